"""Retry delays."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.errors import BadInput
from aiqueue.units import Backoff


@st.composite
def policies(draw: st.DrawFn) -> Backoff:
    first = draw(st.floats(0, 1000))
    return Backoff(
        attempts=draw(st.integers(1, 10_000)),
        first=first,
        factor=draw(st.floats(1, 100)),
        cap=draw(st.floats(first, 10**6)),
        jitter=draw(st.floats(0, 1)),
    )


def full_s(policy: Backoff, attempt: int) -> float:
    return policy.delay_s(attempt, lambda: 0.0)


@given(policies(), st.integers(1, 10**6), st.floats(0, 1, exclude_max=True))
def test_a_delay_is_the_full_one_less_at_most_its_jitter(policy: Backoff, attempt: int, chance: float) -> None:
    full = full_s(policy, attempt)
    delay = policy.delay_s(attempt, lambda: chance)
    assert full * (1 - policy.jitter) <= delay * (1 + 1e-12)
    assert delay <= full <= policy.cap_s


@given(policies(), st.integers(1, 10**6))
def test_delays_never_shrink_from_attempt_to_attempt(policy: Backoff, attempt: int) -> None:
    assert full_s(policy, attempt) <= full_s(policy, attempt + 1)


def test_delays_grow_by_the_factor_up_to_the_cap() -> None:
    policy = Backoff(first="1s", factor=2, cap="10s", jitter=0)
    assert [policy.delay_s(n) for n in range(1, 7)] == [1, 2, 4, 8, 10, 10]


def test_the_millionth_attempt_does_not_overflow() -> None:
    assert Backoff(first=1, factor=100, cap="365d", jitter=0).delay_s(10**6) == 365 * 86400


def test_a_factor_of_one_keeps_the_first_delay() -> None:
    assert Backoff(first=3, factor=1, cap=3, jitter=0).delay_s(500) == 3


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"attempts": 0}, "attempts"), ({"attempts": 10_001}, "attempts"), ({"attempts": True}, "attempts"),
        ({"attempts": 2.0}, "attempts"), ({"attempts": "3"}, "attempts"),
        ({"factor": 0.5}, "factor"), ({"factor": 101}, "factor"), ({"factor": float("nan")}, "factor"),
        ({"factor": "2"}, "factor"), ({"jitter": -0.1}, "jitter"), ({"jitter": 1.1}, "jitter"),
        ({"jitter": float("nan")}, "jitter"), ({"jitter": None}, "jitter"),
        ({"first": "soon"}, "duration"), ({"first": -1}, "duration"), ({"cap": float("inf")}, "duration"),
        ({"first": "10s", "cap": "1s"}, "cap"),
    ],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused_naming_what(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        Backoff(**wrong)


def test_policies_are_equal_by_what_they_say() -> None:
    assert Backoff(attempts=3) == Backoff(attempts=3) != Backoff(attempts=4)
