"""Run one delivery: read its body and journal, claim its run, call its handler. `settlement` writes the outcome."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import attempt, headers
from ..attempt import (
    PLAIN_TYPES,
    AlreadyEnded,
    Cancellations,
    Cancelled,
    Duplicate,
    Handler,
    Interrupted,
    Limits,
    Outcome,
    Postponed,
    Raised,
    Refused,
    Returned,
    TakenOver,
    Threads,
    Unknown,
)  # fmt: skip
from ..connection import HEADERS_MAX, timestamp
from ..enqueue import trimmed
from ..errors import AccountFull, AIQueueError, DiskFull, Stale, Unavailable
from ..job import Job
from ..journal import WRITE_TRIES_MAX, Writer
from ..lanes import Delivery
from ..processes import Processes, Quarantine, Suspect
from ..requests import CHECK_AGAIN_S, Claims
from ..topology import Family
from .context import JobContext, WorkerResources
from .opening import OpenedJob, Opener, may_have_history
from .pipelined import ResultPipeline, SentResult
from .settlement import Settlement
from .takeover import DeliveryOrder, find_pending_retry, find_takeover
from .watchdog import Watchdog

log = logging.getLogger(__name__)

MOVE_BYTES = 512  # header bytes that a move to another lane adds, at most


class Runner:
    """Runs deliveries with the handlers of one worker."""

    def __init__(
        self,
        claims: Claims,
        resources: WorkerResources,
        settlement: Settlement,
        *,
        handlers: Mapping[tuple[str, str], Handler],
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
        self._claims = claims
        self._handlers = handlers
        self._families = resources.families
        self._worker = worker
        self._state = state
        self.processes = processes
        self._quarantine = quarantine
        self.opener = Opener(claims.journal, resources.documents, resources.families, quarantine)
        self._watchdog = watchdog
        self._ended = ended
        self._context = contextvars.copy_context()
        self._pipeline = ResultPipeline(claims.journal.connection, resources.retention, self._on_result_settled)
        self._threads = Threads("aiqueue-handler")
        self._resources = resources
        self._limits = Limits()
        self._interrupted: set[Delivery] = set()
        self.cancellations = Cancellations(claims.journal.connection, resources.families.values(), self._limits)

    async def drain(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for results that the server has no space for yet."""
        await self._settlement.overflow.wait(timeout_s)

    def close(self) -> None:
        """Drop the results that still wait, and let idle threads end."""
        self._settlement.overflow.close()
        self._threads.close()

    async def run_delivery(self, delivery: Delivery) -> None:
        """Run one delivery up to its outcome, in the delivery's own task, and have a second task write the outcome.

        The handler runs in the first task, which ends right after the handler: a handler may cancel its own task, or
        leave something behind that cancels the task later, and neither may reach the writes. An outcome for which
        nothing has to be written needs no second task. Raises nothing.
        """
        started_at = time.monotonic()
        opened: OpenedJob | None = None
        context: JobContext | None = None
        try:
            opened = self.opener.open_first(delivery) or await self.opener.open(delivery)
            handler = self._handlers.get((delivery.lane.key.family, opened.kind))
            context = JobContext(self._resources, delivery, opened)
            outcome: Outcome | BaseException = await self._gate_and_run(delivery, opened, handler, context)
            acked = (
                type(outcome) is Returned
                and not context.has_chunks
                and self._settlement.try_ack_now(delivery, opened, handler)
            )
            sent = not acked and self._pipeline.try_send(delivery, opened, handler, context, outcome, started_at)
        except BaseException as error:  # noqa: BLE001  (`_finish_delivery` raises it again)
            outcome, acked, sent = error, False, False
        if acked:
            self._ended(delivery, started_at)
        elif not sent:
            finishing = self._finish_delivery(delivery, opened, context, outcome, started_at)
            delivery.task = self._resources.loop.create_task(finishing)

    def _on_result_settled(self, sent: SentResult) -> None:
        """Acknowledge the job of a result that is stored. Have a task write one that was refused.

        Without a reply of the server the job is redelivered, and the next delivery finds a result that was stored.
        """
        delivery, error = sent.delivery, sent.outcome
        if sent.is_stored:
            self._settlement.ack(delivery)
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
            handler = self._handlers.get((delivery.lane.key.family, opened.kind))
            try:
                if isinstance(outcome, BaseException):
                    raise outcome
                if context.has_chunks and not isinstance(outcome, Interrupted | TakenOver | AlreadyEnded):
                    await context.flush()  # before anything is decided by the journal's newest entry
                if type(outcome) is Returned:
                    if settlement.try_ack_now(delivery, opened, handler):
                        return
                elif (
                    isinstance(outcome, Raised | Refused) and context.writer and not may_have_history(delivery, opened)
                ):  # it looks like a first delivery, which a recreated consumer may be wrong about
                    await self._reread_journal(delivery, opened, context.writer)
                await settlement.settle(delivery, opened, handler, context.writer, outcome)
            except Stale as stale:
                outcome = AlreadyEnded() if stale.ended else TakenOver()
                await settlement.settle(delivery, opened, handler, context.writer, outcome)
        except asyncio.CancelledError:
            await settlement.release(delivery)
            raise
        except Exception as error:  # noqa: BLE001
            await settlement.redeliver_later(delivery, error)
        finally:
            try:
                if context is not None and context.has_chunks:
                    context.close()
            finally:
                self._ended(delivery, started_at)

    def interrupt(self, delivery: Delivery) -> None:
        """Stop a delivery because the worker leaves: its job returns to the queue. Call `wait` for its end."""
        self._interrupted.add(delivery)
        if (sent := self._pipeline.take_back(delivery)) is not None:
            self._finish_sent(sent, Interrupted())
        elif delivery.task is not None:
            delivery.task.cancel()

    def _is_interrupted(self, delivery: Delivery) -> bool:
        """Return whether the worker leaves, or its event loop ends: a cancellation is not the handler's own then."""
        return delivery in self._interrupted or self.cancellations.loop_ends

    async def release(self, delivery: Delivery) -> None:
        """Return a job that was not run to the queue, for another worker."""
        await self._settlement.release(delivery)

    # -- the attempt

    async def _gate_and_run(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, context: JobContext
    ) -> Outcome:
        """Check whether this delivery may run, claim its run, and call the handler. Returns the outcome.

        1. The delivery must not run, or another delivery holds the run: the handler is not called.
        2. Else the handler is called. A cancellation of the job, or a worker that leaves, may stop it.
        A run is claimed only where several deliveries, or several messages of one job id, may contend for it.
        """
        if not opened.plain:
            if (known := self._outcome_without_run(delivery, opened)) is not None:
                return known
            contended = delivery.delivery_count > 1 or headers.PARKED in opened.raw.headers or opened.family.claim
            if contended and handler is not None and (writer := context.writer) is not None:
                held = await self._claim_run(delivery, opened, writer)
                if held is not None:
                    return held
        context.mark_started()
        outcome: Outcome
        try:
            if self.cancellations.watch(context) and (writer := context.writer) and await writer.is_run_ended():
                return AlreadyEnded()  # cancelled while it waited for a slot
            if not opened.is_suspect or opened.problem:
                outcome = await self._call_handler(delivery, opened, handler, context)
            else:
                outcome = await self._try_suspect(delivery, opened, handler, context)
        except asyncio.CancelledError:
            if not context.cancel_requested:
                raise
            outcome = Interrupted()
        finally:
            self.cancellations.unwatch(context)
        if not context.cancel_requested or isinstance(outcome, Returned):
            return outcome
        return Interrupted() if self._is_interrupted(delivery) else Cancelled()

    def _outcome_without_run(self, delivery: Delivery, opened: OpenedJob) -> Outcome | None:
        """Return the outcome of a delivery that must not run: ended, refused, early, late or misplaced. None: run."""
        if opened.record.ended:
            return AlreadyEnded()
        if opened.refusal is not None:
            return opened.refusal
        if (pending := find_pending_retry(delivery, opened, self._journal.connection.clock.now())) is not None:
            return pending
        if (wrong_lane := attempt.find_wrong_lane(opened.raw)) is not None and self._can_be_moved(delivery):
            return wrong_lane
        if attempt.is_past_deadline(opened.raw, self._journal.connection.clock.now()):
            return Refused("deadline", "its deadline passed before it was run")
        return None

    def _can_be_moved(self, delivery: Delivery) -> bool:
        """Return whether the message still fits with the headers that a move adds. If not, it runs in this lane."""
        message = delivery.message
        header_bytes = sum(len(name) + len(value) + 4 for name, value in message.headers.items()) + MOVE_BYTES
        max_payload = self._journal.connection.max_payload
        return header_bytes <= HEADERS_MAX and header_bytes + len(message.data) <= max_payload

    async def _claim_run(self, delivery: Delivery, opened: OpenedJob, writer: Writer) -> Outcome | None:
        """Write `started`, after which no earlier attempt and no earlier cancellation can write to this run's journal.

        Optimistic concurrency decides: of several `started` at once the journal takes the first. Returns:
        1. None: the run is claimed. Also None where the journal has no space: the job then runs unclaimed.
        2. AlreadyEnded: the run has a final entry.
        3. Duplicate, Postponed: in a family with `claim`, another run holds the job id, or may come back and hold it.
        4. TakenOver, RetryPending: a later delivery of this run has started.
        Raises Stale when others wrote WRITE_TRIES_MAX times meanwhile.
        """
        family = opened.family
        order = await self._order_delivery(delivery, family)
        for _ in range(WRITE_TRIES_MAX):
            if opened.record.ended:
                return AlreadyEnded()
            if family.claim and opened.record.newest is None and opened.record.head_seq:
                taken = await self._claims.is_taken_by_other_run(
                    family, writer.subject, delivery.run, delivery.enqueued_at
                )
                if taken is not False:
                    return Duplicate() if taken else Postponed(CHECK_AGAIN_S)
            if (late := find_takeover(delivery, opened, order, self._journal.connection.clock.now())) is not None:
                return late
            try:
                if await writer.write_started(self._started_data(delivery, opened, order)):
                    return None
            except (AccountFull, DiskFull) as error:  # only jobs that end make space, so this one must run
                log.warning("job %s runs without its `started` entry: %s", opened.job_id, error)
                return None
            await self.opener.load_earlier_attempts(delivery, opened, writer.subject)
            writer.start_after(opened.record, opened.attempt)
        raise Stale(f"{writer.subject}: others wrote first, {WRITE_TRIES_MAX} times", ended=False)

    def _started_data(self, delivery: Delivery, opened: OpenedJob, order: DeliveryOrder) -> dict[str, Any]:
        """Return the data of a `started` entry. It keeps the count of a suspect's trials, if there were any."""
        newest = opened.record.newest
        trials = newest.data.get("trials") if newest is not None and isinstance(newest.data, dict) else None
        data = {"seq": delivery.seq, "delivery": list(order), "worker": self._worker}
        return data | {"history": trimmed(opened.history or []), **({} if trials is None else {"trials": trials})}

    async def _order_delivery(self, delivery: Delivery, family: Family) -> DeliveryOrder:
        """Return the place of a delivery among those of its job, by which a later delivery is told from an earlier one.

        A recreated consumer counts deliveries from 1 again, so the place includes when the consumer was created. For
        one in memory the server is asked, because it may have been recreated since this worker last asked. The answer
        stays true: while a job of the consumer is in flight, the server keeps the consumer.
        """
        lane = delivery.lane
        if delivery.delivery_count > 1 and family.lane_storage == "memory":
            with contextlib.suppress(AIQueueError):
                info = await self._journal.connection.api(f"CONSUMER.INFO.{lane.stream}.{lane.consumer}")
                lane.created = max(lane.created, timestamp(info["created"]))
        return DeliveryOrder(delivery.seq, lane.created, delivery.delivery_count)

    async def _reread_journal(self, delivery: Delivery, opened: OpenedJob, writer: Writer) -> None:
        """Load earlier attempts before a failure is counted. Raises Stale if a newer attempt has written.

        A recreated consumer restarts the delivery count, so a first delivery may have earlier attempts all the same.
        """
        await self.opener.load_earlier_attempts(delivery, opened, writer.subject)
        writer.continue_after(opened.record, opened.attempt)

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
        if handler is not None and handler.process and opened.data is not None:
            return await self.processes.run_handler(opened.raw, opened.attempt, handler, context, context)
        job: Job[Any] | Refused | Unknown
        if opened.plain and handler is not None:
            job = attempt.build_plain_job(
                handler, opened, delivery.own_lane, context.read_headers, enqueued_at=delivery.enqueued_at,
                state=self._state, progress=context,
            )  # fmt: skip
        else:
            job = attempt.build_job(
                opened.raw, opened, handler, attempt=opened.attempt, state=self._state, progress=context
            )
        if not isinstance(job, Job):
            return job
        assert handler is not None  # a job has one
        task, timeout_s = context.task, handler.timeout_s
        limit = None if timeout_s is None else self._limits.start(task, timeout_s)
        outcome: Outcome
        try:
            if handler.is_async:
                self._watchdog.running[timeout_s] += 1
                try:
                    value = await handler.call(job)
                finally:
                    self._watchdog.running[timeout_s] -= 1
            else:
                value = await self._threads.run(lambda: handler.call(job))
            outcome = Returned(value) if type(value) in PLAIN_TYPES else await attempt.outcome_of_value(value)
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            outcome = attempt.outcome_of_error(error, handler.on)
        finally:
            if limit is not None:
                self._limits.stop(limit)
        is_late = limit is not None and limit.expired  # even if the handler made something else of its cancellation
        if (is_late or type(outcome) is not Returned) and self._is_interrupted(delivery):
            return Interrupted()
        return attempt.timeout_outcome(timeout_s) if is_late else outcome
