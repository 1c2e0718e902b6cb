"""Cron lines: what they mean, and how wrong ones are explained."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiqueue.errors import BadInput
from aiqueue.schedules import Cron

from .ticking import LINES, at, ticks

MONDAY = at("2026-11-30")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("5 4 * * *", ["Mon 11-30 04:05:00", "Tue 12-01 04:05:00"]),
        ("30 5 4 * * *", ["Mon 11-30 04:05:30", "Tue 12-01 04:05:30"]),
        ("*/20 * * * * *", ["Mon 11-30 00:00:00", "Mon 11-30 00:00:20", "Mon 11-30 00:00:40", "Mon 11-30 00:01:00"]),
        ("0 0 * * 0", ["Sun 12-06 00:00:00", "Sun 12-13 00:00:00"]),
        ("0 0 * * 7", ["Sun 12-06 00:00:00", "Sun 12-13 00:00:00"]),
        ("0 0 * * 1", ["Mon 11-30 00:00:00", "Mon 12-07 00:00:00"]),
        ("0 0 * * 5-7", ["Fri 12-04 00:00:00", "Sat 12-05 00:00:00", "Sun 12-06 00:00:00", "Fri 12-11 00:00:00"]),
        ("0 0 * * 7-1", ["Mon 11-30 00:00:00", "Sun 12-06 00:00:00", "Mon 12-07 00:00:00"]),
        ("0 0 * * 7-5/2", ["Tue 12-01 00:00:00", "Thu 12-03 00:00:00", "Sun 12-06 00:00:00"]),
        ("0 0 * * FRI-Sun", ["Fri 12-04 00:00:00", "Sat 12-05 00:00:00", "Sun 12-06 00:00:00"]),
        ("0 0 * * 0-6/3", ["Wed 12-02 00:00:00", "Sat 12-05 00:00:00", "Sun 12-06 00:00:00"]),
        ("0 0 1 JAN *", ["Fri 01-01 00:00:00", "Sat 01-01 00:00:00"]),
        ("0 0 1 */6 *", ["Fri 01-01 00:00:00", "Thu 07-01 00:00:00"]),
        ("1,3-5,50-58/4 0 * * *", [f"Mon 11-30 00:{each}:00" for each in ("01", "03", "04", "05", "50", "54", "58")]),
        ("  0\t0 *  * mon ", ["Mon 11-30 00:00:00", "Mon 12-07 00:00:00"]),
        # both days restricted: either; a star before one of them: both
        ("0 0 2 * mon", ["Mon 11-30 00:00:00", "Wed 12-02 00:00:00", "Mon 12-07 00:00:00"]),
        ("0 0 */2 * mon", ["Mon 12-07 00:00:00", "Mon 12-21 00:00:00", "Mon 01-11 00:00:00"]),
        ("0 0 30 2 mon", ["Mon 02-01 00:00:00", "Mon 02-08 00:00:00"]),
        ("@yearly", ["Fri 01-01 00:00:00", "Sat 01-01 00:00:00"]),
        ("@annually", ["Fri 01-01 00:00:00", "Sat 01-01 00:00:00"]),
        ("@monthly", ["Tue 12-01 00:00:00", "Fri 01-01 00:00:00"]),
        ("@weekly", ["Sun 12-06 00:00:00", "Sun 12-13 00:00:00"]),
        ("@Daily", ["Mon 11-30 00:00:00", "Tue 12-01 00:00:00"]),
        ("@midnight", ["Mon 11-30 00:00:00", "Tue 12-01 00:00:00"]),
        ("@hourly", ["Mon 11-30 00:00:00", "Mon 11-30 01:00:00"]),
    ],
)
def test_a_line_means_what_it_means_to_cron(line: str, expected: list[str]) -> None:
    cron, tick = Cron(line), MONDAY - 1
    for each in expected:
        tick = cron.next_after(tick) or 0
        assert datetime.fromtimestamp(tick, UTC).strftime("%a %m-%d %H:%M:%S") == each


FORM = "is not a value, a range such as 1-5, a list such as 1,3, or a step such as */2 or 1-9/2"


@pytest.mark.parametrize(
    ("line", "explained"),
    [
        ("61 * * * *", "cron line '61 * * * *': minute '61' is not 0 to 59"),
        ("60 * * * * *", "second '60' is not 0 to 59"),
        ("0 24 * * *", "hour '24' is not 0 to 23"),
        ("0 0 0 * *", "day of month '0' is not 1 to 31"),
        ("0 0 32 * *", "day of month '32' is not 1 to 31"),
        ("0 0 1 0 *", "month '0' is not 1 to 12"),
        ("0 0 1 13 *", "month '13' is not 1 to 12"),
        ("0 0 * * 8", "day of week '8' is not 0 to 7"),
        ("0 99999999999999999999 * * *", "hour '99999999999999999999' is not 0 to 23"),
        ("0 1-99999999999999999999 * * *", "hour '1-99999999999999999999' is not 0 to 23"),
        ("-5 * * * *", f"minute '-5' {FORM}"),
        ("5- * * * *", f"minute '5-' {FORM}"),
        ("1.5 * * * *", f"minute '1.5' {FORM}"),
        ("*/ * * * *", f"minute '*/' {FORM}"),
        ("** * * * *", f"minute '**' {FORM}"),
        ("٣ * * * *", f"minute '٣' {FORM}"),
        ("😀 * * * *", f"minute '😀' {FORM}"),
        ("\0 * * * *", f"minute '\\x00' {FORM}"),
        ("0x5 * * * *", "minute '0x5' is not 0 to 59"),
        ("mon * * * *", "minute 'mon' is not 0 to 59"),
        ("0 0 * foo *", "month 'foo' is not jan to dec"),
        ("0 0 * * monday", "day of week 'monday' is not sun to sat"),
        ("0 0 * * mon-foo", "day of week 'mon-foo' has 'foo', which is not sun to sat"),
        ("1,,2 * * * *", "minute '' is empty: a comma too many?"),
        ("10-5 * * * *", "minute '10-5' runs backwards: write 10-59,0-5"),
        ("0 0 * nov-feb *", "month 'nov-feb' runs backwards: write nov-dec,jan-feb"),
        ("0 0 * * fri-mon", "day of week 'fri-mon' runs backwards: write fri-sat,sun-mon"),
        ("0 0 * * 7/2", "day of week '7/2' has a step and no range: write 0-6/2"),
        ("5/15 * * * *", "minute '5/15' has a step and no range: write 5-59/15"),
        ("*/0 * * * *", "minute '*/0' has a step that is not 1 to 59"),
        ("*/60 * * * *", "minute '*/60' has a step that is not 1 to 59: for longer steps use Every (--every)"),
        ("*/9999999999999999999 * * * *", "has a step that is not 1 to 59"),
        ("0 0 ? * mon", "day of month '?' has a ?: write *"),
        ("0 0 * * mon#1", "day of week 'mon#1' has a #, which is not supported: fire on each such weekday and check"),
        ("0 0 L * *", "day of month 'L' has an L, which is not supported: use Calendar(months=1, starting="),
        ("0 0 * * 5L", "day of week '5L' has an L, which is not supported: fire on each such weekday and check"),
        ("0 0 15W * *", "day of month '15W' has a W, which is not supported: use mon-fri"),
        ("1~5 * * * *", "minute '1~5' has a ~, which is not supported: use jitter"),
        ("0 0 30 2 *", "cron line '0 0 30 2 *' never fires: no month in its month field '2' has a day 30"),
        ("0 0 30,31 feb *", "has a day 30; for the last day of a month use Calendar (--months)"),
        ("0 0 31 2,4,6,9,11 *", "never fires: no month in its month field '2,4,6,9,11' has a day 31"),
        ("0 0 30 2 */2", "never fires: no month in its month field '2' has a day 30"),
        ("", 'the cron line is empty: write five fields, such as "0 6 * * mon-fri"'),
        (" \t ", "the cron line is empty"),
        ("* * * *", "has 4 fields, not 5 (minute, hour, day of month, month, day of week) or 6 (second before them)"),
        ("x", "has 1 field, not 5"),
        ("0 0 1 1 * * 2027", "or 6 (second before them): there is no field for years, use start and end"),
        ("CRON_TZ=Europe/Berlin 0 6 * * *", "give the time zone as tz, and the fields alone as the line"),
        ("@reboot", "a schedule knows no start of a host: enqueue the job at its start"),
        ("@every 5m", 'for a fixed interval use Every, such as Every("90s") (--every 90s)'),
        ("@fortnightly", "the names are @annually, @daily, @hourly, @midnight, @monthly, @weekly, @yearly"),
        ("*" * 257, "a cron line has at most 256 characters, not 257: use more schedules"),
        (None, 'a cron line is a text such as "0 6 * * mon-fri", not None'),
        (b"* * * * *", "a cron line is a text such as"),
        (10**5_000, "a cron line is a text such as"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_a_wrong_line_is_explained_in_one_line_by_its_field_and_what_to_write(line: str, explained: str) -> None:
    with pytest.raises(BadInput) as refused:
        Cron(line)
    text = str(refused.value)
    assert explained in text
    assert "\n" not in text
    assert len(text) < 400


@given(st.text(max_size=60) | st.text("0123456789*/-,?#LW jafebmonsu@", max_size=60))
@example("0 0 29 2 *")
def test_any_text_is_a_line_that_fires_or_is_refused_in_one_short_line(line: str) -> None:
    refused, cron = "", None
    try:
        cron = Cron(line)
    except BadInput as error:
        refused = str(error)
    assert 0 < len(refused) < 400 if cron is None else cron.next_after(MONDAY) is not None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 6 * * mon-fri", "at 06:00 on Monday to Friday, UTC"),
        ("0 6,18 1 * *", "at 06:00 and 18:00 on day 1 of the month, UTC"),
        ("30 0 6 * * sat,sun", "at 06:00:30 on Saturday and Sunday, UTC"),
        ("* * * * *", "every minute, UTC"),
        ("*/15 * * * *", "every 15 minutes, UTC"),
        ("*/15 9-17 * * 1-5", "every 15 minutes in hours 9 to 17 on Monday to Friday, UTC"),
        ("0 * * * *", "at minute 0 of every hour, UTC"),
        ("5,35 * * jan,mar-may *", "at minutes 5 and 35 of every hour in January and March to May, UTC"),
        ("*/10 * * * * *", "every 10 seconds, UTC"),
        ("*/10 */30 8 * * *", "every 10 seconds in minutes 0 and 30 in hour 8, UTC"),
        ("7 * * * * *", "every minute at second 7, UTC"),
        ("0 0 1,15 * mon", "at 00:00 on days 1 and 15 of the month or on Monday, UTC"),
        ("0 0 29 2 */7", "at 00:00 on day 29 of the month if Sunday in February, UTC"),
        ("@weekly", "at 00:00 on Sunday, UTC"),
        ("@daily", "every day at 00:00, UTC"),
        ("0 6,18 * 12 *", "every day at 06:00 and 18:00 in December, UTC"),
    ],
)
def test_a_line_is_described_in_words(line: str, words: str) -> None:
    assert Cron(line).describe() == words


@pytest.mark.parametrize("line", LINES)
def test_a_line_without_changes_of_the_clock_fires_as_apscheduler_says(line: str) -> None:
    """Except for its trigger's own weekday numbers and its `and` of days, which are written in its terms here."""
    from apscheduler.triggers.cron import CronTrigger  # noqa: PLC0415

    cron = Cron(line)
    names = ("seconds", "minutes", "hours", "days", "months", "weekdays")
    second, minute, hour, day, month, weekdays = (",".join(map(str, getattr(cron.fields, each))) for each in names)
    days = ",".join(str((int(each) - 1) % 7) for each in weekdays.split(","))
    ways = [{"day": day}, {"day_of_week": days}] if cron.fields.either else [{"day": day, "day_of_week": days}]
    triggers = [
        CronTrigger(second=second, minute=minute, hour=hour, month=month, timezone=UTC, **each) for each in ways
    ]
    tick, begin = datetime.fromtimestamp(MONDAY, UTC), MONDAY - 1
    for _ in range(8):
        tick = min(each for trigger in triggers if (each := trigger.get_next_fire_time(None, tick)))
        expected = tick.timestamp()
        if expected >= at("2200-01-01"):
            break
        assert ticks(cron, begin, expected) == [expected]
        begin = expected
        tick = datetime.fromtimestamp(expected + 1, UTC)
