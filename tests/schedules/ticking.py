"""Ticks of a recurrence as a list, and recurrences of all kinds."""

from __future__ import annotations

from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

from hypothesis import strategies as st

from aiqueue.schedules import Calendar, Cron, Every, Once, Recurrence

ZONES = (
    "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago", "UTC", "Antarctica/Troll",
    "Africa/Casablanca", "Asia/Kathmandu", "Pacific/Apia",
)  # fmt: skip
LINES = (
    "0 6 * * mon-fri", "* * * * *", "*/15 * * * *", "0 * * * *", "30 2 * * *", "0 0 * * *", "0 0 31 * *", "0 0 29 2 *",
    "0 0 29 2 */7", "0 12 13 * fri", "*/7 2,3 * * *", "59 23 31 12 *", "30 */2 * * * *", "* * * * * *",
    "*/10 0-59/7 1-3 * * *", "0 0 */2 * 0-6", "@weekly", "@Hourly",
)  # fmt: skip


def ticks(recurrence: Recurrence, begin: float, end: float) -> list[float]:
    """The ticks after `begin` and not after `end`."""
    found: list[float] = []
    tick = recurrence.next_after(begin)
    while tick is not None and tick <= end:
        found.append(tick)
        tick = recurrence.next_after(tick)
    return found


def at(text: str) -> float:
    """The seconds since the epoch of a time in UTC."""
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def local(tick: float, zone: str) -> str:
    return datetime.fromtimestamp(tick, ZoneInfo(zone)).isoformat(" ", "minutes")


def recurrences() -> st.SearchStrategy[Recurrence]:
    """Of all kinds, often with start, end and jitter."""
    times = st.integers(0, 7_000_000_000_000).map(lambda ms: ms / 1000)
    bounds = {
        "jitter": st.sampled_from([0, "2s", "1h"]),
        "start": st.none() | st.floats(0, 1.9e9),
        "end": st.none() | st.floats(1.9e9, 7e9),
    }
    zones = st.sampled_from(ZONES)
    dates = st.dates(date(1970, 1, 1), date(2060, 12, 31))
    clock = st.sampled_from(["00:00", "02:30", "23:59:59", "03:00"])
    calendars = [
        st.builds(Calendar, **{unit: st.integers(1, most)}, time=clock, tz=zones, starting=dates, **bounds)
        for unit, most in {"years": 9, "months": 40, "weeks": 9, "days": 400}.items()
    ]
    return st.one_of(
        st.builds(Cron, st.sampled_from(LINES), tz=zones, **bounds),
        st.builds(Every, st.integers(1000, 10**9).map(lambda ms: ms / 1000), starting=times, **bounds),
        *calendars,
        st.builds(Once, times, **bounds),
    )
