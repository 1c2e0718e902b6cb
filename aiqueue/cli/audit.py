"""``audit``: show who has done what. And how the other commands have their acts written down."""

from __future__ import annotations

import getpass
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from . import output
from .options import Json, ServerOptions, add_command, duration_option
from .output import Column

if TYPE_CHECKING:
    from ..client import AuditedAct, AuditLine, Client

T = TypeVar("T")
ACTS_MAX = 40  # that are named where none matches


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "audit",
        examples=(
            "  aiqueue audit                      the newest 50 acts",
            "  aiqueue audit --newer 2h --act dead",
            "  aiqueue audit --user anna --json",
        ),
    )(audit)


def audit(
    options: ServerOptions,
    *,
    act: Annotated[
        str | None, typer.Option(metavar="ACT", help="Only these acts: pause, dead.replay, or all of dead.")
    ] = None,
    user: Annotated[str | None, typer.Option(metavar="USER", help="Only acts of this NATS or OS user.")] = None,
    newer: Annotated[
        float | None, duration_option("Only acts of the last such time, such as 2h.", metavar="AGE")
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Number of acts, the newest.", min=1)] = 50,
    json: Json = False,
) -> None:
    """Show what operators have done: who, when, from which host, with what filter, and how many jobs it was.

    Lines are kept for 90 days. They say what the tool that wrote them knows: see the page docs/operations/audit.md.
    """
    from collections import deque  # noqa: PLC0415

    acts: set[str] = set()

    async def fetch(client: Client) -> tuple[list[AuditLine], int]:
        kept: deque[AuditLine] = deque(maxlen=limit)
        found = 0
        async for line in client.audit.find(act=act, newer=newer, user=user):
            kept.append(line)
            found += 1
        if act and not kept:
            acts.update([line.act async for line in client.audit.find(newer=newer, user=user)])
        return list(kept), found

    lines, found = options.run_with_client(fetch, reads=True)
    if json:
        output.print_json([asdict(each) for each in lines])
    elif not lines:
        others = f"; there are: {', '.join(sorted(acts)[:ACTS_MAX])}" if acts else ""
        output.print_line(output.escape_controls(f"no acts match{others}") if act or user or newer else "no acts")
    else:
        _print_lines(lines)
    if found > len(lines):
        output.print_line(f"{found - len(lines):,} older acts are not shown: raise --limit", err=True)


def _print_lines(lines: list[AuditLine]) -> None:
    rows = [
        [
            output.format_time(each.begun_at), each.act, each.nats_user or "-", f"{each.os_user}@{each.host}",
            "-" if each.count is None else f"{each.count:,}", _format_end(each),
        ]
        for each in lines
    ]  # fmt: skip
    columns = [
        Column("time"), Column("act", style="bold"), Column("nats user", shrink=True), Column("by", shrink=True),
        Column("count", right=True), Column("outcome", shrink=True, prose=True),
    ]  # fmt: skip
    output.print_table(columns, rows, below=[_format_target(each.target) for each in lines])


def _format_end(line: AuditLine) -> str:
    if line.ended_at is None:
        return "not finished: it goes on, or its process died"
    details = ", ".join(f"{name} {_plain(value)}" for name, value in line.details.items() if value)
    return line.error or details or ("nothing changed" if line.count == 0 else "done")


def _format_target(target: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={_plain(value)}" for name, value in target.items() if value not in (None, "", False))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else output.format_json(value, short=True)


# -- for commands that change something


def run_audited(
    options: ServerOptions,
    act: str,
    target: Mapping[str, Any],
    work: Callable[[Client, AuditedAct], Awaitable[T]],
    *,
    creates: bool = False,
) -> T:
    """Open a client, return what `work` returns for it, and have the audit say who did it, and what came of it.

    An act whose line cannot be stored is done all the same, and stderr says so. `creates`: it stores something new, so
    an embedded server is started for it also where it has no data.
    """
    silence_log()
    return options.run_with_client(lambda client: work_audited(client, act, target, work), acts=not creates)


async def work_audited(
    client: Client,
    act: str,
    target: Mapping[str, Any],
    work: Callable[[Client, AuditedAct], Awaitable[T]],
    *,
    warn: Callable[[str], None] | None = None,
) -> T:
    """As `run_audited`, for a client that is open. `warn` is told why the line could not be stored; "" if it was."""
    stated = {name: value for name, value in target.items() if value not in (None, "", False, [])}
    async with client.audit.act(act, stated) as audited:
        try:
            return await work(client, audited)
        finally:
            (warn or warn_unaudited)(audited.problem)


def run_counted(
    options: ServerOptions,
    act: str,
    target: Mapping[str, Any],
    work: Callable[[Client], Awaitable[T]],
    count: Callable[[T], int] = lambda _: 1,
    *,
    creates: bool = False,
) -> T:
    """As `run_audited`, for work that either fails or has changed what `count` says of its result."""

    async def run(client: Client, audited: AuditedAct) -> T:
        found = await work(client)
        audited.count = count(found)
        return found

    return run_audited(options, act, target, run, creates=creates)


def silence_log() -> None:
    """Have `warn_unaudited` alone say that a line could not be stored."""
    import logging  # noqa: PLC0415

    logging.getLogger("aiqueue.client.auditing").setLevel(logging.ERROR)


def warn_unaudited(problem: str) -> None:
    """Say that an act is not in the audit, if there is a problem."""
    if problem:
        output.print_line(output.escape_controls(f"this is not in the audit: {problem}"), err=True)


def name_operator() -> str:
    """Return who runs this process."""
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user id without a name, as in a container
        return "?"
