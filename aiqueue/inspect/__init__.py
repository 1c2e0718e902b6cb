"""Reads what is stored and changes nothing: families, lanes, one job with its timeline, the server's health.

May not write to the server. Nothing that runs jobs may depend on it, except to look for children that were not heard
of for long.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import stats
from .children import ChildStats
from .explanation import Explanation
from .finding import Finding, Subject
from .found_job import FoundJob, state_when_parked
from .job_filter import IN_LANES, STATES, ListedState, ListFilter, make_filter
from .job_list import JobPage, ListedJob, list_all, list_page, read_delivered
from .job_scan import JobScan, ListCursor, Match, Source, read_sequences
from .limit_stats import LimitStats, LimitUse, describe_limit, read_limits, read_overrides_if_allowed
from .lookup import JobStats, find_and_describe, find_job, look_up
from .outcome_list import ListedOutcome, OutcomePage, OutcomeState, list_outcomes, make_outcome_filter
from .pauses import pause_of, read_key_pauses, read_pauses, read_pauses_if_allowed
from .schedule_stats import (
    Outcome,
    ScheduleStats,
    count_schedules_if_allowed,
    describe_schedule,
    list_times,
    read_schedules,
)
from .shown_payload import redact_data, show_payload
from .stats import FamilyStats, LaneStats
from .timeline import TimelineEvent, event_of
from .unknown_kinds import WaitingKind, describe_waiting, read_waiting_kinds
from .worker_stats import RunningJob, WorkerStats, parse_workers
from .workers import Holder, ask_holder, read_workers

if TYPE_CHECKING:
    from .doctor import examine
    from .explaining import explain, explain_enqueued, explain_job, explain_lane
    from .lane_evidence import LaneReader
    from .metrics_exporter import MetricsExporter, Scrape

__all__ = [
    "IN_LANES", "STATES", "ChildStats", "Explanation", "FamilyStats", "Finding", "FoundJob", "Holder", "JobPage",
    "JobScan", "JobStats", "LaneReader", "LaneStats", "LimitStats", "LimitUse", "ListCursor", "ListFilter", "ListedJob",
    "ListedOutcome", "ListedState", "Match", "MetricsExporter", "Outcome", "OutcomePage", "OutcomeState", "RunningJob",
    "ScheduleStats", "Scrape", "Source", "Subject", "TimelineEvent", "WaitingKind", "WorkerStats", "ask_holder",
    "count_schedules_if_allowed", "describe_limit", "describe_schedule", "describe_waiting", "event_of", "examine",
    "explain", "explain_enqueued", "explain_job", "explain_lane", "find_and_describe", "find_job", "list_all",
    "list_outcomes", "list_page", "list_times", "look_up", "make_filter", "make_outcome_filter", "parse_workers",
    "pause_of", "read_delivered", "read_key_pauses", "read_limits", "read_overrides_if_allowed", "read_pauses",
    "read_pauses_if_allowed", "read_schedules", "read_sequences", "read_waiting_kinds", "read_workers", "redact_data",
    "show_payload", "state_when_parked", "stats",
]  # fmt: skip


_LATE = {
    "examine": "doctor", "explain": "explaining", "explain_enqueued": "explaining", "explain_job": "explaining",
    "explain_lane": "explaining", "LaneReader": "lane_evidence", "MetricsExporter": "metrics_exporter",
    "Scrape": "metrics_exporter",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import the doctor and the explanations on first use: clients and workers do without, and save a megabyte."""
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{module}", __name__), name)
