"""``jobs outcomes``: list jobs that have ended, the newest first."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output, parallel
from .jobs import Cursor, Family, Kind, Tenant
from .options import Json, ServerOptions, add_command, duration_option, split_names
from .output import Column

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import ListedOutcome
    from .json_keys import OutcomesJson

STATES = "done, failed, cancelled"


def register(app: typer.Typer) -> None:
    """Register the command in the group `jobs`."""
    add_command(
        app,
        "outcomes",
        examples=(
            "  aiqueue jobs outcomes                               the newest 50",
            "  aiqueue jobs outcomes --kind report --state failed --newer 2h",
            "  aiqueue jobs outcomes --family rag.ingest --slower 30s --json",
        ),
    )(outcomes)


def outcomes(  # noqa: PLR0913  (the options of a filter)
    options: ServerOptions,
    *,
    family: Family = None,
    tenant: Tenant = None,
    kind: Kind = None,
    state: Annotated[
        list[str] | None, typer.Option(metavar="STATE", help=f"Only these outcomes: {STATES}. Repeatable.")
    ] = None,
    newer: Annotated[
        float | None, duration_option("Only jobs that ended at most this long ago, such as 2h.", metavar="AGE")
    ] = None,
    slower: Annotated[
        float | None,
        duration_option("Only jobs whose last attempt has run for at least this long, such as 30s.", metavar="TIME"),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Number of outcomes of the page.", min=1, max=1_000)] = 50,
    cursor: Cursor = "",
    result: Annotated[bool, typer.Option("--result/--no-result", help="Show results and errors.")] = True,
    json: Json = False,
) -> None:
    """List jobs that have ended, the newest first: outcome, attempts, how long they took and ran, result or error.

    Outcomes are kept as long as the family keeps journals, by default for a day. Reads only, changes nothing.
    """
    given: dict[str, Any] = {
        "family": family, "tenant": tenant, "kind": kind, "state": split_names(state), "newer": newer, "slower": slower,
    }  # fmt: skip
    which = {name: value for name, value in given.items() if value is not None}
    found: list[ListedOutcome] = []
    searched, at = 0, cursor

    async def read(client: Client) -> None:
        nonlocal searched, at
        with parallel.progress_bar("searching", None, unit="entries searched") as advance:
            more = True
            while more and len(found) < limit:
                page = await client.jobs.outcomes(limit=limit - len(found), cursor=at, results=result, **which)
                found.extend(page.outcomes)
                searched, at = searched + page.searched, page.cursor
                advance(page.searched)
                more = bool(at)

    try:
        options.run_with_client(read, reads=True)
    except KeyboardInterrupt:
        if at:
            entries = output.format_count(searched, "entry", "entries")
            output.print_line(f"interrupted after {entries} searched: go on with --cursor {at}", err=True)
        raise
    if json:
        shown: OutcomesJson = {"outcomes": found, "cursor": at, "searched": searched}
        output.print_json(shown | {"outcomes": [asdict(each) for each in found]})
    else:
        _print_outcomes(found, result, filtered=bool(which))
    if at:
        output.print_line(f"there are more: --cursor {at}", err=True)


def _print_outcomes(found: list[ListedOutcome], result: bool, *, filtered: bool) -> None:
    if not found:
        output.print_line("no outcomes match" if filtered else "no outcomes")
        return
    now = time.time()
    several = len({each.family for each in found}) > 1
    rows = [
        [
            each.job_id, *([each.family] if several else []), each.tenant, each.kind or "?", each.state,
            f"{each.attempt or ''}", _format_age(now, each.ended_at), _format_age(each.ended_at, each.enqueued_at),
            output.format_age(each.run_s),
        ]
        for each in found
    ]  # fmt: skip
    columns = [
        Column("job", style="bold"), *([Column("family", shrink=True)] if several else []),
        Column("tenant", shrink=True), Column("kind", shrink=True), Column("outcome"),
        Column("attempt", right=True), Column("ended", right=True), Column("took", right=True),
        Column("ran", right=True),
    ]  # fmt: skip
    output.print_table(columns, rows, below=[_format_below(each) if result else "" for each in found])


def _format_age(now: float, at: float | None) -> str:
    return output.format_age(None if at is None else max(0.0, now - at))


def _format_below(outcome: ListedOutcome) -> str:
    """Return the second line of an outcome: its result, or why there is none."""
    if outcome.state == "done":
        return output.format_json(outcome.result, short=True)
    worker = f", worker {outcome.worker}" if outcome.worker else ""
    return f"{outcome.reason}: {outcome.error}{worker}"
