"""Where a zone skips or repeats an hour: what fires, and when."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiqueue.schedules import Calendar, Cron, Recurrence

from .ticking import at, local, ticks

BERLIN, NEW_YORK, LORD_HOWE, SANTIAGO = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago"


@pytest.mark.parametrize(
    ("line", "zone", "from_utc", "expected"),
    [
        # daily, at a time that is skipped: moved behind the gap by its length
        ("30 2 * * *", BERLIN, "2026-03-28", ["03-28 02:30+01:00", "03-29 03:30+02:00", "03-30 02:30+02:00"]),
        ("30 2 * * *", NEW_YORK, "2026-03-07", ["03-07 02:30-05:00", "03-08 03:30-04:00", "03-09 02:30-04:00"]),
        ("15 2 * * *", LORD_HOWE, "2026-10-02 15:00", ["10-03 02:15+10:30", "10-04 02:45+11:00", "10-05 02:15+11:00"]),
        ("0 0 * * *", SANTIAGO, "2026-09-05", ["09-05 00:00-04:00", "09-06 01:00-03:00", "09-07 00:00-03:00"]),
        # daily, at a time that is repeated: the first of both
        ("30 2 * * *", BERLIN, "2026-10-24", ["10-24 02:30+02:00", "10-25 02:30+02:00", "10-26 02:30+01:00"]),
        ("30 1 * * *", NEW_YORK, "2026-10-31", ["10-31 01:30-04:00", "11-01 01:30-04:00", "11-02 01:30-05:00"]),
        ("45 1 * * *", LORD_HOWE, "2026-04-03 14:00", ["04-04 01:45+11:00", "04-05 01:45+11:00", "04-06 01:45+10:30"]),
        ("30 23 * * *", SANTIAGO, "2026-04-04", ["04-03 23:30-03:00", "04-04 23:30-03:00", "04-05 23:30-04:00"]),
        # daily, right after a skipped and at the end of a repeated hour
        ("0 3 * * *", BERLIN, "2026-03-28 12:00", ["03-29 03:00+02:00", "03-30 03:00+02:00"]),
        ("0 3 * * *", BERLIN, "2026-10-24 12:00", ["10-25 03:00+01:00", "10-26 03:00+01:00"]),
        ("0 0 * * *", SANTIAGO, "2026-04-04 12:00", ["04-05 00:00-04:00", "04-06 00:00-04:00"]),
        # the weekday is that of the time in the line
        ("0 0 * * sun", SANTIAGO, "2026-08-31", ["09-06 01:00-03:00", "09-13 00:00-03:00"]),
        # two times that are one instant are one tick, and ticks stay in order
        ("30 2,3 * * *", BERLIN, "2026-03-29", ["03-29 03:30+02:00", "03-30 02:30+02:00", "03-30 03:30+02:00"]),
        ("15,40 2 * * *", LORD_HOWE, "2026-10-03 14:00",
         ["10-04 02:40+11:00", "10-04 02:45+11:00", "10-05 02:15+11:00"]),
        # hourly: every hour of the real clock
        ("0 * * * *", BERLIN, "2026-03-28 23:30", ["03-29 01:00+01:00", "03-29 03:00+02:00", "03-29 04:00+02:00"]),
        ("0 * * * *", BERLIN, "2026-10-24 23:30",
         ["10-25 02:00+02:00", "10-25 02:00+01:00", "10-25 03:00+01:00", "10-25 04:00+01:00"]),
        ("0 * * * *", NEW_YORK, "2026-03-08 05:30", ["03-08 01:00-05:00", "03-08 03:00-04:00", "03-08 04:00-04:00"]),
        ("0 * * * *", NEW_YORK, "2026-11-01 04:30", ["11-01 01:00-04:00", "11-01 01:00-05:00", "11-01 02:00-05:00"]),
        ("0 * * * *", LORD_HOWE, "2026-10-03 14:00", ["10-04 01:00+10:30", "10-04 03:00+11:00", "10-04 04:00+11:00"]),
        ("0 * * * *", LORD_HOWE, "2026-04-04 13:30", ["04-05 01:00+11:00", "04-05 02:00+10:30", "04-05 03:00+10:30"]),
        ("30 * * * *", LORD_HOWE, "2026-04-04 14:00", ["04-05 01:30+11:00", "04-05 01:30+10:30", "04-05 02:30+10:30"]),
        ("0 * * * *", SANTIAGO, "2026-09-06 02:30", ["09-05 23:00-04:00", "09-06 01:00-03:00", "09-06 02:00-03:00"]),
        ("0 * * * *", SANTIAGO, "2026-04-05 01:30", ["04-04 23:00-03:00", "04-04 23:00-04:00", "04-05 00:00-04:00"]),
        # every 15 minutes
        ("*/15 * * * *", BERLIN, "2026-03-29 00:30", ["03-29 01:45+01:00", "03-29 03:00+02:00", "03-29 03:15+02:00"]),
        ("*/15 * * * *", BERLIN, "2026-10-25 00:30", ["10-25 02:45+02:00", "10-25 02:00+01:00", "10-25 02:15+01:00"]),
        ("*/15 * * * *", NEW_YORK, "2026-03-08 06:30", ["03-08 01:45-05:00", "03-08 03:00-04:00", "03-08 03:15-04:00"]),
        ("*/15 * * * *", NEW_YORK, "2026-11-01 05:30", ["11-01 01:45-04:00", "11-01 01:00-05:00", "11-01 01:15-05:00"]),
        ("*/15 * * * *", LORD_HOWE, "2026-10-03 15:00",
         ["10-04 01:45+10:30", "10-04 02:30+11:00", "10-04 02:45+11:00"]),
        ("*/15 * * * *", LORD_HOWE, "2026-04-04 14:30",
         ["04-05 01:45+11:00", "04-05 01:30+10:30", "04-05 01:45+10:30"]),
        ("*/15 * * * *", SANTIAGO, "2026-09-06 03:30", ["09-05 23:45-04:00", "09-06 01:00-03:00", "09-06 01:15-03:00"]),
        ("*/15 * * * *", SANTIAGO, "2026-04-05 02:30", ["04-04 23:45-03:00", "04-04 23:00-04:00", "04-04 23:15-04:00"]),
        # some times a day, in a repeated hour: each once
        ("*/30 1-2 * * *", BERLIN, "2026-10-24 23:10",
         ["10-25 01:30+02:00", "10-25 02:00+02:00", "10-25 02:30+02:00", "10-26 01:00+01:00"]),
        # monthly on the 31st: months without it have no tick
        ("30 2 31 * *", BERLIN, "2024-02-01", ["03-31 03:30+02:00", "05-31 02:30+02:00", "07-31 02:30+02:00"]),
        ("30 2 31 * *", BERLIN, "2027-09-01", ["10-31 02:30+02:00", "12-31 02:30+01:00", "01-31 02:30+01:00"]),
        ("30 2 31 * *", NEW_YORK, "2026-02-01", ["03-31 02:30-04:00", "05-31 02:30-04:00", "07-31 02:30-04:00"]),
        ("15 2 31 * *", LORD_HOWE, "2026-08-31", ["10-31 02:15+11:00", "12-31 02:15+11:00", "01-31 02:15+11:00"]),
        ("0 0 31 * *", SANTIAGO, "2026-02-01", ["03-31 00:00-03:00", "05-31 00:00-04:00", "07-31 00:00-04:00"]),
        # a day that a zone skips as a whole, also over the turn of a year
        ("0 20 31 12 *", "Pacific/Kanton", "1994-12-01", ["01-01 20:00+13:00", "12-31 20:00+13:00"]),
        ("0 6 * * *", "Pacific/Apia", "2011-12-29", ["12-29 06:00-10:00", "12-31 06:00+14:00", "01-01 06:00+14:00"]),
    ],
)  # fmt: skip
def test_a_line_fires_as_the_table_says(line: str, zone: str, from_utc: str, expected: list[str]) -> None:
    begin = at(from_utc)
    found = ticks(Cron(line, tz=zone), begin, begin + (20 if " 31 " not in line else 400) * 86_400)
    assert [local(each, zone)[5:] for each in found[: len(expected)]] == expected


@pytest.mark.parametrize(
    ("recurrence", "zone", "from_utc", "expected"),
    [
        # monthly on the 31st, from the calendar: the last day of shorter months
        (Calendar(months=1, starting="2024-01-31", time="02:30", tz=BERLIN), BERLIN, "2024-01-01",
         ["01-31 02:30+01:00", "02-29 02:30+01:00", "03-31 03:30+02:00", "04-30 02:30+02:00", "05-31 02:30+02:00"]),
        (Calendar(months=1, starting="2027-08-31", time="02:30", tz=BERLIN), BERLIN, "2027-09-01",
         ["09-30 02:30+02:00", "10-31 02:30+02:00", "11-30 02:30+01:00"]),
        (Calendar(days=1, time="02:30", tz=NEW_YORK), NEW_YORK, "2026-03-07",
         ["03-07 02:30-05:00", "03-08 03:30-04:00", "03-09 02:30-04:00"]),
        (Calendar(days=1, time="01:45", tz=LORD_HOWE), LORD_HOWE, "2026-04-04 12:00",
         ["04-05 01:45+11:00", "04-06 01:45+10:30"]),
        (Calendar(weeks=1, starting="2026-08-30", tz=SANTIAGO), SANTIAGO, "2026-08-30",
         ["08-30 00:00-04:00", "09-06 01:00-03:00", "09-13 00:00-03:00"]),
        (Calendar(years=1, starting="2024-02-29", time="06:00", tz=BERLIN), BERLIN, "2027-12-01",
         ["02-29 06:00+01:00", "02-28 06:00+01:00", "02-28 06:00+01:00"]),
    ],
)  # fmt: skip
def test_a_calendar_interval_fires_as_the_table_says(
    recurrence: Recurrence, zone: str, from_utc: str, expected: list[str]
) -> None:
    tick: float | None = at(from_utc)
    found = []
    for _ in expected:
        tick = recurrence.next_after(tick or 0)
        assert tick is not None
        found.append(local(tick, zone)[5:])
    assert found == expected


CHANGES = (
    (BERLIN, "2026-03-29"), (BERLIN, "2026-10-25"), (NEW_YORK, "2026-03-08"), (NEW_YORK, "2026-11-01"),
    (LORD_HOWE, "2026-10-04"), (LORD_HOWE, "2026-04-05"), (SANTIAGO, "2026-09-06"), (SANTIAGO, "2026-04-05"),
    ("Antarctica/Troll", "2026-03-29"), ("Pacific/Apia", "2011-12-30"), ("Africa/Casablanca", "2026-02-15"),
)  # fmt: skip
Values = tuple[str, frozenset[int]]  # a field as it is written, and what it means


@st.composite
def fields(draw: st.DrawFn, low: int, high: int) -> Values:
    form = draw(st.sampled_from(["*", "step", "value", "range", "list"]))
    if form == "*":
        return "*", frozenset(range(low, high + 1))
    first, last = sorted((draw(st.integers(low, high)), draw(st.integers(low, high))))
    step = draw(st.integers(1, high - low))
    return {
        "step": (f"*/{step}", frozenset(range(low, high + 1, step))),
        "value": (f"{first:02}", frozenset([first])),
        "range": (f"{first}-{last}/{step}", frozenset(range(first, last + 1, step))),
        "list": (f"{last},{first}", frozenset([first, last])),
    }[form]


def walked(
    minutes: Values, hours: Values, days: Values, weekdays: Values, zone: str, begin: int, end: int
) -> list[int]:
    """What fires, found minute by minute: in UTC for a line of every hour, else on the wall clock of each day."""
    tz = ZoneInfo(zone)

    def matches(wall: datetime) -> bool:
        by_date, by_weekday = wall.day in days[1], wall.isoweekday() % 7 in weekdays[1]
        starred = days[0].startswith("*") or weekdays[0].startswith("*")
        on_day = by_date and by_weekday if starred else by_date or by_weekday
        return wall.minute in minutes[1] and wall.hour in hours[1] and on_day

    if len(hours[1]) == 24:
        return [each for each in range(begin, end, 60) if matches(datetime.fromtimestamp(each, tz))]
    wall = datetime.fromtimestamp(begin, UTC).replace(tzinfo=None) - timedelta(days=2)
    found = set()
    for each in (wall + timedelta(minutes=n) for n in range((end - begin) // 60 + 4 * 1440)):
        if matches(each):
            found.add(int(each.replace(tzinfo=tz).timestamp()))  # fold=0: the offset from before the change
    return sorted(each for each in found if begin <= each < end)


@settings(max_examples=60, deadline=None)
@given(
    change=st.sampled_from(CHANGES),
    minutes=fields(0, 59),
    hours=fields(0, 23) | st.just(("*", frozenset(range(24)))) | st.just(("1-3", frozenset([1, 2, 3]))),
    days=fields(1, 31) | st.just(("*", frozenset(range(1, 32)))),
    weekdays=fields(0, 6) | st.just(("*", frozenset(range(7)))),
)
@example((LORD_HOWE, "2026-10-04"), ("*/7", frozenset(range(0, 60, 7))), ("1-3", frozenset([1, 2, 3])),
         ("*", frozenset(range(1, 32))), ("*", frozenset(range(7))))  # fmt: skip
def test_around_a_change_a_line_fires_when_a_walk_minute_by_minute_says(
    change: tuple[str, str], minutes: Values, hours: Values, days: Values, weekdays: Values
) -> None:
    zone, day = change
    noon = int(at(day)) + 43_200
    begin, end = noon - 26 * 3600, noon + 26 * 3600
    cron = Cron(f"{minutes[0]} {hours[0]} {days[0]} * {weekdays[0]}", tz=zone)
    expected = walked(minutes, hours, days, weekdays, zone, begin, end)
    assert ticks(cron, begin - 1, end - 1) == expected
    assert cron.latest_before(end - 1, 50, since=begin - 1) == expected[-50:]
