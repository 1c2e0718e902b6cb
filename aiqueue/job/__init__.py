"""Messages, the jobs that carry them, and what a handler raises about its job."""

from __future__ import annotations

from .children import Child, ChildOutcome, ChildSpec, Wait, WaitsForChildren, make_child_spec
from .job import Job
from .made_headers import MakeHeaders, add_made_headers, check_make_headers
from .message import (
    ANY_KIND,
    KIND,
    AnyM,
    JobSpec,
    M,
    M_co,
    Message,
    RawMessage,
    S_co,
    check_message,
    check_model,
    secret_headers,
    untyped,
)
from .progress import Progress
from .retry import Reject, Retry

__all__ = [
    "ANY_KIND", "KIND", "AnyM", "Child", "ChildOutcome", "ChildSpec", "Job", "JobSpec", "M",
    "M_co", "MakeHeaders", "Message", "Progress", "RawMessage", "Reject", "Retry", "S_co", "Wait", "WaitsForChildren",
    "add_made_headers", "check_make_headers", "check_message", "check_model", "make_child_spec", "secret_headers",
    "untyped",
]  # fmt: skip
