"""What is counted of jobs: how many ended in which way, and how long they waited and ran. Plain values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Self

OUTCOMES = ("done", "retried", "dead", "cancelled")
SHORTEST = 2.0**-20  # seconds, about a microsecond: anything shorter counts as that
BUCKETS = 64  # by the power of two above a time; those of times below a second are counted from the end of the list
HIGHEST = BUCKETS // 2 - 1
LONGEST = 2.0**HIGHEST  # 68 years: anything longer counts as that
_TIMES = ("run", "wait")
_EXPONENTS = {str(exponent): exponent for exponent in range(HIGHEST - BUCKETS + 1, HIGHEST + 1)}  # of buckets


class Counts:
    """Counters of a worker, which change as jobs end. `runs[e]`, `waits[e]`: of times from 2**(e-1) s to 2**e s; `e`
    is below 0 for times below half a second, as a list may be read from its end.
    """

    __slots__ = ("cancelled", "dead", "done", "retried", "run_s", "runs", "wait_s", "waits")

    def __init__(self) -> None:
        self.done = self.retried = self.dead = self.cancelled = 0
        self.run_s = self.wait_s = 0.0
        self.runs = [0] * BUCKETS
        self.waits = [0] * BUCKETS

    def add_run(self, time_s: float) -> None:
        """Count how long an attempt ran."""
        self.run_s += max(0.0, time_s)
        self.runs[bucket_of(time_s)] += 1

    def add_wait(self, time_s: float) -> None:
        """Count how long a job waited. Below 0, where clocks differ by more than it has waited, it is 0."""
        self.wait_s += max(0.0, time_s)
        self.waits[bucket_of(time_s)] += 1

    def add(self, other: Counts, *, buckets: bool = True) -> None:
        """Add the counters of `other`, its buckets too if they are wanted."""
        self.done += other.done
        self.retried += other.retried
        self.dead += other.dead
        self.cancelled += other.cancelled
        self.run_s += other.run_s
        self.wait_s += other.wait_s
        if buckets:
            for own, added in ((self.runs, other.runs), (self.waits, other.waits)):
                for at, count in enumerate(added):
                    if count:
                        own[at] += count

    def increments(self, *, buckets: bool = True) -> dict[str, int]:
        """Return what is not zero, by the name that it has in a subject. Times are in microseconds."""
        found = {name: getattr(self, name) for name in OUTCOMES}
        found |= {"run_us": round(self.run_s * 1e6), "wait_us": round(self.wait_s * 1e6)}
        if buckets:
            for name, counts in zip(_TIMES, (self.runs, self.waits), strict=True):
                found |= {f"{name}:{at if at <= HIGHEST else at - BUCKETS}": n for at, n in enumerate(counts) if n}
        return {name: value for name, value in found.items() if value}


def bucket_of(time_s: float) -> int:
    """Return the bucket of a time: the lowest `e` with time_s < 2**e."""
    return min(HIGHEST, math.frexp(max(SHORTEST, time_s))[1])


@dataclass(frozen=True, slots=True)
class JobSums:
    """Sums over jobs of a time.

    - `done`: attempts that ended well. `retried`: attempts that failed, and whose job is to be tried again. `dead`:
      jobs that became dead letters. `cancelled`: attempts that were cancelled while they ran.
    - `run_s`: seconds of all attempts. `wait_s`: seconds from when a job was stored in its lane to its start there.
    - `runs`, `waits`: how many of them took less than 2**e seconds and not less than half of that, by `e`.
    """

    done: int = 0
    retried: int = 0
    dead: int = 0
    cancelled: int = 0
    run_s: float = 0.0
    wait_s: float = 0.0
    runs: Mapping[int, int] = field(default_factory=dict)
    waits: Mapping[int, int] = field(default_factory=dict)

    @property
    def failed(self) -> int:
        """How many attempts failed, dead letters included."""
        return self.retried + self.dead

    @property
    def ended(self) -> int:
        """How many attempts ended."""
        return self.done + self.failed + self.cancelled

    def run_percentile(self, share: float) -> float | None:
        """Return the time in seconds within which this share of attempts ran; see `percentile`."""
        return percentile(self.runs, share)

    def wait_percentile(self, share: float) -> float | None:
        """Return the time in seconds within which this share of jobs began; see `percentile`."""
        return percentile(self.waits, share)

    @classmethod
    def of(cls, counters: Mapping[str, int]) -> Self:
        """Return the sums of counters, by the names of `Counts.increments`. Unknown names, of a later version or of
        nobody knows whom, are left out.
        """
        times: dict[str, dict[int, int]] = {name: {} for name in _TIMES}
        for name, value in counters.items():
            kind, colon, exponent = name.partition(":")
            if colon and kind in times and (found := _EXPONENTS.get(exponent)) is not None:
                times[kind][found] = value
        outcomes = {name: counters.get(name, 0) for name in OUTCOMES}
        run_s, wait_s = counters.get("run_us", 0) / 1e6, counters.get("wait_us", 0) / 1e6
        return cls(**outcomes, run_s=run_s, wait_s=wait_s, runs=times["run"], waits=times["wait"])

    @classmethod
    def total(cls, all_of_them: Iterable[JobSums]) -> Self:
        """Return the sums of several."""
        found = list(all_of_them)
        return cls(
            **{name: sum(getattr(each, name) for each in found) for name in OUTCOMES},
            run_s=sum(each.run_s for each in found),
            wait_s=sum(each.wait_s for each in found),
            runs=_add(each.runs for each in found),
            waits=_add(each.waits for each in found),
        )


def _add(histograms: Iterable[Mapping[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for each in histograms:
        for exponent, count in each.items():
            total[exponent] = total.get(exponent, 0) + count
    return total


def percentile(histogram: Mapping[int, int], share: float) -> float | None:
    """Return the time in seconds within which a share, 0 to 1, of the counted times lie. None: nothing is counted.

    The bucket is known exactly, and within it times are taken to be spread evenly on a logarithmic scale, as
    Prometheus does for native histograms (`histogram_quantile`, "exponential interpolation"). A bucket ends at twice
    its begin, so the true value is less than twice, and more than half of the returned one.
    """
    count = sum(histogram.values())
    if count <= 0:
        return None
    rank, below = max(0.0, min(1.0, share)) * count, 0
    for exponent in sorted(histogram):
        if below + histogram[exponent] >= rank and histogram[exponent] > 0:
            return float(2.0 ** (exponent - 1 + (rank - below) / histogram[exponent]))
        below += histogram[exponent]
    return float(2.0 ** max(exponent for exponent, n in histogram.items() if n > 0))
