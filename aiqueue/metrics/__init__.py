"""What becomes of jobs over time: counters on the server, to which workers add what they have counted.

Here: the counters, their flush, how they are read, percentiles, and the text format of Prometheus. Not here: who runs
jobs, and when one has ended; the worker counts. Nothing here may be needed for a job to run.
"""

from __future__ import annotations

from .exposition import CONTENT_TYPE, EXPORTED, Exposition
from .flusher import EVERY_S, Flusher
from .history import History, Point, Series, read_history_if_there
from .metric_subjects import OTHER
from .monotonic import MonotonicTotals
from .sums import LONGEST, OUTCOMES, SHORTEST, Counts, JobSums, percentile

__all__ = [
    "CONTENT_TYPE",
    "EVERY_S",
    "EXPORTED",
    "LONGEST",
    "OTHER",
    "OUTCOMES",
    "SHORTEST",
    "Counts",
    "Exposition",
    "Flusher",
    "History",
    "JobSums",
    "MonotonicTotals",
    "Point",
    "Series",
    "percentile",
    "read_history_if_there",
]  # fmt: skip
