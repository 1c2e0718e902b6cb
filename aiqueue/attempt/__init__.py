"""One call of a handler: decoding, the job it is called with, its outcome, time limits, threads, and cancellation.

Workers, agents and child processes use the same code. A child starts without NATS, so no module here may import it
when it is loaded.
"""

from __future__ import annotations

from .cancellation import Cancellations, RunningAttempt
from .decoding import (
    DecodedJob,
    RawJob,
    decode_body,
    decode_headers_only,
    decode_headers_or_defaults,
    decode_into,
    find_wrong_lane,
    is_past_deadline,
)
from .handler import Handler, Policies, build_job, outcome_of_error, timeout_outcome, unknown_kind_outcome
from .outcome_types import (
    AlreadyEnded,
    Cancelled,
    Duplicate,
    Interrupted,
    Outcome,
    Postponed,
    Raised,
    Refused,
    RetryPending,
    Returned,
    TakenOver,
    Unknown,
    WrongLane,
    outcome_from_plain,
    outcome_to_plain,
)
from .threads import Threads
from .timeouts import Limits

__all__ = [
    "AlreadyEnded", "Cancellations", "Cancelled", "DecodedJob", "Duplicate", "Handler", "Interrupted", "Limits",
    "Outcome", "Policies", "Postponed", "Raised", "RawJob", "Refused", "RetryPending", "Returned", "RunningAttempt",
    "TakenOver", "Threads", "Unknown", "WrongLane", "build_job", "decode_body", "decode_headers_only",
    "decode_headers_or_defaults", "decode_into", "find_wrong_lane", "is_past_deadline", "outcome_from_plain",
    "outcome_of_error", "outcome_to_plain", "timeout_outcome", "unknown_kind_outcome",
]  # fmt: skip
