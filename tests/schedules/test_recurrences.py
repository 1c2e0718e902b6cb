"""What all recurrences promise: order, bounds, jitter, documents, and one line for wrong arguments."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import time
import zoneinfo
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from aiqueue import codec
from aiqueue.errors import BadInput
from aiqueue.schedules import Calendar, Cron, Every, Once, Recurrence, UnknownZone, to_ms

from .ticking import at, recurrences, ticks

NOW = at("2026-11-30 15:00")
TIMES = st.floats(-1e10, 1e11) | st.integers(0, 3 * 10**12).map(lambda ms: ms / 1000)


def first_ticks(recurrence: Recurrence, begin: float, count: int) -> list[float]:
    found: list[float] = []
    tick = recurrence.next_after(begin)
    while tick is not None and len(found) < count:
        found.append(tick)
        tick = recurrence.next_after(tick)
    return found


@settings(deadline=None)
@given(recurrences(), TIMES)
def test_ticks_are_whole_milliseconds_after_the_time_asked_for_and_strictly_in_order(
    recurrence: Recurrence, begin: float
) -> None:
    found = first_ticks(recurrence, begin, 12)
    assert all(earlier < later for earlier, later in pairwise([begin, *found]))
    assert [to_ms(each) / 1000 for each in found] == found
    assert all(0 <= each < at("2200-01-01") for each in found)


@settings(deadline=None)
@given(recurrences(), TIMES, st.integers(1, 12))
def test_latest_before_is_next_after_read_backwards(recurrence: Recurrence, begin: float, count: int) -> None:
    found = first_ticks(recurrence, begin, count)
    if not found:
        assert recurrence.latest_before(1e300, count, since=begin) == []
        return
    end = found[-1]
    assert recurrence.latest_before(end, len(found), since=begin) == found
    assert recurrence.latest_before(end, 100, since=begin) == found
    assert recurrence.latest_before(end, 2, since=begin) == found[-2:]
    for tick in recurrence.latest_before(begin, 3):
        assert tick <= begin
        assert recurrence.next_after(tick - 0.001) == tick


@settings(deadline=None)
@given(recurrences())
def test_a_stored_document_makes_an_equal_value(recurrence: Recurrence) -> None:
    document = codec.decode(codec.encode(recurrence.to_document()), codec.CBOR)
    assert document == recurrence.to_document()
    again = Recurrence.from_document(document | {"field of a later version": 1})
    assert again == recurrence
    assert hash(again) == hash(recurrence)
    assert first_ticks(again, NOW, 3) == first_ticks(recurrence, NOW, 3)
    assert again.describe() == recurrence.describe()
    assert pickle.loads(pickle.dumps(recurrence)) == copy.deepcopy(recurrence) == recurrence


def test_a_document_states_defaults_too_so_that_a_later_default_cannot_move_a_stored_schedule() -> None:
    assert Every("90s").to_document() == {
        "format": 1, "type": "every", "jitter": 0.0, "interval": 90.0, "starting": 0.0,
    }  # fmt: skip
    assert Cron(" 0  6 * * mon-fri", start=5).to_document() == {
        "format": 1, "type": "cron", "jitter": 0.0, "start": 5.0, "line": "0 6 * * mon-fri", "tz": "UTC",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("document", "explained"),
    [
        (None, "a stored recurrence must be a map, not None: add the schedule again"),
        ([10**5000], "a stored recurrence must be a map, not a value of type list: add the schedule again"),
        ({}, "no recurrence has format None and type None: add the schedule again"),
        ({"format": True, "type": "every", "interval": 5}, "no recurrence has format True and type 'every'"),
        ({"format": 1, "type": "moon"}, "no recurrence has format 1 and type 'moon': add the schedule again"),
        ({"format": 1, "type": ["every"]}, "no recurrence has format 1 and type ['every']"),
        ({"format": 1, "type": "every"}, "a stored recurrence of type 'every' lacks 'interval'"),
        ({"format": 2, "type": "every"}, "stored in format 2, by a newer aiqueue: update this one"),
        ({"format": 10**5000, "type": "every"}, "by a newer aiqueue: update this one"),
        ({"format": float("nan"), "type": "every"}, "no recurrence has format nan"),
        ({"format": 1, "type": "every", "interval": float("nan")}, "interval: nan is not a duration"),
        ({"format": 1, "type": "cron", "line": "0 6 * *"}, "has 4 fields, not 5"),
        ({"format": 1, "type": "cron", "line": "0 6 * * *", "tz": "Mars/Olympus"}, "no time zone 'Mars/Olympus'"),
        ({"format": 1, "type": "cron", "line": "0 6 * * *", "tz": ["UTC"]}, "tz must be the name of an IANA time zone"),
        ({"format": 1, "type": "calendar"}, "Calendar needs exactly one of years, months, weeks and days"),
        ({"format": 1, "type": "calendar", "months": "1"}, "months must be a whole number from 0 to 1,200, not '1'"),
        ({"format": 1, "type": "once", "at": "tomorrow"}, "at must be a datetime with a time zone"),
    ],
)  # fmt: skip
def test_a_damaged_document_is_refused_with_what_to_do(document: object, explained: str) -> None:
    with pytest.raises(BadInput) as refused:
        Recurrence.from_document(document)
    assert explained in str(refused.value)
    assert len(str(refused.value)) < 300


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=3),
       st.sampled_from(["cron", "every", "calendar", "once"]), st.data())  # fmt: skip
def test_a_document_with_any_value_in_a_field_is_read_or_refused(value: Any, kind: str, data: st.DataObject) -> None:
    values: dict[str, dict[str, Any]] = {
        "cron": {"line": "0 6 * * *", "tz": "UTC"}, "every": {"interval": 5, "starting": 0}, "once": {"at": 5},
        "calendar": {"months": 1, "time": "06:00", "starting": "2026-01-31"},
    }  # fmt: skip
    document: dict[str, Any] = {"format": 1, "type": kind, "start": None, "end": None, "jitter": 0, **values[kind]}
    document[data.draw(st.sampled_from(sorted(document)))] = value
    refused, read = "", None
    try:
        read = Recurrence.from_document(document)
    except BadInput as error:
        refused = str(error)
    assert 0 < len(refused) < 400 if read is None else read.type == kind


@pytest.mark.parametrize(
    ("make", "explained"),
    [
        (lambda: Every("-90s"), "interval: '-90s' is not a duration"),
        (lambda: Every(-1), "interval: -1 is not a duration"),
        (lambda: Every(0), "interval must be at least 1 second, not 0: use several schedules"),
        (lambda: Every("999ms"), "interval must be at least 1 second, not '999ms'"),
        (lambda: Every(math.nan), "interval: nan is not a duration"),
        (lambda: Every(10**400), "is not a duration"),
        (lambda: Every(""), "interval: '' is not a duration"),
        (lambda: Every("1h", starting=-1), "starting must be a time from 1970 to 2199, not -1"),
        (lambda: Every("1h", starting=math.inf), "starting must be a datetime with a time zone"),
        (lambda: Every("1h", starting=datetime(2026, 1, 1)), "starting: 2026-01-01T00:00:00 has no time zone"),  # noqa: DTZ001
        (lambda: Every("1h", start=10, end=9), "end (1970-01-01T00:00:09Z) must not be before start (1970"),
        (lambda: Every("1h", start=10**400), "start must be a datetime with a time zone"),
        (lambda: Every("1h", end=datetime.max.replace(tzinfo=UTC)), "end must be a time from 1970 to 2199"),
        (lambda: Every("1h", jitter=-1), "jitter: -1 is not a duration"),
        (lambda: Every("1h", jitter="25h"), "jitter must be at most one day, not '25h'"),
        (lambda: Once(math.nan), "at must be a datetime with a time zone"),
        (lambda: Once(7_258_118_400), "at must be a time from 1970 to 2199"),
        (lambda: Once("soon"), "at must be a datetime with a time zone"),  # type: ignore[arg-type]
        (Calendar, "needs exactly one of years, months, weeks and days, such as months=1"),
        (lambda: Calendar(months=1, days=1), "needs exactly one of years, months, weeks and days"),
        (lambda: Calendar(months=-1), "months must be a whole number from 0 to 1,200, not -1"),
        (lambda: Calendar(days=10**9), "days must be a whole number from 0 to 36,500"),
        (lambda: Calendar(days=1.5), "days must be a whole number"),  # type: ignore[arg-type]
        (lambda: Calendar(days=True), "days must be a whole number"),
        (lambda: Calendar(days=1, time="6:00"), 'time must be a time of day such as "06:00" or "06:00:30"'),
        (lambda: Calendar(days=1, time="24:00"), "time must be a time of day"),
        (lambda: Calendar(days=1, time="\u0660\u0666:00"), "time must be a time of day"),
        (lambda: Calendar(days=1, starting="2026-02-30"), "starting must be a date from 1970 to 2199, such as"),
        (lambda: Calendar(days=1, starting="9999-12-31"), "starting must be a date from 1970 to 2199"),
        (lambda: Calendar(days=1, starting=datetime(2026, 1, 1, tzinfo=UTC)), "starting must be a date"),
        (lambda: Cron("0 6 * * *", tz="Europe/Berln"), "no time zone 'Europe/Berln': did you mean 'Europe/Berlin'?"),
        (lambda: Cron("0 6 * * *", tz="europe/berlin"), "did you mean 'Europe/Berlin'?"),
        (lambda: Cron("0 6 * * *", tz="berlin"), "no time zone 'berlin': did you mean 'Europe/Berlin'?"),
        (lambda: Cron("0 6 * * *", tz="utc"), "no time zone 'utc': did you mean 'UTC'?"),
        (lambda: Cron("0 6 * * *", tz="CEST"), "no time zone 'CEST': use an IANA name, such as 'Europe/Berlin'"),
        (lambda: Cron("0 6 * * *", tz="GMT+1"), "no time zone 'GMT+1': use an IANA name, such as 'Europe/Berlin'"),
        (lambda: Cron("0 6 * * *", tz="Mars/Olympus"), "for a new one `pip install -U tzdata`"),
        (lambda: Cron("0 6 * * *", tz="Europe"), "no time zone 'Europe'"),
        (lambda: Cron("0 6 * * *", tz="../../etc/passwd"), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz="/etc/localtime"), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz="right/Europe/Berlin"), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz="localtime"), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz="Europe/Berlin\0"), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz="Zürich"), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz=""), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz="A/" * 5_000), "tz must be the name of an IANA time zone"),
        (lambda: Cron("0 6 * * *", tz=None), "tz must be the name of an IANA time zone"),  # type: ignore[arg-type]
        (lambda: Cron("0 6 * * *", tz=UTC), "tz must be the name of an IANA time zone"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_in_one_line_that_says_what_to_pass(
    make: Callable[[], Recurrence], explained: str
) -> None:
    with pytest.raises(BadInput) as refused:
        make()
    assert explained in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


def test_a_host_without_time_zones_says_what_to_install_and_still_knows_utc(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ["tzdata", *(each for each in sys.modules if each.startswith("tzdata."))]:
        monkeypatch.setitem(sys.modules, name, None)
    zoneinfo.reset_tzpath(to=())
    zoneinfo.ZoneInfo.clear_cache()
    try:
        with pytest.raises(UnknownZone, match="no time zones at all: install the system's tzdata, or `pip install tz"):
            Cron("0 6 * * *", tz="Europe/Vaduz")
        assert Cron("0 6 * * *", tz="UTC").next_after(NOW) == at("2026-12-01 06:00")
    finally:
        zoneinfo.reset_tzpath()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1e300, -1e300, 10**400, -(10**400), 253_402_300_800])
@pytest.mark.parametrize("recurrence", [Cron("0 6 * * *"), Every("1h"), Calendar(months=1), Once(5)])
def test_any_number_can_be_asked_for(recurrence: Recurrence, number: float) -> None:
    first = recurrence.next_after(-1)
    assert recurrence.next_after(number) in (None, first)
    assert len(recurrence.latest_before(number, 2)) <= 2
    assert recurrence.latest_before(5e9, 2, since=number) in ([], recurrence.latest_before(5e9, 2))


def test_a_single_tick_in_the_past_is_accepted_and_has_no_next() -> None:
    once = Once(datetime(2001, 9, 9, 1, 46, 40, 123_456, tzinfo=UTC))
    assert once.next_after(NOW) is None
    assert once.next_after(0) == 1_000_000_000.123
    assert once.latest_before(NOW, 5) == [1_000_000_000.123]
    assert once.describe() == "once at 2001-09-09T01:46:40.123Z"


def test_a_tick_is_next_right_before_it_and_not_at_it() -> None:
    for recurrence in (Cron("0 * * * *"), Every("1h"), Calendar(days=1, time="15:00"), Once(NOW)):
        assert recurrence.next_after(math.nextafter(NOW, 0)) == NOW
        assert recurrence.next_after(NOW - 0.0004) == NOW
        assert recurrence.next_after(NOW) != NOW
        assert recurrence.latest_before(NOW) == [NOW]
        assert recurrence.latest_before(NOW - 0.0004, since=NOW - 60) == []


def test_an_interval_counts_from_its_first_tick_and_does_not_drift() -> None:
    every = Every(1.1, starting=at("2026-11-30") + 0.001)
    assert every.next_after(0) == at("2026-11-30") + 0.001
    millionth = every.next_after(at("2026-11-30") + 1_100_000.0)
    assert millionth == at("2026-11-30") + 1_100_000.001
    assert Every("1h").next_after(NOW) == NOW + 3600
    assert (
        Every(timedelta(minutes=90), starting=NOW + 60).describe() == "every 1h30m, counted from 2026-11-30T15:01:00Z"
    )


def test_a_calendar_interval_counts_from_its_first_date() -> None:
    every_two_weeks = Calendar(weeks=2, starting=date(2026, 12, 8), time="06:30:15")
    assert ticks(every_two_weeks, NOW, NOW + 40 * 86_400) == [at("2026-12-08 06:30:15"), at("2026-12-22 06:30:15"),
                                                              at("2027-01-05 06:30:15")]  # fmt: skip
    assert Calendar(months=5, starting="2026-12-31").next_after(NOW - 4e8) == at("2026-12-31")
    assert every_two_weeks.describe() == "every 2 weeks at 06:30:15, counted from 2026-12-08, UTC"


def test_start_and_end_may_be_ticks_themselves() -> None:
    hourly = Every("1h", start=NOW, end=NOW + 7200)
    assert ticks(hourly, 0, 1e11) == [NOW, NOW + 3600, NOW + 7200]
    assert hourly.latest_before(1e11, 10) == [NOW, NOW + 3600, NOW + 7200]
    assert ticks(Cron("0 15 * * *", start=NOW, end=NOW), 0, 1e11) == [NOW]
    assert ticks(Cron("0 15 * * *", start=NOW + 0.001, end=NOW + 1), 0, 1e11) == []
    assert hourly.describe() == "every 1h, from 2026-11-30T15:00:00Z, until 2026-11-30T17:00:00Z"


@settings(deadline=None)
@given(recurrences(), st.text(max_size=10), TIMES)
@example(Every("1s", jitter="1h"), "\ud800", 0.0)
def test_jitter_delays_a_tick_by_less_than_the_gap_to_the_next(
    recurrence: Recurrence, schedule_id: str, begin: float
) -> None:
    found = first_ticks(recurrence, begin, 5)
    fired = [recurrence.jittered(schedule_id, each) for each in found]
    assert fired == [recurrence.jittered(schedule_id, each) for each in found]
    assert all(tick <= late <= tick + recurrence.jitter_ms / 1000 for tick, late in zip(found, fired, strict=True))
    assert all(late < following for late, following in zip(fired, found[1:], strict=False))


def test_jitter_is_the_same_on_all_hosts_and_spreads_schedules_evenly() -> None:
    hourly = Every("1h", jitter="60s")
    assert hourly.jittered("nightly-report", NOW) == NOW + 34.477
    delays = sorted(hourly.jittered(f"s-{n}", NOW) - NOW for n in range(600))
    assert delays[60] == pytest.approx(6, abs=2)
    assert delays[300] == pytest.approx(30, abs=4)
    assert delays[540] == pytest.approx(54, abs=2)
    assert Every("1h").jittered("nightly-report", NOW) == NOW
    assert hourly.describe() == "every 1h, up to 1m later"


@pytest.mark.parametrize(
    "recurrence",
    [Cron("0 0 29 2 *", tz="Europe/Berlin"), Cron("0 0 29 2 */7", tz="America/New_York"),
     Cron("0 0 */28 2 mon", tz="Australia/Lord_Howe"), Cron("0 0 30 2 mon"), Calendar(years=100, tz="Europe/Berlin")],
    ids=["every 4 years", "every 28 years", "some Mondays in February", "a date that never is", "every 100 years"],
)  # fmt: skip
def test_a_rare_tick_is_found_within_milliseconds_forwards_and_backwards(recurrence: Recurrence) -> None:
    recurrence.next_after(NOW)
    spent = -time.process_time()
    for n in range(20):
        assert recurrence.next_after(NOW + 86_400 * n) is not None
        assert len(recurrence.latest_before(NOW + 86_400 * n, 1)) == 1
    spent += time.process_time()
    assert spent / 20 < 0.1


def test_three_days_of_a_tick_a_second_are_read_from_their_end() -> None:
    for recurrence in (Cron("* * * * * *", tz="Europe/Berlin"), Every("1s")):
        spent = -time.process_time()
        assert recurrence.latest_before(NOW + 0.5, 5, since=NOW - 3 * 86_400) == [NOW + n for n in range(-4, 1)]
        assert spent + time.process_time() < 0.05


def test_only_a_cron_line_that_is_asked_for_a_tick_loads_apscheduler() -> None:
    code = (
        "import sys, aiqueue, aiqueue.cli.work; aiqueue.Worker, aiqueue.connect\n"
        "from aiqueue.schedules import Calendar, Cron, Every, Once\n"
        "cron = Cron('0 6 * * *', tz='Europe/Berlin')\n"
        "for each in (Calendar(months=1), Every('1h'), Once(5)): each.next_after(0), each.latest_before(9e9)\n"
        "print('apscheduler' in sys.modules); cron.next_after(0); print('apscheduler' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "True"]
