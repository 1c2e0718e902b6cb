"""``inspect``: show families, the lanes of a family, or one job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import AccessDenied, BadInput
from ..units import short_size
from . import output
from .explain import print_explanation
from .history import format_percentiles, spark
from .options import (
    WATCH_MIN_S,
    Json,
    ServerOptions,
    WatchesByDefault,
    add_command,
    duration_option,
    is_like_family,
)
from .output import Column
from .pause import describe_pause, print_pauses
from .timeline import describe_event, format_span, format_timestamp

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import ChildStats, Explanation, FamilyStats, JobStats, LaneStats, WaitingKind
    from ..lanes import Pause
    from ..metrics import Series

_STATES = {"done": "green", "failed": "red", "retrying": "yellow", "cancelled": "yellow", "unknown": "yellow"}
_UNFINISHED = ("queued", "parked", "in_flight", "retrying", "waiting")
RESULT_CHARACTERS_MAX = 20_000  # of a result, for people


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "inspect",
        examples=(
            "  aiqueue inspect                              all families",
            "  aiqueue inspect agent.tasks --tenant acme    lanes of a family and tenant",
            "  aiqueue inspect 06h0ehe6b82hdkoi8l1epcnf0g   one job",
            "  aiqueue inspect agent.tasks --watch 5        drawn again every 5 seconds",
        ),
        cls=WatchesByDefault,
    )(inspect)


def inspect(
    options: ServerOptions,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="FAMILY|JOB", help="Family (contains a dot), job id, or a job's key. Default: all families."
        ),
    ] = None,
    *,
    job: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Show the job with this id. With the argument FAMILY, only that family is searched."
        ),
    ] = None,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Limit the output to this tenant.")] = None,
    watch: Annotated[
        float | None,
        duration_option("Show it again and again, every so many seconds (2), until Ctrl-C.", metavar="[SECONDS]"),
    ] = None,
    json: Json = False,
) -> None:
    """Show all families, the lanes of a family, or one job with its timeline.

    Reads only, changes nothing. With --watch and --json: one object a line.
    """
    from .. import subjects  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
    family = target if target is not None and is_like_family(target) else None
    if target is not None and family is None:
        if job not in (None, target):
            raise BadInput(f"two job ids given, {target} and {job}: give one")
        job = target
    view = _Inspected(family, tenant, job, json)
    if watch is None:
        view.show(options.run_with_client(view.read, reads=True))
        return
    if watch < WATCH_MIN_S:
        raise BadInput(f"--watch must be at least {WATCH_MIN_S:g}s")
    from .live import WatchedOutput  # noqa: PLC0415

    title = " ".join(filter(None, ("aiqueue inspect", family, job, tenant and f"--tenant {tenant}")))
    as_json = view.as_json if json else None

    async def run(client: Client) -> None:
        await WatchedOutput(client, view.read, view.show, title=title, interval_s=watch, as_json=as_json).run()

    options.run_with_client(run, reads=True)


@dataclass(frozen=True)
class _Inspected:
    """What is inspected: all families, the lanes of a family or a tenant, or a job; and how that is read and shown."""

    family: str | None
    tenant: str | None
    job: str | None
    json: bool

    async def read(self, client: Client) -> Any:
        """Return what is shown. Raises NotFound, and what else the readings raise."""
        from ..inspect import count_schedules_if_allowed, stats  # noqa: PLC0415

        link, topology = client.connection, client.topology
        if self.job is not None:
            return await _find_job(client, self.job, self.family, self.tenant)
        if self.family is not None or self.tenant is not None:
            return await self._read_lanes(client)
        schedules = (0, 0) if self.json else await count_schedules_if_allowed(link, topology)
        return await stats.overview(link, topology), schedules

    async def _read_lanes(self, client: Client) -> Any:
        from ..inspect import read_pauses_if_allowed, read_waiting_kinds, stats  # noqa: PLC0415

        link, topology, family, tenant = client.connection, client.topology, self.family, self.tenant
        families = topology.work_families if family is None else [topology.family(family)]
        lanes = [lane for each in families for lane in await stats.lanes(link, topology, each.name)]
        lanes = [lane for lane in lanes if tenant in (None, lane.tenant)]
        if self.json:
            return lanes, [], [], None
        pauses = await read_pauses_if_allowed(link, topology)
        pauses = [each for each in pauses if family in (None, each.family)]
        pauses = [each for each in pauses if tenant is None or each.tenant in (None, tenant)]
        past = None if family is None or tenant is not None else await _read_last_hour(client, family)
        return lanes, await read_waiting_kinds(link, topology, families), pauses, past

    def show(self, found: Any) -> None:
        """Print what was read."""
        if self.job is not None:
            job, explanation = found
            print_job(job, explanation, self.json)
        elif self.family is None and self.tenant is None:
            families, (schedules, paused) = found
            _print_families(families, self.json)
            _print_schedules(schedules, paused)
        else:
            lanes, waiting, pauses, past = found
            _print_lanes(lanes, self.family, self.tenant, self.json)
            _print_waiting(waiting)
            _print_paused(pauses)
            if past is not None and not self.json:
                _print_last_hour(past)

    def as_json(self, found: Any) -> dict[str, Any]:
        """Return what was read as an object of a line."""
        if self.job is not None:
            return {"job": _job_as_json(*found)}
        name = "families" if self.family is None and self.tenant is None else "lanes"
        return {name: [asdict(each) for each in found[0]]}


async def _read_last_hour(client: Client, family: str) -> Series | None:
    """Return the last hour of a family; None where nothing of it is known, or this user may not read it."""
    from ..metrics import read_history_if_there  # noqa: PLC0415

    link = client.connection
    link.optional += 1
    try:
        found = await read_history_if_there(link, client.topology, "minute", since_s=3600, family=family)
    except AccessDenied:
        return None
    finally:
        link.optional -= 1
    return None if found is None or family not in found.families else found.series(family)


def _print_last_hour(past: Series) -> None:
    sums = past.sums
    retried = f", {output.format_count(sums.retried, 'attempt')} failed and retried" if sums.retried else ""
    dead = f", {output.format_count(sums.dead, 'dead letter')}" if sums.dead else ""
    took = f", run p50/95/99 {format_percentiles(sums.runs)}" if sums.runs else ""
    output.print_line(f"\nlast hour {spark(past)} {sums.done:,} done{retried}{dead}{took}")


async def _find_job(
    client: Client, job: str, family: str | None, tenant: str | None
) -> tuple[JobStats, Explanation | None]:
    """Return a job, and why it waits if it has not ended."""
    from ..inspect import explain_job, find_and_describe  # noqa: PLC0415

    link, topology = client.connection, client.topology
    found, stored = await find_and_describe(link, topology, job, family=family, tenant=tenant)
    if found.state not in _UNFINISHED:
        return found, None
    return found, await explain_job(link, topology, found, stored, client.limit_rules)


def _print_families(found: list[FamilyStats], json: bool) -> None:
    if json:
        output.print_json([asdict(each) for each in found])
        return
    rows = []
    for each in found:
        if each.missing:
            rows.append([each.family, f"stream {each.stream} does not exist: run `aiqueue apply`"])
            continue
        rows.append(
            [
                each.family, f"{each.pending:,}", _format_in_flight(each),
                "-" if each.parked is None else f"{each.parked:,}", output.format_age(each.oldest_age_s),
                _format_rate(each.rate_in), _format_rate(each.rate_done), f"{each.lanes:,}",
                _format_size(each), "-" if each.dead is None else f"{each.dead:,}",
            ]
        )  # fmt: skip
    titles = ("pending", "in flight", "parked", "oldest", "in/s", "done/s", "lanes", "stored", "dead")
    output.print_table([Column("family", shrink=True), *(Column(title, right=True) for title in titles)], rows)
    _print_partial(found)
    _print_paused([pause for each in found for pause in each.pauses])
    dead = sum(each.dead or 0 for each in found)
    if dead:
        output.print_line(f"\n{output.format_count(dead, 'dead letter')}: `aiqueue dead ls` lists them")


def _print_schedules(count: int, paused: int) -> None:
    if count:
        of_them = f", {paused:,} of them paused" if paused else ""
        output.print_line(f"\n{output.format_count(count, 'schedule')}{of_them}: `aiqueue schedule ls` lists them")


def _format_in_flight(found: FamilyStats) -> str:
    """Return the jobs in flight. Redelivered ones are rare, and a column for them would not fit into 80 columns."""
    redelivered = f" ({found.redelivered:,} redelivered)" if found.redelivered else ""
    return f"{found.in_flight:,}{'+' if found.partial else ''}{redelivered}"


def _format_size(found: FamilyStats) -> str:
    limit = "" if found.size_limit_bytes is None else f"/{short_size(found.size_limit_bytes)}"
    return f"{short_size(found.size_bytes)}{limit}".replace(" ", "")


def _format_rate(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _print_lanes(found: list[LaneStats], family: str | None, tenant: str | None, json: bool) -> None:
    if json:
        output.print_json([asdict(each) for each in found])
        return
    scope = " ".join(part for part in (family and f"in {family}", tenant and f"of {tenant}") if part)
    if not found:
        output.print_line(f"no lanes {scope}: no jobs are queued and no worker is connected")
        return
    several = len({lane.family for lane in found}) > 1
    has_keys = any(lane.key_hash for lane in found)
    rows = [
        [
            *([lane.family] if several else []),
            "(all)" if lane.tenant == "*" else lane.tenant, lane.priority, f"{lane.pending:,}",
            f"{lane.in_flight:,}{'+' if lane.partial else ''}", f"{lane.redelivered:,}", f"{lane.parked:,}",
            output.format_age(lane.oldest_age_s),
            _format_limit(lane.limit), describe_lane_workers(lane), *([lane.shown_key] if has_keys else []),
        ]
        for lane in found
    ]  # fmt: skip
    columns = [
        *([Column("family", shrink=True)] if several else []),
        Column("tenant", shrink=True), Column("priority"), Column("pending", right=True),
        Column("in flight", right=True), Column("redelivered", right=True), Column("parked", right=True),
        Column("oldest", right=True), Column("limit", right=True), Column("workers"),
        *([Column("key", shrink=True)] if has_keys else []),
    ]  # fmt: skip
    output.print_table(columns, rows)
    _print_partial(found)
    if any(lane.pending and describe_lane_workers(lane) == "none" for lane in found):
        output.print_line("\nworkers none: jobs are pending, but no worker requests them")


def _print_waiting(found: Sequence[WaitingKind]) -> None:
    """Print the jobs of all tenants that wait until a worker knows their kind."""
    from ..inspect import describe_waiting  # noqa: PLC0415

    if found:
        output.print_line("")
    for each in found:
        output.print_line(f"{each.family}, all tenants: {describe_waiting(each)}")


def _print_paused(found: Sequence[Pause]) -> None:
    if found:
        output.print_line("")
    print_pauses(found)


def _print_partial(found: Sequence[FamilyStats | LaneStats]) -> None:
    if any(each.partial for each in found):
        output.print_line(
            "\nin flight +: at least so many, and fewer pending; parked and dead may be out of date. "
            "The cluster has not reported all: repeat"
        )


def describe_lane_workers(lane: LaneStats) -> str:
    """Return whether workers serve the lane.

    Workers whose slots are all in use are busy: they request no jobs. On an idle lane they wait for news of a job.
    """
    if lane.paused or lane.pause:
        return "paused"
    if lane.waits_for_limit:
        return "limited"
    if lane.waits_in_line:
        return "in line"
    if lane.pulls or lane.in_flight:
        return "ready" if lane.pulls else "busy"
    if lane.partial:
        return "?"
    return "idle" if lane.listening and not lane.pending else "none"


def _format_limit(value: int) -> str:
    return f"{value:,}" if value > 0 else "none"


def print_job(found: JobStats, explanation: Explanation | None, json: bool) -> None:
    """Print one job, why it waits, its timeline, children and result."""
    if json:
        output.print_json(_job_as_json(found, explanation))
        return
    state = output.apply_style(found.state.replace("_", " "), _STATES.get(found.state, "cyan"))
    output.print_line(
        f"job {output.apply_style(found.job_id, 'bold')}: {state}{f' ({found.note})' if found.note else ''}"
    )
    failure = found.failure or {}
    parked = found.state == "parked" and not found.attempt
    output.print_fields(
        [
            ("lane", output.format_lane(found.family, found.tenant, found.priority)),
            (found.limit_key, found.key),
            ("kind", found.kind or ""),
            ("unique", found.unique),
            ("child of", found.parent or ""),
            ("schedule", _format_schedule(found)),
            ("enqueued", output.format_ago(found.enqueued_at)),
            ("attempt", f"{found.attempt}" if found.attempt else ""),
            ("due" if parked else "next attempt", _format_due(found.next_attempt_at)),
            ("paused", describe_pause(found.pause) if found.pause else ""),
            ("reason", str(failure.get("reason") or "")),
            ("error", str(failure.get("error") or "")),
            ("dead letter", f"{found.dead_seq}: `aiqueue dead show {found.dead_seq}`" if found.dead_seq else ""),
        ]
    )
    if explanation is not None:
        output.print_line("")
        print_explanation(explanation)
    _print_timeline(found)
    if found.children:
        output.print_line(f"\nchildren: {found.child_count:,}")
        _print_children(found.children, "")
    if found.state == "done":
        text = output.format_json(found.result)
        output.print_line(f"\nresult\n{text[:RESULT_CHARACTERS_MAX]}")
        if len(text) > RESULT_CHARACTERS_MAX:
            whole = f"`aiqueue inspect {found.job_id} --json` prints them all"
            output.print_line(f"… the first {RESULT_CHARACTERS_MAX:,} of {len(text):,} characters: {whole}")


def _job_as_json(found: JobStats, explanation: Explanation | None) -> dict[str, Any]:
    return asdict(found) | {"explanation": explanation and asdict(explanation)}


def _print_children(children: Sequence[ChildStats], indent: str) -> None:
    """Print a tree of jobs, one a line."""
    for each in children:
        state = output.apply_style(each.state.replace("_", " "), _STATES.get(each.state, "cyan"))
        output.print_line(f"{indent}{each.name}  {each.job_id}  {each.kind}  {state}")
        _print_children(each.children, f"{indent}  ")


def _format_schedule(found: JobStats) -> str:
    if found.scheduled_for is None:
        return found.schedule
    return f"{found.schedule}, for {output.format_time(found.scheduled_for)}"


def _format_due(at: float | None) -> str:
    if at is None:
        return ""
    left_s = at - time.time()
    return f"in {output.format_age(left_s)} ({output.format_time(at)})" if left_s >= 0 else output.format_ago(at)


def _print_timeline(found: JobStats) -> None:
    events = found.timeline
    days = {time.strftime("%Y-%m-%d", time.localtime(event.at)) for event in events if event.at is not None}
    day = f" of {days.pop()}" if len(days) == 1 else ""
    cut = " (entries in the middle of the journal are left out)" if found.entries_cut else ""
    output.print_line(f"\ntimeline{day}{cut}")
    rows = [
        [
            "?" if event.at is None else format_timestamp(event.at, with_day=not day),
            "" if event.after_s is None else f"+{format_span(event.after_s)}",
            event.event,
            f"{event.attempt}" if event.attempt else "",
            describe_event(event),
        ]
        for event in events
    ]
    if found.state in _UNFINISHED:
        rows.append(["now", "", found.state.replace("_", " "), "", ""])
    columns = [Column("time"), Column("after", right=True), Column("event"), Column("attempt", right=True)]
    output.print_table([*columns, Column("details", shrink=True, prose=True)], rows)
