"""What becomes of jobs over time: counters on the server, to which workers add what they have counted.

Here: the counters, their flush, how they are read, and percentiles. Not here: who runs jobs, and when one has ended;
the worker counts. Nothing here may be needed for a job to run.
"""

from __future__ import annotations

from .flusher import EVERY_S, Flusher
from .history import History, Point, Series, read_history_if_there
from .metric_subjects import OTHER
from .sums import LONGEST, OUTCOMES, SHORTEST, Counts, JobSums, percentile

__all__ = [
    "EVERY_S",
    "LONGEST",
    "OTHER",
    "OUTCOMES",
    "SHORTEST",
    "Counts",
    "Flusher",
    "History",
    "JobSums",
    "Point",
    "Series",
    "percentile",
    "read_history_if_there",
]  # fmt: skip
