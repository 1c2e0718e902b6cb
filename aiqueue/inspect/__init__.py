"""Reads what is stored and changes nothing: families, lanes, one job with its timeline, the server's health.

May not write to the server. Nothing that runs jobs may depend on it, except to look for children that were not heard
of for long.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import stats
from .children import ChildStats
from .finding import Finding, Subject
from .found_job import FoundJob
from .limit_stats import LimitStats, LimitUse, describe_limit, read_limits, read_overrides_if_allowed
from .lookup import JobStats, find_job, look_up
from .pauses import pause_of, read_key_pauses, read_pauses, read_pauses_if_allowed
from .schedule_stats import (
    Outcome,
    ScheduleStats,
    count_schedules_if_allowed,
    describe_schedule,
    list_times,
    read_schedules,
)
from .stats import FamilyStats, LaneStats
from .timeline import TimelineEvent, event_of
from .unknown_kinds import WaitingKind, describe_waiting, read_waiting_kinds
from .workers import Holder, RunningJob, WorkerStats, ask_holder, parse_workers, read_workers

if TYPE_CHECKING:
    from .doctor import examine

__all__ = [
    "ChildStats", "FamilyStats", "Finding", "FoundJob", "Holder", "JobStats", "LaneStats", "LimitStats", "LimitUse",
    "Outcome", "RunningJob", "ScheduleStats", "Subject", "TimelineEvent", "WaitingKind", "WorkerStats",
    "ask_holder", "count_schedules_if_allowed", "describe_limit", "describe_schedule", "describe_waiting",
    "event_of", "examine", "find_job", "list_times", "look_up", "parse_workers", "pause_of", "read_key_pauses",
    "read_limits", "read_overrides_if_allowed", "read_pauses", "read_pauses_if_allowed", "read_schedules",
    "read_waiting_kinds", "read_workers", "stats",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the doctor on first use: clients and workers do without, and save a megabyte."""
    if name != "examine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .doctor import examine  # noqa: PLC0415

    return examine
