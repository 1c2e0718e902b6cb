"""The turns of tenants whose limited keys have lanes of their own.

All lanes of a tenant and priority have one turn: a tenant with 50 keys gets no more than one with a single key. Within
a turn the lanes are served round robin, and none gets more jobs than its key has credits.
"""

from __future__ import annotations

from collections.abc import Iterable

from . import fairness
from .delivery import LanePull, Turn
from .key_pool import KeyPool

SHARED_ROOM = 4  # jobs of a lane that many keys share that may be here, or asked for, without a credit


def share_with_keys(
    clock: fairness.StrideClock,
    busy: Iterable[LanePull],
    budget: int,
    now: float,
    *,
    step: int,
    step_per_weight: float = 0.0,
) -> list[tuple[LanePull, int]]:
    """As `fairness.share_budget`, for lanes of which some belong to a turn."""
    plain: list[LanePull] = []
    turns: dict[Turn, list[LanePull]] = {}
    pools: dict[KeyPool, int] = {}
    for lane in busy:
        wanted = lane.wanted
        if wanted <= 0:
            continue
        if lane.turn is None:
            plain.append(lane)
            continue
        turns.setdefault(lane.turn, []).append(lane)
    for turn, lanes in turns.items():
        room = max(0, turn.room)  # for more jobs than that, others may have the credits
        for lane in lanes:
            if lane.pool is not None:
                pools[lane.pool] = pools.get(lane.pool, 0) + min(lane.wanted, room)
    free = {pool: pool.want(min(wanted, budget)) for pool, wanted in pools.items()}
    rooms: dict[LanePull, int] = {}
    for turn in sorted(turns, key=lambda each: each.rank):
        for lane in turns[turn]:
            wanted = lane.wanted
            if lane.pool is not None:
                wanted = min(wanted, free[lane.pool])
                free[lane.pool] -= wanted
            elif lane.key.key:
                wanted = min(wanted, max(0, SHARED_ROOM - lane.asking - lane.granted))
            rooms[lane] = wanted
        turn.wanted = min(sum(rooms[each] for each in turns[turn]), turn.room)
    wanting: list[LanePull | Turn] = [*plain, *(each for each in turns if each.wanted > 0)]
    shares: list[tuple[LanePull, int]] = []
    for each, jobs in fairness.share_budget(clock, wanting, budget, now, step=step, step_per_weight=step_per_weight):
        shares += each.share(rooms, jobs) if isinstance(each, Turn) else [(each, jobs)]
    return shares
