"""The judge of the scenarios of schedules finds what it is to find."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.schedules.bench import Fired, judge, judge_lateness
from benchmarks.schedules.deploy import judge_ticks
from benchmarks.schedules.faults import _latest_ms

TICKS = [("s", 1.0), ("s", 2.0), ("t", 1.5)]
GOOD = [Fired("s", 1.0, 1.001, 1), Fired("s", 2.0, 2.003, 2), Fired("t", 1.5, 1.502, 3)]
HERE: Any = SimpleNamespace(expected=lambda: TICKS, workers=SimpleNamespace(surprises=[]))


def violated(fired: list[Fired]) -> list[str]:
    return [each.name for each in judge(HERE, fired) if not each.holds]


def test_each_tick_with_one_job_is_right() -> None:
    assert violated(GOOD) == []


@pytest.mark.parametrize(
    ("fired", "found"),
    [
        (GOOD[1:], ["ticks without a job"]),
        ([*GOOD, GOOD[0]._replace(seq=9)], ["jobs beside the first of a tick"]),
        ([*GOOD, Fired("s", 3.0, 3.001, 9)], ["jobs of no tick"]),
    ],
)
def test_a_missing_tick_a_double_one_and_one_of_nowhere_are_found(fired: list[Fired], found: list[str]) -> None:
    assert violated(fired) == found


def test_a_late_tick_is_found_unless_a_server_was_away() -> None:
    late = [*GOOD, Fired("u", 5.0, 9.0, 4)]
    assert not judge_lateness(late, (), at_most_ms=3_000)[-1].holds
    assert judge_lateness(GOOD, (), at_most_ms=3_000)[-1].holds


def test_a_tick_that_two_victims_held_may_be_late_twice() -> None:
    late = [Fired("s", 10.0, 13.9, 1)]
    assert _latest_ms(late, []) == pytest.approx(3_900)
    assert _latest_ms(late, [9.9]) == pytest.approx(3_900)
    assert _latest_ms(late, [9.9, 11.8]) == pytest.approx(1_900)


def test_in_a_deploy_a_missing_tick_a_double_one_and_one_of_the_other_version_are_found() -> None:
    """From second 10 on each second, from 15 on every second one."""
    changes = [(10.2, 1.0), (15.2, 2.0)]
    right = [Fired("s", float(each), each + 0.001, each) for each in (11, 12, 13, 14, 15, 16, 18, 20, 22, 24, 26)]

    def wrong(fired: list[Fired]) -> list[str]:
        return [each.name for each in judge_ticks(fired, changes) if not each.holds]

    assert wrong(right) == []
    assert wrong([each for each in right if each.tick != 13]) == ["ticks without a job"]
    assert wrong([*right, right[3]]) == ["jobs beside the first of a tick"]
    assert wrong([*right, Fired("s", 19.0, 19.001, 99)]) == ["jobs of ticks that were not declared"]
