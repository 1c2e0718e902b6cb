"""``history``: how many jobs ended, how, and how long they waited and ran, over time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput
from . import output
from .options import Json, ServerOptions, add_command, duration_option
from .output import Column
from .timeline import format_span

if TYPE_CHECKING:
    from ..client import Client
    from ..metrics import History, Point, Series
    from .json_keys import HistoryJson, PercentilesJson, PointJson, SeriesJson

SINCE_S, SINCE_MAX_S = 3600.0, 90 * 86400.0
MINUTES_MAX_S = 3 * 3600.0  # beyond that, a point is an hour
SPARK_MAX = 30  # characters of a line
LEVELS = "▁▂▃▄▅▆▇█"
ZERO, GAP = "_", "·"
OTHER = "=other"
SHARES = (0.5, 0.95, 0.99)


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "history",
        examples=(
            "  aiqueue history                            the last hour, by family",
            "  aiqueue history agent.tasks --since 7d     a family's kinds",
            "  aiqueue history agent.tasks --tenants      its tenants, by the hour",
        ),
    )(history)


def history(
    options: ServerOptions,
    family: Annotated[str | None, typer.Argument(metavar="FAMILY", help="Only this family, by kind.")] = None,
    *,
    since: Annotated[
        float | None,
        duration_option("How far to go back, such as 30m or 7d. Default: 1h. Beyond 3h a point is an hour."),
    ] = None,
    tenants: Annotated[bool, typer.Option("--tenants", metavar="", help="By tenant, an hour a point.")] = False,
    json: Json = False,
) -> None:
    """Show what became of jobs over time, and how long they waited and ran.

    Workers count their jobs and report every 5 seconds. A point in which none has reported is a gap.
    """
    from ..metrics import History  # noqa: PLC0415

    since_s = min(SINCE_S if since is None else since, SINCE_MAX_S)
    if since_s <= 0:
        raise BadInput("--since must be above 0")
    level: Any = "tenant" if tenants else "minute" if since_s <= MINUTES_MAX_S else "hour"

    async def fetch(client: Client) -> History:
        if family is not None:
            client.topology.family(family)
        found = History(client.connection, client.topology, level, since_s=since_s, family=family)
        await found.update()
        return found

    found = options.run_with_client(fetch, reads=True)
    shown = _choose(found, family, tenants=tenants)
    if json:
        series = list(map(_to_plain, shown))
        printed: HistoryJson = {"level": level, "now": found.now, "since_s": since_s, "series": series}
        output.print_json(printed)
    elif not shown:
        output.print_line(f"no jobs were counted in the last {output.format_age(since_s)}")
    else:
        _print_series(shown, by_family=family is None and not tenants, tenants=tenants)


def _choose(found: History, family: str | None, *, tenants: bool) -> list[Series]:
    """Return the series to show: of families, or of the kinds or tenants of one or of all."""
    if family is None and not tenants:
        return [found.series(each) for each in found.families]
    families = found.families if family is None else [family]
    return [found.series(each, name) for each in families for name in found.names(each)]


def _print_series(shown: Sequence[Series], *, by_family: bool, tenants: bool) -> None:
    several = len({each.family for each in shown}) > 1 and not by_family
    rows = [
        [
            *([each.family] if several else []),
            each.family if by_family else "(all others)" if each.name == OTHER else each.name, spark(each),
            f"{sums.done:,}", f"{sums.failed:,}", f"{sums.dead:,}",
            *([format_mean(sums.wait_s, sums.ended), format_mean(sums.run_s, sums.ended)] if tenants
              else [format_percentiles(sums.waits), format_percentiles(sums.runs)]),
        ]
        for each in shown
        for sums in (each.sums,)
    ]  # fmt: skip
    times = ("wait mean", "run mean") if tenants else ("wait p50/95/99", "run p50/95/99")
    columns = [
        *([Column("family", shrink=True)] if several else []),
        Column("family" if by_family else "tenant" if tenants else "kind", shrink=True),
        Column("ended", shrink=True, prose=True), Column("done", right=True), Column("failed", right=True),
        Column("dead", right=True), *(Column(title, right=True) for title in times),
    ]  # fmt: skip
    output.print_table(columns, rows)
    if len(shown[0].points) > 1:
        output.print_line(f"\n{_describe_axis(shown[0])}")
    if any(each.name == OTHER for each in shown):
        what = "tenants beyond the first 1,000 of a worker" if tenants else "kinds without a handler"
        output.print_line(f"\n(all others): {what}")


def _describe_axis(series: Series) -> str:
    """Return when the first character of a line begins, and for how long each one stands."""
    points = series.points
    per = _points_a_character(points, SPARK_MAX)
    step_s = per * (points[1].at - points[0].at)
    return f"ended: {output.format_age(step_s)} a character, the first from {output.format_time(points[0].at)} on"


def _points_a_character(points: Sequence[Point], width: int) -> int:
    return max(1, -(-len(points) // width))


def spark(series: Series, width: int = SPARK_MAX) -> str:
    """Draw how many attempts ended over time, the newest last. ``_`` is none, ``·`` that nobody has reported."""
    points = series.points
    per = _points_a_character(points, width)
    rates: list[float | None] = []
    for end in range(len(points) - (len(points) - 1) // per * per, len(points) + 1, per):
        known = [each.rate for each in points[max(0, end - per) : end] if each.rate is not None]
        rates.append(sum(known) / len(known) if known else None)
    most = max((each for each in rates if each is not None), default=0.0)
    return "".join(
        GAP if each is None else ZERO if each == 0 else LEVELS[min(7, int(each / most * 8))] for each in rates
    )


def format_percentiles(histogram: Any) -> str:
    """Return the median and two percentiles, such as "12ms/80ms/1.2s"; "-" where nothing is counted."""
    from ..metrics import percentile  # noqa: PLC0415

    found = [percentile(histogram, share) for share in SHARES]
    return "/".join(_format_time(each) for each in found if each is not None) or "-"


def format_mean(total_s: float, count: int) -> str:
    """Return the mean, "-" where nothing is counted."""
    return _format_time(total_s / count) if count else "-"


def _format_time(value_s: float) -> str:
    return "<1ms" if value_s < 0.001 else format_span(value_s)


def _to_plain(series: Series) -> SeriesJson:
    points: list[PointJson] = [
        {
            "at": each.at, "length_s": each.length_s, "workers": each.workers,
            "counts": None if each.sums is None else {
                "done": each.sums.done, "failed": each.sums.failed, "retried": each.sums.retried,
                "dead": each.sums.dead, "cancelled": each.sums.cancelled, "run_s": each.sums.run_s,
                "wait_s": each.sums.wait_s,
            },
        }
        for each in series.points
    ]  # fmt: skip
    sums = series.sums
    return {
        "family": series.family, "name": series.name,
        "wait": _percentiles(sums.waits), "run": _percentiles(sums.runs), "points": points,
    }  # fmt: skip


def _percentiles(histogram: Any) -> PercentilesJson:
    from ..metrics import percentile  # noqa: PLC0415

    half, most, nearly_all = (percentile(histogram, share) for share in SHARES)
    return {"p50_s": half, "p95_s": most, "p99_s": nearly_all}
