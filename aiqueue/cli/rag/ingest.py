"""``rag ingest``: files become documents, by jobs in the queue."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import AIQueueError, BadInput
from .. import output
from ..options import FAILED, Json, ServerOptions, duration_option
from .arguments import (
    NO_WORKER,
    ByPath,
    Exclude,
    Glob,
    Metadata,
    NoWait,
    Tenant,
    is_worker_missing,
    parse_metadata,
    parse_place,
)
from .files import FoundFile, Patterns, find_files
from .pipeline import IngestOrder, IngestTotals, bar, ingest_files, print_totals

if TYPE_CHECKING:
    from ...client import Client

DRAW_EVERY_S = 0.1


def ingest(  # noqa: PLR0913  (the options of what is ingested)
    options: ServerOptions,
    places: Annotated[
        list[Path],
        typer.Argument(metavar="DIR|FILE...", parser=parse_place, help="Directories and files to ingest."),
    ],
    *,
    tenant: Tenant,
    glob: Glob = None,
    exclude: Exclude = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            parser=parse_place,
            help="Directory that ids are relative to. Default: each DIR.",
            show_default=False,
        ),
    ] = None,
    metadata: Metadata = None,
    by_path: ByPath = False,
    priority: Annotated[str, typer.Option(metavar="PRIORITY", help="high, normal or low.")] = "normal",
    no_wait: NoWait = False,
    timeout: Annotated[
        float,
        duration_option("How long to wait for each document."),
    ] = "10m",  # type: ignore[assignment]  # typer passes defaults to the parser too
    json: Json = False,
) -> None:
    """Ingest files: read them here, up to 64 MiB each, and have workers parse, chunk, embed and index them.

    A document's id is its path relative to DIR, such as guide/setup.md. A file that is ingested again is a new version,
    and replaces the former one. Hidden files are passed over. A worker is needed: aiqueue work aiqueue.rag:worker

    With --by-path only paths are sent, and workers read the files, up to 256 MiB each: on this host, below a directory
    that rag.toml lists in the tenant's `roots`. `rag reindex ID` can then read a file again.

    Exit codes: 0 all are indexed (stored, with --no-wait), also those with errors; 1 some failed.
    """
    totals = IngestTotals()
    order_metadata = parse_metadata(metadata)
    files = find_files(places, Patterns(glob or (), exclude or ()), base, totals.fail)
    if not files and not totals.failed:
        left_out = "hidden files" + (", and what --glob and --exclude leave out," if glob or exclude else "")
        raise BadInput(
            f"no file to ingest in {', '.join(repr(str(each)) for each in places)}: {left_out} are passed over"
        )
    order = IngestOrder(tenant, order_metadata, priority, None if no_wait else timeout, by_path)
    totals.found = len(files) + len(totals.failed)
    try:
        options.run_with_client(lambda client: _run(client, files, order, totals))
    except AIQueueError:
        if totals.stored:
            stored = output.format_count(totals.stored, "document")
            output.print_line(f"{stored} enqueued before this error:", err=True)
        raise
    except KeyboardInterrupt:
        if totals.stored:
            stored = output.format_count(totals.stored, "document")
            output.print_line(f"\n{stored} enqueued; workers go on with them", err=True)
        raise
    if json:
        output.print_json(totals.as_data())
    else:
        print_totals(totals, waited=not no_wait)
    if totals.failed:
        raise typer.Exit(FAILED)


async def _run(client: Client, files: list[FoundFile], order: IngestOrder, totals: IngestTotals) -> None:
    import asyncio  # noqa: PLC0415

    from ...rag import RagDocument  # noqa: PLC0415
    from ...subjects import token  # noqa: PLC0415

    token("tenant", order.tenant)  # once, and not for each document
    family = client.topology.family(RagDocument.aiq_family)
    if order.priority not in family.priorities:
        raise BadInput(f"there is no priority {order.priority!r}: use one of {', '.join(family.priorities)}")
    if await is_worker_missing(client, RagDocument, order.tenant):
        waits = "the documents wait" if order.wait_s is None else "this command waits"
        output.print_line(f"{NO_WORKER}; {waits} for one", err=True)
    with bar(totals) as draw:
        drawing = asyncio.create_task(_draw(draw))
        try:
            await ingest_files(client, files, order, totals)
        finally:
            drawing.cancel()


async def _draw(draw: object) -> None:
    import asyncio  # noqa: PLC0415

    assert callable(draw)
    while True:
        draw()
        await asyncio.sleep(DRAW_EVERY_S)
