"""``dead``: list, show, replay and purge dead letters."""

from __future__ import annotations

import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AIQueueError, BadInput, Corrupt, DecodeError, NotFound, QueueFull
from . import output, parallel
from .audit import run_audited
from .options import FAILED, Json, ServerOptions, add_command, duration_option, print_error
from .output import Column

if TYPE_CHECKING:
    from ..client import AuditedAct, Client
    from ..config import Redact
    from ..enqueue import DeadLetter, DeadLetters, Filter

AT_ONCE = 16
HEX_BYTES = 256
ERRORS_SHOWN = 5

app = typer.Typer(no_args_is_help=True, help="List, show, replay and purge dead letters (failed jobs).")

Family = Annotated[str | None, typer.Option(metavar="FAMILY", help="Only jobs of this family.")]
Tenant = Annotated[str | None, typer.Option(metavar="TENANT", help="Only jobs of this tenant.")]
Kind = Annotated[str | None, typer.Option(metavar="KIND", help="Only messages of this kind.")]
JobId = Annotated[str | None, typer.Option("--job", metavar="ID", help="Only the job with this id.")]
Older = Annotated[
    float | None,
    duration_option("Only jobs that failed at least this long ago, such as 2h.", metavar="AGE"),
]
Newer = Annotated[
    float | None,
    duration_option("Only jobs that failed at most this long ago, such as 2h.", metavar="AGE"),
]
Error = Annotated[
    str | None,
    typer.Option(metavar="TEXT", help="Only jobs with this in their reason or error, such as ValueError. Any case."),
]
Seqs = Annotated[
    list[int] | None, typer.Argument(metavar="SEQ...", help="Numbers of dead letters, from `dead ls`.", min=1)
]
All = Annotated[bool, typer.Option("--all", metavar="", help="All dead letters.")]


def ls(
    options: ServerOptions,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    job: JobId = None,
    older: Older = None,
    newer: Newer = None,
    error: Error = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Maximum number to list.", min=1)] = 100,
    json: Json = False,
) -> None:
    """List dead letters, oldest first."""
    wanted = _filter(family, tenant, kind, job, older, newer, error)
    found, more = options.list_with_client(lambda client: client.dead.find(wanted), limit)
    if json:
        output.print_json([each.summary() for each in found])
    elif not found:
        filtered = any(each is not None for each in (family, tenant, kind, job, older, newer, error))
        output.print_line("no dead letters match; `aiqueue dead ls` lists all" if filtered else "no dead letters")
    else:
        _print_letters(found)
    if more:
        output.print_line(f"more than {limit:,} dead letters: add a filter or raise --limit", err=True)
    elif found and not json:
        output.print_line("\n`aiqueue dead show SEQ` shows details, `aiqueue dead replay SEQ` runs the job again")


def _print_letters(found: list[DeadLetter]) -> None:
    now = time.time()
    rows = [
        [
            f"{each.seq}", each.job_id, output.format_lane(*each.lane), each.kind,
            output.format_age(now - each.failed_at),
        ]
        for each in found
    ]  # fmt: skip
    columns = [
        Column("seq", right=True), Column("job", style="bold"), Column("lane", shrink=True),
        Column("kind", shrink=True), Column("failed", right=True),
    ]  # fmt: skip
    output.print_table(columns, rows, below=[f"{each.reason}: {each.error}" for each in found])


def show(
    options: ServerOptions,
    seq: Annotated[int, typer.Argument(metavar="SEQ", help="Number of the dead letter, from `dead ls`.", min=1)],
    *,
    json: Json = False,
) -> None:
    """Show a dead letter: error, headers, payload and the history of its attempts."""
    from ..inspect import redact_data  # noqa: PLC0415

    async def fetch(client: Client) -> tuple[DeadLetter, str, Redact | None]:
        letter, redact = await client.dead.get(seq), client.redact
        try:
            return replace(letter, body=await client.dead.body(letter)), "", redact
        except (NotFound, Corrupt, BadInput) as error:
            return letter, str(error), redact

    letter, body_problem, redact = options.run_with_client(fetch, reads=True)
    data, problem = (None, body_problem) if body_problem else _decode_payload(letter)
    hidden = _has_secrets(letter) or redact is not None
    if not problem:
        data, problem = redact_data(redact, letter.lane.family, letter.kind, data)
    if json:
        body: dict[str, Any] = {"payload": data}
        if problem:
            body = {"body_base64": None if hidden else letter.body}
        output.print_json({**letter.summary(), "headers": dict(letter.headers), **body})
        return
    seq_shown = output.apply_style(str(letter.seq), "bold")
    output.print_line(f"dead letter {seq_shown}: {output.apply_style(output.escape_controls(letter.error), 'red')}")
    output.print_fields(
        [
            ("job", letter.job_id),
            ("unique", letter.unique),
            ("kind", letter.kind),
            ("lane", output.format_lane(*letter.lane)),
            ("limit key", letter.key),
            ("reason", f"{letter.reason} (attempt {letter.attempt})"),
            ("failed", output.format_ago(letter.failed_at)),
            ("enqueued", output.format_ago(letter.enqueued_at)),
            ("worker", letter.worker),
            ("replays", f"{letter.replays}" if letter.replays else ""),
        ]
    )
    _print_headers(letter)
    _print_payload(letter, data, problem, hidden=hidden)
    _print_history(letter)
    output.print_line(
        f"\n`aiqueue dead replay {letter.seq}` runs the job again, `aiqueue dead purge {letter.seq}` deletes it"
    )


def _print_headers(letter: DeadLetter) -> None:
    theirs = [(name, value) for name, value in letter.headers.items() if not name.startswith(("Aiq-", "Nats-"))]
    if theirs:
        output.print_line("\nheaders")
        output.print_fields(sorted(theirs))


def _decode_payload(letter: DeadLetter) -> tuple[Any, str]:
    """Return the payload as plain data and "", or None and why it cannot be decoded."""
    from .. import codec, headers  # noqa: PLC0415
    from ..codec import secret_paths  # noqa: PLC0415

    try:
        data = codec.decode(letter.body, letter.headers.get(headers.CONTENT_TYPE, ""))
    except DecodeError as error:
        return None, error.reason
    return secret_paths.mask(data, letter.headers.get(headers.SECRET, "")), ""


def _has_secrets(letter: DeadLetter) -> bool:
    from .. import headers  # noqa: PLC0415

    return headers.SECRET in letter.headers


def _print_payload(letter: DeadLetter, data: Any, problem: str, *, hidden: bool) -> None:
    """Print the payload as JSON, or a hex dump if there is a `problem` with decoding it, unless that is `hidden`."""
    from ..units import short_size  # noqa: PLC0415

    size = short_size(len(letter.body))
    if not problem:
        output.print_line(f"\npayload ({size})")
        output.print_line(output.format_json(data))
        return
    output.print_line(f"\npayload ({size}), cannot be decoded: {output.escape_controls(problem)}")
    if hidden:
        output.print_line("  (not shown: it contains secrets, or the redact hook cannot read it)")
        return
    for start in range(0, min(len(letter.body), HEX_BYTES), 16):
        part = letter.body[start : start + 16]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        output.print_line(f"  {start:04x}  {part.hex(' '):<47}  {text}")
    if len(letter.body) > HEX_BYTES:
        output.print_line(f"  … and {len(letter.body) - HEX_BYTES:,} more bytes")


def _print_history(letter: DeadLetter) -> None:
    if not letter.history:
        return
    output.print_line("\nhistory")
    for each in letter.history:
        at = each.get("at")
        when = output.format_ago(at) if isinstance(at, int | float) else ""
        line = f"attempt {each.get('attempt')}, {when}, on {each.get('worker')}: {each.get('error')}"
        output.print_line(f"  {output.escape_controls(line)}")
        trace = each.get("traceback")
        if isinstance(trace, str):
            for text in trace.rstrip().splitlines():
                output.print_line(output.apply_style(f"    {output.escape_controls(text)}", "dim"))


def replay(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    seqs: Seqs = None,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    job: JobId = None,
    older: Older = None,
    newer: Newer = None,
    error: Error = None,
    everything: All = False,
    json: Json = False,
) -> None:
    """Replay dead letters: enqueue their jobs again, with new attempts. The jobs keep their history.

    Select them by number, by filters or by --all.

    Exit codes: 0 all replayed, 1 some were not.
    """
    selection = _Selection(seqs, _filter(family, tenant, kind, job, older, newer, error), everything)

    async def replay_selected(client: Client, audited: AuditedAct) -> DeadOutcome:
        found = await selection.find(client.dead)
        return await _apply_to_each(client.dead, found, client.dead.replay, "replaying", audited)

    _print_outcome(run_audited(options, "dead.replay", selection.describe(), replay_selected), "replayed", json)


def make_replay(seq: int) -> tuple[dict[str, Any], Callable[[Client, AuditedAct], Awaitable[DeadOutcome]]]:
    """Return what the audit says of the replay of one dead letter, and what replays it, without a progress bar."""
    selection = _Selection([seq], _filter(), everything=False)

    async def run(client: Client, audited: AuditedAct) -> DeadOutcome:
        return await _apply_to_each(client.dead, [seq], client.dead.replay, "", audited)

    return selection.describe(), run


def purge(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    seqs: Seqs = None,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    job: JobId = None,
    older: Older = None,
    newer: Newer = None,
    error: Error = None,
    everything: All = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", metavar="", help="Do not ask for confirmation.")] = False,
    json: Json = False,
) -> None:
    """Delete dead letters permanently.

    Select them by number, by filters or by --all. Without --yes, the command asks for confirmation.

    Exit codes: 0 all deleted, 1 some were not, or the confirmation was refused.
    """
    selection = _Selection(seqs, _filter(family, tenant, kind, job, older, newer, error), everything)
    if not yes and not is_interactive():
        raise BadInput("purge deletes dead letters permanently and there is no terminal to confirm it: add --yes")
    found = options.run_with_client(lambda client: selection.find(client.dead), acts=True)
    question = f"Delete {output.format_count(len(found), 'dead letter')} permanently?"
    if found and not yes and not typer.confirm(question, err=True):
        output.print_line("nothing was deleted", err=True)
        raise typer.Exit(FAILED)

    async def purge_found(client: Client, audited: AuditedAct) -> DeadOutcome:
        return await _apply_to_each(client.dead, found, client.dead.purge, "purging", audited)

    outcome = run_audited(options, "dead.purge", selection.describe(), purge_found) if found else DeadOutcome()
    _print_outcome(outcome, "deleted", json)


def is_interactive() -> bool:
    """Return whether a user can answer a prompt."""
    return sys.stdin.isatty()


@dataclass(frozen=True)
class _Selection:
    """The dead letters to work on: by numbers, by a filter, or all. Raises BadInput for none and for a mixture."""

    seqs: list[int] | None
    wanted: Filter
    everything: bool

    def __post_init__(self) -> None:
        filtered = any(value is not None for value in vars(self.wanted).values())
        if bool(self.seqs) + filtered + self.everything > 1:
            raise BadInput("numbers, filters and --all exclude each other: use only one of these")
        if not (self.seqs or filtered or self.everything):
            raise BadInput("select dead letters: numbers from `aiqueue dead ls`, filters such as --tenant, or --all")

    def describe(self) -> dict[str, Any]:
        """Return what is selected, for the audit."""
        numbers = list(dict.fromkeys(self.seqs or ()))
        return {"seqs": numbers, "all": self.everything, **vars(self.wanted)}

    async def find(self, dead: DeadLetters) -> list[int]:
        """Return the numbers that exist now, so that a replayed job that fails again is not replayed twice."""
        if self.seqs:
            return [(await dead.get(seq)).seq for seq in dict.fromkeys(self.seqs)]
        return [letter.seq async for letter in dead.find(self.wanted)]


@dataclass
class DeadOutcome:
    """How many dead letters were replayed or deleted, and the errors of the others by number."""

    done: int = 0
    errors: list[tuple[int, str]] = field(default_factory=list)


async def _apply_to_each(
    dead: DeadLetters,
    found: list[int],
    action: Callable[[DeadLetter], Coroutine[Any, Any, bool]],
    title: str,
    audited: AuditedAct,
) -> DeadOutcome:
    """Apply `action` to each dead letter. Errors of one letter are collected, any other error is raised at once.

    `title`: of the progress bar; "": none.
    """
    outcome = DeadOutcome()

    async def numbers() -> AsyncIterator[int]:
        for seq in found:
            yield seq

    with parallel.progress_bar(title, len(found), unit="dead letters") as advance:

        async def apply(seq: int) -> None:
            try:
                done = await action(await dead.get(seq))
            except (QueueFull, BadInput, NotFound) as error:
                outcome.errors.append((seq, str(error)))
            else:
                if done:
                    outcome.done += 1
                else:
                    outcome.errors.append((seq, "somebody else has replayed or deleted it meanwhile"))
            advance(1)

        try:
            await parallel.for_each(numbers(), apply, at_once=AT_ONCE)
        except AIQueueError:
            if outcome.done:
                output.print_line(f"stopped after {outcome.done:,} of {len(found):,} dead letters", err=True)
            raise
        finally:
            audited.count = outcome.done
            audited.details = {"matched": len(found), "failed": len(outcome.errors)}
    return outcome


def _print_outcome(outcome: DeadOutcome, done: str, json: bool) -> None:
    if json:
        errors = [{"seq": seq, "error": error} for seq, error in sorted(outcome.errors)]
        output.print_json({done: outcome.done, "errors": errors})
    else:
        for seq, error in sorted(outcome.errors)[:ERRORS_SHOWN]:
            print_error(f"dead letter {seq}: {error}")
        if len(outcome.errors) > ERRORS_SHOWN:
            print_error(f"… and {len(outcome.errors) - ERRORS_SHOWN:,} more")
        if outcome.done:
            output.print_line(f"{done} {output.format_count(outcome.done, 'dead letter')}")
        elif not outcome.errors:
            output.print_line("no dead letters match")
    if outcome.errors:
        raise typer.Exit(FAILED)


def _filter(
    family: str | None = None, tenant: str | None = None, kind: str | None = None, job: str | None = None,
    older: float | None = None, newer: float | None = None, error: str | None = None,
) -> Filter:  # fmt: skip
    """Return the filter that the options describe. Raises InvalidToken, BadInput."""
    from .. import subjects  # noqa: PLC0415
    from ..enqueue import Filter  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
    if job is not None:
        subjects.job_id(job)
    if error is not None and not error.strip():
        raise BadInput("--error is empty: give a part of the error, such as ValueError")
    if older is not None and newer is not None and older > newer:
        raise BadInput("no job failed longer ago than --older and not longer ago than --newer: swap the two")
    return Filter(family=family, tenant=tenant, kind=kind, job_id=job, older_s=older, newer_s=newer, error=error)


add_command(app, "ls", examples=("  aiqueue dead ls --tenant acme --newer 2h",))(ls)
add_command(app, "show")(show)
add_command(app, "replay", examples=("  aiqueue dead replay 17 18", "  aiqueue dead replay --error ConnectionError"))(
    replay
)
add_command(app, "purge", examples=("  aiqueue dead purge 17", "  aiqueue dead purge --older 7d --yes"))(purge)
