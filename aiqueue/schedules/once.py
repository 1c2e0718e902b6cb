"""Once: a single tick."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..units import Time
from .recurrence import Recurrence, iso_time, parse_tick


@dataclass(frozen=True)
class Once(Recurrence, type="once"):
    """Fires at `at`, in whole milliseconds. A time in the past is accepted here: `next_after` returns None then."""

    at: Time
    at_ms: int = field(init=False, repr=False, compare=False)
    """`at` in milliseconds since the epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_ms = parse_tick("at", self.at)
        self._put(at=at_ms / 1000, at_ms=at_ms)

    def _next_ms(self, after: int) -> int | None:
        return self.at_ms if after < self.at_ms else None

    def _words(self) -> str:
        return f"once at {iso_time(self.at_ms)}"
