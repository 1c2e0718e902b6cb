"""Keeps totals from going back a little, which readers of counters would take for a restart from 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .sums import OUTCOMES, JobSums

Totals = Mapping[tuple[str, str], JobSums]


class MonotonicTotals:
    """The totals that were shown last, by family and kind.

    A single counter on the server can go back: one that had no job for 90 days, or that a full stream has dropped,
    begins again at 0, and a server that crashed may have lost the last increments. Where that makes a total fall by
    less than half, it is shown as it was until it has caught up. If it falls by more, it has been reset, and is shown
    as it is. A total that is gone is forgotten.
    """

    def __init__(self) -> None:
        self._shown: dict[tuple[str, str], JobSums] = {}

    def update(self, totals: Totals) -> Totals:
        """Return what to show for these totals."""
        self._shown = {key: _advance(self._shown.get(key), sums) for key, sums in totals.items()}
        return self._shown


class _Times(NamedTuple):
    total_s: float
    counts: Mapping[int, int]


def _advance(old: JobSums | None, new: JobSums) -> JobSums:
    if old is None:
        return new
    run = _advance_times(_Times(old.run_s, old.runs), _Times(new.run_s, new.runs))
    wait = _advance_times(_Times(old.wait_s, old.waits), _Times(new.wait_s, new.waits))
    outcomes = {name: _advance_count(getattr(old, name), getattr(new, name)) for name in OUTCOMES}
    return JobSums(**outcomes, run_s=run.total_s, wait_s=wait.total_s, runs=run.counts, waits=wait.counts)


def _advance_times(old: _Times, new: _Times) -> _Times:
    if _is_reset(sum(old.counts.values()), sum(new.counts.values())):
        return new
    counts = {each: max(old.counts.get(each, 0), new.counts.get(each, 0)) for each in {*old.counts, *new.counts}}
    return _Times(max(old.total_s, new.total_s), counts)


def _advance_count(old: int, new: int) -> int:
    return new if _is_reset(old, new) else max(old, new)


def _is_reset(old: int, new: int) -> bool:
    return new * 2 < old
