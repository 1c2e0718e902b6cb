"""The retry policy: how many attempts a job gets, and how long it waits between them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ..errors import BadInput
from ..units import Duration, parse_duration, whole_number

DELAY_MAX_S = 365 * 86_400.0  # of any job: a retry, or a job that is enqueued with a delay


@dataclass(frozen=True)
class Backoff:
    """A retry policy: exponential delays with jitter and a cap.

    The delay before attempt n+1 is ``first * factor**(n-1)``, at most `cap`, of which the share `jitter` is random
    ("equal jitter" at 0.5, "full jitter" at 1: AWS Architecture Blog, *Exponential Backoff And Jitter*, 2015).

    `attempts` includes the first attempt: 1 means no retry. Durations are seconds or "30s", "2m", "1h".
    At most 365 days each. Raises BadInput for values out of range.
    """

    attempts: int = 5
    first: Duration = "1s"
    factor: float = 2.0
    cap: Duration = "5m"
    jitter: float = 0.5
    first_s: float = field(init=False, repr=False, compare=False)
    cap_s: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_s", parse_duration("first", self.first))
        object.__setattr__(self, "cap_s", parse_duration("cap", self.cap))
        whole_number("attempts", self.attempts, 1, 10_000)
        for name, value in (("factor", self.factor), ("jitter", self.jitter)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadInput(f"{name} must be a number, not {value!r}")
        if not 1 <= self.factor <= 100:
            raise BadInput(f"factor must be from 1 to 100, not {self.factor!r}")
        if not 0 <= self.jitter <= 1:
            raise BadInput(f"jitter must be from 0 to 1, not {self.jitter!r}")
        if self.cap_s > DELAY_MAX_S:
            raise BadInput(f"cap must be at most 365 days, not {self.cap!r}")
        if self.cap_s < self.first_s:
            raise BadInput(f"`cap` ({self.cap}) must not be below `first` ({self.first})")

    def delay_s(self, attempt: int, rng: Callable[[], float] = random.random) -> float:
        """Return how many seconds to wait after failed attempt `attempt`, counted from 1. `rng` returns [0, 1)."""
        # The exponent is bounded first, because the power would overflow after some 1,000 attempts.
        exponent = min(max(attempt, 1) - 1, 64)
        full = min(self.first_s * self.factor**exponent, self.cap_s)
        return full * (1 - self.jitter * rng())
