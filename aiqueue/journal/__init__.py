"""A job's journal: its entries, the one writer of an attempt, readers that follow it, and the wait for its outcome.

May not know who runs a job, or where it is stored.
"""

from __future__ import annotations

from .checkpoints import CALLS_MAX, Checkpoints, LargeSteps, StepNames, decode_step, encode_call, encode_step
from .children import (
    CHILDREN_MAX,
    LOST,
    ChildEnd,
    ChildEnds,
    ChildRecord,
    EndsRecord,
    WakeAt,
    children_of_entry,
    is_over,
)
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
    kind_header,
)
from .follower import follow, follow_batches
from .journal import Journal
from .outcome_watch import wait_for_outcome
from .result_headers import ResultHeaders
from .stream_items import StreamItem, is_outdated
from .writer import HEADERS_BYTES, WRITE_TRIES_MAX, Retention, Writer

__all__ = [
    "CALLS_MAX", "CANCELLED", "CHILDREN_MAX", "EMPTY_RECORD", "FAILED", "HEADERS_BYTES", "LIVE", "LOST", "PROGRESS",
    "RESULT", "RETRY", "STARTED", "TRIAL", "WHILE_RUNNING", "WRITE_TRIES_MAX", "Checkpoints", "ChildEnd", "ChildEnds",
    "ChildRecord", "EndsRecord", "Entry", "Journal", "LargeSteps", "ResultHeaders", "Retention", "RunRecord",
    "StepNames", "StreamItem", "WakeAt", "Writer", "children_of_entry", "decode_step", "encode_call", "encode_step",
    "entry_from_live", "entry_from_stored", "follow", "follow_batches", "is_outdated", "is_over", "kind_header",
    "wait_for_outcome",
]  # fmt: skip
