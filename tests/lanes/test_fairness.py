from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.lanes.fairness import AGED_AFTER_S, STEP_BY_WEIGHT_MAX, StrideClock, StrideState, share_budget


@dataclass(slots=True, eq=False, kw_only=True)
class Lane(StrideState):
    name: str = "lane"
    pending: int = 0
    granted: int = 0

    @property
    def wanted(self) -> int:
        return self.pending - self.granted


def given_to(clock: StrideClock, lanes: list[Lane], budget: int, now: float = 0.0) -> dict[str, int]:
    return {lane.name: jobs for lane, jobs in share_budget(clock, lanes, budget, now)}


lanes = st.lists(
    st.builds(
        Lane,
        rank=st.integers(0, 3),
        weight=st.floats(0.01, 100),
        pass_value=st.floats(0, 1e6),
        served_at=st.floats(0, 100),
        pending=st.integers(0, 1_000),
        granted=st.integers(0, 50),
    ),
    max_size=40,
)


by_weight = st.one_of(st.just(0.0), st.floats(0.001, 100))


@given(lanes, st.integers(0, 500), st.floats(0, 100), by_weight)
def test_no_lane_is_given_more_than_it_holds_nor_all_more_than_there_is(
    each: list[Lane], budget: int, now: float, step_per_weight: float
) -> None:
    wanting = [lane for lane in each if lane.pending > lane.granted]
    parts = share_budget(StrideClock(), wanting, budget, now, step_per_weight=step_per_weight)
    assert sum(jobs for _, jobs in parts) <= max(budget, 0)
    for lane, jobs in parts:
        assert 0 < jobs <= lane.pending - lane.granted


@given(lanes, st.integers(1, 500), by_weight)
def test_nothing_is_left_ungiven_while_jobs_wait(each: list[Lane], budget: int, step_per_weight: float) -> None:
    wanting = [lane for lane in each if lane.pending > lane.granted]
    waits = sum(lane.pending - lane.granted for lane in wanting)
    parts = share_budget(StrideClock(), wanting, budget, 0.0, step_per_weight=step_per_weight)
    assert sum(jobs for _, jobs in parts) == min(budget, waits)


def test_by_weight_lanes_of_three_to_one_have_their_due_after_one_turn_of_each_and_none_has_a_long_one() -> None:
    heavy, light = Lane(name="heavy", weight=3, pending=10**6), Lane(name="light", pending=10**6)
    assert dict(share_budget(StrideClock(), [light, heavy], 16, 0.0, step=8, step_per_weight=4.0)) == {
        light: 4,
        heavy: 12,
    }
    giant, light = Lane(name="giant", weight=100, pending=10**6), Lane(name="light", pending=10**6)
    shares = dict(share_budget(StrideClock(), [giant, light], 3 * STEP_BY_WEIGHT_MAX, 0.0, step_per_weight=4.0))
    assert shares == {giant: 3 * STEP_BY_WEIGHT_MAX - 4, light: 4}  # in three turns, and one in between


def test_weights_of_three_to_one_hold_over_many_small_turns() -> None:
    clock, total = StrideClock(), Counter[str]()
    heavy, light = Lane(name="heavy", weight=3, pending=10**6), Lane(name="light", pending=10**6)
    for _ in range(1_000):
        total.update(given_to(clock, [light, heavy], 1))
    assert total["heavy"] == pytest.approx(750, abs=2)


def test_a_lane_that_was_idle_has_saved_up_no_turns() -> None:
    clock = StrideClock()
    busy, back = Lane(name="busy", pending=10**6), Lane(name="back", pending=10**6)
    for _ in range(500):
        given_to(clock, [busy], 1)
    clock.join(back, 0.0)
    total = Counter[str]()
    for _ in range(100):
        total.update(given_to(clock, [busy, back], 1))
    assert total["back"] == pytest.approx(50, abs=2)


def test_a_quiet_tenants_job_is_next_behind_a_backlog_of_another() -> None:
    clock = StrideClock()
    noisy = Lane(name="noisy", pending=50_000)
    for _ in range(100):
        given_to(clock, [noisy], 10)
    quiet = Lane(name="quiet", pending=3)
    clock.join(quiet, 0.0)
    assert given_to(clock, [noisy, quiet], 2)["quiet"] >= 1


def test_a_higher_rank_goes_first_and_a_lower_one_within_the_bound() -> None:
    clock = StrideClock()
    high, low = Lane(name="high", rank=0, pending=10**6), Lane(name="low", rank=2, pending=5)
    clock.join(high, 0.0)
    clock.join(low, 0.0)
    assert given_to(clock, [low, high], 4, now=AGED_AFTER_S / 2) == {"high": 4}
    assert given_to(clock, [low, high], 4, now=AGED_AFTER_S)["low"] == 1
    assert given_to(clock, [low, high], 4, now=AGED_AFTER_S * 1.5) == {"high": 4}
    assert given_to(clock, [low, high], 1, now=AGED_AFTER_S * 2) == {"low": 1}


def test_many_aged_lanes_leave_the_higher_rank_half_of_what_there_is() -> None:
    clock = StrideClock()
    high = Lane(name="high", rank=0, pending=100)
    low = [Lane(name=f"low{n}", rank=1, pending=100) for n in range(50)]
    parts = given_to(clock, [high, *low], 20, now=10.0)
    assert parts["high"] >= 9
    assert sum(parts.values()) == 20


def test_many_aged_lanes_leave_the_higher_rank_half_also_where_slots_come_free_one_by_one() -> None:
    clock, total = StrideClock(), Counter[str]()
    high = Lane(name="high", rank=0, pending=10**6)
    low = [Lane(name=f"low{n}", rank=1, pending=10**6) for n in range(50)]
    for turn in range(1_000):
        total.update(given_to(clock, [high, *low], 1, now=100.0 + turn * 0.01))
    assert total["high"] >= 499
    assert min(total[lane.name] for lane in low) >= 8
