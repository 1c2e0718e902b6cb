"""Spans of OpenTelemetry: whether a job is traced, and the spans around what happens to it.

Nothing here imports opentelemetry before `find_tracing` has found that spans can go somewhere. A failure of the SDK or
of its exporter is logged and never raised. Not here: what the spans are around. That is where it happens.
"""

from . import names
from .finding import find_tracing
from .trace_context import TRACEPARENT, TRACESTATE, Parent, is_sampled, read_parent
from .tracing import NOT_SENT, NOT_TRACED, NotTraced, OpenSpan, Sending, Tracing, received_trace, running_tracing, span

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
    "find_tracing",
    "is_sampled",
    "names",
    "read_parent",
    "received_trace",
    "running_tracing",
    "span",
]
