from hypothesis import given
from hypothesis import strategies as st

from aiqueue.lanes.puller import prefetch


@given(st.integers(1, 10_000), st.floats(0, 1e6))
def test_prefetch_is_at_most_the_concurrency(concurrency: int, handler_s: float) -> None:
    assert 0 <= prefetch(concurrency, handler_s) <= concurrency


def test_prefetch_is_full_for_fast_handlers_and_none_for_slow_or_unknown_ones() -> None:
    assert prefetch(20, 0.001) == 20
    assert prefetch(20, 2.0) == 0
    assert prefetch(20, None) == 0
