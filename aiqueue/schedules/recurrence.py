"""What every recurrence has: its ticks as whole milliseconds, start and end, jitter, and its stored document.

A tick is a time at which a schedule fires: seconds since the epoch as a float, always whole milliseconds. Ticks are
computed as integers of milliseconds, because sums of floats drift. There are ticks from 1970 to the end of 2199.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any, ClassVar

from ..errors import BadInput
from ..units import Duration, Time, parse_duration, parse_time, short_duration, shown

FORMAT = 1  # of the documents that this version writes; it reads all formats up to this one
TICKS_END_MS = 7_258_118_400_000  # 2200-01-01: what the server stores ends in 2262, and a schedule has to end before
JITTER_MAX_S = 86_400.0
_TYPES: dict[str, type[Recurrence]] = {}


def to_ms(tick: float) -> int:
    """Return a tick in milliseconds, as subjects and job ids have it."""
    return round(tick * 1000)


def floor_ms(at: float) -> int:
    """Return the last whole millisecond that is not after `at`, which is finite."""
    nearest = round(at * 1000)
    return nearest - 1 if nearest / 1000 > at else nearest


def _bounded(at: float) -> float:
    """Return a finite time, which has the same ticks before and after it; the least one for NaN."""
    return min(at, TICKS_END_MS / 1000) if at >= 0 else -0.001


def iso_time(ms: int) -> str:
    """Format a time for people: "2026-10-25T01:00:00Z", with milliseconds where there are any."""
    text = datetime.fromtimestamp(ms / 1000, UTC).isoformat(timespec="milliseconds" if ms % 1000 else "seconds")
    return text.replace("+00:00", "Z")


def parse_tick(argument: str, value: Time) -> int:
    """Return a caller's time in whole milliseconds, rounded down. From 1970 to the end of 2199, else BadInput."""
    at = parse_time(argument, value)
    if not 0 <= at * 1000 < TICKS_END_MS:
        raise BadInput(f"{argument} must be a time from 1970 to 2199, not {shown(value)}")
    return floor_ms(at)


@dataclass(frozen=True)
class Recurrence(ABC):
    """The times at which a schedule fires: a Cron, an Every, a Calendar or a Once. A value: equal ones tick alike.

    `start`, `end`: no tick is before or after them; both may be ticks themselves. None: no bound.
    `jitter`: by how much `jittered` moves a tick at most, up to one day. The ticks themselves stay where they are.

    All raise BadInput for wrong arguments. `next_after` and `latest_before` take any numbers, also infinite ones.
    """

    type: ClassVar[str] = ""  # in documents

    jitter: Duration = field(default=0.0, kw_only=True)
    start: Time | None = field(default=None, kw_only=True)
    end: Time | None = field(default=None, kw_only=True)
    jitter_ms: int = field(init=False, repr=False, compare=False)
    """`jitter` in milliseconds."""
    start_ms: int = field(init=False, repr=False, compare=False)
    """`start` in milliseconds since the epoch."""
    end_ms: int = field(init=False, repr=False, compare=False)
    """`end` in milliseconds since the epoch."""

    def __init_subclass__(cls, type: str, **rest: Any) -> None:  # noqa: A002  (what documents call it)
        super().__init_subclass__(**rest)
        cls.type = type
        _TYPES[type] = cls

    def __post_init__(self) -> None:
        jitter_s = parse_duration("jitter", self.jitter)
        if jitter_s > JITTER_MAX_S:
            raise BadInput(f"jitter must be at most one day, not {shown(self.jitter)}")
        start_ms = 0 if self.start is None else parse_tick("start", self.start)
        end_ms = TICKS_END_MS - 1 if self.end is None else parse_tick("end", self.end)
        if end_ms < start_ms:
            raise BadInput(f"end ({iso_time(end_ms)}) must not be before start ({iso_time(start_ms)})")
        self._put(jitter=to_ms(jitter_s) / 1000, jitter_ms=to_ms(jitter_s), start_ms=start_ms, end_ms=end_ms)
        self._put(start=None if self.start is None else start_ms / 1000)
        self._put(end=None if self.end is None else end_ms / 1000)

    def _put(self, **values: Any) -> None:
        """Set fields of this frozen value, in its construction only."""
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @abstractmethod
    def _next_ms(self, after: int) -> int | None:
        """Return the first tick after `after`, without regard to start and end. `after` is from -1 to TICKS_END_MS."""

    @abstractmethod
    def _words(self) -> str:
        """Describe the ticks without start, end and jitter."""

    def next_after(self, at: float) -> float | None:
        """Return the first tick after `at`, never `at` itself; None if there are no more."""
        found = self._next_tick(floor_ms(_bounded(at)))
        return None if found is None else found / 1000

    def _next_tick(self, after: int) -> int | None:
        after = max(after, self.start_ms - 1)
        found = self._next_ms(after) if after < self.end_ms else None
        return None if found is None or found > self.end_ms else found

    def latest_before(self, at: float, count: int = 1, *, since: float = 0.0) -> list[float]:
        """Return the newest ticks that are after `since` and not after `at`: at most `count` of them, oldest first."""
        low, high = floor_ms(_bounded(since)), floor_ms(_bounded(at))
        low, high = max(low, self.start_ms - 1), min(high, self.end_ms)
        found: list[int] = []
        step = 1000
        while len(found) < count and (tick := self._latest_tick(low, high, step)) is not None:
            step = max(high - tick, 1000)  # about as far back the next one is
            found.append(tick)
            high = tick - 1
        return [tick / 1000 for tick in reversed(found)]

    def _latest_tick(self, low: int, high: int, step: int) -> int | None:
        """Return the newest tick after `low` and not after `high`. `step`: how far back it is looked for first."""
        while True:
            if low >= high:
                return None
            begin = max(low, high - step)
            tick = self._next_tick(begin)
            if tick is not None and tick <= high:
                break
            high, step = begin, step * 4  # no tick is after `begin`
        while (later := self._next_tick(tick)) is not None and later <= high:
            tick, middle = later, (later + high) // 2
            later = self._next_tick(middle)
            if later is None or later > high:
                high = middle
            else:
                tick = later
        return tick

    def jittered(self, schedule_id: str, tick: float) -> float:
        """Return when to fire at `tick`: at most `jitter` later, and before the next tick.

        The delay is a hash of both arguments: the same on all hosts and each time it is asked for. It spreads schedules
        that tick at once, and it spreads the ticks of one schedule.
        """
        if not self.jitter_ms:
            return tick
        ms = to_ms(tick)
        following = self._next_tick(ms)
        width = self.jitter_ms if following is None else min(self.jitter_ms, following - ms)
        digest = hashlib.sha256(f"{schedule_id}/{ms}".encode(errors="replace")).digest()
        return (ms + int.from_bytes(digest[:8], "big") * width // 2**64) / 1000

    def describe(self) -> str:
        """Describe the ticks in words: "at 06:00 on Monday to Friday, Europe/Berlin"."""
        words = self._words()
        if self.start is not None:
            words += f", from {iso_time(self.start_ms)}"
        if self.end is not None:
            words += f", until {iso_time(self.end_ms)}"
        return f"{words}, up to {short_duration(self.jitter_ms / 1000)} later" if self.jitter_ms else words

    def to_document(self) -> dict[str, Any]:
        """Return what is stored: a map of texts and numbers, from which `from_document` makes an equal value."""
        given = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        return {"format": FORMAT, "type": self.type} | {k: v for k, v in given.items() if v is not None}

    @classmethod
    def from_document(cls, document: object) -> Recurrence:
        """Return the value of a stored document. Unknown fields are passed over.

        Raises BadInput: a newer version has written it, it is damaged, or this host lacks its time zone (UnknownZone).
        """
        if not isinstance(document, Mapping):
            raise BadInput(f"a stored recurrence must be a map, not {shown(document)}: add the schedule again")
        version, name = document.get("format"), document.get("type")
        if isinstance(version, int) and version > FORMAT:
            raise BadInput(f"the recurrence is stored in format {shown(version)}, by a newer aiqueue: update this one")
        kind = _TYPES.get(name) if isinstance(name, str) else None
        if kind is None or version != FORMAT or isinstance(version, bool):
            raise BadInput(f"no recurrence has format {shown(version)} and type {shown(name)}: add the schedule again")
        wanted = [each for each in fields(kind) if each.init]
        for each in wanted:
            if each.default is MISSING and each.name not in document:
                raise BadInput(f"a stored recurrence of type {name!r} lacks {each.name!r}: add the schedule again")
        return kind(**{each.name: document[each.name] for each in wanted if each.name in document})
