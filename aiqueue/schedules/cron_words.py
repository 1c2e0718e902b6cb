"""A cron line in words: "at 06:00 on Monday to Friday"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .cron_fields import CronFields

_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")  # as a week is read
_TIMES_MAX = 6  # of a day, listed one by one


def describe_fields(fields: CronFields) -> str:
    """Describe when a cron line fires."""
    days = _days(fields)
    every_day = "" if days or not _has_listed_times(fields) else "every day"
    return " ".join(filter(None, [every_day, _times(fields), days, _months(fields)]))


def _has_listed_times(fields: CronFields) -> bool:
    return len(fields.seconds) * len(fields.minutes) * len(fields.hours) <= _TIMES_MAX


def _times(fields: CronFields) -> str:
    seconds, minutes, hours = fields.seconds, fields.minutes, fields.hours
    if _has_listed_times(fields):
        times = [(hour, minute, second) for hour in hours for minute in minutes for second in seconds]
        shown = [f"{h:02}:{m:02}" + (f":{s:02}" if any(seconds) else "") for h, m, s in times]
        return f"at {_joined(shown)}"
    if len(seconds) > 1:
        words = [_cycle("second", seconds), "" if len(minutes) == 60 else f"in {_named('minute', minutes)}"]
    else:
        words = [_cycle("minute", minutes), f"at {_named('second', seconds)}" if seconds[0] else ""]
    if len(hours) == 24:
        words.append("" if words[0].startswith("every") and not words[1].startswith("in") else "of every hour")
    else:
        words.append(f"in {_named('hour', hours)}")
    return " ".join(filter(None, words))


def _days(fields: CronFields) -> str:
    dates = "" if len(fields.days) == 31 else f"on {_named('day', fields.days)} of the month"
    week = sorted((each - 1) % 7 for each in fields.weekdays)
    weekdays = "" if len(week) == 7 else f"on {_joined(_runs(week, _WEEKDAYS))}"
    if fields.either:
        return f"{dates or 'on every day'} or {weekdays or 'on every day'}"
    return f"{dates} {weekdays.replace('on', 'if', 1)}" if dates and weekdays else dates or weekdays


def _months(fields: CronFields) -> str:
    months = [each - 1 for each in fields.months]
    return "" if len(months) == 12 else f"in {_joined(_runs(months, _MONTHS))}"


def _cycle(unit: str, values: Sequence[int]) -> str:
    """Say how often in a cycle of 60 it is: "every 15 minutes", or "at minutes 5 and 35"."""
    step = values[1] - values[0] if len(values) > 1 else 60
    if values[0] == 0 and 60 % step == 0 and list(values) == list(range(0, 60, step)) and step < 60:
        return f"every {step} {unit}s" if step > 1 else f"every {unit}"
    return f"at {_named(unit, values)}"


def _named(unit: str, values: Sequence[int]) -> str:
    return f"{unit}{'s' * (len(values) > 1)} {_joined(_runs(values, range(60)))}"


def _runs(values: Sequence[int], names: Sequence[object]) -> list[str]:
    """Write ascending values, three or more in a row as "first to last"."""
    found: list[list[int]] = []
    for value in values:
        if found and value == found[-1][-1] + 1:
            found[-1].append(value)
        else:
            found.append([value])
    runs: list[str] = []
    for run in found:
        if len(run) > 2:
            runs.append(f"{names[run[0]]} to {names[run[-1]]}")
        else:
            runs += [str(names[each]) for each in run]
    return runs


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
