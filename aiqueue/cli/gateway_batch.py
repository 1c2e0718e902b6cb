"""``gateway batch``: the lines of a file are answered, and the answers saved. ``gateway batches`` lists them."""

from __future__ import annotations

import json as jsonlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput
from . import output
from .options import FAILED, Json, ServerOptions
from .output import Column

if TYPE_CHECKING:
    from ..client import Client
    from ..gateway import Batches, RequestBatch

FIRST_BYTES = 32 * 1024 * 1024  # within which the first line must end
PROBLEMS_SHOWN = 10
NO_WORKER = "no gateway worker is running: start `aiqueue work aiqueue.gateway:worker`"


def batch(
    options: ServerOptions,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="Requests, in OpenAI's form: one JSON object a line.")
    ] = None,
    *,
    tenant: Annotated[str, typer.Option(metavar="TENANT", help="Whose requests they are.")],
    resume: Annotated[
        str | None, typer.Option(metavar="BATCH", help="Wait for this batch, in place of a new one for FILE.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="Where answers are saved. Default: beside FILE, as requests.output.jsonl.",
            show_default=False,
        ),
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where errors are saved. Default: beside FILE, as requests.errors.jsonl.",
            show_default=False,
        ),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", metavar="", help="Do not wait for the answers.")] = False,
    json: Json = False,
) -> None:
    """Have each line of a file answered by the gateway within 24 hours, and save the answers.

    A line is {"custom_id", "method": "POST", "url", "body"}, with the url /v1/chat/completions or /v1/embeddings, the
    same in all lines. Workers answer them (aiqueue work aiqueue.gateway:worker), also after Ctrl-C: --resume waits
    again. Lines have the lowest priority, `batch`.

    Exit codes: 0 all lines are answered (stored, with --no-wait), 1 some are not, or the batch is refused.
    """
    if (file is None) == (resume is None):
        problem = "neither FILE nor --resume is" if file is None else "both FILE and --resume are"
        raise BadInput(f"{problem} given: name a FILE for a new batch, or an earlier one with --resume")
    endpoint = "" if file is None else _endpoint_of(file)
    stem = Path(f"{resume}.jsonl") if file is None else file
    places = {"output": to or _beside(stem, "output"), "errors": errors or _beside(stem, "errors")}
    if not no_wait:
        _check_places(file, places)
    known: list[RequestBatch] = []
    try:
        ended, saved = options.run_with_client(
            lambda client: _run(client, file, endpoint, tenant, resume, None if no_wait else places, known)
        )
    except KeyboardInterrupt:
        if known:
            output.print_line(f"\n{known[0].id} goes on; wait for it again with `{_resuming(known[0])}`", err=True)
        raise
    if json:
        output.print_json({**ended.public(), "saved": saved})
    else:
        _print_end(ended, saved)
        if no_wait:
            output.print_line(f"its answers are saved by `{_resuming(ended)}`", err=True)
    if not no_wait and (ended.status != "completed" or ended.failed):
        raise typer.Exit(FAILED)


def batches(
    options: ServerOptions,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only batches of this tenant.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Number of batches, the newest.", min=1)] = 50,
    json: Json = False,
) -> None:
    """List the batches of requests, the newest first: how far each is, and how many of its lines have failed.

    Batches that have ended are listed for as long as their files are kept, for 30 days unless a client says less.
    """

    async def fetch(client: Client) -> list[RequestBatch]:
        from ..gateway import Batches  # noqa: PLC0415

        return await Batches(client).batches(tenant)

    found = options.run_with_client(fetch, reads=True)
    shown = found[:limit]
    if json:
        output.print_json([{**each.public(), "tenant": each.tenant} for each in shown])
    elif not shown:
        output.print_line("no batches" + ("" if tenant is None else f" of tenant {tenant}"))
    else:
        _print_batches(shown)
    if len(found) > len(shown):
        output.print_line(f"{len(found) - len(shown):,} older batches are not shown: raise --limit", err=True)
    elif shown and not json:
        output.print_line(
            "\n`aiqueue gateway batch --resume BATCH --tenant TENANT` waits for one, and saves its answers"
        )


def _print_batches(found: list[RequestBatch]) -> None:
    now = time.time()
    rows = [
        [
            each.id, each.tenant, each.status.replace("_", " "),
            f"{each.ended:,}/{each.total:,}" if each.total else "-", f"{each.failed:,}" if each.failed else "",
            output.format_age(now - each.created_at),
        ]
        for each in found
    ]  # fmt: skip
    columns = [
        Column("batch", style="bold"), Column("tenant", shrink=True), Column("status"),
        Column("lines", right=True), Column("failed", right=True), Column("age", right=True),
    ]  # fmt: skip
    below = [output.escape_controls(each.problems[0].message) if each.problems else "" for each in found]
    output.print_table(columns, rows, below=below)


def _endpoint_of(file: Path) -> str:
    """Return the url of a file's first line, which is that of all. Raises BadInput."""
    from ..gateway import BATCH_ENDPOINTS  # noqa: PLC0415

    try:
        with file.open("rb") as opened:
            line = next((each for each in iter(lambda: opened.readline(FIRST_BYTES), b"") if each.strip()), b"")
    except OSError as error:
        raise BadInput(f"cannot read {str(file)!r}: {error.strerror or error}") from None
    try:
        first = jsonlib.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError):
        first = None
    url = first.get("url") if isinstance(first, dict) else None
    if not line:
        raise BadInput(f"{str(file)!r} is empty: write a request a line, see `aiqueue gateway batch --help`")
    if url not in BATCH_ENDPOINTS:
        problem = f'must be a JSON object whose "url" is one of {", ".join(BATCH_ENDPOINTS)}'
        raise BadInput(f"{str(file)!r}: its first line {problem}, see `aiqueue gateway batch --help`")
    return str(url)


def _check_places(file: Path | None, places: dict[str, Path]) -> None:
    """Refuse places that cannot be written, before any line is paid for. Raises BadInput."""
    for what, place in places.items():
        if place.exists() and not place.is_file():
            raise BadInput(f"cannot write {str(place)!r}: it is not a regular file; choose another --{what}")
        if not os.access(place.parent, os.W_OK | os.X_OK):
            why = "permission denied" if place.parent.is_dir() else "there is no such directory"
            raise BadInput(f"cannot write {str(place)!r}: {why}; choose another --{what}")
    named = [each.resolve() for each in (file, *places.values()) if each is not None]
    if len({*named}) < len(named):
        raise BadInput("FILE, --output and --errors must be different files: one would replace the other")


def _resuming(batch: RequestBatch) -> str:
    return f"aiqueue gateway batch --resume {batch.id} --tenant {batch.tenant}"


def _beside(file: Path, what: str) -> Path:
    return file.with_name(f"{file.name.removesuffix('.jsonl')}.{what}.jsonl")


async def _run(
    client: Client,
    file: Path | None,
    endpoint: str,
    tenant: str,
    resume: str | None,
    places: dict[str, Path] | None,
    known: list[RequestBatch],
) -> tuple[RequestBatch, dict[str, str]]:
    """Create a batch, or find it, and wait for it if there are `places` to save its files at."""
    from ..gateway import Batches, GatewayBatch  # noqa: PLC0415
    from .rag.arguments import is_worker_missing  # noqa: PLC0415

    batches = Batches(client)
    if file is not None:
        stored = await batches.upload(file, tenant=tenant)
        found = await batches.create(stored.id, tenant=tenant, endpoint=endpoint)
    else:
        found = await batches.batch(str(resume), tenant=tenant)
    known.append(found)
    if not found.has_ended and await is_worker_missing(client, GatewayBatch, tenant):
        output.print_line(f"{NO_WORKER}; the batch waits for one", err=True)
    if places is None:
        return found, {}
    with _bar() as draw:
        ended = await batches.wait(found.id, tenant=tenant, progress=draw)
    return ended, await _save(batches, ended, places)


async def _save(batches: Batches, batch: RequestBatch, places: dict[str, Path]) -> dict[str, str]:
    saved = {}
    for what, file_id in (("output", batch.output_file_id), ("errors", batch.error_file_id)):
        if file_id is not None:
            file = await batches.file(file_id, tenant=batch.tenant)
            try:
                saved[what] = str(await batches.content(file).save(places[what]))
            except OSError as error:
                problem = f"cannot write {str(places[what])!r}: {error.strerror or error}"
                raise BadInput(f"{problem}; again with `{_resuming(batch)}`") from None
    return saved


def _print_end(batch: RequestBatch, saved: dict[str, str]) -> None:
    lines = f"{batch.total:,} lines, {batch.completed:,} answered, {batch.failed:,} failed" if batch.total else ""
    output.print_line(f"{batch.id} {batch.status}" + (f": {lines}" if lines else ""))
    output.print_fields([*saved.items()])
    for problem in batch.problems[:PROBLEMS_SHOWN]:
        output.print_line(output.escape_controls(f"  {problem.message}"))
    if len(batch.problems) > PROBLEMS_SHOWN:
        output.print_line(f"  and {len(batch.problems) - PROBLEMS_SHOWN} more")


@contextmanager
def _bar() -> Iterator[Callable[[RequestBatch], None]]:
    """Show on stderr how many lines have ended, on a terminal only. Yields a function that draws a batch."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    columns: list[Any] = [
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"), TimeElapsedColumn(),
    ]  # fmt: skip
    shown = Progress(*columns, console=Console(stderr=True), transient=True)
    started: tuple[float, int] | None = None
    with shown:
        task = shown.add_task("waiting", total=None, note="")

        def draw(batch: RequestBatch) -> None:
            nonlocal started
            if started is None and batch.total:
                started = time.monotonic(), batch.ended
            began_at, began = started or (time.monotonic(), 0)
            rate = (batch.ended - began) / max(time.monotonic() - began_at, 1.0)
            failed = f", {batch.failed:,} failed" if batch.failed else ""
            name = batch.status.replace("_", " ")
            shown.update(
                task, description=name, completed=batch.ended, total=batch.total or None, note=f"{rate:,.0f}/s{failed}"
            )

        yield draw
