"""What was read for a place."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from .place import Place

if TYPE_CHECKING:
    from ...inspect import FamilyStats, LaneStats, ListedJob, WorkerStats
    from ...lanes import Pause
    from ...metrics import JobSums, Series

WINDOW_S = 15.0
AGES_EVERY_S = 15.0
MINUTE_S = 60.0


class KnownAges:
    """The ages of lanes' oldest jobs as they were read last, by which lanes are sorted that are not visible.

    All of them are read rarely: that is a request for each lane.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[float, float]] = {}
        self._all_until = 0.0

    def fill(self, lanes: Iterable[LaneStats], now: float) -> list[LaneStats]:
        """Return the lanes, with the ages that they must have `now` where they were not read. Note those that were."""
        filled = []
        for each in lanes:
            key = each.family, each.tenant, each.priority, each.key_hash
            if each.oldest_age_s is not None:
                self._known[key] = each.oldest_age_s, now
            elif each.pending and key in self._known:
                age_s, at = self._known[key]
                filled.append(replace(each, oldest_age_s=age_s + now - at))
                continue
            filled.append(each)
        return filled

    def begin_all(self, now: float) -> bool:
        """Return whether all are to be read; then for AGES_EVERY_S not again."""
        if now < self._all_until:
            return False
        self._all_until = now + AGES_EVERY_S
        return True


class OutcomeRates(NamedTuple):
    """How many attempts ended well, and failed, in a second. None: nothing is known of it."""

    done: float | None = None
    failed: float | None = None


class FamilyRow(NamedTuple):
    """A family with its last hour (None: nothing is known), and the number of its workers that run jobs."""

    stats: FamilyStats
    past: Series | None
    rates: OutcomeRates
    workers: int | None
    is_inbox: bool = False


class KindRow(NamedTuple):
    """A kind with its last hour."""

    past: Series
    sums: JobSums
    rates: OutcomeRates


@dataclass(frozen=True)
class Figures:
    """What was read for `place`; what the place does not show is empty.

    - `families`: all, or the one of the place. `workers`: all. None: they cannot be read, and `notes` says why.
    - `more_jobs`: there are more than those in `jobs`. `details`: the job or the worker of the place; None: there is
      none of this name, and `missing` says so.
    """

    place: Place
    server: str = ""
    families: tuple[FamilyRow, ...] = ()
    workers: tuple[WorkerStats, ...] | None = None
    lanes: tuple[LaneStats, ...] = ()
    jobs: tuple[ListedJob, ...] = ()
    more_jobs: bool = False
    kinds: tuple[KindRow, ...] = ()
    pauses: tuple[Pause, ...] = ()
    details: Any = None
    missing: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


class RecentRates:
    """OutcomeRates over the last WINDOW_S, from a history that is read again and again; at first over its last minute.

    Workers report every 5 s, each at its own time, and the history keeps sums of minutes.
    """

    def __init__(self) -> None:
        self._before: dict[int, tuple[int, int]] = {}  # done and failed, by minute
        self._steps: deque[tuple[float, int, int]] = deque()  # when it was read, and what had come since the last time
        self.now = OutcomeRates()

    def update(self, past: Series, at: float) -> None:
        """Note what is known `at` this time, in seconds."""
        minutes = {each.at: (each.sums.done, each.sums.failed) for each in past.points if each.sums is not None}
        nothing = (0, 0)
        came = [
            sum(max(0, now[which] - self._before.get(minute, nothing)[which]) for minute, now in minutes.items())
            for which in (0, 1)
        ]
        self._before = minutes
        self._steps.append((at, *(came if self._steps else nothing)))
        while len(self._steps) > 2 and self._steps[1][0] <= at - WINDOW_S:
            self._steps.popleft()
        if not minutes:
            self.now = OutcomeRates()
        elif at - self._steps[0][0] < WINDOW_S / 2:
            self.now = _rates_of_minute(past)
        else:
            over_s = at - self._steps[0][0]
            steps = list(self._steps)[1:]
            self.now = OutcomeRates(sum(each[1] for each in steps) / over_s, sum(each[2] for each in steps) / over_s)


def _rates_of_minute(past: Series) -> OutcomeRates:
    """Return the rates over the last 60 s: those of this minute, and a part of those of the one before."""
    points = past.points[-2:]
    if not points or all(each.sums is None for each in points):
        return OutcomeRates()
    left = max(0.0, 1 - points[-1].length_s / MINUTE_S) if len(points) > 1 else 1.0
    shares = (left, 1.0)[-len(points) :]
    known = [(each.sums, share) for each, share in zip(points, shares, strict=True) if each.sums is not None]
    return OutcomeRates(
        *(sum(getattr(sums, name) * share for sums, share in known) / MINUTE_S for name in OutcomeRates._fields)
    )
