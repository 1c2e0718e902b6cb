"""One call of a handler: decoding, the job it is called with, its outcome, time limits, threads, and cancellation.

Workers, agents and child processes use the same code. A child starts without NATS, so no module here may import it
when it is loaded.
"""

from __future__ import annotations

from .around import Around, AroundFunction, parse_around
from .cancellation import Cancellations, RunningAttempt
from .costs import check_cost_function, cost_of
from .decoding import (
    DecodedJob,
    RawJob,
    decode_body,
    decode_headers_only,
    decode_headers_or_defaults,
    decode_into,
    find_wrong_lane,
    is_past_deadline,
    limit_key_of,
    wished_priority,
)
from .handler import (
    Handler,
    Handlers,
    Policies,
    build_job,
    build_plain_job,
    find_handler,
    is_async_handler,
    make_raw_message,
    read_message,
    timeout_outcome,
    unknown_kind_outcome,
)
from .handler_errors import PLAIN_TYPES, error_line, outcome_of_error, outcome_of_value, warn_of_no_key
from .handler_task import run_in_task
from .outcome_types import (
    RETURNED_NONE,
    AlreadyEnded,
    Cancelled,
    Duplicate,
    Interrupted,
    KindPaused,
    Outcome,
    Postponed,
    Raised,
    Refused,
    RetryPending,
    Returned,
    TakenOver,
    Unknown,
    Waiting,
    WrongLane,
    outcome_from_plain,
    outcome_to_plain,
)
from .redaction import secrets_of, secrets_of_body, without_secrets
from .threads import Threads
from .timeouts import Limit, Limits
from .verdicts import DEADLINE_PASSED, delay_after, too_late, unkept_result

__all__ = [
    "DEADLINE_PASSED",
    "PLAIN_TYPES",
    "RETURNED_NONE",
    "AlreadyEnded",
    "Around",
    "AroundFunction",
    "Cancellations",
    "Cancelled",
    "DecodedJob",
    "Duplicate",
    "Handler",
    "Handlers",
    "Interrupted",
    "KindPaused",
    "Limit",
    "Limits",
    "Outcome",
    "Policies",
    "Postponed",
    "Raised",
    "RawJob",
    "Refused",
    "RetryPending",
    "Returned",
    "RunningAttempt",
    "TakenOver",
    "Threads",
    "Unknown",
    "Waiting",
    "WrongLane",
    "build_job",
    "build_plain_job",
    "check_cost_function",
    "cost_of",
    "decode_body",
    "decode_headers_only",
    "decode_headers_or_defaults",
    "decode_into",
    "delay_after",
    "error_line",
    "find_handler",
    "find_wrong_lane",
    "is_async_handler",
    "is_past_deadline",
    "limit_key_of",
    "make_raw_message",
    "outcome_from_plain",
    "outcome_of_error",
    "outcome_of_value",
    "outcome_to_plain",
    "parse_around",
    "read_message",
    "run_in_task",
    "secrets_of",
    "secrets_of_body",
    "timeout_outcome",
    "too_late",
    "unkept_result",
    "unknown_kind_outcome",
    "warn_of_no_key",
    "wished_priority",
    "without_secrets",
]  # fmt: skip
