"""``dead``: list, show, replay and purge the jobs that ended badly."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AIQueueError, BadInput, Corrupt, DecodeError, NotFound, QueueFull
from . import many, output
from .options import FAILED, Json, Where, complain, duration, verb
from .output import Column

if TYPE_CHECKING:
    from ..client import Client
    from ..enqueue import DeadLetter, DeadLetters, Filter

AT_ONCE = 16
HEX_BYTES = 256
ERRORS_SHOWN = 5

app = typer.Typer(no_args_is_help=True, help="Jobs that ended badly: look at them, run them again, delete them.")

Family = Annotated[str | None, typer.Option(help="Only this family's.")]
Tenant = Annotated[str | None, typer.Option(help="Only this tenant's.")]
Kind = Annotated[str | None, typer.Option(help="Only this kind of message.")]
JobId = Annotated[str | None, typer.Option("--job", metavar="ID", help="Only this job's.")]
Older = Annotated[
    float | None, typer.Option(parser=duration, metavar="AGE", help="Only those that died so long ago, such as 2h.")
]
Seqs = Annotated[list[int] | None, typer.Argument(metavar="SEQ...", help="Numbers, as `dead ls` shows them.")]
All = Annotated[bool, typer.Option("--all", help="All that there are.")]


def ls(
    where: Where,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    job: JobId = None,
    older: Older = None,
    limit: Annotated[int, typer.Option(help="How many to show.", min=1)] = 100,
    json: Json = False,
) -> None:
    """List dead letters, the oldest first."""
    wanted = _filter(family, tenant, kind, job, older)

    async def look(client: Client) -> list[DeadLetter]:
        found = []
        async for letter in client.dead.find(wanted):
            found.append(letter)
            if len(found) > limit:
                break
        return found

    found = where.drive(look)
    more, found = len(found) > limit, found[:limit]
    if json:
        output.say_json([each.summary() for each in found])
    elif not found:
        given = any(each is not None for each in (family, tenant, kind, job, older))
        output.say(
            "no dead letters match; `aiqueue dead ls` shows all" if given else "no dead letters: no job has ended badly"
        )
    else:
        _list(found)
    if more:
        output.say(f"there are more than {limit:,}: filter, or raise --limit", err=True)
    elif found and not json:
        output.say("\n`aiqueue dead show SEQ` tells more, `aiqueue dead replay SEQ` runs it again")


def _list(found: list[DeadLetter]) -> None:
    now = time.time()
    rows = [
        [f"{each.seq}", each.job_id, output.lane(*each.lane), each.kind, output.age(now - each.failed_at)]
        for each in found
    ]
    columns = [
        Column("seq", right=True), Column("job", style="bold"), Column("lane", shrink=True),
        Column("kind", shrink=True), Column("died", right=True),
    ]  # fmt: skip
    output.table(columns, rows, below=[f"{each.reason}: {each.error}" for each in found])


def show(
    where: Where, seq: Annotated[int, typer.Argument(help="Its number, as `dead ls` shows it.")], *, json: Json = False
) -> None:
    """Show one dead letter: what happened in each attempt, its headers and its payload."""

    async def look(client: Client) -> tuple[DeadLetter, str]:
        letter = await client.dead.get(seq)
        try:
            return replace(letter, body=await client.dead.body(letter)), ""
        except (NotFound, Corrupt, BadInput) as error:
            return letter, str(error)

    letter, lost = where.drive(look)
    data, problem = (None, lost) if lost else _payload(letter)
    if json:
        body: dict[str, Any] = {"body_base64": letter.body} if problem else {"payload": data}
        output.say_json({**letter.summary(), "headers": dict(letter.headers), **body})
        return
    output.say(
        f"dead letter {output.styled(str(letter.seq), 'bold')}: {output.styled(output.clean(letter.error), 'red')}"
    )
    output.fields(
        [
            ("job", letter.job_id),
            ("kind", letter.kind),
            ("lane", output.lane(*letter.lane)),
            ("reason", f"{letter.reason} (attempt {letter.attempt})"),
            ("died", output.ago(letter.failed_at)),
            ("enqueued", output.ago(letter.enqueued_at)),
            ("worker", letter.worker),
            ("replays", f"{letter.replays}" if letter.replays else ""),
        ]
    )
    _headers(letter)
    _body(letter, data, problem)
    _history(letter)
    output.say(f"\n`aiqueue dead replay {letter.seq}` runs it again, `aiqueue dead purge {letter.seq}` deletes it")


def _headers(letter: DeadLetter) -> None:
    theirs = [(name, value) for name, value in letter.headers.items() if not name.startswith(("Aiq-", "Nats-"))]
    if theirs:
        output.say("\nheaders")
        output.fields(sorted(theirs))


def _payload(letter: DeadLetter) -> tuple[Any, str]:
    from .. import codec, headers  # noqa: PLC0415

    try:
        return codec.decode(letter.body, letter.headers.get(headers.CONTENT_TYPE, "")), ""
    except DecodeError as error:
        return None, error.reason


def _body(letter: DeadLetter, data: Any, problem: str) -> None:
    from ..units import short_size  # noqa: PLC0415

    if not problem:
        output.say(f"\npayload ({short_size(len(letter.body))})")
        output.say(output.pretty(data))
        return
    output.say(f"\npayload ({short_size(len(letter.body))}), which cannot be read: {output.clean(problem)}")
    for start in range(0, min(len(letter.body), HEX_BYTES), 16):
        part = letter.body[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        output.say(f"  {start:04x}  {part.hex(' '):<47}  {text}")
    if len(letter.body) > HEX_BYTES:
        output.say(f"  … and {len(letter.body) - HEX_BYTES:,} more bytes")


def _history(letter: DeadLetter) -> None:
    if not letter.history:
        return
    output.say("\nhistory")
    for each in letter.history:
        at = each.get("at")
        when = output.ago(at) if isinstance(at, int | float) else ""
        line = f"attempt {each.get('attempt')}, {when}, on {each.get('worker')}: {each.get('error')}"
        output.say(f"  {output.clean(line)}")
        trace = each.get("traceback")
        if isinstance(trace, str):
            for text in trace.rstrip().splitlines():
                output.say(output.styled(f"    {output.clean(text)}", "dim"))


def replay(
    where: Where,
    seqs: Seqs = None,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    job: JobId = None,
    older: Older = None,
    everything: All = False,
    json: Json = False,
) -> None:
    """Enqueue jobs again, with a fresh set of attempts and their history."""
    chosen = _Choice(seqs, _filter(family, tenant, kind, job, older), everything)

    async def do(client: Client) -> _Tally:
        found = await chosen.find(client.dead)
        return await _each(client.dead, found, client.dead.replay, "replaying")

    _report(where.drive(do), "replayed", json)


def purge(
    where: Where,
    seqs: Seqs = None,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    job: JobId = None,
    older: Older = None,
    everything: All = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json: Json = False,
) -> None:
    """Delete dead letters for good."""
    chosen = _Choice(seqs, _filter(family, tenant, kind, job, older), everything)
    if not yes and not somebody_there():
        raise BadInput("purge deletes dead letters for good, and nobody is there to be asked: say --yes")
    found = where.drive(lambda client: chosen.find(client.dead))
    if found and not yes and not typer.confirm(f"Delete {output.count(len(found), 'dead letter')} for good?", err=True):
        output.say("nothing was deleted", err=True)
        raise typer.Exit(FAILED)

    async def do(client: Client) -> _Tally:
        return await _each(client.dead, found, client.dead.purge, "purging")

    _report(where.drive(do) if found else _Tally(), "deleted", json)


def somebody_there() -> bool:
    """Whether a question can be answered."""
    return sys.stdin.isatty()


@dataclass(frozen=True)
class _Choice:
    """Which dead letters are meant: numbers, or a filter, or all. Raises BadInput for none and for a mixture."""

    seqs: list[int] | None
    wanted: Filter
    everything: bool

    def __post_init__(self) -> None:
        filtered = any(value is not None for value in vars(self.wanted).values())
        if bool(self.seqs) + filtered + self.everything > 1:
            raise BadInput("give numbers, or filters, or --all; not several of them")
        if not (self.seqs or filtered or self.everything):
            raise BadInput("say which: numbers (`aiqueue dead ls` shows them), filters such as --tenant, or --all")

    async def find(self, dead: DeadLetters) -> list[int]:
        """Their numbers, as of now: a replayed job that fails again is not met twice."""
        if self.seqs:
            return [(await dead.get(seq)).seq for seq in dict.fromkeys(self.seqs)]
        return [letter.seq async for letter in dead.find(self.wanted)]


@dataclass
class _Tally:
    done: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)


async def _each(
    dead: DeadLetters, found: list[int], do: Callable[[DeadLetter], Coroutine[Any, Any, None]], title: str
) -> _Tally:
    """Do it to each. What one letter's own lane or body refuses is told at the end; anything else ends it at once."""
    tally = _Tally()

    async def numbers() -> AsyncIterator[int]:
        for seq in found:
            yield seq

    with many.progress(title, len(found), unit="dead letters") as advance:

        async def one(seq: int) -> None:
            try:
                await do(await dead.get(seq))
            except (QueueFull, BadInput, NotFound) as error:
                tally.errors.append((seq, str(error)))
            else:
                tally.done += 1
            advance(1)

        try:
            await many.each(numbers(), one, at_once=AT_ONCE)
        except AIQueueError:
            if tally.done:
                output.say(f"{output.count(tally.done, 'dead letter')} of {len(found):,} done before this:", err=True)
            raise
    return tally


def _report(tally: _Tally, done: str, json: bool) -> None:
    if json:
        errors = [{"seq": seq, "error": error} for seq, error in sorted(tally.errors)]
        output.say_json({done: tally.done, "errors": errors})
    else:
        for seq, error in sorted(tally.errors)[:ERRORS_SHOWN]:
            complain(f"dead letter {seq}: {error}")
        if len(tally.errors) > ERRORS_SHOWN:
            complain(f"… and {len(tally.errors) - ERRORS_SHOWN:,} more")
        if tally.done or not tally.errors:
            output.say(f"{done} {output.count(tally.done, 'dead letter')}" if tally.done else "no dead letters match")
    if tally.errors:
        raise typer.Exit(FAILED)


def _filter(family: str | None, tenant: str | None, kind: str | None, job: str | None, older: float | None) -> Filter:
    from .. import subjects  # noqa: PLC0415
    from ..enqueue import Filter  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
    if job is not None:
        subjects.token("job id", job)
    return Filter(family=family, tenant=tenant, kind=kind, job_id=job, older_s=older)


verb(app, "ls")(ls)
verb(app, "show")(show)
verb(app, "replay")(replay)
verb(app, "purge")(purge)
