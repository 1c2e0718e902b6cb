"""A job's journal: entries, the one writer of a run, readers that follow it, and the wait for its outcome.

May not know who runs a job, or where it is stored.
"""

from __future__ import annotations

from .follower import StreamItem, follow
from .journal import (
    CANCELLED,
    FAILED,
    LIVE,
    NOTHING,
    PROGRESS,
    RESULT,
    RETRY,
    STARTED,
    TRIAL,
    WHILE_RUNNING,
    WRITE_TRIES_MAX,
    Entry,
    Journal,
    Retention,
    RunRecord,
    Writer,
    entry_of,
    heard,
)
from .outcome import wait_for_outcome

__all__ = [
    "CANCELLED",
    "FAILED",
    "LIVE",
    "NOTHING",
    "PROGRESS",
    "RESULT",
    "RETRY",
    "STARTED",
    "TRIAL",
    "WHILE_RUNNING",
    "WRITE_TRIES_MAX",
    "Entry",
    "Journal",
    "Retention",
    "RunRecord",
    "StreamItem",
    "Writer",
    "entry_of",
    "follow",
    "heard",
    "wait_for_outcome",
]  # fmt: skip
