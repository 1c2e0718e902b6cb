"""``tail``: follow one job from its start until it ends, or all jobs of a family from now on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput, NotFound
from . import output
from .options import FAILED, Json, ServerOptions, add_command, is_like_family
from .timeline import describe_event, format_timestamp

if TYPE_CHECKING:
    from ..client import Client
    from ..connection import Received
    from ..journal import Entry, StreamItem
    from .json_keys import EntryJson

BUFFERED_MAX = 10_000  # received entries that are not printed yet; further ones are counted and not printed


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "tail",
        examples=("  aiqueue tail 06h0ehe6b82hdkoi8l1epcnf0g", "  aiqueue tail --family agent.tasks --tenant acme"),
    )(tail)


def tail(
    options: ServerOptions,
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Job id. Without it, give --family.")] = None,
    *,
    after: Annotated[
        str | None,
        typer.Option(metavar="CURSOR", help="Start after the entry with this cursor, from the --json output."),
    ] = None,
    family: Annotated[
        str | None,
        typer.Option(metavar="FAMILY", help="Without JOB: follow all jobs of this family. With JOB: its family."),
    ] = None,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only jobs of this tenant.")] = None,
    json: Json = False,
) -> None:
    """Follow a job's output until the job ends. With --family, follow all jobs of a family until Ctrl-C.

    A job is shown from its start; a family is shown from now on. Text chunks are printed as they arrive.

    Exit codes: 0 the job succeeded, 1 the job failed, was cancelled or is not found.
    """
    from .. import subjects  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
    if job is None and family is None:
        raise BadInput("give a job id, or --family to follow all jobs of a family")
    if job is not None and family is None and is_like_family(job):
        raise BadInput(f"{job} is not a job id; to follow a family, run `aiqueue tail --family {job}`")
    if job is not None:
        subjects.job_id(job)
        _tail_job(options, job, after, family, tenant, json)
        return
    if after is not None:
        raise BadInput("--after needs a job id: a family can only be followed from now on")
    assert family is not None
    try:
        options.run_with_client(lambda client: _follow_family(client, family, tenant, json), reads=True)
    except KeyboardInterrupt:
        return  # the normal end of this command


async def _follow_family(client: Client, family: str, tenant: str | None, json: bool) -> None:
    """Print the journal entries of the family's jobs from now on. Never returns."""
    import asyncio  # noqa: PLC0415

    from .. import subjects  # noqa: PLC0415
    from ..journal import LIVE, entry_from_live  # noqa: PLC0415

    declared = client.topology.family(family)
    if declared.journal is None:
        raise BadInput(f"family {family} keeps no journals, so there is nothing to follow")
    received: asyncio.Queue[Received | None] = asyncio.Queue(BUFFERED_MAX)
    dropped = 0

    def on_live(message: Received | None) -> None:
        nonlocal dropped
        try:
            received.put_nowait(message)
        except asyncio.QueueFull:
            dropped += 1

    subject = f"{LIVE}.{declared.journal}.{tenant or '*'}.*"
    subscription = await client.connection.subscribe(subject, on_live)
    off = client.connection.on_regained(lambda: on_live(None))
    try:
        await _require_journal_stream(client)  # its answer also shows that the server has processed the subscription
        output.print_line(f"following {family}{f' of {tenant}' if tenant else ''}; press Ctrl-C to stop", err=True)
        while True:
            message = await received.get()
            if message is None:
                output.print_line("reconnected: entries of the meantime are not shown", err=True)
            else:
                entry_tenant, job_id = subjects.parse_journal(message.subject)
                _print_entry(entry_from_live(message).masked(), family, entry_tenant, job_id, json)
            if dropped and received.empty():
                skipped = output.format_count(dropped, "entry", "entries")
                output.print_line(f"{skipped} not shown: too many at once", err=True)
                dropped = 0
    finally:
        off()
        await subscription.close()


async def _require_journal_stream(client: Client) -> None:
    """Raises NotFound if the stream of journals does not exist."""
    stream = client.topology.journal_stream.name
    try:
        await client.connection.api(f"STREAM.INFO.{stream}")
    except NotFound:
        raise NotFound(f"stream {stream} does not exist: run `aiqueue apply`") from None


def _print_entry(entry: Entry, family: str, tenant: str, job_id: str, json: bool) -> None:
    """Print one entry of a family on one line."""
    if json:
        output.print_json(_as_dict(entry, family=family, tenant=tenant, job_id=job_id), lines=True)
        return
    from ..inspect import event_of  # noqa: PLC0415

    is_chunk = entry.event == "chunk"
    text = " ".join(_chunk_texts(entry.data)) if is_chunk else describe_event(event_of(entry))
    line = f"{format_timestamp(entry.time)} {tenant}/{job_id} {_format_event(entry)}{':' if text else ''} {text}"
    output.print_line(output.truncate(line, output.terminal_width()))


def _format_event(entry: Entry | StreamItem) -> str:
    from ..inspect import event_of  # noqa: PLC0415

    event = entry.event if entry.event == "chunk" else event_of(entry).event
    return f"{event} (attempt {entry.attempt})" if entry.attempt > 1 else event


def _chunk_texts(chunks: Any) -> list[str]:
    found = chunks if isinstance(chunks, list) else [chunks]
    return [each if isinstance(each, str) else output.format_json(each, short=True) for each in found]


def _as_dict(entry: Entry | StreamItem, *, family: str, tenant: str, job_id: str) -> EntryJson:
    return {
        "family": family, "tenant": tenant, "job_id": job_id,
        "event": entry.event, "attempt": entry.attempt, "run": entry.run, "time": entry.time, "data": entry.data,
        "final": entry.final,
    }  # fmt: skip


class _JobPrinter:
    """Prints the entries of one job: text chunks as they are, everything else on lines of its own."""

    def __init__(self) -> None:
        self._in_line = False  # the last text chunk did not end with a newline

    def print(self, entry: StreamItem) -> None:
        if entry.event == "chunk" and isinstance(entry.data, str):
            text = output.escape_controls(entry.data)
            self._in_line = not text.endswith("\n") if text else self._in_line
            output.write(text)
        elif entry.event == "chunk":
            self._print_line(output.format_json(entry.data, short=True))
        elif entry.event == "restart":
            why = output.escape_controls(str(entry.data.get("why") or "the previous attempt was lost"))
            notice = f"-- restarted (attempt {entry.attempt}): {why}; discard the output above"
            self._print_line(output.apply_style(notice, "yellow"))
        elif entry.event == "gap":
            chunks = entry.data.get("chunks")
            missing = output.format_count(chunks, "chunk is", "chunks are") if chunks else "some output is"
            self._print_line(output.apply_style(f"-- gap: {missing} missing here (expired or not stored)", "yellow"))
        else:
            from ..inspect import event_of  # noqa: PLC0415

            text = ": ".join(part for part in (_format_event(entry), describe_event(event_of(entry))) if part)
            line = f"-- {format_timestamp(entry.time)} {output.escape_controls(text)}"
            self._print_line(output.apply_style(line, "dim"))

    def _print_line(self, text: str) -> None:
        output.print_line(f"\n{text}" if self._in_line else text)
        self._in_line = False


def _tail_job(
    options: ServerOptions, job: str, after: str | None, family: str | None, tenant: str | None, json: bool
) -> None:
    """Print the entries of one job until it ends. Raises typer.Exit if it failed or was cancelled."""
    printer = _JobPrinter()
    last: StreamItem | None = None

    async def follow(client: Client) -> None:
        nonlocal last
        handle = await client.job(job, family=family, tenant=tenant)
        async with contextlib.aclosing(handle.stream(after=after)) as items:
            async for shown in items:
                item = shown.masked()
                if json:
                    told = _as_dict(item, family=handle.family, tenant=handle.tenant, job_id=handle.id)
                    output.print_json(told | {"cursor": item.cursor}, lines=True)
                else:
                    printer.print(item)
                last = item

    try:
        options.run_with_client(follow, reads=True)
    except KeyboardInterrupt:
        if last is not None and not json:
            given = (("family", family), ("tenant", tenant))
            narrowed = "".join(f" --{name} {value}" for name, value in given if value)
            output.print_line(f"\nto continue: aiqueue tail {job}{narrowed} --after {last.cursor}", err=True)
        raise
    if last is not None and last.event in ("failed", "cancelled"):
        raise typer.Exit(FAILED)
