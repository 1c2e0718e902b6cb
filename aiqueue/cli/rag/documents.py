"""``rag status``, ``ls``, ``rm`` and ``stats``: what is known of documents, and deleting them."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import JobFailed, NotFound, ResultTimeout
from ...units import short_size
from .. import output
from ..audit import run_counted
from ..options import FAILED, Json, ServerOptions, duration_option, print_error
from ..output import Column
from .arguments import NO_WORKER, DocumentId, NoWait, Tenant, is_worker_missing, parse_document_id
from .opened_store import run_with_store

if TYPE_CHECKING:
    from ...client import Client
    from ...rag import DocumentState, StoreStats, VectorStore
    from ..json_keys import DeletedDocumentJson

PAGE = 1_000


def status(
    options: ServerOptions,
    document_id: DocumentId,
    *,
    tenant: Tenant,
    json: Json = False,
) -> None:
    """Show what has become of a document: its newest version, its state, and chunks done of total. A worker answers.

    Exit codes: 0 known; 1 nothing is known of it, its newest version failed, or no worker answers.
    """

    async def fetch(client: Client) -> DocumentState | None:
        from ...rag import Rag  # noqa: PLC0415

        try:
            return await Rag(client).status(document_id, tenant=tenant)
        except NotFound:
            return None

    found = options.run_with_client(fetch, reads=True)
    if json:
        output.print_json(None if found is None else asdict(found))
    elif found is None:
        print_error(f"{tenant} has no document {document_id[:200]!r}; see `aiqueue rag ls --tenant {tenant}`")
    else:
        _print_state(found)
    if found is None or found.state == "failed":
        raise typer.Exit(FAILED)


def _print_state(found: DocumentState) -> None:
    from ...rag import time_of  # noqa: PLC0415

    indexed = found.indexed_version
    former = "" if indexed in (None, found.version) else f"version of {output.format_time(time_of(indexed or 0))}"
    output.print_fields(
        [
            ("document", " ".join(found.document_id.split())),
            ("state", found.state.replace("_", " ") + (f": {found.reason}" if found.reason else "")),
            ("stage", f"{found.stage} {_progress(found)}".strip() if found.state == "working" else ""),
            ("version", output.format_time(time_of(found.version)) if found.version else ""),
            ("found by questions", former or ("nothing" if indexed is None else "this version")),
            ("chunks", f"{found.chunks:,}" if found.chunks else ""),
            ("title", found.title),
            ("source", found.source),
            ("metadata", output.format_json(dict(found.metadata), short=True) if found.metadata else ""),
            *(("problem", each) for each in found.problems),
        ]
    )


def _progress(found: DocumentState) -> str:
    return f"{found.done:,} of {found.total:,} chunks" if found.total else ""


def ls(
    options: ServerOptions,
    *,
    tenant: Tenant,
    failed: Annotated[bool, typer.Option("--failed", metavar="", help="Only those that failed.")] = False,
    limit: Annotated[int, typer.Option(metavar="N", help="Maximum number to list.", min=1)] = 1_000,
    json: Json = False,
) -> None:
    """List a tenant's documents, by their ids. Reads the store, so it runs where the store is."""

    async def fetch(store: VectorStore) -> tuple[list[DocumentState], bool]:
        found: list[DocumentState] = []
        after = ""
        while page := await store.documents(tenant, after=after, limit=PAGE):
            after = page[-1].document_id
            found += [each for each in page if not failed or each.state == "failed"]
            if len(found) > limit:
                return found[:limit], True
        return found, False

    found, more = run_with_store(options, tenant, fetch)
    if json:
        output.print_json([asdict(each) for each in found])
        return
    if not found:
        output.print_line(f"no {'failed ' if failed else ''}documents of {tenant}")
        return
    columns = [
        Column("document", shrink=True), Column("state"), Column("chunks", right=True), Column("changed", right=True),
        Column("title", shrink=True, prose=True),
    ]  # fmt: skip
    output.print_table(columns, [_row(each) for each in found], below=[_below(each) for each in found])
    if more:
        output.print_line(f"only the first {limit:,}: --limit lists more")


def _row(found: DocumentState) -> list[str]:
    state = found.state.replace("_", " ") + (f" {found.done}/{found.total}" if found.state == "working" else "")
    age = output.format_age(time.time() - found.updated_at) if found.updated_at else "-"
    return [found.document_id, state, f"{found.chunks:,}", age, found.title]


def _below(found: DocumentState) -> str:
    from ...rag import CANNOT_BE_READ  # noqa: PLC0415

    return "; ".join(each for each in (found.reason.removeprefix(CANNOT_BE_READ), *found.problems) if each)


def rm(
    options: ServerOptions,
    document_ids: Annotated[
        list[str], typer.Argument(metavar="ID...", parser=parse_document_id, help="Ids of documents, from `rag ls`.")
    ],
    *,
    tenant: Tenant,
    no_wait: NoWait = False,
    timeout: Annotated[
        float,
        duration_option("How long to wait for each."),
    ] = "1m",  # type: ignore[assignment]  # typer passes defaults to the parser too
    json: Json = False,
) -> None:
    """Delete documents: all versions that were stored before. Deleting what is not known is no failure.

    Exit codes: 0 deleted (stored as jobs, with --no-wait); 1 some were not deleted in time.
    """

    async def delete(client: Client) -> list[DeletedDocumentJson]:
        from ...rag import Rag, RagDelete  # noqa: PLC0415

        if await is_worker_missing(client, RagDelete, tenant):
            output.print_line(f"{NO_WORKER}; the deletions wait for one", err=True)
        handles = [await Rag(client).delete(each, tenant=tenant) for each in document_ids]
        found: list[DeletedDocumentJson] = []
        for document_id, handle in zip(document_ids, handles, strict=True):
            told: DeletedDocumentJson = {"document_id": document_id, "job_id": handle.id}
            if not no_wait:
                try:
                    told["state"] = (await handle.result(timeout))["state"]
                except (JobFailed, ResultTimeout) as error:
                    told["error"] = str(error)
            found.append(told)
        return found

    target = {"tenant": tenant, "documents": document_ids}
    found = run_counted(options, "rag.rm", target, delete, len, creates=True)
    if json:
        output.print_json(found)
    for each in found:
        if "error" in each:
            print_error(f"{each['document_id']}: {each['error']}")
        elif not json:
            done = "deletion enqueued" if no_wait else "deleted"
            output.print_line(output.escape_controls(f"{done}  {each['document_id']}"))
    if any("error" in each for each in found):
        raise typer.Exit(FAILED)


def stats(options: ServerOptions, *, tenant: Tenant, json: Json = False) -> None:
    """Show how many documents and chunks a tenant has, and by which embedder. Runs where the store is."""

    async def fetch(store: VectorStore) -> StoreStats:
        return await store.stats(tenant)

    found = run_with_store(options, tenant, fetch)
    if json:
        output.print_json(asdict(found))
        return
    embedder = f"{found.embedder}, {found.dimensions} dimensions" if found.embedder else ""
    output.print_fields(
        [
            ("documents", f"{found.documents:,}"), ("chunks", f"{found.chunks:,}"), ("failed", f"{found.failed:,}"),
            ("deleted", f"{found.deleted:,}"), ("size", short_size(found.bytes)), ("embedder", embedder),
        ]
    )  # fmt: skip
