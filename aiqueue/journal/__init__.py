"""A job's journal: its entries, the one writer of an attempt, readers that follow it, and the wait for its outcome.

May not know who runs a job, or where it is stored.
"""

from __future__ import annotations

from .checkpoints import Checkpoints, StepNames, encode_call, encode_step
from .entries import (
    CANCELLED,
    EMPTY_RECORD,
    FAILED,
    LIVE,
    PROGRESS,
    RESULT,
    RETRY,
    STARTED,
    TRIAL,
    WHILE_RUNNING,
    Entry,
    RunRecord,
    entry_from_live,
    entry_from_stored,
)
from .follower import StreamItem, follow
from .journal import Journal
from .outcome_watch import wait_for_outcome
from .writer import WRITE_TRIES_MAX, ResultHeaders, Retention, Writer

__all__ = [
    "CANCELLED", "EMPTY_RECORD", "FAILED", "LIVE", "PROGRESS", "RESULT", "RETRY", "STARTED", "TRIAL",
    "WHILE_RUNNING", "WRITE_TRIES_MAX", "Checkpoints", "Entry", "Journal", "ResultHeaders", "Retention", "RunRecord",
    "StepNames", "StreamItem", "Writer", "encode_call", "encode_step", "entry_from_live", "entry_from_stored",
    "follow", "wait_for_outcome",
]  # fmt: skip
