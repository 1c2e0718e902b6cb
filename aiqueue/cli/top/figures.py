"""What was read for a place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .place import Place

if TYPE_CHECKING:
    from ...inspect import FamilyStats, LaneStats, ListedJob, WorkerStats
    from ...lanes import Pause
    from ...metrics import Series

RECENT_S = 60.0


class FamilyRow(NamedTuple):
    """A family with its last hour (None: nothing is known) and the number of its workers that run jobs."""

    stats: FamilyStats
    past: Series | None
    workers: int | None
    is_inbox: bool = False


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
    kinds: tuple[Series, ...] = ()
    pauses: tuple[Pause, ...] = ()
    details: Any = None
    missing: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)


def recent_failures(past: Series | None) -> float | None:
    """Return how many attempts failed in a second, over the last minute. None: nothing is known of it."""
    points = () if past is None else past.points[-2:]
    if not points or all(each.sums is None for each in points):
        return None
    failed = [0 if each.sums is None else each.sums.failed for each in points]
    part = min(1.0, points[-1].length_s / RECENT_S)
    before = failed[0] * (1 - part) if len(points) > 1 else 0.0
    return (failed[-1] + before) / RECENT_S
