from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.lanes.delivery import LanePull, Turn
from aiqueue.lanes.fairness import StrideClock
from aiqueue.lanes.key_turns import SHARED_ROOM, share_with_keys
from aiqueue.subjects import REST, Lane


class Credits:
    """A pool with so many credits."""

    is_exhausted = False

    def __init__(self, free: int) -> None:
        self.free = free
        self.wanted = 0

    def want(self, jobs: int) -> int:
        self.wanted = jobs
        return self.free


def pull(lane: Lane, turn: Turn | None = None, pool: Any = None, *, pending: int = 1_000, rank: int = 0) -> LanePull:
    made = LanePull(lane, "S", str(lane), 30.0, pending=pending, rank=rank, turn=turn, pool=pool)
    if turn is not None:
        turn.lanes.append(made)
    return made


def keys(tenant: str, count: int, turn: Turn, free: int = 1_000, priority: str = "normal") -> list[LanePull]:
    return [pull(Lane("f.x", tenant, priority, f"k{each}"), turn, Credits(free)) for each in range(count)]


def given_to(lanes: list[LanePull], budget: int, times: int = 1) -> Counter[str]:
    clock, total = StrideClock(), Counter[str]()
    for _ in range(times):
        for lane, jobs in share_with_keys(clock, lanes, budget, 0.0, step=1):
            total[lane.key.tenant] += jobs
            total[str(lane.key.key)] += jobs
    return total


def test_a_tenant_with_fifty_keys_gets_no_more_than_one_with_a_single_key() -> None:
    many, one = Turn(0, 1.0, 10_000), Turn(0, 1.0, 10_000)
    lanes = [*keys("many", 50, many), *keys("one", 1, one)]
    total = given_to(lanes, 4, times=200)
    assert total["many"] == pytest.approx(total["one"], abs=8)


def test_a_tenants_keys_are_served_evenly() -> None:
    turn = Turn(0, 1.0, 10_000)
    total = given_to(keys("a", 7, turn), 1, times=70)
    assert {total[f"k{each}"] for each in range(7)} == {10}


def test_a_tenant_without_limited_keys_has_the_same_turn_as_one_with_them() -> None:
    limited, plain = Turn(0, 1.0, 10_000), Turn(0, 1.0, 10_000)
    lanes = [
        *keys("limited", 5, limited),
        pull(Lane("f.x", "plain", "normal"), plain),
        pull(Lane("g.x", "other", "normal")),
    ]
    total = given_to(lanes, 6, times=100)
    assert total["limited"] == pytest.approx(200, abs=6)
    assert total["plain"] == pytest.approx(200, abs=6)
    assert total["other"] == pytest.approx(200, abs=6)


def test_no_more_jobs_are_asked_for_than_there_are_credits_in_the_pool_of_all_priorities() -> None:
    pool = Credits(5)
    high, low = Turn(0, 1.0, 10_000), Turn(1, 1.0, 10_000)
    lanes = [
        pull(Lane("f.x", "a", "low", "k"), low, pool, rank=1),
        pull(Lane("f.x", "a", "high", "k"), high, pool),
    ]
    shares = share_with_keys(StrideClock(), lanes, 100, 0.0, step=1)
    assert [(lane.key.priority, jobs) for lane, jobs in shares] == [("high", 5)]
    assert pool.wanted == 100  # of both lanes, and no more than there are slots


def test_a_key_without_credits_leaves_its_turn_to_the_tenants_other_keys() -> None:
    turn = Turn(0, 1.0, 10_000)
    lanes = [*keys("a", 3, turn, free=0), pull(Lane("f.x", "a", "normal", "open"), turn, Credits(50))]
    assert given_to(lanes, 20) == {"a": 20, "open": 20}


def test_a_tenants_cap_holds_over_all_its_lanes() -> None:
    turn = Turn(0, 1.0, 10)
    lanes = keys("a", 5, turn)
    turn.running = 4
    lanes[0].waiting = 2
    assert given_to(lanes, 100)["a"] == 4


def test_of_a_lane_that_many_keys_share_only_a_few_jobs_are_here_without_a_credit() -> None:
    turn = Turn(0, 1.0, 10_000)
    rest = pull(Lane("f.x", "a", "normal", REST), turn)
    rest.asking = 1
    assert given_to([rest], 100)["a"] == SHARED_ROOM - 1


lane_lists = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 20), st.integers(0, 30), st.booleans()), max_size=30
)


@given(lane_lists, st.integers(1, 200), st.sampled_from([0.0, 0.4, 5.0]))
def test_what_is_given_has_credits_and_jobs_and_room(
    each: list[tuple[int, int, int, int, bool]], budget: int, step_per_weight: float
) -> None:
    turns: dict[tuple[int, int], Turn] = {}
    lanes = []
    for number, (tenant, rank, free, pending, is_plain) in enumerate(each):
        lane = Lane("f.x", f"t{tenant}", f"p{rank}", "" if is_plain else f"k{number}")
        turn = None if is_plain else turns.setdefault((tenant, rank), Turn(rank, 1.0, 25))
        lanes.append(pull(lane, turn, None if is_plain else Credits(free), pending=pending, rank=rank))
    shares = dict(share_with_keys(StrideClock(), lanes, budget, 0.0, step=1, step_per_weight=step_per_weight))
    assert sum(shares.values()) <= budget
    for lane, jobs in shares.items():
        assert 0 < jobs <= lane.pending
        assert lane.pool is None or jobs <= lane.pool.free
    for turn in turns.values():
        assert sum(shares.get(lane, 0) for lane in turn.lanes) <= 25
    rooms = {
        turn: sum(min(lane.pending, lane.pool.free) for lane in turn.lanes if lane.pool) for turn in turns.values()
    }
    most = sum(min(25, room) for room in rooms.values()) + sum(lane.pending for lane in lanes if lane.turn is None)
    assert sum(shares.values()) == min(budget, most)
