"""Cron: the times that a cron line names, in a time zone."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from functools import lru_cache, partial
from typing import Any

from .cron_fields import WEEKDAYS, CronFields, has_date, parse_line
from .cron_words import describe_fields
from .recurrence import Recurrence
from .wall_clock import find_zone, next_instant

_DAY_S = 86_400
_EPOCH_ORDINAL = 719_163
_Values = tuple[int, ...]


@dataclass(frozen=True)
class Cron(Recurrence, type="cron"):
    """Fires at the times that a cron line names: ``Cron("0 6 * * mon-fri", tz="Europe/Berlin")``.

    `line`: minute, hour, day of month, month, day of week, or six fields with the second first; or ``@yearly``,
    ``@annually``, ``@monthly``, ``@weekly``, ``@daily``, ``@midnight``, ``@hourly``. Names, ranges, lists and steps are
    as in cron; 0 and 7 are Sunday. If both day fields are restricted, a day matches by either of them; a field that
    begins with ``*`` is not restricted. Refused: ``#``, ``L``, ``W``, ``?``, and a line that never fires.
    `tz`: an IANA time zone.

    A skipped hour: a time in it is moved behind it, 02:30 to 03:30. A repeated hour: only its first occurrence counts.
    A line for every hour of the day (``*``, ``0-23``) follows the real clock instead: nothing is moved, and both of the
    repeated hours count.
    """

    line: str
    tz: str = "UTC"
    zone: tzinfo = field(init=False, repr=False, compare=False)
    """Time zone that `tz` names."""
    fields: CronFields = field(init=False, repr=False, compare=False)
    """Values that each field of `line` matches."""

    def __post_init__(self) -> None:
        super().__post_init__()
        line, fields = parse_line(self.line)
        self._put(line=line, fields=fields, zone=find_zone(self.tz))

    def _next_ms(self, after: int) -> int | None:
        real_clock = len(self.fields.hours) == 24
        found = next_instant(self.zone, after // 1000 + 1, partial(_next_wall, self.fields), real_clock=real_clock)
        return None if found is None else found * 1000

    def _words(self) -> str:
        return f"{describe_fields(self.fields)}, {self.tz}"


def _next_wall(fields: CronFields, wall: int) -> int:
    """Return the first wall-clock time from `wall` on that matches, in seconds as if the zone was UTC."""
    days, second = divmod(wall, _DAY_S)
    matching = _next_day(fields[3:], days)
    if matching == days:
        found = _next_second(fields, second)
        if found is not None:
            return days * _DAY_S + found
        matching = _next_day(fields[3:], days + 1)
    return matching * _DAY_S + fields.hours[0] * 3600 + fields.minutes[0] * 60 + fields.seconds[0]


def _next_second(fields: CronFields, second: int) -> int | None:
    """Return the first matching second of a day from `second` on; None if the day has no more."""
    hour, minute, second = second // 3600, second // 60 % 60, second % 60
    hours, minutes, seconds = fields.hours, fields.minutes, fields.seconds
    at = bisect_left(hours, hour)
    if at < len(hours) and hours[at] == hour:
        of_hour = bisect_left(minutes, minute)
        if of_hour < len(minutes) and minutes[of_hour] == minute:
            of_minute = bisect_left(seconds, second)
            if of_minute < len(seconds):
                return hour * 3600 + minute * 60 + seconds[of_minute]
            of_hour += 1
        if of_hour < len(minutes):
            return hour * 3600 + minutes[of_hour] * 60 + seconds[0]
        at += 1
    return hours[at] * 3600 + minutes[0] * 60 + seconds[0] if at < len(hours) else None


@lru_cache(4096)
def _next_day(day_fields: tuple[Any, ...], days: int) -> int:
    """Return the first matching day from `days` on, both in days since the epoch."""
    midnight = datetime.fromordinal(_EPOCH_ORDINAL + days).replace(tzinfo=UTC)
    found = (trigger.get_next_fire_time(None, midnight) for trigger in _triggers(*day_fields))
    return min(int(each.toordinal()) for each in found if each is not None) - _EPOCH_ORDINAL


@lru_cache(1024)
def _triggers(days: _Values, months: _Values, weekdays: _Values, either: bool) -> list[Any]:
    """Return APScheduler's triggers for the midnights of matching days: two if a day matches by either field.

    One that never fires is left out: APScheduler looks for its next date up to the year 9999.
    """
    # here, because only who has schedules is to pay for the import
    from apscheduler.triggers.cron import CronTrigger  # type: ignore[import-untyped,unused-ignore]  # noqa: PLC0415

    by_date = {"day": _listed(days, 31)}
    by_weekday = {"day_of_week": ",".join(WEEKDAYS[each] for each in weekdays)} if len(weekdays) < 7 else {}
    ways = [by_weekday, *([by_date] if has_date(days, months) else [])] if either else [by_date | by_weekday]
    shared = {"month": _listed(months, 12), "hour": 0, "minute": 0, "second": 0, "timezone": UTC}
    return [CronTrigger(**{"day": "*"} | way | shared) for way in ways]


def _listed(values: tuple[int, ...], full: int) -> str:
    return "*" if len(values) == full else ",".join(map(str, values))
