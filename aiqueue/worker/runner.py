"""Run one delivery: read its body and journal, claim its run, call its handler. `settlement` writes the outcome."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import attempt, headers, subjects
from ..attempt import (
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
    RawJob,
    Refused,
    Returned,
    TakenOver,
    Threads,
)  # fmt: skip
from ..connection import HEADERS_MAX, timestamp
from ..enqueue import history_of, trimmed
from ..errors import AccountFull, AIQueueError, BadInput, Corrupt, DiskFull, NotFound, Stale
from ..job import Job
from ..journal import RETRY, WRITE_TRIES_MAX, Writer
from ..lanes import Delivery
from ..processes import Processes, Quarantine, Suspect
from ..requests import CHECK_AGAIN_S, Claims
from ..topology import Family
from .context import JobContext, WorkerResources
from .settlement import OpenedJob, Settlement
from .takeover import DeliveryOrder, find_pending_retry, is_taken_over
from .watchdog import Watchdog

log = logging.getLogger(__name__)

MOVE_BYTES = 512  # header bytes that a move to another lane adds, at most
_NOT_PLAIN = frozenset({headers.PARKED, headers.DEADLINE, headers.HISTORY, *headers.DOCUMENTS})


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
        self._watchdog = watchdog
        self._ended = ended
        self._threads = Threads("aiqueue-handler")
        self._resources = resources
        self._limits = Limits()
        self.cancellations = Cancellations(claims.journal.connection, resources.families.values(), self._limits)

    async def drain(self, timeout_s: float) -> None:
        """Wait up to `timeout_s` seconds for results that the server has no space for yet."""
        await self._settlement.overflow.wait(timeout_s)

    def close(self) -> None:
        """Drop the results that still wait, and let idle threads end."""
        self._settlement.overflow.close()
        self._threads.close()

    async def run_delivery(self, delivery: Delivery) -> None:
        """Run one delivery and settle it, in the delivery's own task.

        Raises nothing that the message or its handler causes. When the task itself is cancelled, the job returns to the
        queue. When the outcome cannot be written, the job is redelivered later.
        """
        started_at = time.monotonic()
        context: JobContext | None = None
        settlement = self._settlement
        try:
            opened = self._open_first_delivery(delivery) or await self._open_delivery(delivery)
            handler = self._handlers.get((delivery.lane.key.family, opened.kind))
            context = JobContext(self._resources, delivery, opened)
            try:
                outcome = await self._gate_and_run(delivery, opened, handler, context)
                if context.has_chunks and not isinstance(outcome, Interrupted | TakenOver | AlreadyEnded):
                    await context.flush()  # before anything is decided by the journal's newest entry
                if type(outcome) is Returned:
                    if settlement.try_ack_now(delivery, opened, handler):
                        return
                elif (
                    isinstance(outcome, Raised | Refused) and context.writer and not _may_have_history(delivery, opened)
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

    async def release(self, delivery: Delivery) -> None:
        """Return a job that was not run to the queue, for another worker."""
        await self._settlement.release(delivery)

    # -- before the handler

    def _open_first_delivery(self, delivery: Delivery) -> OpenedJob | None:
        """Open a plain first delivery without any request to the server. None: `_open_delivery` must open it.

        This is the fast path, for most jobs. For a delivery that it opens, `_open_delivery` would return the same.
        """
        message_headers, key = delivery.message.headers, delivery.lane.key
        family = self._families[key.family]
        if delivery.delivery_count > 1 or family.claim or not _NOT_PLAIN.isdisjoint(message_headers):
            return None
        if message_headers.get(headers.PRIORITY, key.priority) != key.priority or self._quarantine.is_suspect(delivery):
            return None
        raw = _raw_job(family, delivery)
        opened = OpenedJob.for_first_delivery(raw)
        attempt.decode_into(raw, opened)
        return opened

    async def _open_delivery(self, delivery: Delivery) -> OpenedJob:
        """Open any delivery: fetch and decode its body, and load the attempts before this delivery.

        The body of a suspect is not decoded in this process, because decoding may be what killed its workers.
        """
        family = self._families[delivery.lane.key.family]
        raw = _raw_job(family, delivery)
        refusal = None
        if headers.DOCUMENT in raw.headers:
            raw, refusal = await self._fetch_body(raw)
        maybe_suspect = self._quarantine.is_suspect(delivery)
        if refusal is not None:
            known = attempt.decode_headers_only(raw) or attempt.decode_headers_or_defaults(raw)
            opened = OpenedJob(**vars(known), raw=raw, refusal=refusal)
        elif maybe_suspect:
            opened = await self._identify_suspect(raw)
        else:
            opened = OpenedJob(job_id="", kind="", raw=raw)
            attempt.decode_into(raw, opened)
        opened.history = history_of(raw.headers)
        if headers.PARKED in raw.headers:
            opened.attempt = opened.first_attempt = max(1, headers.number(raw.headers.get(headers.ATTEMPT, "")))
        if opened.refused_before:
            opened.refusal = Refused(raw.headers[headers.REASON], raw.headers.get(headers.ERROR, ""))
        if _may_have_history(delivery, opened) and family.journal:
            subject = subjects.journal(family.journal, delivery.tenant, opened.job_id)
            await self._load_earlier_attempts(delivery, opened, subject)
        if maybe_suspect:
            self._decide_suspect(delivery, opened)
        return opened

    def _decide_suspect(self, delivery: Delivery, opened: OpenedJob) -> None:
        """Decide whether the job is a suspect, now that its failed attempts are known. If not, decode its body."""
        opened.is_suspect = self._quarantine.is_suspect(delivery, opened.attempt - opened.first_attempt + 1)
        if not opened.is_suspect and opened.data is None and opened.refusal is None:
            attempt.decode_into(opened.raw, opened)

    async def _fetch_body(self, raw: RawJob) -> tuple[RawJob, Refused | None]:
        """Return the job with the body from its document, or unchanged with the reason why there is none.

        Raises Unavailable.
        """
        try:
            return raw._replace(body=await self._resources.documents.read_body(raw.tenant, raw.headers)), None
        except (NotFound, Corrupt, BadInput) as error:
            return raw, Refused("document", str(error))

    async def _identify_suspect(self, raw: RawJob) -> OpenedJob:
        """Open a suspect with id and kind only. If reading its body killed a child process, it is refused."""
        found = await self._quarantine.identify(raw)
        if isinstance(found, Refused):
            return OpenedJob(**vars(attempt.decode_headers_or_defaults(raw)), raw=raw, refusal=found)
        return OpenedJob(**vars(found), raw=raw)

    async def _load_earlier_attempts(self, delivery: Delivery, opened: OpenedJob, subject: str) -> None:
        """Read this run's journal into `opened`: its record, the number of this attempt, the history of failures.

        The recap is the newest `started` or `retry`. After a `retry` this is the next attempt; after a `started` that
        ended without an entry the same attempt runs once more, because a lost worker does not count as a failure.
        """
        parking_id = headers.parking_id(opened.raw.headers)
        record = opened.record = await self._journal.read_run(subject, delivery.run, delivery.enqueued_at, parking_id)
        if record.recap is not None and isinstance(record.recap.data, dict):
            number = record.recap.attempt + (record.recap.event == RETRY)
            history = record.recap.data.get("history")
            if isinstance(history, list) and number >= opened.attempt:
                opened.history = [each for each in history if isinstance(each, dict)]
        else:
            number = record.newest.attempt if record.newest else 1
        opened.attempt = max(opened.first_attempt, number)

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
            contended = delivery.delivery_count > 1 or headers.PARKED in opened.raw.headers or opened.raw.family.claim
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
                outcome = await self._call_handler(opened, handler, context)
            else:
                outcome = await self._try_suspect(opened, handler, context)
        except asyncio.CancelledError:
            if not context.cancel_requested:
                raise
            outcome = Interrupted()
        finally:
            worker_leaves = self.cancellations.unwatch(context)  # the worker, too, has cancelled the task
        if not context.cancel_requested or isinstance(outcome, Returned):
            return outcome
        return Interrupted() if worker_leaves else Cancelled()

    def _outcome_without_run(self, delivery: Delivery, opened: OpenedJob) -> Outcome | None:
        """Return the outcome of a delivery that must not run: ended, refused, early, late or misplaced. None: run."""
        if opened.record.ended:
            return AlreadyEnded()
        if opened.refusal is not None:
            return opened.refusal
        if (pending := find_pending_retry(delivery, opened)) is not None:
            return pending
        if (wrong_lane := attempt.find_wrong_lane(opened.raw)) is not None and self._can_be_moved(delivery):
            return wrong_lane
        if attempt.is_past_deadline(opened.raw):
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
        4. TakenOver: a later delivery of this run has started.
        Raises Stale when others wrote WRITE_TRIES_MAX times meanwhile.
        """
        family = opened.raw.family
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
            if is_taken_over(delivery, opened, order):
                return TakenOver()
            try:
                if await writer.write_started(self._started_data(delivery, opened, order)):
                    return None
            except (AccountFull, DiskFull) as error:  # only jobs that end make space, so this one must run
                log.warning("job %s runs without its `started` entry: %s", opened.job_id, error)
                return None
            await self._load_earlier_attempts(delivery, opened, writer.subject)
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
        await self._load_earlier_attempts(delivery, opened, writer.subject)
        writer.continue_after(opened.record, opened.attempt)

    async def _try_suspect(self, opened: OpenedJob, handler: Handler | None, context: JobContext) -> Outcome:
        """Have the quarantine run the handler: in a child process, or here where no child can find the handler."""
        raw = opened.raw
        if handler is None:
            return attempt.unknown_kind_outcome(raw, opened)

        async def run_here() -> Outcome:
            """Run the suspect in this process, without chunks and progress.

            Its `trial` must stay the newest entry: if the job kills this process too, that entry shows it.
            """
            attempt.decode_into(raw, opened)
            context.journal_muted = True
            return await self._call_handler(opened, handler, context)

        suspect = Suspect(
            raw, opened.job_id, opened.attempt, handler, context.writer,
            progress=context, newest=opened.record.newest, running=context,
        )  # fmt: skip
        return await self._quarantine.run_trial(suspect, run_here)

    async def _call_handler(self, opened: OpenedJob, handler: Handler | None, context: JobContext) -> Outcome:
        """Call the handler on the event loop, in a thread, or in a child process, within its timeout."""
        raw = opened.raw
        if handler is not None and handler.process and opened.data is not None:
            return await self.processes.run_handler(raw, opened.attempt, handler, context, context)
        job = attempt.build_job(raw, opened, handler, attempt=opened.attempt, state=self._state, progress=context)
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
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            outcome = attempt.outcome_of_error(error, handler.on)
        else:
            outcome = Returned(value)
        finally:
            if limit is not None:
                self._limits.stop(limit)
        if limit is not None and limit.expired:
            # the time is up, even if the handler turned its cancellation into something else; `absolve` tells whether
            # the worker has cancelled the task as well
            return Interrupted() if limit.absolve() else attempt.timeout_outcome(timeout_s)
        if type(outcome) is not Returned and task.cancelling():
            return Interrupted()
        return outcome


def _raw_job(family: Family, delivery: Delivery) -> RawJob:
    """Return what an attempt needs of a delivery."""
    message = delivery.message
    return RawJob(
        family, delivery.tenant, delivery.lane.key.priority, delivery.seq, delivery.enqueued_at,
        message.headers, message.data,
    )  # fmt: skip


def _may_have_history(delivery: Delivery, opened: OpenedJob) -> bool:
    """Return whether there may have been earlier attempts, as far as the delivery alone shows."""
    return delivery.delivery_count > 1 or opened.first_attempt > 1
