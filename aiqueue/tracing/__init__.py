"""Spans of OpenTelemetry: whether a job is traced, and the spans around what happens to it.

Nothing here imports opentelemetry before `find_tracing` has found that spans can go somewhere. A failure of the SDK or
of its exporter is logged and never raised. Not here: what the spans are around. That is where it happens.
"""

from . import names
from .attribute_values import bounded_all
from .finding import find_tracing
from .trace_context import TRACEPARENT, TRACESTATE, Parent, is_sampled, read_parent
from .tracing import (
    NOT_SENT,
    NOT_TRACED,
    NotTraced,
    OpenSpan,
    Sending,
    Tracing,
    handler_span,
    received_trace,
    running_tracing,
    span,
)  # fmt: skip

__all__ = [
    "NOT_SENT",
    "NOT_TRACED",
    "TRACEPARENT",
    "TRACESTATE",
    "NotTraced",
    "OpenSpan",
    "Parent",
    "Sending",
    "Tracing",
    "bounded_all",
    "find_tracing",
    "handler_span",
    "is_sampled",
    "names",
    "read_parent",
    "received_trace",
    "running_tracing",
    "span",
]
