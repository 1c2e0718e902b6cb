"""``schedule ls``, ``show`` and ``next``: when schedules fire, and what became of their jobs."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import output
from ..options import Json, ServerOptions, print_error, time_option
from ..output import Column
from .arguments import ScheduleId, Tenant, format_tick

if TYPE_CHECKING:
    from datetime import datetime

    from ...client import Client
    from ...inspect import ScheduleStats
    from ...schedules import ScheduleDocument

NEXT_SHOWN = 5


def ls(
    options: ServerOptions,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only schedules of this tenant.")] = None,
    owner: Annotated[
        str | None, typer.Option(metavar="OWNER", help="Only schedules that the code of this owner declares.")
    ] = None,
    json: Json = False,
) -> None:
    """List schedules: when they fire, the next and the last time, what became of the last job, and missed ticks."""
    from ...inspect import read_schedules  # noqa: PLC0415

    found, unreadable = options.run_with_client(
        lambda client: read_schedules(client.connection, client.topology, tenant=tenant, owner=owner), reads=True
    )
    if json:
        output.print_json([each.summary() for each in found])
    elif found:
        _print_schedules(found)
    elif not unreadable:
        filtered = tenant is not None or owner is not None
        hint = "; `aiqueue schedule ls` lists all" if filtered else ": `aiqueue schedule add --help` shows how"
        output.print_line(f"no schedules{' match' if filtered else ''}{hint}")
    for each in unreadable:
        print_error(f"schedule {each.id} of {each.tenant} cannot be read: {each.problem}")


def _print_schedules(found: list[ScheduleStats]) -> None:
    now = time.time()
    rows = [
        [
            each.id, each.tenant, _format_next(each, now),
            "-" if each.last_at is None else f"{output.format_age(now - each.last_at)} ago", each.outcome or "-",
            f"{each.document.misfired:,}",
        ]
        for each in found
    ]  # fmt: skip
    columns = [
        Column("id", style="bold", shrink=True), Column("tenant", shrink=True), Column("next"), Column("last"),
        Column("outcome"), Column("missed", right=True),
    ]  # fmt: skip
    output.print_table(columns, rows, below=[_second_line(each) for each in found])
    output.print_line("\n`aiqueue schedule show ID --tenant TENANT` shows one with its next times")


def _format_next(found: ScheduleStats, now: float) -> str:
    if found.paused:
        return "paused"
    if found.next_at is None:
        return "ended"
    left_s = found.next_at - now
    return f"in {output.format_age(left_s)}" if left_s >= 0 else f"due {output.format_age(-left_s)} ago"


def _second_line(found: ScheduleStats) -> str:
    """Return when it fires, after what is wrong with it."""
    failed = output.format_count(found.document.failed, "tick")
    problems = [
        found.problem,
        found.error and f"the last job: {found.error}",
        found.document.error and f"{failed} failed, the last by {found.document.error}",
    ]
    return "; ".join([*(each for each in problems if each), found.when])


def show(options: ServerOptions, schedule_id: ScheduleId, *, tenant: Tenant, json: Json = False) -> None:
    """Show a schedule: when it fires, its next five times with their offsets, its policies, counts and message."""

    async def fetch(client: Client) -> tuple[ScheduleStats, list[datetime]]:
        found = await client.schedules.get(schedule_id, tenant=tenant)
        return found, [] if found.problem else found.next_times(NEXT_SHOWN, after=client.connection.clock.now())

    found, times = options.run_with_client(fetch, reads=True)
    message = _read_message(found.document)
    if json:
        shown = {"next_times": [each.isoformat() for each in times], "message": message}
        output.print_json(found.summary() | shown)
        return
    output.print_line(f"schedule {output.apply_style(found.id, 'bold')} of {found.tenant}")
    if found.problem:
        print_error(found.problem)
    output.print_fields(_list_fields(found))
    if times:
        output.print_line("\nnext times")
        for each in times:
            output.print_line(f"  {format_tick(each)}")
    output.print_line("\nmessage")
    output.print_line("  made by the owner's code for each tick" if message is None else output.format_json(message))


def _list_fields(found: ScheduleStats) -> list[tuple[str, str]]:
    document = found.document
    paused, last, missed = document.paused, document.last, document.missed
    pause = f"{output.format_ago(paused.since)}{f' by {paused.by}' if paused.by else ''}" if paused else ""
    misfire = {"all": f"all, the newest {document.bound:,}"}.get(document.misfire, document.misfire)
    return [
        ("when", found.when),
        ("paused", f"{pause}{f': {paused.reason}' if paused and paused.reason else ''}"),
        ("lane", output.format_lane(document.family, document.tenant, document.priority)),
        ("kind", document.kind),
        ("owner", document.owner),
        ("deadline", output.format_age(document.deadline_s) if document.deadline_s is not None else ""),
        ("misfire", f"{misfire}, for ticks over {output.format_age(document.grace_s)} late"),
        ("overlap", document.overlap),
        ("due tick", _describe_due(found)),
        ("last tick", output.format_ago(found.last_at)),
        ("last job", last.job_id if last else ""),
        ("outcome", f"{found.outcome}{f': {found.error}' if found.error else ''}"),
        ("jobs", f"{document.fired:,}"),
        ("missed", f"{document.misfired:,}{_describe_missed(document)}" if document.misfired or missed else ""),
        ("skipped", f"{document.skipped:,}, because the former job had not ended" if document.skipped else ""),
        ("failed", f"{document.failed:,}{_describe_failure(document)}" if document.failed else ""),
        ("changed", output.format_ago(document.updated_at)),
    ]


def _describe_due(found: ScheduleStats) -> str:
    if found.paused or found.next_at is None or found.next_at > time.time():
        return ""
    return f"{output.format_ago(found.next_at)}, not fired yet"


def _describe_failure(document: ScheduleDocument) -> str:
    return f": {document.error}" if document.error else ", none since the last job"


def _describe_missed(document: ScheduleDocument) -> str:
    missed = document.missed
    if missed is None:
        return ""
    count = output.format_count(missed.ticks, "tick")
    begin, end = output.format_time(missed.from_ms / 1000), output.format_time(missed.to_ms / 1000)
    more = "more than " if missed.more else ""
    return f"; the last time {more}{count} from {begin} to {end}, of which {missed.fired:,} ran late"


def _read_message(document: ScheduleDocument) -> Any:
    """Return the message without its secrets; None: the owner's code makes it."""
    from ... import codec  # noqa: PLC0415
    from ...codec import secret_paths  # noqa: PLC0415

    if document.body is None:
        return None
    return secret_paths.mask(codec.decode(document.body, codec.CBOR), document.secrets)


def next_times(
    options: ServerOptions,
    schedule_id: ScheduleId,
    *,
    tenant: Tenant,
    count: Annotated[int, typer.Option(metavar="N", help="How many.", min=1, max=10_000)] = NEXT_SHOWN,
    after: Annotated[
        float | None, time_option("Times after this one, such as 2027-03-27T00:00+01:00. Default: now.")
    ] = None,
    json: Json = False,
) -> None:
    """Print the next times of a schedule, in its time zone; without jitter, and as if it was not paused."""
    found = options.run_with_client(
        lambda client: client.schedules.next_times(schedule_id, count, tenant=tenant, after=after), reads=True
    )
    if json:
        output.print_json([each.isoformat() for each in found])
        return
    for each in found:
        output.print_line(format_tick(each))
    if len(found) < count:
        output.print_line("no more: the schedule ends" if found else "none: the schedule has ended", err=True)
