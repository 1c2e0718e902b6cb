"""Every: a fixed interval, counted from an anchor. It knows no time zone, so a change of the clock does not move it."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..errors import BadInput
from ..units import Duration, Time, parse_duration, short_duration, shown
from .recurrence import Recurrence, iso_time, parse_tick, to_ms

INTERVAL_MIN_S = 1.0


@dataclass(frozen=True)
class Every(Recurrence, type="every"):
    """Fires at `starting` and every `interval` after it: ``Every("90s")``.

    `interval`: from 1 second to 100 years, in whole milliseconds. `starting`: the first tick, the epoch by default, so
    that all hosts agree, and ``Every("1h")`` ticks on the hour in UTC.
    """

    interval: Duration
    starting: Time = 0.0
    interval_ms: int = field(init=False, repr=False, compare=False)
    """`interval` in milliseconds."""
    anchor_ms: int = field(init=False, repr=False, compare=False)
    """`starting` in milliseconds since the epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        interval_s = parse_duration("interval", self.interval)
        if interval_s < INTERVAL_MIN_S:
            raise BadInput(f"interval must be at least 1 second, not {shown(self.interval)}: use several schedules")
        anchor_ms, interval_ms = parse_tick("starting", self.starting), to_ms(interval_s)
        self._put(interval=interval_ms / 1000, interval_ms=interval_ms, starting=anchor_ms / 1000, anchor_ms=anchor_ms)

    def _next_ms(self, after: int) -> int | None:
        if after < self.anchor_ms:
            return self.anchor_ms
        return after + self.interval_ms - (after - self.anchor_ms) % self.interval_ms

    def _words(self) -> str:
        words = f"every {short_duration(self.interval_ms / 1000)}"
        return f"{words}, counted from {iso_time(self.anchor_ms)}" if self.anchor_ms else words
