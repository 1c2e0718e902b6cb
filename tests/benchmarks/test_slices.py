"""How a drain in slices is judged."""

from __future__ import annotations

import pytest

import aiqueue
from aiqueue.metrics import History
from benchmarks import slices
from benchmarks.slices import METRICS, OFF, OFF_AGAIN, Figures, slices_of


def test_whatever_changes_steadily_adds_to_no_side() -> None:
    sides = [OFF, OFF_AGAIN, METRICS]
    order = slices_of(sides, 50)
    assert len(order) == 51 * 6
    figures = Figures(sides, order, [10.0 + 0.1 * at + (each == METRICS) for at, each in enumerate(order)])
    assert figures.added("off again") == pytest.approx([0.0] * 50)
    assert figures.added("metrics") == pytest.approx([1.0] * 50)
    assert slices.interval(figures.added("metrics")) == pytest.approx((1.0, 1.0))
    assert "metrics adds 1.00 µs a job (95 %: 1.00 to 1.00; mean 1.00; 50 blocks)" in figures.lines()[2]


@pytest.mark.families("agent.tasks")
async def test_the_jobs_of_a_side_are_counted_and_those_of_another_are_not(client: aiqueue.Client) -> None:
    figures = await slices.measure(client, [OFF, METRICS], blocks=2, jobs=300)
    assert [len(each) for each in figures.by_side.values()] == [2, 2]
    history = History(client.connection, client.topology, "total", since_s=0)
    await history.update()
    (sums,) = dict(history.totals()).values()
    assert abs(sums.done - 3 * 2 * 300) <= 6 * 2 * slices.SLOTS  # those that ran when the sides changed
