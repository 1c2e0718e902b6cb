"""What follows an attempt that has ended, as far as its handler decides that. `worker.settlement` carries it out."""

from __future__ import annotations

import random
from collections.abc import Callable

from ..units import Backoff
from .handler import Handler
from .outcome_types import Raised, Refused

DEADLINE_PASSED = Refused("deadline", "its deadline passed before it was run")


def delay_after(
    handler: Handler | None, failed: Raised, number: int, rng: Callable[[], float] = random.random
) -> float | None:
    """Return how many seconds after attempt `number` has failed the next one is due; None: there is no next one.

    `rng` returns [0, 1), of which the random part of the delay is made.
    """
    retry = handler.backoff(failed.rule) if handler else Backoff()
    if number >= retry.attempts:
        return None
    return retry.delay_s(number, rng) if failed.after_s is None else failed.after_s


def too_late(error: str, delay_s: float) -> str:
    """Return the error of a job that has no time for its next attempt."""
    return f"{error} (the retry in {delay_s:.1f} s would be after its deadline)"


def unkept_result(problem: str) -> str:
    """Return the error of a job whose result cannot be kept."""
    return f"the result cannot be kept: {problem}"
