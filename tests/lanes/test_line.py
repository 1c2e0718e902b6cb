"""Which lanes have a place and which stand in line, decided without a server: random lines, and simulated workers."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.lanes import line
from aiqueue.lanes.fairness import AGED_AFTER_S, StrideClock, StrideState, share_budget
from aiqueue.lanes.line import (
    AGED_PLACES,
    AHEAD,
    LIVE_MAX,
    NEW_PLACES,
    LaneInLine,
    Line,
    choose_leaving,
    debt,
    may_go_first,
    turn_length,
)
from aiqueue.lanes.puller import STEP_MAX
from aiqueue.subjects import Lane

FULL = LIVE_MAX + AHEAD
MOST = FULL + NEW_PLACES + 3 * AGED_PLACES  # of four priorities


def lane(n: int) -> Lane:
    return Lane("agent.tasks", f"t{n}", "normal")


@dataclass(slots=True, eq=False, kw_only=True)
class Placed(StrideState):
    key: Lane
    pending: int = 1_000
    turn_at: float = 0.0
    turn_jobs: float = 0.0
    owed: float = 0.0

    @property
    def wanted(self) -> int:
        return self.pending

    @property
    def given_at(self) -> float:
        return self.served_at


waitings = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 100)), max_size=300).map(
    lambda each: [LaneInLine(lane(n), rank, at, 0.0, is_new=new) for n, (rank, new, at) in enumerate(each)]
)
ranks = st.lists(st.integers(0, 3), max_size=120)


def filled(each: list[LaneInLine]) -> Line:
    found = Line()
    for waiting in each:
        found.add(waiting)
    return found


@given(waitings, ranks, st.floats(0, 200), st.sets(st.integers(0, 300)))
def test_no_lane_is_lost_or_taken_twice_and_no_more_than_the_places_are_given(
    each: list[LaneInLine], placed: list[int], now: float, skipped: set[int]
) -> None:
    waiting, skip = filled(each), {lane(n) for n in skipped}
    taken = [one.lane for one in waiting.take(placed, now, skip=skip)]
    assert len(set(taken)) == len(taken)
    assert not skip & set(taken)
    assert sorted([*taken, *(one.lane for one in waiting)]) == sorted(one.lane for one in each)
    assert len(placed) + len(taken) <= max(len(placed), MOST)


@given(waitings, ranks, st.floats(0, 200))
def test_while_a_place_is_free_nobody_waits(each: list[LaneInLine], placed: list[int], now: float) -> None:
    waiting = filled(each)
    taken = waiting.take(placed, now)
    if waiting:
        assert len(placed) + len(taken) >= FULL


@given(waitings, st.integers(0, FULL))
def test_priorities_go_in_order_apart_from_lanes_that_have_aged(each: list[LaneInLine], places: int) -> None:
    waiting = filled(each)
    taken = [one.rank for one in waiting.take([0] * places, now=0.0)]  # nobody has aged
    by_rank = sorted(taken)
    assert taken == by_rank
    if taken and waiting and places + len(taken) == FULL:
        assert taken[-1] <= min(one.rank for one in waiting)


@given(waitings)
def test_of_one_priority_those_that_came_first_go_first(each: list[LaneInLine]) -> None:
    waiting = filled(each)
    taken = waiting.take([], now=0.0)
    for rank in range(4):
        for is_new in (False, True):
            came = [one for one in each if (one.rank, one.is_new) == (rank, is_new)]
            got = [one for one in taken if (one.rank, one.is_new) == (rank, is_new)]
            assert got == came[: len(got)]


@given(st.integers(10, 200), st.integers(10, 200))
def test_new_lanes_go_first_and_leave_every_second_place_to_the_others(new: int, old: int) -> None:
    waiting = filled([LaneInLine(lane(n), 0, 0.0, 0.0, is_new=n < new) for n in range(new + old)])
    taken = waiting.take([0] * (FULL - 10), now=0.0)
    assert taken[0].is_new
    assert sum(one.is_new for one in taken[:10]) == 5
    assert len(taken) == 10 + min(NEW_PLACES, new - 5)


def test_a_new_lane_has_a_place_at_once_where_all_are_taken() -> None:
    waiting = filled([LaneInLine(lane(n), 0, 0.0, 0.0) for n in range(1_000)])
    waiting.add(LaneInLine(lane(-1), 0, 0.0, 0.0, is_new=True))
    assert [one.lane for one in waiting.take([0] * FULL, now=0.0)] == [lane(-1)]


def test_lower_priorities_get_places_when_they_have_aged_and_no_more_than_their_share() -> None:
    waiting = filled([LaneInLine(lane(n), 2, float(n), 0.0) for n in range(100)])
    assert not waiting.take([0] * FULL, now=0.5)
    aged = waiting.take([0] * FULL, now=AGED_AFTER_S + 50)
    assert [one.lane for one in aged] == [lane(n) for n in range(AGED_PLACES)]
    assert not waiting.take([0] * FULL + [2] * AGED_PLACES, now=AGED_AFTER_S + 50)


def test_consumers_that_are_about_to_go_take_as_large_a_part_of_a_lower_prioritys_places_as_of_the_highest() -> None:
    each = [LaneInLine(lane(n), 2 * (n % 2), 0.0, 0.0) for n in range(400)]
    taken = Counter(one.rank for one in filled(each).take([], now=50.0, leaving=line.LEAVING_MAX + FULL // 2))
    assert taken == {0: FULL // 2, 2: AGED_PLACES // 2}
    assert not filled(each).take([], now=50.0, leaving=line.LEAVING_MAX + FULL)


placements = st.lists(
    st.builds(
        Placed, key=st.just(lane(0)), rank=st.integers(0, 3), weight=st.floats(0.01, 100),
        pending=st.integers(1, 1_000), turn_at=st.floats(0, 100), turn_jobs=st.floats(0, 1_000),
        served_at=st.floats(0, 100),
    ),
    max_size=120,
)  # fmt: skip
lengths = st.floats(0, 100)


@given(placements, lengths, st.floats(100, 200))
def test_no_lane_gives_up_its_place_for_nobody(placed: list[Placed], length: float, now: float) -> None:
    assert not choose_leaving(placed, Line(), length, now)


@given(placements, waitings, lengths, st.floats(100, 200))
def test_a_lane_gives_up_its_place_for_its_own_or_a_higher_priority_only(
    placed: list[Placed], each: list[LaneInLine], length: float, now: float
) -> None:
    waiting = filled(each)
    leaving = choose_leaving(placed, waiting, length, now)
    assert len(set(leaving)) == len(leaving)
    for one in leaving:
        assert min(other.rank for other in each) <= one.rank


@given(placements, waitings, lengths, st.floats(100, 200))
def test_a_lane_whose_turn_is_long_over_stays_only_where_a_place_is_free(
    placed: list[Placed], each: list[LaneInLine], length: float, now: float
) -> None:
    leaving = choose_leaving(placed, filled(each), length, now)
    stays = [one for one in placed if one not in leaving]
    highest = min((one.rank for one in placed), default=0)
    for one in stays:
        is_over = one.turn_jobs > 0 and one.turn_jobs >= (1 + line.FINISH_TURNS) * length
        if is_over and one.rank == highest and any(other.rank <= one.rank for other in each):
            lower = Counter(other.rank for other in placed if other.rank > highest)
            assert len(stays) <= LIVE_MAX + sum(min(AGED_PLACES, count) for count in lower.values())


def test_of_lanes_whose_turn_is_over_those_leave_that_have_had_the_most_beyond_it() -> None:
    even = [Placed(key=lane(n), turn_at=9.0, turn_jobs=6.0, pending=1_000) for n in range(LIVE_MAX)]
    more = Placed(key=lane(100), turn_at=9.0, turn_jobs=5.0, owed=4.0, pending=1_000)
    assert choose_leaving([more, *even], filled([LaneInLine(lane(200), 0, 0.0, 0.0)]), 5.0, 10.0) == [more]


@given(st.integers(1, 100_000), st.floats(0.1, 1_000), st.floats(0, 50_000))
def test_the_turns_of_all_lanes_are_as_many_jobs_as_a_round_takes(lanes: int, weight: float, rate: float) -> None:
    length = turn_length(lanes, weight, rate)
    assert length == pytest.approx(max(line.TURN_MIN, rate * line.ROUND_S / lanes / weight))


@given(placements, waitings, st.floats(0.1, 100), st.floats(0.0, 1.99))
def test_a_lane_that_owes_a_turn_is_given_jobs_all_the_same_before_it_leaves(
    placed: list[Placed], each: list[LaneInLine], length: float, ago: float
) -> None:
    for one in placed:
        one.owed, one.turn_jobs, one.turn_at, one.rank = length, 0.0, 100.0 - ago, 0
    assert not choose_leaving(placed, filled(each), length, 100.0)


@dataclass
class Simulated:
    """A worker that starts `rate` jobs a second of backlogged lanes, by the decisions of `fairness` and `line`."""

    lanes: list[Placed]
    rate: int
    now: float = 0.0
    starts: Counter[Lane] = field(default_factory=Counter)
    last: dict[Lane, float] = field(default_factory=dict)
    longest: float = 0.0  # between two starts of a lane
    turns: int = 0
    vain: int = 0  # of these, of lanes that were given no job
    jobs: float = 0.0  # that it may start now
    turns_a_second: float = math.inf  # lanes that the server opens
    opening: list[LaneInLine] = field(default_factory=list)
    opens: float = 0.0  # lanes that it may open now

    def __post_init__(self) -> None:
        self.by_key = {each.key: each for each in self.lanes}
        self.live: list[Placed] = []
        self.clock, self.line = StrideClock(), Line()
        for each in self.lanes:
            self.line.add(LaneInLine(each.key, each.rank, 0.0, 0.0, weight=each.weight))
            self.last[each.key] = 0.0
        self.passes: dict[Lane, float] = {}

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += 0.01
            self.step()

    def step(self) -> None:
        lanes, weights = len(self.live) + len(self.line), self.line.weights + sum(each.weight for each in self.live)
        length = turn_length(lanes + len(self.opening), weights / lanes, self.rate)
        for each in self.live:
            each.turn_jobs = each.pass_value - self.passes[each.key]
        for each in choose_leaving(self.live, self.line, length, self.now):
            self.live.remove(each)
            owed = debt(each.turn_jobs, each.owed, length)
            waiting = LaneInLine(each.key, each.rank, each.served_at, self.now, weight=each.weight, debt=owed)
            self.line.add(waiting, first=may_go_first(each, self.now))
            self.turns += 1
            self.vain += each.turn_jobs <= 0
        ranks = [each.rank for each in self.live] + [each.rank for each in self.opening]
        self.opening += self.line.take(ranks, self.now)
        self.opens = min(1.0, self.opens) + self.turns_a_second / 100
        while self.opening and self.opens >= 1.0:
            self.opens -= 1.0
            waiting = self.opening.pop(0)
            each = self.by_key[waiting.lane]
            self.clock.join(each, self.now)
            each.served_at, each.turn_at = waiting.served_at, self.now
            self.passes[each.key], each.turn_jobs, each.owed = each.pass_value, 0.0, waiting.debt
            self.live.append(each)
        self.jobs += self.rate / 100
        budget, self.jobs = int(self.jobs), self.jobs % 1
        step = min(STEP_MAX, line.STEP_OF_TURN * length)
        for each, jobs in share_budget(self.clock, self.live, budget, self.now, step_per_weight=step):
            self.starts[each.key] += jobs
            self.longest = max(self.longest, self.now - self.last[each.key])
            self.last[each.key] = self.now

    def waited(self) -> float:
        """The longest time without a start, of any lane."""
        return max(self.longest, self.now - min(self.last.values()))


@pytest.mark.parametrize("rate", [8_000, 6_000, 3_000, 1_500, 800, 400])
def test_a_thousand_backlogs_share_by_weight_and_none_waits_for_much_more_than_a_round(rate: int) -> None:
    heavy = [Placed(key=lane(n), weight=3.0, pending=10**6) for n in range(500)]
    light = [Placed(key=lane(500 + n), pending=10**6) for n in range(500)]
    worker = Simulated([*heavy, *light], rate=rate)  # the heavy ones all come first
    worker.run(30.0)
    shares = [sum(worker.starts[each.key] for each in group) for group in (heavy, light)]
    assert shares[0] / sum(shares) == pytest.approx(0.75, rel=0.1)
    assert shares[1] / sum(shares) == pytest.approx(0.25, rel=0.1)
    assert worker.waited() < max(5.0, 1.25 * 2_000 * line.TURN_MIN / rate)
    assert worker.turns <= 410 * 30  # each of them costs the server 1 to 2 ms


@pytest.mark.parametrize("turns_a_second", [400, 300, 200, 150])
@pytest.mark.parametrize("rate", [6_000, 3_000, 1_500])
def test_where_the_server_is_slow_to_open_lanes_they_share_by_weight_all_the_same(
    rate: int, turns_a_second: int
) -> None:
    lanes = [Placed(key=lane(n), weight=3.0 if n < 500 else 1.0, pending=10**6) for n in range(1_000)]
    random.Random(turns_a_second).shuffle(lanes)
    worker = Simulated(lanes, rate=rate, turns_a_second=turns_a_second)
    worker.run(30.0)
    heavy, light = (sum(worker.starts[each.key] for each in lanes if each.weight == weight) for weight in (3.0, 1.0))
    assert light / (heavy + light) == pytest.approx(0.25, rel=0.1)
    assert worker.waited() < 1.3 * 1_000 / turns_a_second


def test_beside_a_high_job_no_lane_gives_up_a_place_that_no_high_lane_waits_for() -> None:
    high = Placed(key=lane(-1), rank=0, pending=1, turn_at=9.9)
    served = [Placed(key=lane(n), rank=1, turn_at=9.5, turn_jobs=4.0, served_at=9.99) for n in range(20)]
    begun = [Placed(key=lane(20 + n), rank=1, turn_at=9.9) for n in range(60)]
    normal = [LaneInLine(lane(100 + n), 1, 0.0, 0.0) for n in range(900)]
    assert not choose_leaving([high, *served, *begun], filled(normal), 6.0, now=10.0)
    higher = LaneInLine(lane(-2), 0, 0.0, 0.0)
    leaving = choose_leaving([high, *served, *begun], filled([higher, *normal]), 6.0, now=10.0)
    assert leaving[-20:] == served  # 81 placed: 49 have to, and these were given jobs
    assert len(leaving) == 81 - LIVE_MAX - AGED_PLACES


@given(placements, waitings, st.floats(100, 200))
def test_where_higher_lanes_wait_those_of_a_lower_one_with_the_most_jobs_give_way_first(
    placed: list[Placed], each: list[LaneInLine], now: float
) -> None:
    leaving = choose_leaving(placed, filled(each), 10.0**6, now)  # no turn is over
    highest = min((one.rank for one in placed), default=0)
    forced = [one for one in leaving if now - one.given_at < line.LOWER_S or one.turn_jobs <= 0]
    for one in forced:
        if one.turn_jobs > 0 or now - one.turn_at < line.UNSERVED_S:
            assert one.rank > highest
            stays = [other for other in placed if other not in leaving and other.rank == one.rank]
            assert all(other.turn_jobs <= one.turn_jobs or now - other.turn_at >= line.UNSERVED_S for other in stays)


def test_a_lane_that_gives_up_its_place_before_it_was_given_a_job_is_next() -> None:
    waiting = filled([LaneInLine(lane(n), 1, 0.0, 0.0) for n in range(100)])
    for wanted, first in ((1, lane(200)), (0, lane(0))):  # the second one has had its place in vain
        left = Placed(key=lane(200), rank=1, turn_at=1.0, pending=wanted)
        waiting.add(LaneInLine(left.key, 1, 0.0, 10.0), first=may_go_first(left, 10.0))
        assert waiting.take([1] * (FULL - 1), now=10.0)[0].lane == first
        waiting.discard(left.key)
        waiting.add(LaneInLine(lane(0), 1, 0.0, 0.0), first=True)


@pytest.mark.parametrize("rate", [5, 20, 50])
def test_where_few_jobs_are_started_no_lane_gives_up_its_place_unserved_and_all_go_in_order(rate: int) -> None:
    worker = Simulated([Placed(key=lane(n), pending=10**6) for n in range(200)], rate=rate)
    worker.run(3 * 200 / rate)
    assert worker.vain == 0
    assert worker.waited() <= 200 / rate + 0.1


def test_while_no_slot_is_free_lanes_keep_their_places() -> None:
    worker = Simulated([Placed(key=lane(n), pending=10**6) for n in range(200)], rate=0)
    worker.run(30.0)
    assert worker.turns == 0


@pytest.mark.parametrize("rate", [50, 800, 6_000])
def test_aged_lanes_of_two_lower_priorities_do_not_take_each_others_places(rate: int) -> None:
    lanes = [Placed(key=lane(n), rank=n % 3, pending=10**6) for n in range(300)]
    worker = Simulated(lanes, rate=rate)
    worker.run(20.0 if rate < 500 else 8.0)
    assert all(worker.starts[each.key] for each in lanes)
    assert worker.vain <= 0.02 * worker.turns
    assert worker.waited() < max(2.5, AGED_AFTER_S + 200 / (0.5 * rate))  # lower ones have half the jobs, once aged


@given(st.lists(st.integers(0, 99), min_size=60, max_size=100, unique=True))
def test_of_lanes_that_give_way_unserved_to_higher_ones_those_that_waited_longest_stay(order: list[int]) -> None:
    high = [Placed(key=lane(1_000 + n), rank=0, turn_at=9.9, turn_jobs=1.0, served_at=9.99) for n in range(LIVE_MAX)]
    begun = [Placed(key=lane(n), rank=1, turn_at=9.9, served_at=float(n) / 100) for n in order]
    higher = LaneInLine(lane(-2), 0, 0.0, 0.0)
    leaving = choose_leaving([*high, *begun], filled([higher]), 10.0**6, now=10.0)
    stay = sorted(order)[:AGED_PLACES]
    assert [each.key for each in leaving] == [lane(n) for n in sorted(order) if n not in stay]


def test_slots_that_come_free_one_by_one_go_round() -> None:
    worker = Simulated([Placed(key=lane(n), pending=10**6) for n in range(200)], rate=100)
    worker.run(20.0)
    assert min(worker.starts.values()) >= 5
    assert max(worker.starts.values()) <= 20


def test_many_lower_lanes_beside_many_higher_ones_are_all_served() -> None:
    high = [Placed(key=lane(n), rank=0, pending=10**6) for n in range(300)]
    low = [Placed(key=lane(300 + n), rank=2, pending=10**6) for n in range(300)]
    worker = Simulated([*high, *low], rate=6_000)
    worker.run(20.0)
    assert all(worker.starts[each.key] for each in [*high, *low])
    assert sum(worker.starts[each.key] for each in high) >= 0.5 * sum(worker.starts.values())
    assert worker.waited() < 5.0


def test_the_lowest_priority_is_served_beside_one_lane_of_the_highest_and_many_between() -> None:
    high, low = Placed(key=lane(0), rank=0, pending=10**6), Placed(key=lane(1), rank=2, pending=10**6)
    normal = [Placed(key=lane(n), rank=1, pending=10**6) for n in range(2, 202)]
    worker = Simulated([high, *normal, low], rate=2_000)
    worker.run(10.0)
    assert worker.starts[low.key]
    assert worker.waited() < 2.0


def test_of_lanes_that_are_equally_far_on_the_one_that_waits_longest_is_next() -> None:
    lanes = [Placed(key=lane(n), served_at=float(at)) for n, at in enumerate((3, 1, 2))]
    assert [one.key for one, _ in share_budget(StrideClock(), lanes, 1, now=3.5)] == [lane(1)]
