"""Which rows and columns each place has, and what its rows stand for."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ...units import short_size
from .. import output
from ..history import OTHER, format_percentiles, spark
from ..inspect import describe_lane_workers
from ..jobs import format_due, format_listed_age
from ..workers import STATES as WORKER_STATES
from ..workers import describe_worker, format_oldest, format_slots
from .figures import FamilyRow, Figures, KindRow
from .place import Place
from .table import Table, TopField

if TYPE_CHECKING:
    from ...inspect import FamilyStats, LaneStats, ListedJob, WorkerStats
    from ...lanes import Pause
    from ...metrics import Series

SPARK_MIN, SPARK_MAX = 8, 30
NAME_MIN = 16  # cells of a name: rather than to cut it more, columns are left out
ID_CELLS = 26  # of a job that has no id of its own
LANE_STYLES = {"none": "red", "paused": "yellow", "limited": "yellow", "ready": "green"}
JOB_STYLES = {"failed": "red", "retrying": "yellow", "in_flight": "cyan", "waiting": "yellow"}


class RowTarget(NamedTuple):
    """Whose jobs a row stands for: what a pause or a replay of it is about. None: all. `pause`: the one that holds.

    `seq`: of a dead letter. `count`: how many dead letters there are, where that is known.
    """

    family: str
    tenant: str | None = None
    kind: str | None = None
    key: str | None = None
    pause: Pause | None = None
    seq: int = 0
    name: str = ""


def table_of(figures: Figures) -> Table:
    """Return the table of the place of these figures. Raises KeyError for a place without one."""
    return _TABLES[figures.place.pane](figures)


def inside(place: Place, row: Any) -> Place | None:
    """Return where a row leads to; None: nowhere."""
    match place.pane:
        case "families":
            return None if row.is_inbox or row.stats.missing else Place("lanes", row.stats.family)
        case "lanes":
            return Place("jobs", row.family, row.tenant, row.priority)
        case "jobs" | "dead":
            return Place("job", row.family, row.tenant, row.priority, row.job_id, row)
        case "workers":
            return replace(place, pane="worker", item=row.name)
        case "kinds":
            return Place("lanes", row.past.family)
        case "pauses":
            return Place("lanes", row.family, row.tenant or "")
    return None


def target_of(place: Place, row: Any) -> RowTarget | None:
    """Return whose jobs a row stands for; None: a worker's, or nobody's."""
    match place.pane:
        case "families":
            whole = next(
                (each for each in row.stats.pauses if each.scope == (row.stats.family, None, None, None)), None
            )
            return None if row.is_inbox else RowTarget(row.stats.family, pause=whole)
        case "lanes":
            tenant = None if row.tenant == "*" else row.tenant
            return RowTarget(row.family, tenant, key=row.key or None, pause=row.pause)
        case "jobs":
            return RowTarget(row.family, row.tenant, seq=row.seq if row.state == "failed" else 0, name=row.job_id)
        case "dead":
            return RowTarget(row.family, row.tenant, seq=row.seq, name=row.job_id)
        case "kinds":
            return None if row.past.name == OTHER else RowTarget(row.past.family, kind=row.past.name)
        case "pauses":
            return RowTarget(row.family, row.tenant, row.kind, row.key, row)
    return None


# -- the tables


def _families(figures: Figures) -> Table:
    fields = [
        _words("family", lambda row: row.stats.family, _family_style, floor=NAME_MIN),
        *_depths(lambda row: row.stats),
        _count("dead", lambda row: row.stats.dead, _red_if_any),
        TopField("oldest", lambda row: output.format_age(row.stats.oldest_age_s), _stat("oldest_age_s"), width=6),
        _rate("in/s", lambda row: row.stats.rate_in, drop=5),
        _rate("done/s", lambda row: row.rates.done, drop=1),
        _rate("fail/s", lambda row: row.rates.failed, _red_if_any, drop=2),
        _count("lanes", lambda row: row.stats.lanes, drop=6),
        TopField("workers", lambda row: number(row.workers), lambda row: row.workers, _workers_style, drop=7),
        TopField("stored", lambda row: _size(row.stats.size_bytes), _stat("size_bytes"), drop=8),
        _spark(lambda row: row.past),
    ]

    def name(row: FamilyRow) -> str:
        return row.stats.family

    return Table(fields, figures.families, name, name, "no families", _family_note)


def _stat(name: str) -> Callable[[FamilyRow], Any]:
    return lambda row: getattr(row.stats, name)


def _family_note(row: FamilyRow) -> str:
    return f"stream {row.stats.stream} does not exist: run `aiqueue apply`" if row.stats.missing else ""


def _family_style(row: FamilyRow) -> str:
    return "yellow" if row.stats.pauses else "bold"


def _workers_style(row: FamilyRow) -> str:
    return "red" if row.workers == 0 and row.stats.pending else ""


def _lanes(figures: Figures) -> Table:
    rows = figures.lanes

    def workers(row: LaneStats) -> str:
        said = describe_lane_workers(row)
        is_served = said == "none" and any(
            each.is_busy and each.serves_lane(row.family, row.tenant) for each in figures.workers or ()
        )
        return "busy" if is_served else said  # their slots are taken by jobs of other lanes

    fields = [
        _words("tenant", lambda row: "(all)" if row.tenant == "*" else row.tenant, _lane_style, floor=NAME_MIN),
        TopField("priority", lambda row: row.priority, right=False, drop=2),
        *_depths(lambda row: row),
        _count("redelivered", lambda row: row.redelivered, drop=6),
        TopField("oldest", _lane_oldest, lambda row: row.oldest_age_s, width=6),
        TopField("limit", lambda row: number(row.limit) if row.limit > 0 else "none", lambda row: row.limit, drop=5),
        TopField(
            "workers", workers, workers, lambda row: LANE_STYLES.get(workers(row), ""), right=False, low=True, drop=1
        ),
        *([_words("key", lambda row: row.shown_key)] if any(row.key_hash for row in rows) else []),
    ]

    def name(row: LaneStats) -> str:
        return f"{row.tenant}.{row.priority}.{row.key_hash}"

    def search(row: LaneStats) -> str:
        return f"{row.tenant} {row.priority} {row.shown_key} {workers(row)}"

    return Table(fields, rows, name, search, "no lanes: no jobs are queued and no worker is connected")


def _lane_style(row: LaneStats) -> str:
    return "yellow" if row.pause else "bold"


def _lane_oldest(row: LaneStats) -> str:
    return "…" if row.pending and row.oldest_age_s is None else output.format_age(row.oldest_age_s)


def _jobs(figures: Figures) -> Table:
    now = time.time()
    fields = [
        _words("job", lambda row: row.job_id, _bold, floor=ID_CELLS),
        *([] if figures.place.family else [_words("family", lambda row: row.family, drop=7)]),
        *([] if figures.place.priority else [_words("lane", lambda row: f"{row.tenant}/{row.priority}", floor=12)]),
        _words("kind", lambda row: row.kind, floor=12),
        TopField("state", _job_state, _job_state, lambda row: JOB_STYLES.get(row.state, ""), right=False, low=True),
        TopField("age", lambda row: format_listed_age(row, now), lambda row: _since(row.enqueued_at)),
        TopField("due", lambda row: format_due(row, now), lambda row: row.due_at, low=True, drop=4),
        TopField("message", _message, right=False, grows=True, floor=12, drop=9),
    ]
    return Table(fields, figures.jobs, _job_key, _job_search, f"no jobs of {figures.place.scope} wait or run")


def _dead(figures: Figures) -> Table:
    now, several = time.time(), not figures.place.family
    fields = [
        TopField("seq", lambda row: f"{row.seq}", lambda row: row.seq, low=True),
        _words("job", lambda row: row.job_id, _bold, floor=ID_CELLS),
        *([_words("family", lambda row: row.family, drop=6)] if several else []),
        *(
            []
            if figures.place.priority
            else [_words("lane", lambda row: f"{row.tenant}/{row.priority}", floor=12, drop=5)]
        ),
        _words("kind", lambda row: row.kind, floor=10, drop=7),
        TopField("failed", lambda row: format_listed_age(row, now), lambda row: _since(row.failed_at)),
        _words("error", _error, lambda _: "red", floor=22),
    ]
    return Table(fields, figures.jobs, _job_key, _job_search, f"no dead letters of {figures.place.scope}")


def _bold(_: Any) -> str:
    return "bold"


def _error(row: ListedJob) -> str:
    return row.error if row.reason == "attempts" and row.error else f"{row.reason}: {row.error}"


def _job_state(row: ListedJob) -> str:
    return row.state.replace("_", " ")


def _job_key(row: ListedJob) -> str:
    return f"{row.stream}.{row.seq}"


def _job_search(row: ListedJob) -> str:
    return f"{row.job_id} {row.family} {row.tenant} {row.priority} {row.kind} {row.state} {row.reason} {row.error}"


def _message(row: ListedJob) -> str:
    return f"({row.payload_problem})" if row.payload_problem else output.format_json(row.payload, short=True)


def _since(at: float | None) -> float | None:
    return None if at is None else time.time() - at


def _workers(figures: Figures) -> Table:
    place = figures.place
    rows = [
        each
        for each in figures.workers or ()
        if place.family in ("", *each.families)
        and (place.tenant in ("", "*") or each.tenants is None or place.tenant in each.tenants)
    ]
    fields = [
        _words("worker", lambda row: row.name, _bold),
        _words("state", lambda row: row.state, lambda row: WORKER_STATES.get(row.state, ""), floor=12),
        TopField("slots", format_slots, lambda row: row.running),
        TopField("oldest", lambda row: format_oldest(row, whole=False), lambda row: row.oldest and row.oldest.age_s),
        _count("lanes", lambda row: row.lanes, drop=3),
        _count("done", lambda row: row.done, drop=2),
        TopField("memory", lambda row: _size(row.rss_bytes), lambda row: row.rss_bytes, drop=4),
        TopField("up", _up, lambda row: row.started_at or None, drop=5),
        _words("host", lambda row: row.host, drop=6),
        _words("what", lambda row: describe_worker(row) or ", ".join(row.families), floor=10, drop=7),
    ]
    empty = f"no worker of {place.scope} is running: `aiqueue work MODULE:WORKER` starts one"
    return Table(fields, rows, lambda row: row.name, lambda row: f"{row.name} {row.state} {row.host}", empty)


def _up(row: WorkerStats) -> str:
    return output.format_age(time.time() - row.started_at) if row.started_at else "?"


def _kinds(figures: Figures) -> Table:
    fields = [
        _words("kind", lambda row: "(all others)" if row.past.name == OTHER else row.past.name, _bold),
        *([] if figures.place.family else [_words("family", lambda row: row.past.family, drop=5)]),
        _count("done", lambda row: row.sums.done),
        _count("failed", lambda row: row.sums.failed, _red_if_any),
        _count("dead", lambda row: row.sums.dead, drop=3),
        _rate("done/s", lambda row: row.rates.done, drop=6),
        _rate("fail/s", lambda row: row.rates.failed, _red_if_any, drop=7),
        TopField("wait p50/95/99", lambda row: format_percentiles(row.sums.waits), drop=2),
        TopField("run p50/95/99", lambda row: format_percentiles(row.sums.runs)),
        _spark(lambda row: row.past),
    ]

    def search(row: KindRow) -> str:
        return f"{row.past.family} {row.past.name}"

    empty = f"no jobs of {figures.place.scope} were counted in the last hour"
    return Table(fields, figures.kinds, search, search, empty)


def _pauses(figures: Figures) -> Table:
    fields = [
        _words("paused", lambda row: str(row.scope), lambda _: "yellow"),
        TopField("since", lambda row: output.format_age(time.time() - row.since), lambda row: row.since, low=True),
        _words("by", lambda row: row.by, drop=2),
        TopField("until", lambda row: "-" if row.until is None else output.format_time(row.until), drop=3),
        _words("why", lambda row: row.reason, floor=10, drop=1),
    ]

    def search(row: Pause) -> str:
        return f"{row.scope} {row.by} {row.reason}"

    return Table(fields, figures.pauses, lambda row: str(row.scope), search, "nothing is paused")


_TABLES: dict[str, Callable[[Figures], Table]] = {
    "families": _families, "lanes": _lanes, "jobs": _jobs, "dead": _dead, "workers": _workers, "kinds": _kinds,
    "pauses": _pauses,
}  # fmt: skip


# -- columns and cells


def _words(
    title: str, text: Callable[[Any], str], style: Callable[[Any], str] = lambda _: "", *, floor: int = 8, drop: int = 0
) -> TopField:
    """Return a column of names or prose, which is cut where there is no room."""
    return TopField(title, text, text, style, right=False, low=True, grows=True, floor=floor, drop=drop)


def _count(
    title: str, value: Callable[[Any], int | None], style: Callable[[int | None], str] = lambda _: "", *, drop: int = 0
) -> TopField:
    return TopField(title, lambda row: number(value(row)), value, lambda row: style(value(row)), drop=drop)


def _red_if_any(value: float | None) -> str:
    return "red" if value else ""


def _depths(stats: Callable[[Any], FamilyStats | LaneStats]) -> list[TopField]:
    """Return the columns of a family or lane that say how many jobs it has: ``?`` at most so many, ``+`` at least."""

    def pending(row: Any) -> str:
        return f"{number(stats(row).pending)}{'?' if stats(row).partial else ''}"

    def in_flight(row: Any) -> str:
        return f"{number(stats(row).in_flight)}{'+' if stats(row).partial else ''}"

    return [
        TopField("pending", pending, lambda row: stats(row).pending),
        TopField("in flight", in_flight, lambda row: stats(row).in_flight),
        _count("parked", lambda row: stats(row).parked, drop=3),
    ]


def _rate(
    title: str,
    value: Callable[[Any], float | None],
    style: Callable[[float | None], str] = lambda _: "",
    *,
    drop: int = 0,
) -> TopField:
    return TopField(title, lambda row: rate(value(row)), value, lambda row: style(value(row)), width=6, drop=drop)


def _spark(past: Callable[[Any], Series | None]) -> TopField:
    def draw(row: Any, width: int) -> str:
        series = past(row)
        return "" if series is None else spark(series, width)

    return TopField("last hour", lambda _: "", draw=draw, width=SPARK_MIN, width_max=SPARK_MAX, drop=4)


def _size(value: int | None) -> str:
    return "?" if value is None else short_size(value).replace(" ", "")


def number(value: int | None) -> str:
    """Format a count in at most 6 characters: "-", "12,345", "123k", "1.2M"."""
    if value is None:
        return "-"
    if value < 100_000:
        return f"{value:,}"
    if value < 999_500:
        return f"{value / 1e3:.0f}k"
    return f"{value / 1e6:.1f}M" if value < 99_950_000 else f"{value / 1e6:,.0f}M"


def rate(value: float | None) -> str:
    """Format a rate in at most 6 characters: "-", "0", "0.02", "1.5", "250"."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if value < 0.1:
        return f"{value:.2f}" if value >= 0.005 else "<0.01"
    return f"{value:.1f}" if value < 10 else number(round(value))
