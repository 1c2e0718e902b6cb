"""The spans of one client, of its workers and its agents. What a sampled trace has, and nothing for any other job."""

from __future__ import annotations

import hashlib
import importlib
import logging
import zlib
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Final, Protocol, Self

from ..headers import find
from . import names
from .attribute_values import bounded, bounded_all
from .late_span import LateSpan, LateSpans
from .made_ids import MadeIds
from .trace_context import (
    TRACEPARENT,
    TRACESTATE,
    Parent,
    has_trace,
    is_sampled,
    read_parent,
    read_tracestate,
    trace_headers,
)  # fmt: skip

log = logging.getLogger(__name__)

_ALL: Final = 2**32  # of what zlib.crc32 returns
_running: ContextVar[Tracing | None] = ContextVar("aiqueue tracing", default=None)


class HasHeaders(Protocol):
    """A job or a mail whose handler runs."""

    @property
    def headers(self) -> Mapping[str, str]: ...


def running_tracing() -> Tracing | None:
    """Return what traces the attempt in which the code runs; None if it is not traced."""
    return _running.get()


class OpenSpan:
    """A span that has begun. As a context manager it is the current span of what is within, and ends with that.

    An error that leaves it makes it a failed span, with the class of the error; being cancelled, or waiting for
    children, is none. Its text is left out: it may repeat what is secret in a message. Nothing here raises.
    """

    def __init__(self, tracing: Tracing, span: Any) -> None:
        self._tracing = tracing
        self._span = span
        self._token: Token[Any] | None = None
        self._was_running: Token[Tracing | None] | None = None
        self._late: dict[str, Any] = {}
        self.error_type = ""  # of an attempt that has raised, until it is known what becomes of its job
        self._has_failed = False

    def set(self, name: str, value: Any) -> None:
        """Set an attribute, at the span's end. None is left out."""
        if value is not None:
            self._late[name] = bounded(value)

    def rename(self, name: str) -> None:
        """Give it another name."""
        self._tracing.guard(self._span.update_name, name)

    def fail(self, error_type: str, text: str = "") -> None:
        """Note that what the span is of has failed. `error_type`: "" if there is no name for it. `text`: without
        secrets.
        """
        self._has_failed = True
        self.set(names.ERROR_TYPE, error_type or names.OTHER_ERROR)
        self._tracing.guard(self._tracing.set_failed, self._span, text)

    def end(self, error: BaseException | None = None) -> None:
        """End the span, which has failed if there is an error."""
        if isinstance(error, Exception | SystemExit | KeyboardInterrupt) and not self._has_failed:
            self.fail(type(error).__name__)
        try:
            if self._late:
                self._span.set_attributes(self._late)
        except Exception as fault:  # noqa: BLE001  (the provider is not ours)
            self._tracing.log_fault(fault)
        try:
            self._span.end()
        except Exception as fault:  # noqa: BLE001  (as above)
            self._tracing.log_fault(fault)

    def make_current(self) -> bool:
        """Make it the current span of this context, and have what runs here be traced.

        Returns whether the span is kept, or is a late one: a sampler of the program's own may decide otherwise.
        """
        tracing = self._tracing
        try:
            self._token = tracing.attach(self._span)
            if type(self._span) is not LateSpan and not self._span.is_recording():
                return False
        except Exception as error:  # noqa: BLE001  (the provider is not ours)
            tracing.log_fault(error)
            return False
        if _running.get() is not tracing:
            self._was_running = _running.set(tracing)
        return True

    def __enter__(self) -> Self:
        self.make_current()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            self._tracing.guard(self._tracing.detach, self._token)
        if self._was_running is not None:
            _running.reset(self._was_running)
        self.end(error)


class NotTraced:
    """In place of an OpenSpan where nothing is traced."""

    def set(self, name: str, value: Any) -> None: ...

    def fail(self, error_type: str, text: str = "") -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


NOT_TRACED: Final = NotTraced()


class Sending:
    """A message that is about to be sent. `headers`: what it has to carry. It has no span if its trace is not sampled.

    As a context manager it ends with the block, which stores the message.
    """

    def __init__(self, headers: dict[str, str], span: OpenSpan | None) -> None:
        self.headers = headers
        self.span = span
        self._is_current = False

    def with_current_span(self) -> Self:
        """Have its span be the current one in its block."""
        self._is_current = True
        return self

    def add_to(self, block: bytes) -> bytes:
        """Return an encoded header block with the headers at its end."""
        if not self.headers:
            return block
        lines = "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        return block[:-2] + lines.encode() + block[-2:]

    def add_unless_given(self, block: bytes) -> bytes:
        """As `add_to`. A block that has a `traceparent` stays as it is."""
        return block if has_trace(block) else self.add_to(block)

    def set(self, name: str, value: Any) -> None:
        """Set an attribute of the span, if there is one."""
        if self.span is not None:
            self.span.set(name, value)

    def name(self, destination: str, tenant: str) -> None:
        """Name the destination, which was not known when the span was started."""
        if self.span is not None:
            self.span.rename(f"{names.SEND} {destination}")
            self.span.set(names.DESTINATION, destination)
            self.span.set(names.TENANT, tenant)

    def end(self, error: BaseException | None = None) -> None:
        """The message is stored, or there is the error because of which it is not."""
        if self.span is not None:
            self.span.end(error)

    def __enter__(self) -> Self:
        if self._is_current and self.span is not None:
            self.span.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_current and self.span is not None:
            self.span.__exit__(kind, error, trace)
        else:
            self.end(error)


NOT_SENT: Final = Sending({}, None)  # what a message is sent with that is part of no trace


class Tracing:
    """Starts spans by one provider of tracers. `ratio`: of messages that are part of no trace, how many begin one.

    Such a message is chosen by its id: client and worker decide the same, and so do all attempts.
    """

    def __init__(self, provider: Any, ratio: float, version: str) -> None:
        self._trace = importlib.import_module("opentelemetry.trace")
        self._context = importlib.import_module("opentelemetry.context")
        self._tracer = provider.get_tracer(names.SCOPE, version, schema_url=names.SCHEMA_URL)
        self._ids = MadeIds.of(self._tracer)
        self.late_spans = LateSpans(self.guard)
        self._trace.Span.register(LateSpan)
        self._no_context, self._consumer = self._context.Context(), self._trace.SpanKind.CONSUMER
        self._has_failed = False
        self.roots_below = int(ratio * _ALL)

    @property
    def is_off(self) -> bool:
        """Whether the provider records nothing whatever it is asked, as with OTEL_SDK_DISABLED."""
        return isinstance(self._tracer, self._trace.NoOpTracer)

    @property
    def has_current_span(self) -> bool:
        """Whether a span of the program is active here, which what is sent continues."""
        return bool(self._trace.get_current_span().get_span_context().is_valid)

    def begins_trace(self, message_id: str) -> bool:
        """Return whether a message that is part of no trace begins one."""
        return zlib.crc32(message_id.encode(errors="replace")) < self.roots_below

    # -- sending

    def start_send(
        self,
        destination: str,
        tenant: str,
        message_id: str = "",
        *,
        operation: str = names.SEND,
        of: HasHeaders | None = None,
        block: bytes = b"",
        may_begin: bool = True,
    ) -> Sending | None:
        """Start the span of a message that is sent to a destination. None: it is part of no trace, and gets no header.

        1. There is a current span: the message continues its trace. If that is not sampled, it only says so.
        2. The code runs in the handler of a job or mail (`of`) whose trace is not sampled: the same.
        3. Otherwise the message begins a trace if its id is chosen, and `may_begin`.

        `block`: its encoded headers. The caller's own `traceparent` stays, and there is no span.
        """
        try:
            current = self._trace.get_current_span().get_span_context()
            if current.is_valid:
                if has_trace(block):
                    return None
                if not current.trace_flags & 1:
                    return Sending(self._headers_of(current), None)
            elif of is not None and (passed := _passed_on(of.headers)):
                return None if has_trace(block) else Sending(passed, None)
            elif not may_begin or not self.begins_trace(message_id) or has_trace(block):
                return None
            kind = self._trace.SpanKind.CLIENT if operation == names.REQUEST else self._trace.SpanKind.PRODUCER
            attributes = _messaging(operation, names.SEND, destination, tenant)
            if message_id:
                attributes[names.MESSAGE_ID] = bounded(message_id)
            span = self._tracer.start_span(f"{operation} {destination}".strip(), kind=kind, attributes=attributes)
            return Sending(self._headers_of(span.get_span_context()), OpenSpan(self, span))
        except Exception as error:  # noqa: BLE001  (the provider is not ours, and no message is refused because of it)
            self.log_fault(error)
            return None

    def start_many(self, of: HasHeaders | None) -> Sending | None:
        """Start the span of a call that sends many messages; see `Sending.name`. None: they continue no trace."""
        return self.start_send("", "", operation=names.SEND, of=of, may_begin=False)

    # -- processing

    def start_process(
        self,
        destination: str,
        tenant: str,
        *,
        parent: Parent | None,
        tracestate: str = "",
        run: str,
        attributes: dict[str, Any],
    ) -> OpenSpan:
        """Start the span of one attempt. `parent`: where the message was sent; None: the attempt begins the trace.

        All attempts of a `run` that begin it are of one trace. `attributes`: with bounded values.
        """

        def make(late: LateSpan) -> Any:
            context, ids = self._no_context, self._ids
            fields = _messaging(names.PROCESS, names.PROCESS, destination, tenant) | late.fields
            try:
                if parent is not None:
                    context = self._trace.set_span_in_context(self._remote(parent, tracestate), context)
                else:
                    ids.use(_trace_id_of(f"{tenant} {run}"))
                return self._tracer.start_span(
                    f"{names.PROCESS} {destination}", context, self._consumer, fields, start_time=late.started_at
                )
            except Exception as error:  # noqa: BLE001  (as above)
                self.log_fault(error)
                return self._trace.INVALID_SPAN
            finally:
                ids.use(0)

        return self._open_late(LateSpan(make, attributes))

    def _remote(self, parent: Parent, tracestate: str) -> Any:
        api = self._trace
        state = api.TraceState.from_header([known]) if (known := read_tracestate(tracestate)) else None
        flags = api.TraceFlags(parent.flags)
        context = api.SpanContext(parent.trace_id, parent.span_id, is_remote=True, trace_flags=flags, trace_state=state)
        return api.NonRecordingSpan(context)

    # -- within a traced attempt

    def start(
        self, name: str, attributes: Mapping[str, Any] | None = None, *, is_call: bool = False
    ) -> OpenSpan | None:
        """Start a span below the current one. `is_call`: of another service. None: the provider has failed."""
        kind = self._trace.SpanKind.CLIENT if is_call else self._trace.SpanKind.INTERNAL
        try:
            fields = bounded_all(attributes) if attributes else None
            return OpenSpan(self, self._tracer.start_span(name, None, kind, fields))
        except Exception as error:  # noqa: BLE001  (as above)
            self.log_fault(error)
            return None

    def start_handler(self, name: str) -> OpenSpan:
        """Start the span of a handler below the current one."""
        context = self._context.get_current()

        def make(late: LateSpan) -> Any:
            try:
                return self._tracer.start_span(name, context, attributes=late.fields, start_time=late.started_at)
            except Exception as error:  # noqa: BLE001  (as above)
                self.log_fault(error)
                return self._trace.INVALID_SPAN

        return self._open_late(LateSpan(make, {}))

    def _open_late(self, late: LateSpan) -> OpenSpan:
        self.late_spans.add(late)
        return OpenSpan(self, late)

    # -- the provider

    def _headers_of(self, context: Any) -> dict[str, str]:
        state = context.trace_state.to_header() if context.trace_state else ""
        return trace_headers(Parent(context.trace_id, context.span_id, int(context.trace_flags)), state)

    def attach(self, span: Any) -> Token[Any]:
        """Make a span the current one. Returns what `detach` needs."""
        token: Token[Any] = self._context.attach(self._trace.set_span_in_context(span))
        return token

    def detach(self, token: Token[Any]) -> None:
        """Make current again what was before `attach`."""
        self._context.detach(token)

    def set_failed(self, span: Any, text: str) -> None:
        """Set the status of a span to an error."""
        span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, text or None))

    def guard(self, call: Any, *args: Any) -> None:
        """Call the provider, and log what it raises."""
        try:
            call(*args)
        except Exception as error:  # noqa: BLE001  (the provider is not ours, and no job fails because of it)
            self.log_fault(error)

    def log_fault(self, error: Exception) -> None:
        """Log what the provider has raised, once."""
        if not self._has_failed:
            log.warning("the provider of tracers has failed, so that spans are missing", exc_info=error)
        self._has_failed = True


def span(name: str, attributes: Mapping[str, Any] | None = None, *, is_call: bool = False) -> OpenSpan | NotTraced:
    """Return a span below the current one, to be entered, within an attempt that is traced. Elsewhere nothing."""
    tracing = _running.get()
    if tracing is None:
        return NOT_TRACED
    return tracing.start(name, attributes, is_call=is_call) or NOT_TRACED


def handler_span(name: str) -> OpenSpan | NotTraced:
    """Return the span of a handler, to be entered; see `span`."""
    tracing = _running.get()
    return NOT_TRACED if tracing is None else tracing.start_handler(name)


def received_trace(headers: Mapping[str, str], tracing: Tracing | None) -> dict[str, str]:
    """Return the headers by which a job continues the trace of a request that was received over HTTP.

    {}: it names no trace, or a span of the program is active, which has continued it.
    """
    parent = read_parent(headers.get(TRACEPARENT, ""))
    if parent is None or (tracing is not None and tracing.has_current_span):
        return {}
    return trace_headers(parent, headers.get(TRACESTATE, ""))


def _messaging(operation: str, kind: str, destination: str, tenant: str) -> dict[str, Any]:
    fields = {names.SYSTEM: names.NATS, names.OPERATION: operation, names.OPERATION_TYPE: kind}
    if destination:
        fields |= {names.DESTINATION: destination, names.TENANT: tenant}
    return fields


def _trace_id_of(run: str) -> int:
    """Return the id of the trace that the attempts of a run begin."""
    return int.from_bytes(hashlib.blake2b(run.encode(), digest_size=16).digest())


def _passed_on(headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers of a trace that is not sampled, to be passed on; {} without one."""
    traceparent = find(headers, TRACEPARENT)
    if not traceparent or is_sampled(traceparent) or (parent := read_parent(traceparent)) is None:
        return {}
    return trace_headers(parent, find(headers, TRACESTATE) or "")
