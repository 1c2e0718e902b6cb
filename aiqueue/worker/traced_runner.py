"""A runner whose attempts have spans, for workers of a client that is traced. Other workers have a plain `Runner`.

Whether an attempt is traced is decided where the coroutine of its task is made, before anything of OpenTelemetry is
called: by the flags of its job's `traceparent`, and without one by the job's id. An attempt that is not traced pays for
that look alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine
from typing import Any, Final
from zlib import crc32

from .. import headers
from ..attempt import Handler, Outcome, Raised, Refused, Returned
from ..client import Client
from ..lanes import Delivery
from ..tracing import TRACEPARENT, TRACESTATE, OpenSpan, Parent, Tracing, handler_span, is_sampled, names, read_parent
from .context import JobContext
from .opening import OpenedJob
from .runner import Runner
from .settlement import Settlement

_IN_BLOCK: Final = b"\r\ntraceparent: "
_FLAGS_AT: Final = len(_IN_BLOCK) + 54  # the last digit of the flags, whose lowest bit is "sampled"
_IS_SET: Final = frozenset(b"13579bdf")
_FAILED: Final = frozenset({"retry", "failed"})


def runner_class(client: Client) -> type[Runner]:
    """Return the class of the runner for a worker of this client."""
    return Runner if client.tracing is None else TracedRunner


class TracedRunner(Runner):
    """See the module. `_open`: the spans of the deliveries that run and are traced. While there is none, `_run_plain`
    and `_ended` are those of a plain runner.
    """

    def __init__(self, claims: Any, resources: Any, settlement: Settlement, **options: Any) -> None:
        self._clock = claims.journal.connection.clock
        self._tracing: Tracing = resources.children.client.tracing
        self._open: dict[Delivery, OpenSpan] = {}
        self._end_untraced: Callable[[Delivery, float], None] = options.pop("ended")
        self._traced_handlers = {each: _with_own_span(each) for each in options["handlers"].values()}
        super().__init__(claims, resources, settlement, ended=self._end_untraced, **options)
        # bound once: `super()` for each job would cost as much as the look at its headers
        self._run_untraced, self._run_plain_untraced = super().run_delivery, super()._run_plain
        self._run_plain = self._run_plain_untraced  # type: ignore[method-assign]
        settlement.notes.traced = self._note
        self._roots_below = self._tracing.roots_below

    def run_delivery(self, delivery: Delivery) -> Coroutine[Any, Any, None]:
        """See `Runner.run_delivery`."""
        plain = delivery.plain
        if plain is not None:
            block = delivery.message.block or b""
            at = block.rfind(_IN_BLOCK)
            if at < 0:
                if crc32(plain[1].encode()) >= self._roots_below:  # as `Tracing.begins_trace`
                    return self._run_untraced(delivery)
                return self._run_traced(delivery, None, "")
            if block[at + _FLAGS_AT] not in _IS_SET:
                return self._run_untraced(delivery)
        if not self._is_traced(delivery):
            return self._run_untraced(delivery)
        fields = delivery.message.headers
        parent = read_parent(headers.find(fields, TRACEPARENT) or "")
        return self._run_traced(delivery, parent, headers.find(fields, TRACESTATE) or "")

    def close(self) -> None:
        """See `Runner.close`."""
        self._tracing.late_spans.make()
        super().close()

    def _is_traced(self, delivery: Delivery) -> bool:
        """Return whether the attempt is traced: by its headers, and without any trace in them by its job's id."""
        traceparent = headers.find(delivery.message.headers, TRACEPARENT)
        if traceparent is not None and read_parent(traceparent) is not None:
            return is_sampled(traceparent)
        return self._tracing.begins_trace(_key_of(delivery))

    async def _run_traced(self, delivery: Delivery, parent: Parent | None, tracestate: str) -> None:
        """Run a delivery with a span. An attempt among many that are not traced finds none of its code and data in the
        processor's caches, so each call that is not made here counts twice.
        """
        lane, plain = delivery.own_lane, delivery.plain
        # all at the start, where attributes cost least
        attributes: dict[str, Any] = {
            names.PRIORITY: lane.priority,
            names.QUEUED_S: round(max(0.0, self._clock.now() - delivery.stored_at), 6),
            names.OUTCOME: "done",  # unless something else becomes of the job
        }
        if plain is not None and plain[0] and delivery.delivery_count == 1:
            attributes |= {names.MESSAGE_ID: plain[1], names.KIND: plain[0], names.ATTEMPT: 1}
        opened = self._tracing.start_process(
            names.destination(lane.family), lane.tenant, parent=parent, tracestate=tracestate,
            run="" if parent else f"{lane.family} {_key_of(delivery)} {delivery.run}", attributes=attributes,
        )  # fmt: skip
        if opened.make_current():
            self._open[delivery] = opened
            self._run_plain, self._ended = self._run_plain_traced, self._on_ended  # type: ignore[method-assign]
        await self._run_untraced(delivery)

    def _run_plain_traced(self, delivery: Delivery, opened: OpenedJob, handler: Handler) -> Coroutine[Any, Any, None]:
        """See `Runner._run_plain`."""
        if (found := self._open.get(delivery)) is not None:
            if opened.kind != (delivery.plain or ("",))[0]:  # only its body names it
                _set_job(found, opened)
            handler = self._traced_handlers[handler]
        return self._run_plain_untraced(delivery, opened, handler)

    def _call_handler(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext
    ) -> Coroutine[Any, Any, Outcome]:
        """See `Runner._call_handler`."""
        if (found := self._open.get(delivery)) is not None:
            _set_job(found, opened)
            if handler is not None and not handler.process:
                handler = self._traced_handlers.get(handler, handler)
        return super()._call_handler(delivery, opened, handler, context)

    def _finish_delivery(
        self,
        delivery: Delivery,
        opened: OpenedJob | None,
        context: JobContext | None,
        outcome: Outcome | BaseException,
        started_at: float,
    ) -> Coroutine[Any, Any, None]:
        """See `Runner._finish_delivery`. What becomes of the job may replace what is noted here."""
        if (found := self._open.get(delivery)) is not None:
            if type(outcome) is not Returned:
                found.set(names.OUTCOME, type(outcome).__name__.lower())
            if isinstance(outcome, Raised | Refused):
                found.error_type = outcome.error_type
            if opened is not None:
                _set_job(found, opened)
        return super()._finish_delivery(delivery, opened, context, outcome, started_at)

    def _note(
        self, delivery: Delivery, opened: OpenedJob, outcome: str, reason: str = "", error: str = "",
        delay_s: float | None = None, /,
    ) -> None:  # fmt: skip
        """Note what became of a job in the span of its attempt, if it has one."""
        if (found := self._open.get(delivery)) is None:
            return
        found.set(names.OUTCOME, outcome)
        found.set(names.RETRY_DELAY_S, delay_s)
        found.set(names.REASON, reason or None)
        if outcome in _FAILED:
            found.fail(found.error_type or reason, error)

    def _on_ended(self, delivery: Delivery, started_at: float) -> None:
        if (found := self._open.pop(delivery, None)) is not None:
            found.end()
            if not self._open:
                self._run_plain, self._ended = self._run_plain_untraced, self._end_untraced  # type: ignore[method-assign]
        self._end_untraced(delivery, started_at)


def _set_job(found: OpenSpan, opened: OpenedJob) -> None:
    found.set(names.MESSAGE_ID, opened.job_id)
    found.set(names.KIND, opened.kind)
    found.set(names.ATTEMPT, opened.attempt)


def _key_of(delivery: Delivery) -> str:
    """Return the id of a job, as its headers alone state it; else what names its run."""
    if delivery.plain is not None:
        return delivery.plain[1]
    return delivery.message.headers.get(headers.JOB_ID) or str(delivery.run)


def _with_own_span(handler: Handler) -> Handler:
    """Return a handler whose calls have a span of their own, where the guide names one."""
    name = names.HANDLERS.get(handler.key[0])
    if name is None:
        return handler
    inner = handler.call

    async def call(job: Any) -> Any:
        with handler_span(name):
            return await inner(job)

    def call_in_thread(job: Any) -> Any:
        with handler_span(name):
            return inner(job)

    traced = dataclasses.replace(handler)
    object.__setattr__(traced, "call", call if handler.is_async else call_in_thread)
    return traced
