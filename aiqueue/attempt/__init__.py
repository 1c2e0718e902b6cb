"""One call of a handler: what goes in, the outcome, time limits, threads, and cancellation while it runs.

The same code serves workers and their children, so nothing here may import NATS when it is loaded.
"""

from __future__ import annotations

from .attempt import (
    AlreadyEnded,
    Cancelled,
    DecodedJob,
    Duplicate,
    Handler,
    Interrupted,
    Outcome,
    Policies,
    Postponed,
    Raised,
    RawJob,
    Refused,
    RetryPending,
    Returned,
    TakenOver,
    Unknown,
    WrongLane,
    fill,
    here,
    misplaced,
    nameless,
    outcome_of,
    overdue,
    prepare,
    raised,
    read,
    timed_out,
    to_plain,
    unknown_kind,
    unread,
)
from .cancellation import Cancellations, RunningAttempt
from .threads import Threads
from .timeouts import Limits

__all__ = [
    "AlreadyEnded", "Cancellations", "Cancelled", "DecodedJob", "Duplicate", "Handler", "Interrupted", "Limits",
    "Outcome", "Policies", "Postponed", "Raised", "RawJob", "Refused", "RetryPending", "Returned", "RunningAttempt",
    "TakenOver", "Threads", "Unknown", "WrongLane", "fill", "here", "misplaced", "nameless", "outcome_of",
    "overdue", "prepare", "raised", "read", "timed_out", "to_plain", "unknown_kind", "unread",
]  # fmt: skip
