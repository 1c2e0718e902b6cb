"""``tail``: what one job says, from its beginning until it ends; or what all jobs of a family say from now on."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput, NotFound
from . import output
from .options import FAILED, Json, Where, verb
from .steps import moment, says

if TYPE_CHECKING:
    from ..client import Client
    from ..connection import Received
    from ..journal import Entry, StreamItem

BEHIND_MAX = 10_000  # entries that have come in and are not written yet: those above are counted, and not shown


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "tail")(tail)


def tail(
    where: Where,
    job: Annotated[str | None, typer.Argument(metavar="JOB", help="Its id; or none, with --family.")] = None,
    *,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Go on behind an entry, as --json has told it.")
    ] = None,
    family: Annotated[str | None, typer.Option(help="Without JOB: of which family's jobs; else where JOB is.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    json: Json = False,
) -> None:
    """Follow a job until it ends, or, from now on, all jobs of a family until Ctrl-C.

    Chunks of text are written as they come. Exit code 1 where the job failed or was cancelled.
    """
    from .. import subjects  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
    if job is None and family is None:
        raise BadInput("name a job, or a --family whose jobs are to be followed")
    if job is not None and family is None and "." in job:
        raise BadInput(f"{job} is no job's id; for all jobs of a family: `aiqueue tail --family {job}`")
    if job is not None:
        subjects.token("job id", job)
        _tail_job(where, job, after, family, tenant, json)
        return
    if after is not None:
        raise BadInput("--after is for one job: a family is followed from now on")
    assert family is not None
    try:
        where.drive(lambda client: _follow_family(client, family, tenant, json))
    except KeyboardInterrupt:
        return  # which is how it ends


async def _follow_family(client: Client, family: str, tenant: str | None, json: bool) -> None:
    """Write what the jobs of a family say from now on, and never end."""
    import asyncio  # noqa: PLC0415

    from ..journal import LIVE, heard  # noqa: PLC0415

    declared = client.topology.family(family)
    if declared.journal is None:
        raise BadInput(f"family {family} keeps no journals: there is nothing to follow")
    arrived: asyncio.Queue[Received | None] = asyncio.Queue(BEHIND_MAX)
    missed = 0

    def on_live(message: Received | None) -> None:
        nonlocal missed
        try:
            arrived.put_nowait(message)
        except asyncio.QueueFull:
            missed += 1

    subject = f"{LIVE}.{declared.journal}.{tenant or '*'}.*"
    subscription = await client.connection.subscribe(subject, on_live)
    off = client.connection.on_regained(lambda: on_live(None))
    try:
        await _see(client)  # whose answer comes when the server has heard of the subscription
        output.say(f"following {family}{f' of {tenant}' if tenant else ''}; Ctrl-C ends it", err=True)
        while True:
            message = await arrived.get()
            if message is None:
                output.say("the link was lost: what was said meanwhile is not here", err=True)
            else:
                *_, whose, job_id = message.subject.split(".")
                _say_entry(heard(message), family, whose, job_id, json)
            if missed and arrived.empty():
                output.say(f"{output.count(missed, 'entry was', 'entries were')} not shown: too many at once", err=True)
                missed = 0
    finally:
        off()
        await subscription.close()


async def _see(client: Client) -> None:
    """Raises NotFound where there is no stream of journals."""
    stream = client.topology.journal_stream.name
    try:
        await client.connection.api(f"STREAM.INFO.{stream}")
    except NotFound:
        raise NotFound(f"stream {stream} is missing: `aiqueue apply` makes it") from None


def _say_entry(entry: Entry, family: str, tenant: str, job_id: str, json: bool) -> None:
    if json:
        told = {"family": family, "tenant": tenant, "job_id": job_id, **_plain(entry)}
        output.say_json(told, lines=True)
        return
    from ..inspect import step_of  # noqa: PLC0415

    chunk = entry.event == "chunk"
    said = " ".join(_texts(entry.data)) if chunk else says(step_of(entry))
    line = f"{moment(entry.time)} {tenant}/{job_id} {_event(entry)}{':' if said else ''} {said}"
    output.say(output.cut(line, output.width()))


def _event(entry: Entry | StreamItem) -> str:
    from ..inspect import step_of  # noqa: PLC0415

    event = entry.event if entry.event == "chunk" else step_of(entry).event
    return f"{event} (attempt {entry.attempt})" if entry.attempt > 1 else event


def _texts(chunks: Any) -> list[str]:
    found = chunks if isinstance(chunks, list) else [chunks]
    return [each if isinstance(each, str) else output.pretty(each, short=True) for each in found]


def _plain(entry: Entry | StreamItem) -> dict[str, Any]:
    return {
        "event": entry.event, "attempt": entry.attempt, "run": entry.run, "time": entry.time, "data": entry.data,
        "final": entry.final,
    }  # fmt: skip


class _Teller:
    """Writes what one job says: chunks of text as they are, everything else on lines of its own."""

    def __init__(self) -> None:
        self._within = False  # a line of text has begun

    def tell(self, entry: StreamItem) -> None:
        if entry.event == "chunk" and isinstance(entry.data, str):
            text = output.clean(entry.data)
            self._within = not text.endswith("\n") if text else self._within
            sys.stdout.write(text)
            sys.stdout.flush()
        elif entry.event == "chunk":
            self._line(output.pretty(entry.data, short=True))
        elif entry.event == "restart":
            why = output.clean(str(entry.data.get("why", "")))
            said = f"-- restart: attempt {entry.attempt} begins anew, what stands above is void"
            self._line(output.styled(f"{said} ({why})" if why else said, "yellow"))
        elif entry.event == "gap":
            chunks = entry.data.get("chunks")
            said = output.count(chunks, "chunk is", "chunks are") if chunks else "something is"
            self._line(output.styled(f"-- gap: {said} missing here, expired or never kept", "yellow"))
        else:
            from ..inspect import step_of  # noqa: PLC0415

            told = ": ".join(part for part in (_event(entry), says(step_of(entry))) if part)
            self._line(output.styled(f"-- {moment(entry.time)} {output.clean(told)}", "dim"))

    def _line(self, text: str) -> None:
        output.say(f"\n{text}" if self._within else text)
        self._within = False


def _tail_job(where: Where, job: str, after: str | None, family: str | None, tenant: str | None, json: bool) -> None:
    teller = _Teller()
    last: StreamItem | None = None

    async def follow(client: Client) -> None:
        nonlocal last
        handle = await client.job(job, family=family, tenant=tenant)
        name = {"family": handle.family, "tenant": handle.tenant, "job_id": handle.id}
        async with contextlib.aclosing(handle.stream(after=after)) as items:
            async for item in items:
                if json:
                    output.say_json({**name, **_plain(item), "cursor": item.cursor}, lines=True)
                else:
                    teller.tell(item)
                last = item

    try:
        where.drive(follow)
    except KeyboardInterrupt:
        if last is not None and not json:
            narrowed = "".join(f" --{name} {word}" for name, word in (("family", family), ("tenant", tenant)) if word)
            output.say(f"\nto go on: aiqueue tail {job}{narrowed} --after {last.cursor}", err=True)
        raise
    if last is not None and last.event in ("failed", "cancelled"):
        raise typer.Exit(FAILED)
