"""Counters, sums and percentiles. No server."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.metrics import Counts, JobSums, percentile

TIMES = st.lists(st.floats(min_value=2.0**-19, max_value=1e9), min_size=1, max_size=200)


def counted(runs: list[float], waits: list[float] | None = None) -> Counts:
    counts = Counts()
    for each in runs:
        counts.add_run(each)
    for each in waits or []:
        counts.add_wait(each)
    return counts


@given(times=TIMES, share=st.floats(min_value=0.01, max_value=1.0))
def test_a_percentile_is_within_a_factor_of_two_of_the_true_one(times: list[float], share: float) -> None:
    true = sorted(times)[math.ceil(share * len(times)) - 1]
    found = JobSums.of(counted(times).increments()).run_percentile(share)
    assert found is not None
    assert true / 2 <= found <= true * 2


@given(runs=TIMES, waits=TIMES, more=TIMES)
def test_sums_are_what_was_counted_and_add_up(runs: list[float], waits: list[float], more: list[float]) -> None:
    one, other = counted(runs, waits), counted(more)
    one.done, one.retried, one.dead, other.cancelled = 4, 3, 2, 1
    apart = JobSums.total(JobSums.of(each.increments()) for each in (one, other))
    one.add(other)
    together = JobSums.of(one.increments())
    assert (together.done, together.failed, together.ended) == (4, 5, 10)
    assert sum(together.runs.values()) == len(runs) + len(more)
    assert (apart.runs, apart.waits, apart.ended) == (together.runs, together.waits, 10)
    assert together.run_s == pytest.approx(sum(runs) + sum(more), rel=1e-6, abs=1e-6)
    assert apart.wait_s == pytest.approx(sum(waits), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("time_s", [0.0, -3.0, 1e-12, 2.0**-20, 0.25, 0.5, 1.0, 3e9, 1e300])
def test_any_time_has_a_bucket(time_s: float) -> None:
    ((name, count),) = [each for each in counted([time_s]).increments().items() if ":" in each[0]]
    assert count == 1
    exponent = int(name.removeprefix("run:"))
    if 2.0**-20 <= time_s < 2.0**31:
        assert 2.0 ** (exponent - 1) <= time_s < 2.0**exponent
    else:
        assert exponent == (31 if time_s > 1 else -19)


@pytest.mark.parametrize(
    ("histogram", "share", "expected"),
    [({}, 0.5, None), ({0: 0}, 0.5, None), ({0: 10}, 1.0, 1.0), ({0: 10}, 0.5, 2**-0.5), ({0: 10}, 0.0, 0.5),
     ({-2: 50, 3: 50}, 0.5, 0.25), ({-2: 50, 3: 50}, 0.75, 4 * 2**0.5), ({1: 1}, 7.0, 2.0)],
)  # fmt: skip
def test_within_a_bucket_times_are_spread_evenly_on_a_logarithmic_scale(
    histogram: dict[int, int], share: float, expected: float | None
) -> None:
    assert percentile(histogram, share) == (expected if expected is None else pytest.approx(expected))


def test_what_a_later_version_counts_is_left_out() -> None:
    counters: dict[str, Any] = {"done": 1, "tokens": 9, "run:": 1, "run:x": 1, "wait:-": 2, "size:3": 1, "run:-4": 5}
    assert JobSums.of(counters) == JobSums(done=1, runs={-4: 5})
