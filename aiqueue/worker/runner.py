"""Run one delivery: read its body and journal, claim its run, call its handler. `settlement` writes the outcome."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from .. import attempt, headers
from ..attempt import (
    PLAIN_TYPES,
    RETURNED_NONE,
    AlreadyEnded,
    Cancellations,
    Cancelled,
    Handler,
    Handlers,
    Interrupted,
    Limit,
    Limits,
    Outcome,
    Raised,
    Refused,
    Returned,
    TakenOver,
    Unknown,
    Waiting,
)  # fmt: skip
from ..errors import Stale, Unavailable
from ..job import Job, RawMessage
from ..journal import Writer
from ..lanes import Delivery
from ..logs import running_job
from ..processes import Processes, Quarantine, Suspect
from ..requests import Claims
from .claiming import RunClaims
from .context import JobContext, WorkerResources
from .gate import Gate
from .interruptions import Interruptions
from .limiting import Limiting
from .opening import OpenedJob, Opener, PlainJob, may_have_history
from .pipelined import ResultPipeline, SentResult
from .settlement import Settlement
from .watchdog import Watchdog

log = logging.getLogger(__name__)


class Runner:
    """Runs deliveries with the handlers of one worker."""

    def __init__(
        self,
        claims: Claims,
        resources: WorkerResources,
        settlement: Settlement,
        *,
        handlers: Handlers,
        worker: str,
        state: Any,
        processes: Processes,
        quarantine: Quarantine,
        watchdog: Watchdog,
        ended: Callable[[Delivery, float], None],
    ) -> None:
        """`ended` is called after each delivery, with the monotonic time at which its run started, in seconds."""
        self._journal = claims.journal
        self._settlement = settlement
        self._handlers = handlers
        self._families = resources.families
        self._state = state
        self.processes = processes
        self._quarantine = quarantine
        self.opener = Opener(claims.journal, resources.documents, resources.families, quarantine)
        self.limiting: Limiting | None = None  # where a family has a limit_key; set before the first delivery
        self.gate = Gate(claims.journal.connection)
        self._run_claims = RunClaims(claims, self.opener, worker)
        self._watchdog = watchdog
        self._ended = ended
        self._context = contextvars.copy_context()
        self._pipeline = ResultPipeline(
            claims.journal.connection, resources.retention, resources.documents.inline_max, self._on_result_settled
        )
        self._threads = resources.threads
        self._resources, self._limits = resources, Limits()
        self.cancellations = Cancellations(claims.journal.connection, resources.families.values(), self._limits)
        self.interruptions = Interruptions(self.cancellations)

    async def drain(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for results that the server has no space for yet."""
        await self._settlement.results.overflow.wait(timeout_s)

    def close(self) -> None:
        """Drop the results that still wait, and let idle threads end."""
        self._settlement.results.overflow.close()
        self._threads.close()

    def run_delivery(self, delivery: Delivery) -> Coroutine[Any, Any, None]:
        """Return the coroutine that runs a delivery up to its outcome, in the delivery's own task. It raises nothing.

        A second task writes the outcome. The handler runs in the first task, which ends right after the handler: a
        handler may cancel its own task, or leave something behind that cancels the task later, and neither may reach
        the writes. Where nothing has to be written, or a result is sent at once, there is no second task.
        """
        opened = None
        try:
            opened = self.opener.open_first(delivery)
        except Exception:
            log.exception("opening job %d of lane %s; it is opened again", delivery.seq, delivery.lane.key)
        if opened is not None:
            handler: Handler | None = self._handlers[delivery.lane.key.family, opened.kind]
            if handler is None or not handler.is_async or handler.process:
                return self._run_any(delivery, opened)
            if self.limiting is None or self.limiting.may_start(delivery, opened, handler):
                return self._run_plain(delivery, opened, handler)
        return self._run_any(delivery, opened)

    async def _run_any(self, delivery: Delivery, opened: OpenedJob | None) -> None:
        """Run any delivery: the full path, for which `_run_plain` is a shortcut. `opened`: if it is opened already."""
        started_at = time.monotonic()
        context: JobContext | None = None
        handler: Handler | None = None
        outcome: Outcome | BaseException
        try:
            opened = opened or await self.opener.open(delivery)
            handler = attempt.find_handler(self._handlers, opened.family, opened)
            context = JobContext(self._resources, delivery, opened)
            outcome = await self._gate_and_run(delivery, opened, handler, context)
        except BaseException as error:  # noqa: BLE001  (`_finish_delivery` raises it again)
            outcome = error
        self._conclude(delivery, opened, handler, context, outcome, started_at)

    async def _run_plain(self, delivery: Delivery, opened: OpenedJob, handler: Handler) -> None:
        """As `_run_any`, for a plain first delivery whose handler runs on the event loop: most jobs.

        Everything that a job passes through is in this one coroutine. What users put around handlers is part of
        `handler.call`.
        """
        started_at = time.monotonic()
        context: JobContext | None = None
        outcome: Outcome | BaseException
        ended: Outcome
        try:
            context = JobContext(self._resources, delivery, opened, started_at)
            # a notice: the journal must be read; or something is paused, perhaps this job; or its credit has expired
            if (
                self.cancellations.watch(context, started_at)
                or self.gate.pauses is not None
                or (delivery.credit is not None and not delivery.begin_credit())
            ):
                outcome = await self._gate_and_run(delivery, opened, handler, context)
            elif isinstance(job := self._build_plain_job(delivery, opened, handler, context), Refused):
                outcome = job
            else:
                timeout_s = handler.timeout_s
                if timeout_s is not None:
                    self._limits.start(context, time.monotonic() + timeout_s)
                self._watchdog.running[context] = timeout_s
                running_job.set(job)
                try:
                    value = await handler.call(job)
                    if type(value) in PLAIN_TYPES:
                        ended = Returned(value) if handler.keeps_result else RETURNED_NONE
                    else:
                        ended = await attempt.outcome_of_value(value)
                except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
                    ended = attempt.outcome_of_error(error, handler.on)
                finally:
                    del self._watchdog.running[context]
                    self._limits.stop(context)
                if type(ended) is not Returned or context.cancels:
                    ended = self._judge(delivery, ended, context, timeout_s)
                outcome = self._heed_cancellation(delivery, ended) if context.cancel_requested else ended
        except BaseException as error:  # noqa: BLE001  (`_finish_delivery` raises it again)
            outcome = error
        if context is not None:
            self.cancellations.unwatch(context)
        self._conclude(delivery, opened, handler, context, outcome, started_at)

    def _conclude(
        self,
        delivery: Delivery,
        opened: OpenedJob | None,
        handler: Handler | None,
        context: JobContext | None,
        outcome: Outcome | BaseException,
        started_at: float,
    ) -> None:
        """Acknowledge the job, or send its result, if that is all; else have a second task settle it."""
        acked = False
        if type(outcome) is Raised and outcome.pauses_key and opened is not None and self.limiting is not None:
            self.limiting.pause_key(delivery, opened, context, outcome)
        try:
            if type(outcome) is Returned and opened is not None and context is not None and not context.has_checkpoints:
                acked = not context.has_chunks and self._settlement.try_ack_now(delivery, opened, handler)
                if not acked and self._pipeline.try_send(delivery, opened, handler, context, outcome, started_at):
                    return
        except BaseException as error:  # noqa: BLE001  (`_finish_delivery` raises it again)
            outcome = error
        if acked:
            self._ended(delivery, started_at)
            return
        delivery.run_ended_at = delivery.run_ended_at or time.monotonic()
        finishing = self._finish_delivery(delivery, opened, context, outcome, started_at)
        delivery.task = self._resources.loop.create_task(finishing)

    def _on_result_settled(self, sent: SentResult) -> None:
        """Acknowledge the job of a result that is stored. Have a task write one that was refused.

        Without a reply of the server the job is redelivered, and the next delivery finds a result that was stored.
        """
        delivery, error = sent.delivery, sent.outcome
        if sent.is_stored:
            self._settlement.ack(delivery, sent.opened)
            self._ended(delivery, sent.started_at)
            return
        if (writer := sent.context.writer) is not None:
            writer.take_over_sent(sent.nonce)
        self._finish_sent(sent, error if isinstance(error, Unavailable) else sent.returned)

    def _finish_sent(self, sent: SentResult, outcome: Outcome | BaseException) -> None:
        """Have a task settle the delivery of a result that is under way no more, in no other job's context."""
        delivery = sent.delivery
        finishing = self._finish_delivery(delivery, sent.opened, sent.context, outcome, sent.started_at)
        delivery.task = self._resources.loop.create_task(finishing, context=self._context.copy())

    async def _finish_delivery(
        self,
        delivery: Delivery,
        opened: OpenedJob | None,
        context: JobContext | None,
        outcome: Outcome | BaseException,
        started_at: float,
    ) -> None:
        """Write the outcome of a delivery and reply to the server. `outcome`: also an error that there was instead.

        Raises nothing that the message or its handler causes. When this task is cancelled, or the first one was before
        its handler ran, the job returns to the queue. When the outcome cannot be written, the job is redelivered later.
        """
        settlement = self._settlement
        try:
            if opened is None or context is None:
                assert isinstance(outcome, BaseException)
                raise outcome  # noqa: TRY301  (the handlers below decide about all errors)
            handler = attempt.find_handler(self._handlers, opened.family, opened)
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                if context.has_chunks and not isinstance(outcome, Interrupted | TakenOver | AlreadyEnded):
                    await context.flush()  # before anything is decided by the journal's newest entry
                if type(outcome) is Returned:
                    if settlement.try_ack_now(delivery, opened, handler):
                        await context.forget_checkpoints()
                        return
                elif isinstance(outcome, Raised | Refused | Waiting) and context.writer:
                    outcome = await self._look_back(delivery, opened, context.writer, outcome)
                await settlement.settle(delivery, opened, handler, context.writer, outcome)
                if isinstance(outcome, Returned | Cancelled):
                    await context.forget_checkpoints(cancelled=isinstance(outcome, Cancelled))
            except Stale as stale:
                was_cancelled = isinstance(outcome, Cancelled)
                outcome = AlreadyEnded() if stale.ended else TakenOver()
                await settlement.settle(delivery, opened, handler, context.writer, outcome)
                if was_cancelled and stale.ended:
                    await context.forget_checkpoints(cancelled=True)
        except asyncio.CancelledError:
            await settlement.release(delivery)
            raise
        except Exception as error:  # noqa: BLE001
            await settlement.redeliver_later(delivery, error)
        finally:
            delivery.give_back_credit()  # it has one still if it never came to its call
            try:
                if context is not None and context.has_chunks:
                    context.close()
            finally:
                self._ended(delivery, started_at)

    def interrupt(self, delivery: Delivery) -> None:
        """Stop a delivery because the worker leaves: its job returns to the queue. Call `wait` for its end."""
        self.interruptions.note(delivery)
        if (sent := self._pipeline.take_back(delivery)) is not None:
            self._finish_sent(sent, Interrupted())
        elif delivery.task is not None:
            delivery.task.cancel()

    async def release(self, delivery: Delivery) -> None:
        """Return a job that was not run to the queue, for another worker."""
        await self._settlement.release(delivery)

    # -- the attempt

    async def _gate_and_run(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext
    ) -> Outcome:
        """Run a delivery, with a credit if its key is limited. Returns the outcome."""
        if self.limiting is None or not self.limiting.concerns(delivery, opened):
            return await self._claim_and_run(delivery, opened, handler, context)
        return await self.limiting.run(delivery, opened, handler, context, self._claim_and_run)

    async def _claim_and_run(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext
    ) -> Outcome:
        """Check whether this delivery may run, claim its run, and call the handler. Returns the outcome.

        1. The delivery must not run, or another delivery holds the run: the handler is not called.
        2. Else the handler is called. A cancellation of the job, or a worker that leaves, may stop it.
        A run is claimed only where several deliveries, or several messages of one job id, may contend for it.
        """
        if not opened.plain:
            if (known := self.gate.find_outcome(delivery, opened)) is not None:
                return known
            if headers.PARENT in opened.raw.headers and await self._resources.children.is_parent_cancelled(
                opened.raw.headers, delivery.tenant
            ):
                return Cancelled()
            contended = delivery.delivery_count > 1 or headers.PARKED in opened.raw.headers or opened.family.claim
            if contended and handler is not None and (writer := context.writer) is not None:
                held = await self._run_claims.claim(delivery, opened, writer)
                if held is not None:
                    return held
        if (paused := self.gate.find_pause(delivery, opened)) is not None:  # begun meanwhile, or a plain job
            return paused
        now = time.monotonic()
        context.mark_started(now)
        outcome: Outcome
        try:
            if self.cancellations.watch(context, now) and (writer := context.writer) and await writer.is_run_ended():
                return AlreadyEnded()  # cancelled while it waited for a slot
            takes_any = handler is not None and bool(handler.any_of)  # and so a body that cannot be decoded
            if not opened.is_suspect or (opened.problem and not takes_any):
                outcome = await self._call_handler(delivery, opened, handler, context)
            else:
                outcome = await self._try_suspect(delivery, opened, handler, context)
        except asyncio.CancelledError:
            if not context.cancel_requested:
                raise
            outcome = Interrupted()
        finally:
            self.cancellations.unwatch(context)
        return self._heed_cancellation(delivery, outcome) if context.cancel_requested else outcome

    def _heed_cancellation(self, delivery: Delivery, outcome: Outcome) -> Outcome:
        """Return the outcome of an attempt whose job was cancelled while it ran. A handler that returned has won."""
        if isinstance(outcome, Returned):
            return outcome
        return Interrupted() if self.interruptions.concern(delivery) else Cancelled()

    async def _look_back(
        self, delivery: Delivery, opened: OpenedJob, writer: Writer, outcome: Raised | Refused | Waiting
    ) -> Outcome:
        """Load earlier attempts before a failure is counted. Raises Stale if a newer attempt has written.

        A recreated consumer restarts the delivery count, so a first delivery may have earlier attempts all the same.
        """
        if not may_have_history(delivery, opened):
            await self.opener.load_earlier_attempts(delivery, opened, writer.subject)
            writer.continue_after(opened.record, opened.attempt)
        if type(outcome) is Refused and opened.family.claim:
            return await self._run_claims.yield_id(delivery, opened, writer, outcome)
        return outcome

    async def _try_suspect(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext
    ) -> Outcome:
        """Have the quarantine run the handler: in a child process, or here where no child can find the handler."""
        raw = opened.raw
        if handler is None:
            return attempt.unknown_kind_outcome(raw, opened)

        async def run_here() -> Outcome:
            """Run the suspect in this process, without chunks and progress, in a task of its own.

            Its `trial` must stay the newest entry: if the job kills this process too, that entry shows it.
            """
            attempt.decode_into(raw, opened)
            context.journal_muted = True
            call = self._call_handler(delivery, opened, handler, context)
            return await attempt.run_in_task(call, contextvars.copy_context(), context.set_task)

        suspect = Suspect(
            raw, opened.job_id, opened.attempt, handler, context.writer,
            progress=context, newest=opened.record.newest, running=context,
        )  # fmt: skip
        return await self._quarantine.run_trial(suspect, run_here)

    async def _call_handler(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext
    ) -> Outcome:
        """Call the handler on the event loop, in a thread, or in a child process, within its timeout.

        Only the worker's own cancellations, and those of a timeout, stop the attempt. Any other comes from the handler,
        which has failed then.
        """
        if handler is not None and handler.process and (opened.data is not None or handler.any_of):
            return await self.processes.run_handler(opened.raw, opened.attempt, handler, context, context)
        job: Job[Any] | Refused | Unknown
        if opened.plain and handler is not None:
            job = self._build_plain_job(delivery, opened, handler, context)
        else:
            job = attempt.build_job(
                opened.raw, opened, handler, attempt=opened.attempt, state=self._state, progress=context
            )
        if not isinstance(job, Job):
            return job
        assert handler is not None  # a job has one
        if context.admission is not None and self.limiting is not None:
            refusal = await self.limiting.begin(opened, handler, job.message, context.admission)
            if refusal is not None:
                return refusal
        timeout_s = handler.timeout_s
        if timeout_s is not None:
            self._limits.start(context, time.monotonic() + timeout_s)
        running_job.set(job)
        outcome: Outcome
        try:
            if handler.is_async:
                self._watchdog.running[context] = timeout_s
                value = await handler.call(job)
            else:
                value = await handler.call_in_thread(job, context.run_in_thread)
                self._watchdog.running[context] = timeout_s  # a coroutine that it returned runs on the loop
            outcome = Returned(value) if type(value) in PLAIN_TYPES else await attempt.outcome_of_value(value)
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            outcome = attempt.outcome_of_error(error, handler.on)
        finally:
            self._watchdog.running.pop(context, None)
            self._limits.stop(context)
        return self._judge(delivery, outcome, context, timeout_s)

    def _judge(self, delivery: Delivery, outcome: Outcome, limit: Limit, timeout_s: float | None) -> Outcome:
        """Return the outcome of a handler that has ended: it may have ended because of its timeout, or of a drain."""
        is_late = limit.expired  # even if the handler made something else of its cancellation
        if (is_late or type(outcome) is not Returned) and self.interruptions.concern(delivery):
            return Interrupted()
        return attempt.timeout_outcome(timeout_s) if is_late else outcome

    def _build_plain_job(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler, context: JobContext
    ) -> Job[Any] | Refused:
        message = opened.message if isinstance(opened, PlainJob) else None
        if handler.any_of and delivery.plain is not None:
            message = RawMessage(opened.kind, delivery.message.data, delivery.plain[3], opened.version, opened.data)
        return attempt.build_plain_job(
            handler, opened, delivery.own_lane[:3], context.read_headers, message, enqueued_at=delivery.enqueued_at,
            state=self._state, progress=context, stored=(delivery.seq, delivery.stored_at),
        )  # fmt: skip
