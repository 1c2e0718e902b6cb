"""``rag reindex``: all chunks of a tenant are embedded anew, or one document is read again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import output
from ..audit import run_counted
from ..options import FAILED, Json, ServerOptions, duration_option, print_error
from .arguments import NO_WORKER, NoWait, Tenant, is_worker_missing, parse_document_id

if TYPE_CHECKING:
    from ...client import Client


def reindex(
    options: ServerOptions,
    document_id: Annotated[
        str | None,
        typer.Argument(
            metavar="ID",
            parser=parse_document_id,
            help="Read this document again, from its path or URL. Default: embed all anew.",
        ),
    ] = None,
    *,
    tenant: Tenant,
    no_wait: NoWait = False,
    timeout: Annotated[
        float,
        duration_option("How long to wait."),
    ] = "1h",  # type: ignore[assignment]  # typer passes defaults to the parser too
    json: Json = False,
) -> None:
    """Embed all chunks of a tenant anew, as after a change of the embedder in rag.toml; restart the workers first.

    Exit codes: 0 done (stored as a job, with --no-wait), 1 failed or not done in time.
    """

    async def run(client: Client) -> dict[str, Any]:
        from ...rag import Rag, RagReindex  # noqa: PLC0415

        if await is_worker_missing(client, RagReindex, tenant):
            output.print_line(f"{NO_WORKER}; the job waits for one", err=True)
        handle = await Rag(client).reindex(tenant=tenant, document_id=document_id)
        if no_wait:
            return {"job_id": handle.id}
        return {"job_id": handle.id, **await handle.result(timeout)}

    found = run_counted(options, "rag.reindex", {"tenant": tenant, "document": document_id}, run, creates=True)
    if json:
        output.print_json(found)
    elif no_wait:
        output.print_line(f"enqueued {found['job_id']}")
    elif document_id is not None and found.get("state") != "failed":
        chunks = output.format_count(found.get("chunks") or 0, "chunk")
        output.print_line(output.escape_controls(f"{document_id}: {found.get('state')}, {chunks}"))
    elif document_id is None:
        counts = [output.format_count(found.get(each) or 0, each[:-1]) for each in ("documents", "chunks")]
        embedded = found.get("embedded") or 0
        did = f"{embedded:,} embedded" if embedded else "nothing to embed: all vectors are"
        if not found.get("chunks"):
            output.print_line(f"nothing to embed: tenant {tenant} has no documents")
            return
        output.print_line(f"{', '.join(counts)}, {did} by {found.get('embedder')}")
    if found.get("state") == "failed":
        print_error(f"{document_id}: {'; '.join(found.get('problems') or ())}")
        raise typer.Exit(FAILED)
