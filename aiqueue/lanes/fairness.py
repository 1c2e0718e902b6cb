"""Whose turn it is: higher priorities first, within a bound on how long a lower one waits, then tenants by weight.

Within a priority this is stride scheduling (Waldspurger and Weihl, 1995): every job that a lane is given moves it on by
one stride, the inverse of its weight, and the lane that is least far on is next. A lane that comes back from idleness
starts where the others are, so that nobody saves up turns.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

AGED_AFTER_S = 1.0
AGED_PART = 0.5
AGED_CREDIT_MAX = 1.0


@dataclass(slots=True, eq=False, kw_only=True)
class Turn:
    """A lane's place. `rank` 0 is the highest priority; `weight` is its tenant's part (default 1)."""

    rank: int = 0
    weight: float = 1.0
    passed: float = 0.0  # how far on it is, in strides
    served: float = 0.0  # when it was last given something, monotonic seconds


class Clock:
    """How far on the lanes of each rank are."""

    def __init__(self) -> None:
        self._now: dict[int, float] = {}
        self.aged_credit = AGED_CREDIT_MAX  # jobs that aged lanes may be given, ahead of their part

    def join(self, turn: Wanting, now: float) -> None:
        """A lane has jobs again: it starts where the others are, and has waited since `now`."""
        turn.passed = max(turn.passed, self._now.get(turn.rank, 0.0))
        turn.served = now

    def advance(self, turn: Wanting, jobs: int, now: float) -> None:
        """A lane is given `jobs`."""
        self._now[turn.rank] = max(self._now.get(turn.rank, 0.0), turn.passed)
        turn.passed += jobs / turn.weight
        turn.served = now


class Wanting(Protocol):
    """What `share` asks of a lane."""

    rank: int
    weight: float
    passed: float
    served: float
    pending: int

    @property
    def granted(self) -> int: ...


L = TypeVar("L", bound=Wanting)


def share(clock: Clock, lanes: Iterable[L], budget: int, now: float, *, step: int = 1) -> list[tuple[L, int]]:
    """How many of `budget` jobs each lane is given, at most what it holds (`pending` less `granted`).

    A turn is `step` jobs, or more where there is plenty for every lane.

    Lower lanes that have waited AGED_AFTER_S for a turn come first, one job each, in the order of their waiting. Over
    time they get at most AGED_PART of all jobs, so that many of them cannot starve the highest rank: slots come free
    one by one, and each would go to some lane that has aged. The rest goes by rank, within a rank by stride.
    """
    given: dict[L, int] = {}
    room = budget
    lanes = list(lanes)
    best = min((lane.rank for lane in lanes), default=0)
    aged = sorted(
        (lane for lane in lanes if lane.rank > best and now - lane.served >= AGED_AFTER_S), key=lambda lane: lane.served
    )
    credit = clock.aged_credit + AGED_PART * budget
    for lane in aged[: min(budget, int(credit))]:
        given[lane] = 1
        clock.advance(lane, 1, now)
        room -= 1
    aged_jobs = budget - room
    by_rank: dict[int, list[L]] = {}
    for lane in lanes:
        by_rank.setdefault(lane.rank, []).append(lane)
    for rank in sorted(by_rank):
        if room <= 0:
            break
        room = _stride(clock, by_rank[rank], room, given, now, step)
    clock.aged_credit = min(AGED_CREDIT_MAX, credit - aged_jobs - AGED_PART * room)
    return list(given.items())


def _stride(clock: Clock, lanes: list[L], room: int, given: dict[L, int], now: float, step: int) -> int:
    """Give out `room` jobs among the lanes of one rank; returns what is left."""
    # several jobs at a step where there is plenty: one by one would cost more than it is fairer
    step = max(step, room // (4 * len(lanes)))
    heap = [(lane.passed, number, lane) for number, lane in enumerate(lanes)]
    heapq.heapify(heap)
    while room > 0 and heap:
        _, number, lane = heap[0]
        wants = lane.pending - lane.granted - given.get(lane, 0)
        if wants <= 0:
            heapq.heappop(heap)
            continue
        jobs = min(wants, room, step)
        given[lane] = given.get(lane, 0) + jobs
        clock.advance(lane, jobs, now)
        room -= jobs
        heapq.heapreplace(heap, (lane.passed, number, lane))
    return room
