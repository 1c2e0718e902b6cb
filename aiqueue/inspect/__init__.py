"""Reads what is stored and changes nothing: families, lanes, one job with its timeline, the server's health.

May not write to the server, and nothing that runs jobs may depend on it.
"""

from __future__ import annotations

from . import stats
from .doctor import examine
from .finding import Finding, Subject
from .lookup import JobStats, find_job
from .stats import FamilyStats, LaneStats
from .timeline import Step, step_of
from .unknown_kinds import WaitingKind, describe_waiting, read_waiting_kinds

__all__ = [
    "FamilyStats", "Finding", "JobStats", "LaneStats", "Step", "Subject", "WaitingKind", "describe_waiting", "examine",
    "find_job", "read_waiting_kinds", "stats", "step_of",
]  # fmt: skip
