"""Reads what there is without changing anything: families, lanes, one job, its timeline, the server's durability.

May not write to the server and may not be needed to run a job.
"""

from __future__ import annotations

from . import stats
from .doctor import Finding, Subject, examine
from .lookup import JobStats, find, job
from .stats import FamilyStats, LaneStats
from .timeline import Step, step_of

__all__ = [
    "FamilyStats", "Finding", "JobStats", "LaneStats", "Step", "Subject", "examine", "find", "job", "stats",
    "step_of",
]  # fmt: skip
