"""``tail``: what the jobs of a family say, from now on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput, NotFound
from . import output
from .options import Json, Where, verb
from .steps import moment, says

if TYPE_CHECKING:
    from ..client import Client
    from ..connection import Received
    from ..journal import Entry

BEHIND_MAX = 10_000  # entries that have come in and are not written yet: those above are counted, and not shown


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "tail")(tail)


def tail(
    where: Where,
    *,
    family: Annotated[str, typer.Option(help="Of which family's jobs.")],
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's.")] = None,
    json: Json = False,
) -> None:
    """Show what all jobs of a family say, from now on until Ctrl-C: progress, retries, results, failures."""
    from .. import subjects  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
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
    from ..timeline import step_of  # noqa: PLC0415

    chunk = entry.event == "chunk"
    said = " ".join(_texts(entry.data)) if chunk else says(step_of(entry))
    line = f"{moment(entry.time)} {tenant}/{job_id} {_event(entry)}{':' if said else ''} {said}"
    output.say(output.cut(line, output.width()))


def _event(entry: Any) -> str:
    from ..timeline import step_of  # noqa: PLC0415

    event = entry.event if entry.event == "chunk" else step_of(entry).event
    return f"{event} (attempt {entry.attempt})" if entry.attempt > 1 else event


def _texts(chunks: Any) -> list[str]:
    found = chunks if isinstance(chunks, list) else [chunks]
    return [each if isinstance(each, str) else output.pretty(each, short=True) for each in found]


def _plain(entry: Entry) -> dict[str, Any]:
    return {
        "event": entry.event, "attempt": entry.attempt, "run": entry.run, "time": entry.time, "data": entry.data,
        "final": entry.final,
    }  # fmt: skip
