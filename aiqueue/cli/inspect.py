"""``inspect``: families, the lanes of one, or a single job."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput
from ..units import short_size
from . import output
from .options import Json, Where, verb
from .output import Column
from .steps import moment, says, span

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import FamilyStats, JobStats, LaneStats

_STATES = {"done": "green", "failed": "red", "retrying": "yellow", "cancelled": "yellow", "unknown": "yellow"}
_OPEN = ("queued", "parked", "in_flight", "retrying")  # states in which something is still to come


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "inspect")(inspect)


def inspect(
    where: Where,
    target: Annotated[
        str | None, typer.Argument(metavar="FAMILY|JOB", help="A family (it has a dot in it) or a job's id.")
    ] = None,
    *,
    job: Annotated[str | None, typer.Option(metavar="ID", help="One job; with a FAMILY only there.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's lanes or job.")] = None,
    json: Json = False,
) -> None:
    """Show the families, the lanes of a family, or what is known of one job. Changes nothing."""
    from .. import subjects  # noqa: PLC0415
    from ..inspect import stats  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
    family = target if target is not None and "." in target else None
    if target is not None and family is None:
        if job not in (None, target):
            raise BadInput(f"{target} and {job} are two jobs: name one")
        job = target

    async def look(client: Client) -> Any:
        link, topology = client.connection, client.topology
        if job is not None:
            return await stats.job(link, topology, job, family=family, tenant=tenant)
        if family is not None:
            return await stats.family(link, topology, family)
        if tenant is not None:
            return [lane for each in topology.work_families for lane in await stats.family(link, topology, each.name)]
        return await stats.overview(link, topology)

    found = where.drive(look)
    if job is not None:
        _say_job(found, json)
    elif family is None and tenant is None:
        _say_overview(found, json)
    else:
        _say_lanes([lane for lane in found if tenant in (None, lane.tenant)], family, tenant, json)


def _say_overview(found: list[FamilyStats], json: bool) -> None:
    if json:
        output.say_json([asdict(each) for each in found])
        return
    rows = []
    for each in found:
        if each.missing:
            rows.append([each.family, f"stream {each.stream} is missing: `aiqueue apply` makes it"])
            continue
        rows.append(
            [
                each.family, f"{each.waiting:,}", f"{each.in_flight:,}", f"{each.redelivered:,}",
                "-" if each.parked is None else f"{each.parked:,}", output.age(each.oldest_age_s),
                _rate(each.rate_in), _rate(each.rate_done), f"{each.lanes:,}",
                _size(each), "-" if each.dead is None else f"{each.dead:,}",
            ]
        )  # fmt: skip
    titles = ("waiting", "in flight", "again", "parked", "oldest", "in/s", "done/s", "lanes", "stored", "dead")
    output.table([Column("family", shrink=True), *(Column(title, right=True) for title in titles)], rows)
    if any(each.redelivered for each in found):
        output.say("\nagain: jobs in flight that were delivered more than once")
    dead = sum(each.dead or 0 for each in found)
    if dead:
        output.say(f"\n{output.count(dead, 'dead letter')}: `aiqueue dead ls`")


def _size(found: FamilyStats) -> str:
    limit = "" if found.size_limit_bytes is None else f"/{short_size(found.size_limit_bytes)}"
    return f"{short_size(found.size_bytes)}{limit}".replace(" ", "")


def _rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _say_lanes(found: list[LaneStats], family: str | None, tenant: str | None, json: bool) -> None:
    if json:
        output.say_json([asdict(each) for each in found])
        return
    where = " ".join(part for part in (family and f"in {family}", tenant and f"of {tenant}") if part)
    if not found:
        output.say(f"no lanes {where}: no job waits and no worker is there. `aiqueue enqueue` makes a lane")
        return
    several = len({lane.family for lane in found}) > 1
    rows = [
        [
            *([lane.family] if several else []),
            "(all)" if lane.tenant == "*" else lane.tenant, lane.priority, f"{lane.waiting:,}",
            f"{lane.in_flight:,}", f"{lane.redelivered:,}", f"{lane.parked:,}", output.age(lane.oldest_age_s),
            _limit(lane.limit), _served(lane),
        ]
        for lane in found
    ]  # fmt: skip
    columns = [
        *([Column("family", shrink=True)] if several else []),
        Column("tenant", shrink=True), Column("priority"), Column("waiting", right=True),
        Column("in flight", right=True), Column("again", right=True), Column("parked", right=True),
        Column("oldest", right=True), Column("limit", right=True), Column("served"),
    ]  # fmt: skip
    output.table(columns, rows)
    if any(lane.redelivered for lane in found):
        output.say("\nagain: jobs in flight that were delivered more than once")
    if any(lane.waiting and _served(lane) == "no" for lane in found):
        output.say("\nserved no: jobs wait there, and no worker asks for them")


def _served(lane: LaneStats) -> str:
    """Whether workers ask for its jobs; those whose slots are all taken do not."""
    return "yes" if lane.pulls else "busy" if lane.in_flight else "no"


def _limit(value: int) -> str:
    return f"{value:,}" if value > 0 else "none"


def _say_job(found: JobStats, json: bool) -> None:
    if json:
        output.say_json(asdict(found))
        return
    state = output.styled(found.state.replace("_", " "), _STATES.get(found.state, "cyan"))
    output.say(f"job {output.styled(found.job_id, 'bold')}: {state}{f' ({found.note})' if found.note else ''}")
    failure = found.failure or {}
    parked = found.state == "parked" and not found.attempt
    output.fields(
        [
            ("lane", output.lane(found.family, found.tenant, found.priority)),
            ("kind", found.kind or ""),
            ("enqueued", output.ago(found.enqueued_at)),
            ("attempt", f"{found.attempt}" if found.attempt else ""),
            ("due" if parked else "next attempt", _due(found.next_attempt_at)),
            ("reason", str(failure.get("reason") or "")),
            ("error", str(failure.get("error") or "")),
            ("dead letter", f"{found.dead_seq}: `aiqueue dead show {found.dead_seq}`" if found.dead_seq else ""),
        ]
    )
    _say_timeline(found)
    if found.state == "done":
        output.say(f"\nresult\n{output.pretty(found.result)}")


def _due(at: float | None) -> str:
    if at is None:
        return ""
    left_s = at - time.time()
    return f"in {output.age(left_s)} ({output.clock(at)})" if left_s >= 0 else output.ago(at)


def _say_timeline(found: JobStats) -> None:
    steps = found.timeline
    days = {time.strftime("%Y-%m-%d", time.localtime(step.at)) for step in steps if step.at is not None}
    told = f" of {days.pop()}" if len(days) == 1 else ""
    output.say(f"\ntimeline{told}{' (what the middle of its journal says is left out)' if found.entries_cut else ''}")
    rows = [
        [
            "?" if step.at is None else moment(step.at, with_day=not told),
            "" if step.after_s is None else f"+{span(step.after_s)}",
            step.event,
            f"{step.attempt}" if step.attempt else "",
            says(step),
        ]
        for step in steps
    ]
    if found.state in _OPEN:
        rows.append(["now", "", found.state.replace("_", " "), "", ""])
    columns = [Column("time"), Column("after", right=True), Column("event"), Column("attempt", right=True)]
    output.table([*columns, Column("says", shrink=True, prose=True)], rows)
