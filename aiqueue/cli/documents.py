"""``documents``: put, list, get, delete and collect large bytes that jobs refer to."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BadInput
from ..units import short_size
from . import output
from .options import Json, Where, duration, verb
from .output import Column

if TYPE_CHECKING:
    from ..client import Client
    from ..document_ref import Document
    from ..documents import Collected, Listed

app = typer.Typer(no_args_is_help=True, help="Large bytes that jobs refer to: put, list, get, delete, collect.")

Tenant = Annotated[str, typer.Option(help="Whose document it is.")]
Sha = Annotated[str, typer.Argument(metavar="SHA256", help="Its hash, as `documents ls` shows it.")]


def put(
    where: Where,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="The file, or stdin.")],
    *,
    tenant: Tenant,
    name: Annotated[str | None, typer.Option(help="What to call it. Default: the file's name.")] = None,
    content_type: Annotated[str, typer.Option(help="Such as application/pdf.")] = "",
    keep: Annotated[
        float, typer.Option(parser=duration, metavar="DURATION", help="For how long at least, if no job holds it.")
    ] = "7d",  # type: ignore[assignment]  # typer gives defaults to the parser too
    json: Json = False,
) -> None:
    """Store a file, and say the hash under which jobs refer to it."""
    called = name if name is not None else "" if file == "-" else Path(file).name

    async def work(client: Client) -> Document:
        source = sys.stdin.buffer if file == "-" else file
        return await client.documents.put(source, tenant=tenant, name=called, content_type=content_type, keep=keep)

    document = where.drive(work)
    if json:
        output.say_json(document.model_dump())
    else:
        output.say(f"{document.sha256}  {short_size(document.size)} of {tenant}")


def ls(
    where: Where,
    *,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    limit: Annotated[int, typer.Option(help="How many to show.", min=1)] = 100,
    json: Json = False,
) -> None:
    """List documents, the least recently used first."""

    async def look(client: Client) -> list[Listed]:
        found = []
        async for each in client.documents.find(tenant):
            found.append(each)
            if len(found) > limit:
                break
        return found

    found = where.drive(look)
    more, found = len(found) > limit, found[:limit]
    if json:
        output.say_json([each.summary() for each in found])
    elif not found:
        output.say("no documents" if tenant is None else f"no documents of {tenant}")
    else:
        now = time.time()
        rows = [
            [each.document.sha256, each.document.tenant, short_size(each.document.size),
             output.age(now - each.touched_at), f"{each.jobs}", each.document.name]
            for each in found
        ]  # fmt: skip
        columns = [
            Column("sha256", style="bold"), Column("tenant"), Column("size", right=True), Column("used", right=True),
            Column("jobs", right=True), Column("name", shrink=True),
        ]  # fmt: skip
        output.table(columns, rows)
    if more:
        output.say(f"there are more than {limit:,}: filter, or raise --limit", err=True)


def get(
    where: Where,
    sha256: Sha,
    *,
    tenant: Tenant,
    out: Annotated[Path | None, typer.Option("--output", "-o", help="The file. Default: stdout.")] = None,
) -> None:
    """Read a document, verified: into a file, which is then whole or not there, or to stdout."""

    async def work(client: Client) -> None:
        chunks = client.documents.open(await client.documents.get(sha256, tenant=tenant))
        if out is None:
            async for chunk in chunks:
                sys.stdout.buffer.write(chunk)
            return
        try:
            await chunks.save(out)
        except OSError as error:
            raise BadInput(f"cannot write {str(out)!r}: {error.strerror or error}") from None

    where.drive(work)


def rm(where: Where, sha256: Sha, *, tenant: Tenant) -> None:
    """Delete a document; one that a job still needs goes when that job has ended."""

    async def work(client: Client) -> bool:
        return await client.documents.forget(await client.documents.get(sha256, tenant=tenant))

    gone = where.drive(work)
    output.say("deleted" if gone else "a job needs it still: it is deleted when no job does")


def collect(
    where: Where,
    *,
    grace: Annotated[
        float, typer.Option(parser=duration, metavar="AGE", help="What was used within this time is left alone.")
    ] = "10m",  # type: ignore[assignment]  # typer gives defaults to the parser too
    json: Json = False,
) -> None:
    """Delete what no job needs. Workers do this by themselves every ten minutes."""

    async def work(client: Client) -> Collected:
        from ..documents import Collector  # noqa: PLC0415

        return await Collector(client.connection, client.topology).collect(grace_s=grace)

    done = where.drive(work)
    if json:
        output.say_json(vars(done))
        return
    output.say(
        f"{output.count(done.documents, 'document')} ({short_size(done.size_bytes)}) deleted, "
        f"{output.count(done.uploads, 'dead upload')}, {output.count(done.holds, 'hold')} of jobs that are no more"
    )


for each in (put, ls, get, rm, collect):
    verb(app, each.__name__)(each)
