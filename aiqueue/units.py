"""Plain values that callers pass: durations, times and sizes ("30s", `timedelta`, `datetime`, "1GiB"), parsed and
formatted; numbers, flags, texts; the retry policy.
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

from .errors import BadInput

Duration = str | float | timedelta  # "30s", seconds, or a timedelta
Time = datetime | float  # a datetime with a time zone, or seconds since the epoch
Deadline = Duration | datetime  # how long from now, or until when

_DURATION = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = (
    {"B": 1}
    | {f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)}
    | {f"{k}iB": 1024**n for n, k in enumerate("KMGT", 1)}
)
DELAY_MAX_S = 365 * 86_400.0  # of any job: a retry, or a job that is enqueued with a delay
COST_MAX = 1e15  # of what a limited call may use, such as tokens
MAX_S = 100 * 365 * 86400.0  # the server keeps nanoseconds in 64 bits, which end at 292 years
_NUMBER_UNIT = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")


def seconds(value: Duration) -> float:
    """Return seconds for a number of seconds, a timedelta, or a text such as "250ms", "30s", "2m", "7d", "1h30m".

    Raises ValueError for anything else, also for negative numbers and for more than 100 years.
    """
    if type(value) is float and 0 <= value <= MAX_S:
        return value  # first, because every enqueue calls this
    if isinstance(value, timedelta):
        return seconds(value.total_seconds())
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(_not_a_duration(value))
    if isinstance(value, int | float):
        if not 0 <= value <= MAX_S:
            raise ValueError(_not_a_duration(value))
        return float(value)
    parts = _NUMBER_UNIT.findall(value)
    if not parts or _NUMBER_UNIT.sub("", value).strip() or any(unit not in _DURATION for _, unit in parts):
        raise ValueError(_not_a_duration(value))
    total = sum(float(number) * _DURATION[unit] for number, unit in parts)
    if total > MAX_S:
        raise ValueError(_not_a_duration(value))
    return total


def parse_duration(argument: str, value: Duration) -> float:
    """Return a caller's duration in seconds. Raises BadInput, which names the `argument`."""
    try:
        return seconds(value)
    except ValueError as error:
        raise BadInput(f"{argument}: {error}") from None


def whole_number(argument: str, value: Any, low: int, high: int) -> int:
    """Return `value` if it is a whole number from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadInput(f"{argument} must be a whole number from {low} to {high:,}, not {shown(value)}")
    return value


def real_number(argument: str, value: Any, low: float, high: float) -> float:
    """Return `value` if it is a number from `low` to `high`, which NaN is not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise BadInput(f"{argument} must be a number from {low:g} to {high:g}, not {shown(value)}")
    return float(value)


def flag(argument: str, value: Any) -> bool:
    """Return `value` if it is True or False."""
    if not isinstance(value, bool):
        raise BadInput(f"{argument} must be True or False, not {shown(value)}")
    return value


def text(argument: str, value: Any) -> str:
    """Return `value` if it is a text."""
    if not isinstance(value, str):
        raise BadInput(f"{argument} must be a text, not {shown(value)}")
    return value


def texts(argument: str, values: Any) -> tuple[str, ...]:
    """Return the texts in an iterable. One text is none: its characters would be taken for the items."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise BadInput(f'{argument} must be a list of texts, such as ["a", "b"], not {shown(values)}')
    return tuple(text(f"each of {argument}", each) for each in values)


def parse_time(argument: str, value: Time) -> float:
    """Return a caller's time in seconds since the epoch. Raises BadInput, which names the `argument`.

    A datetime without a time zone is refused, because it would mean another time on another machine.
    """
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            raise BadInput(
                f"{argument}: {value.isoformat()} has no time zone: use datetime.now(UTC) or seconds since the epoch"
            )
        return value.timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise BadInput(
            f"{argument} must be a datetime with a time zone, or seconds since the epoch, not {shown(value)}"
        )
    return float(value)


def parse_deadline(argument: str, value: Deadline, now: float) -> float:
    """Return a caller's deadline in seconds since the epoch. A duration counts from `now`, likewise.

    Raises BadInput, which names the `argument`.
    """
    if isinstance(value, datetime):
        return parse_time(argument, value)
    return now + parse_duration(argument, value)


def size_bytes(value: str | int) -> int:
    """Return bytes for a number of bytes or for "512KiB", "1GiB", "10MB". Raises ValueError for anything else."""
    problem = f'{shown(value)} is not a size such as 1048576, "512KiB" or "1GiB"'
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(problem)
    if isinstance(value, int):
        return value
    match = _NUMBER_UNIT.fullmatch(value.strip())
    if not match or match[2] not in _SIZE:
        raise ValueError(problem)
    return int(Decimal(match[1]) * _SIZE[match[2]])


def shown(value: object) -> str:
    """Return a value as an error shows it, at most 80 characters."""
    try:
        whole = repr(value)
    except Exception:  # noqa: BLE001  (a number of more than 4,300 digits, or the value's own code)
        return f"a value of type {type(value).__name__}"
    return whole if len(whole) <= 80 else whole[:79] + "…"


def short_duration(value_s: float) -> str:
    """Format a duration: "250ms", "4.2s", "3m10s", "2h5m", "6d4h"."""
    if value_s < 0.9995:
        return f"{value_s * 1000:.0f}ms"
    if value_s < 59.95:
        return f"{value_s:.1f}s".replace(".0s", "s")
    whole = round(value_s)
    for unit, size, below, lower in (("d", 86400, 3600, "h"), ("h", 3600, 60, "m"), ("m", 60, 1, "s")):
        if whole >= size:
            rest = whole % size // below
            return f"{whole // size}{unit}" + (f"{rest}{lower}" if rest else "")
    return f"{whole}s"


def short_size(value: int) -> str:
    """Format a size: "512 B", "3.4 KiB", "1.0 GiB"."""
    number = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def module_of_path(path: str) -> str:
    """Return the module in the path of a Python file that somebody gave as one: "src.app" for "./src/app.py".

    "": it is no such path, or one whose module cannot be told.
    """
    if "/" not in path and not path.endswith(".py"):
        return ""
    parts = PurePosixPath(path.removesuffix(".py")).parts
    return ".".join(parts) if all(part.isidentifier() for part in parts) else ""


def _not_a_duration(value: object) -> str:
    if isinstance(value, datetime):
        return f'{value.isoformat()} is a time and not a duration, such as 30.0, timedelta(seconds=30) or "30s"'
    return f'{shown(value)} is not a duration such as 1.5, "250ms", "30s" or "2m"'


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
    """By how much each delay is longer than the one before."""
    cap: Duration = "5m"
    jitter: float = 0.5
    first_s: float = field(init=False, repr=False, compare=False)
    """`first` in seconds."""
    cap_s: float = field(init=False, repr=False, compare=False)
    """`cap` in seconds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_s", parse_duration("first", self.first))
        object.__setattr__(self, "cap_s", parse_duration("cap", self.cap))
        whole_number("attempts", self.attempts, 1, 10_000)
        for name, value in (("factor", self.factor), ("jitter", self.jitter)):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadInput(f"{name} must be a number, not {shown(value)}")
        if not 1 <= self.factor <= 100:
            raise BadInput(f"factor must be from 1 to 100, not {shown(self.factor)}")
        if not 0 <= self.jitter <= 1:
            raise BadInput(f"jitter must be from 0 to 1, not {shown(self.jitter)}")
        if self.cap_s > DELAY_MAX_S:
            raise BadInput(f"cap must be at most 365 days, not {shown(self.cap)}")
        if self.cap_s < self.first_s:
            raise BadInput(f"`cap` ({self.cap}) must not be below `first` ({self.first})")

    def delay_s(self, attempt: int, rng: Callable[[], float] = random.random) -> float:
        """Return how many seconds to wait after failed attempt `attempt`, counted from 1. `rng` returns [0, 1)."""
        # The exponent is bounded first, because the power would overflow after some 1,000 attempts.
        exponent = min(max(attempt, 1) - 1, 64)
        full = min(self.first_s * self.factor**exponent, self.cap_s)
        return full * (1 - self.jitter * rng())
