"""Calendar: every so many days, weeks, months or years, at a time of day in a time zone."""

from __future__ import annotations

import re
from calendar import monthrange
from dataclasses import dataclass, field
from datetime import date, datetime, time, tzinfo
from typing import Any

from ..errors import BadInput
from ..units import shown, whole_number
from .recurrence import Recurrence
from .wall_clock import find_zone, next_instant

_DAY_S = 86_400
_EPOCH_ORDINAL = 719_163
_MOST = {"years": 100, "months": 1_200, "weeks": 5_200, "days": 36_500}
_TIME = re.compile(r"([01][0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9]))?", re.ASCII)
_DATE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_YEARS = range(1970, 2200)


@dataclass(frozen=True)
class Calendar(Recurrence, type="calendar"):
    """Fires every so many days, weeks, months or years: ``Calendar(months=1, starting="2026-01-31", time="06:00")``.

    Exactly one of `years`, `months`, `weeks` and `days`, at most 100 years of them. `starting`: the date of the first
    tick, as a date or "2026-01-31"; by default 1973-01-01, a Monday. `time`: "06:00" or "06:00:30". `tz`: an IANA time
    zone.

    A month without the day of `starting` has its tick on the last day: January 31, February 28, March 31. A time that a
    change of the clock skips is moved behind the skipped hour; a repeated one is its first occurrence.
    """

    years: int = field(default=0, kw_only=True)
    months: int = field(default=0, kw_only=True)
    weeks: int = field(default=0, kw_only=True)
    days: int = field(default=0, kw_only=True)
    time: str | time = field(default="00:00", kw_only=True)
    tz: str = field(default="UTC", kw_only=True)
    starting: str | date = field(default="1973-01-01", kw_only=True)
    zone: tzinfo = field(init=False, repr=False, compare=False)
    """Time zone that `tz` names."""
    second: int = field(init=False, repr=False, compare=False)
    """`time` in seconds since midnight."""
    first: date = field(init=False, repr=False, compare=False)
    """`starting` as a date."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in _MOST.items():
            whole_number(name, getattr(self, name), 0, most)
        if sum(getattr(self, name) > 0 for name in _MOST) != 1:
            raise BadInput("Calendar needs exactly one of years, months, weeks and days, such as months=1")
        second, first = _parse_time_of_day(self.time), _parse_date(self.starting)
        text = f"{second // 3600:02}:{second // 60 % 60:02}" + (f":{second % 60:02}" if second % 60 else "")
        self._put(time=text, second=second, starting=first.isoformat(), first=first, zone=find_zone(self.tz))

    def _next_ms(self, after: int) -> int | None:
        found = next_instant(self.zone, after // 1000 + 1, self._next_wall, real_clock=False)
        return None if found is None else found * 1000

    def _next_wall(self, wall: int) -> int:
        if self.weeks or self.days:
            period, begin = (self.weeks * 7 + self.days) * _DAY_S, self._wall_of(self.first)
            return begin + max(0, -((begin - wall) // period)) * period
        period = self.years * 12 + self.months
        asked = date.fromordinal(_EPOCH_ORDINAL + wall // _DAY_S)
        elapsed = (asked.year - self.first.year) * 12 + asked.month - self.first.month
        count = max(0, elapsed // period)
        found = self._wall_of(self._month_of(count * period))
        return found if found >= wall else self._wall_of(self._month_of((count + 1) * period))

    def _month_of(self, months: int) -> date:
        """Return the date so many months after the first, on the last day of a month that is too short."""
        year, month = divmod(self.first.year * 12 + self.first.month - 1 + months, 12)
        return date(year, month + 1, min(self.first.day, monthrange(year, month + 1)[1]))

    def _wall_of(self, day: date) -> int:
        return (day.toordinal() - _EPOCH_ORDINAL) * _DAY_S + self.second

    def _words(self) -> str:
        unit = next(each for each in _MOST if getattr(self, each))
        count = getattr(self, unit)
        every = f"every {count} {unit}" if count > 1 else f"every {unit.removesuffix('s')}"
        return f"{every} at {self.time}, counted from {self.starting}, {self.tz}"


def _parse_time_of_day(value: Any) -> int:
    """Return the second of the day."""
    if isinstance(value, time) and value.tzinfo is None and not value.microsecond:
        value = value.isoformat()
    match = _TIME.fullmatch(value) if isinstance(value, str) else None
    if not match:
        raise BadInput(f'time must be a time of day such as "06:00" or "06:00:30", not {shown(value)}')
    hour, minute, second = match.groups()
    return int(hour) * 3600 + int(minute) * 60 + int(second or 0)


def _parse_date(value: Any) -> date:
    if isinstance(value, date) and not isinstance(value, datetime):
        value = value.isoformat()
    try:
        found = date.fromisoformat(value) if isinstance(value, str) and _DATE.fullmatch(value) else None
    except ValueError:  # February 30
        found = None
    if found is None or found.year not in _YEARS:
        raise BadInput(f'starting must be a date from 1970 to 2199, such as "2026-01-31", not {shown(value)}')
    return found
