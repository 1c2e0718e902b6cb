"""From wall-clock times in a zone to instants, over changes of the zone's offset. All times are whole seconds.

Two rules for the hour that a change skips or repeats:

- A time of day (a line that names hours, a calendar day): once on its day. A skipped time is moved behind the gap, by
  the length of the gap: 02:30 becomes 03:30. A repeated time is its first occurrence. RFC 5545 (iCalendar), 3.3.5.
- What ticks in every hour follows the real clock, as cron does: not for skipped times, twice for repeated ones.

Both are *readings* of the clock: from one instant to another the wall clock is read with one offset. A skipped time of
day is read with the offset from before the gap.
"""

from __future__ import annotations

import difflib
import re
import zoneinfo
from collections.abc import Callable, Collection, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from ..errors import BadInput
from ..units import shown
from .recurrence import TICKS_END_MS

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_S = 86_400
_SAMPLE_S = 4 * _DAY_S  # the closest two changes of any zone since 1970 are 6.9 days apart
_MARGIN_S = 2 * _DAY_S  # above the largest offset and the largest change together
_NEVER = TICKS_END_MS  # far above all times, which are in seconds
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(/[A-Za-z0-9_+-]+){0,2}")
_NOT_PORTABLE = re.compile(r"(posix|right)/|(localtime|posixrules|Factory)$", re.IGNORECASE)  # leap seconds, or local


def find_zone(name: Any) -> tzinfo:
    """Return the zone of an IANA name. Raises BadInput for what is no name, UnknownZone for one this host lacks."""
    if not isinstance(name, str) or len(name) > 64 or not _NAME.fullmatch(name) or _NOT_PORTABLE.match(name):
        raise BadInput(f'tz must be the name of an IANA time zone, such as "Europe/Berlin" or "UTC", not {shown(name)}')
    if name == "UTC":
        return UTC  # a host without time zones knows this one
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, OSError, ValueError):
        known = zoneinfo.available_timezones()
        raise UnknownZone(name, _find_close(name.lower(), known), has_any=len(known) > 1) from None


def _find_close(name: str, known: Collection[str]) -> str:
    """Return the zone that a name in lower case may mean, also by its city alone; "" if that is a guess.

    Abbreviations and offsets are close to those of other offsets: CEST to EST.
    """
    by_lower = {each.lower(): each for each in known}
    if "/" in name:
        close = difflib.get_close_matches(name, by_lower, n=1, cutoff=0.75)
        return by_lower[close[0]] if close else ""
    cities = {each.rpartition("/")[2]: each for each in sorted(by_lower, reverse=True) if not each.startswith("etc/")}
    found = name if name in by_lower else cities.get(name, "")
    return by_lower[found] if found else ""


class UnknownZone(BadInput):
    """This host has no time zone of that name. `close`: one that it has and that may be meant; empty: none."""

    def __init__(self, zone: str, close: str = "", *, has_any: bool = True) -> None:
        if not has_any:
            advice = "no time zones at all: install the system's tzdata, or `pip install tzdata`"
        elif close:
            advice = f"no time zone {zone!r}: did you mean {close!r}?"
        else:
            advice = f"no time zone {zone!r}: use an IANA name, such as 'Europe/Berlin'; for a new one "
            advice += "`pip install -U tzdata`"
        super().__init__(f"tz: this host has {advice}")
        self.zone, self.close = zone, close


class Reading(NamedTuple):
    """From `begins` up to `ends` the wall clock is read as the instant plus `offset`."""

    offset: int
    begins: int
    ends: int


def next_instant(zone: tzinfo, at: int, next_wall: Callable[[int], int | None], *, real_clock: bool) -> int | None:
    """Return the first instant from `at` on whose wall-clock time matches; None if there is none before 2200.

    `next_wall` returns the first matching wall-clock time from the one given on, in seconds as if the zone was UTC.
    `real_clock`: the second of the module's two rules.
    """
    asked, wall = 0, -1  # no wall-clock time from `asked` up to `wall` matches
    while at * 1000 < TICKS_END_MS:
        year = _at(at).year
        found = None
        for offset, begins, ends in _readings(zone, year, real_clock):
            if ends <= at or (found is not None and begins >= found):
                continue
            local = max(at, begins) + offset
            if not asked <= local <= wall:
                following = next_wall(local)
                asked, wall = local, _NEVER if following is None else following
            instant = wall - offset
            if instant < ends and (found is None or instant < found):
                found = instant
        if found is not None:
            return found
        following_year = _year_begins(year + 1)
        at = max(following_year, wall - _MARGIN_S) if wall >= following_year else following_year
    return None


@lru_cache(4096)
def _readings(zone: tzinfo, year: int, real_clock: bool) -> tuple[Reading, ...]:
    """Return how the wall clock is read in a year of UTC, by begin."""
    first, end = _year_begins(year), _year_begins(year + 1)
    begins, offset = first - _MARGIN_S, _offset(zone, first - _MARGIN_S)
    changes = [*_changes(zone, begins, end), end]
    found = [Reading(offset, begins, changes[0])]
    for begins, ends in pairwise(changes):
        former, offset = offset, _offset(zone, begins)
        if real_clock or former == offset:
            found.append(Reading(offset, begins, ends))
        elif former > offset:  # what is repeated has been read
            found.append(Reading(offset, begins + former - offset, ends))
        else:
            found.append(Reading(offset, begins, ends))
            found.append(Reading(former, begins, begins + offset - former))
    clipped = (Reading(each.offset, max(each.begins, first), min(each.ends, end)) for each in found)
    return tuple(each for each in clipped if each.begins < each.ends)


def _changes(zone: tzinfo, begin: int, end: int) -> Iterator[int]:
    """Yield the instants after `begin` and before `end` from which on another offset holds."""
    low, before = begin, _offset(zone, begin)
    while low < end:
        high = min(low + _SAMPLE_S, end)
        after = _offset(zone, high)
        while before != after:
            left, right = low, high
            while right - left > 1:
                middle = (left + right) // 2
                left, right = (middle, right) if _offset(zone, middle) == before else (left, middle)
            if right < end:
                yield right
            low, before = right, _offset(zone, right)
        low = high


def _offset(zone: tzinfo, at: int) -> int:
    offset = _at(at).astimezone(zone).utcoffset()
    return 0 if offset is None else round(offset.total_seconds())


def _at(at: int) -> datetime:
    return _EPOCH + timedelta(seconds=at)


def _year_begins(year: int) -> int:
    return (datetime(year, 1, 1, tzinfo=UTC) - _EPOCH) // timedelta(seconds=1)
