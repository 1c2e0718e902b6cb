from hypothesis import given
from hypothesis import strategies as st

from aiqueue.puller import LanePull, prefetch, shares
from aiqueue.subjects import Lane


def lane(pending: int, open_credits: int = 0) -> LanePull:
    requests = {1: open_credits} if open_credits else {}
    return LanePull(Lane("agent.tasks", "acme", "normal"), "S", "C", 30.0, pending=pending, requests=requests)


lanes = st.lists(st.builds(lane, st.integers(0, 1_000), st.integers(0, 50)), max_size=40)


@given(lanes, st.integers(-10, 500))
def test_new_credits_never_exceed_what_is_free(pulls: list[LanePull], free: int) -> None:
    held = sum(pull.credits for pull in pulls if pull.pending)
    assert sum(more for _, more in shares(pulls, free)) <= max(0, free - held)


@given(lanes, st.integers(1, 500))
def test_a_lane_is_never_asked_for_more_than_it_holds(pulls: list[LanePull], free: int) -> None:
    for pull, more in shares(pulls, free):
        assert more > 0
        assert more + pull.credits <= pull.pending


@given(st.lists(st.integers(1, 1_000), min_size=1, max_size=20), st.integers(20, 500))
def test_every_waiting_lane_gets_a_part(backlogs: list[int], free: int) -> None:
    pulls = [lane(pending) for pending in backlogs]
    given_to = {id(pull): more for pull, more in shares(pulls, free)}
    part = free // len(pulls)
    assert all(given_to[id(pull)] >= min(part, pull.pending) for pull in pulls)


def test_what_short_lanes_leave_goes_to_the_long_one() -> None:
    short, long = lane(2), lane(50_000)
    assert {pull.pending: more for pull, more in shares([long, short], 100)} == {2: 2, 50_000: 98}


def test_a_retiring_lane_gets_nothing() -> None:
    pull = lane(5)
    pull.retiring = True
    assert shares([pull], 100) == []


@given(st.integers(1, 10_000), st.floats(0, 1e6))
def test_prefetch_is_at_most_the_concurrency(concurrency: int, handler_s: float) -> None:
    assert 0 <= prefetch(concurrency, handler_s) <= concurrency


def test_prefetch_is_full_for_fast_handlers_and_none_for_slow_or_unknown_ones() -> None:
    assert prefetch(20, 0.001) == 20
    assert prefetch(20, 2.0) == 0
    assert prefetch(20, None) == 0
