"""``documents``: put, list, get, delete and collect documents, the large files that jobs refer to."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from ..errors import BadInput
from ..units import short_duration, short_size
from . import output
from .audit import run_audited, run_counted
from .options import Json, ServerOptions, add_command, duration_option
from .output import Column

if TYPE_CHECKING:
    from ..client import AuditedAct, Client
    from ..documents import Collected
    from ..payload import Document

app = typer.Typer(no_args_is_help=True, help="Put, list, get and delete documents (large files that jobs refer to).")

Tenant = Annotated[str, typer.Option(metavar="TENANT", help="Tenant that owns the document.")]
Sha = Annotated[str, typer.Argument(metavar="SHA256", help="Hash of the document, from `documents ls`.")]


def put(
    options: ServerOptions,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="File to store, or - for stdin.")],
    *,
    tenant: Tenant,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Document name. Default: the file's name.")] = None,
    content_type: Annotated[str, typer.Option(metavar="TYPE", help="Media type, such as application/pdf.")] = "",
    keep: Annotated[
        float,
        duration_option("Keep the document at least this long, even if no job refers to it."),
    ] = "7d",  # type: ignore[assignment]  # typer passes defaults to the parser too
    json: Json = False,
) -> None:
    """Store a file and print its SHA-256 hash, by which jobs refer to it."""
    document_name = name if name is not None else "" if file == "-" else Path(file).name

    source: str | bytes | BinaryIO = sys.stdin.buffer if file == "-" else file
    if file == "-" and sys.stdin.isatty():
        output.print_line("reading from the terminal; Ctrl-D ends the input", err=True)
        source = sys.stdin.buffer.read()  # in chunks, each end of one would take a Ctrl-D

    async def store(client: Client, audited: AuditedAct) -> Document:
        stored = await client.documents.put(
            source, tenant=tenant, name=document_name, content_type=content_type, keep=keep
        )
        audited.count, audited.details = 1, {"document": stored.sha256, "size_bytes": stored.size}
        return stored

    document = run_audited(options, "documents.put", {"name": document_name, "tenant": tenant}, store, creates=True)
    if json:
        output.print_json(document.model_dump())
    else:
        output.print_line(f"{document.sha256}  {short_size(document.size)} of {tenant}")


def ls(
    options: ServerOptions,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only documents of this tenant.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Maximum number to list.", min=1)] = 100,
    json: Json = False,
) -> None:
    """List documents, least recently used first."""
    found, more = options.list_with_client(lambda client: client.documents.find(tenant), limit)
    if json:
        output.print_json([each.summary() for each in found])
    elif not found:
        output.print_line("no documents" if tenant is None else f"no documents of {tenant}")
    else:
        now = time.time()
        rows = [
            [each.document.sha256, each.document.tenant, short_size(each.document.size),
             output.format_age(now - each.touched_at), f"{each.jobs}", f"{each.results}", f"{each.steps}",
             each.document.name]
            for each in found
        ]  # fmt: skip
        columns = [
            Column("sha256", style="bold"), Column("tenant"), Column("size", right=True),
            Column("last used", right=True), Column("jobs", right=True), Column("results", right=True),
            Column("steps", right=True),
            Column("name", shrink=True),
        ]  # fmt: skip
        output.print_table(columns, rows)
    if more:
        output.print_line(f"more than {limit:,} documents: add --tenant or raise --limit", err=True)


def get(
    options: ServerOptions,
    sha256: Sha,
    *,
    tenant: Tenant,
    out: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write. Default: stdout.")
    ] = None,
) -> None:
    """Download a document and verify its hash.

    With --output, the file appears when the whole document was downloaded and verified.
    """

    async def download(client: Client) -> None:
        chunks = client.documents.open(await client.documents.get(sha256, tenant=tenant))
        if out is None:
            async for chunk in chunks:
                output.write(chunk)
            return
        try:
            await chunks.save(out)
        except OSError as error:
            raise BadInput(f"cannot write {str(out)!r}: {error.strerror or error}") from None

    options.run_with_client(download, reads=True)


def rm(options: ServerOptions, sha256: Sha, *, tenant: Tenant) -> None:
    """Delete a document.

    The bytes are deleted when no job and no dead letter needs the document any more.
    """

    async def forget(client: Client) -> bool:
        return await client.documents.forget(await client.documents.get(sha256, tenant=tenant))

    deleted = run_counted(options, "documents.rm", {"document": sha256, "tenant": tenant}, forget, int)
    output.print_line(
        "deleted" if deleted else "a job, a result or a step still needs it: it will be deleted when none does"
    )


def collect(
    options: ServerOptions,
    *,
    grace: Annotated[
        float,
        duration_option("Keep documents that were used in the last AGE.", metavar="AGE"),
    ] = "10m",  # type: ignore[assignment]  # typer passes defaults to the parser too
    json: Json = False,
) -> None:
    """Delete documents that no job needs.

    Workers do this automatically every ten minutes.
    """

    async def run_collector(client: Client, audited: AuditedAct) -> Collected:
        from ..documents import Collector  # noqa: PLC0415

        found = await Collector(client.connection, client.topology).collect(grace_s=grace)
        audited.count = found.documents
        audited.details = {name: value for name, value in vars(found).items() if name != "documents"}
        return found

    collected = run_audited(options, "documents.collect", {"grace": short_duration(grace)}, run_collector)
    if json:
        output.print_json(vars(collected))
        return
    output.print_line(
        f"deleted {output.format_count(collected.documents, 'document')} ({short_size(collected.size_bytes)}), "
        f"{output.format_count(collected.uploads, 'incomplete upload')} and "
        f"{output.format_count(collected.holds, 'hold')} of jobs that no longer exist"
    )


add_command(app, "put", examples=("  aiqueue documents put report.pdf --tenant acme",))(put)
for each in (ls, get, rm, collect):
    add_command(app, each.__name__)(each)
