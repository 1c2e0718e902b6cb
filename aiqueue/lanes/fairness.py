"""Which lane's jobs are pulled next: higher priorities first, then tenants by weight. Low priorities do not starve.

Pure functions of the lanes' state and the time; nothing here waits or sends.

- Among lanes of one priority: stride scheduling (Waldspurger and Weihl, 1995). Each lane has a pass value. The lane
  with the lowest value is next, and each job advances it by one stride, ``1 / weight``. Over time, a lane of weight 3
  thus gets three times the jobs of a lane of weight 1. A lane that was idle starts at the current value of the others:
  idle time does not save up turns.
- Between priorities: ageing. A lower lane that was not served for AGED_AFTER_S goes before the highest priority, but
  all aged lanes together get at most the share AGED_SHARE of the jobs.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

AGED_AFTER_S = 1.0
AGED_SHARE = 0.5
AGED_CREDIT_MAX = 1.0
STEP_BY_WEIGHT_MAX = 32  # jobs of a turn by weight


@dataclass(slots=True, eq=False, kw_only=True)
class StrideState:
    """The scheduling state of a lane. `rank` 0 is the highest priority; `weight` is its tenant's (default 1)."""

    rank: int = 0
    weight: float = 1.0
    pass_value: float = 0.0  # the sum of the lane's strides; the lowest is next
    served_at: float = 0.0  # when the lane was last given a job, or joined; monotonic seconds


class Schedulable(Protocol):
    """What `share_budget` needs of a lane. `wanted`: how many more of its jobs may be asked for."""

    rank: int
    weight: float
    pass_value: float
    served_at: float

    @property
    def wanted(self) -> int: ...


class StrideClock:
    """The current pass value of each rank, and the credit of aged lanes.

    `aged_credit`: how many jobs aged lanes may get ahead of their share, from 0 to AGED_CREDIT_MAX, in fractions.
    """

    def __init__(self) -> None:
        self._pass_values: dict[int, float] = {}
        self.aged_credit = AGED_CREDIT_MAX

    def join(self, lane: Schedulable, now: float) -> None:
        """A lane has jobs again: let it start at its rank's current pass value, and age from `now` on."""
        lane.pass_value = max(lane.pass_value, self._pass_values.get(lane.rank, 0.0))
        lane.served_at = now

    def advance(self, lane: Schedulable, jobs: int, now: float) -> None:
        """A lane is given `jobs`: advance it by as many strides."""
        self._pass_values[lane.rank] = max(self._pass_values.get(lane.rank, 0.0), lane.pass_value)
        lane.pass_value += jobs / lane.weight
        lane.served_at = now


L = TypeVar("L", bound=Schedulable)


def share_budget(
    clock: StrideClock, lanes: Iterable[L], budget: int, now: float, *, step: int = 1, step_per_weight: float = 0.0
) -> list[tuple[L, int]]:
    """Share `budget` jobs among lanes. Return each served lane with its number of jobs.

    No lane gets more than is `wanted` of it, and nothing is left over while a lane wants more.

    1. Aged lanes, those not served for AGED_AFTER_S below the highest rank present, get one job each, the longest
       waiting first. Their number is bounded by ``aged_credit + AGED_SHARE * budget``. What they leave unused carries
       over as credit, because slots often come free one by one, and a share of one job is less than a job.
    2. The rest goes to the ranks in order, and within a rank by stride, in turns of at least `step` jobs. If it is not
       0, a turn is of `step_per_weight` jobs times the lane's weight instead, at most STEP_BY_WEIGHT_MAX: then a few
       turns of each lane are enough for shares by weight.
    """
    given: dict[L, int] = {}
    left = budget
    lanes = list(lanes)
    highest = min((lane.rank for lane in lanes), default=0)
    aged = sorted(
        (lane for lane in lanes if lane.rank > highest and now - lane.served_at >= AGED_AFTER_S),
        key=lambda lane: lane.served_at,
    )
    credit = clock.aged_credit + AGED_SHARE * budget
    for lane in aged[: min(budget, int(credit))]:
        given[lane] = 1
        clock.advance(lane, 1, now)
        left -= 1
    aged_jobs = budget - left
    by_rank: dict[int, list[L]] = {}
    for lane in lanes:
        by_rank.setdefault(lane.rank, []).append(lane)
    for rank in sorted(by_rank):
        if left <= 0:
            break
        left = _share_by_stride(clock, by_rank[rank], left, given, now, step, step_per_weight)
    clock.aged_credit = min(AGED_CREDIT_MAX, credit - aged_jobs - AGED_SHARE * left)
    return list(given.items())


def _share_by_stride(
    clock: StrideClock,
    lanes: list[L],
    budget: int,
    given: dict[L, int],
    now: float,
    step: int,
    step_per_weight: float,
) -> int:
    """Share `budget` jobs among the lanes of one rank, and add them to `given`. Return how many are left over.

    Each turn serves the lane with the lowest pass value. A turn by weight: see `share_budget`. Another one is `step`
    jobs, or a quarter of an equal share if that is more: single jobs would cost more time than they gain in fairness.
    """
    step = max(step, budget // (4 * len(lanes)))
    heap = [(lane.pass_value, lane.served_at, number, lane) for number, lane in enumerate(lanes)]
    heapq.heapify(heap)
    while budget > 0 and heap:
        _, _, number, lane = heap[0]
        wanted = lane.wanted - given.get(lane, 0)
        if wanted <= 0:
            heapq.heappop(heap)
            continue
        turn = max(1, min(STEP_BY_WEIGHT_MAX, round(step_per_weight * lane.weight))) if step_per_weight else step
        jobs = min(wanted, budget, turn)
        given[lane] = given.get(lane, 0) + jobs
        clock.advance(lane, jobs, now)
        budget -= jobs
        heapq.heapreplace(heap, (lane.pass_value, now, number, lane))
    return budget
