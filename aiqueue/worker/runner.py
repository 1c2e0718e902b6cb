"""How one delivery is run: its body, its journal, its handler. What becomes of it is for `settlement`."""

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
    RetryPending,
    Returned,
    TakenOver,
    Threads,
)  # fmt: skip
from ..connection import HEADERS_MAX, timestamp
from ..enqueue import history_of, trimmed
from ..errors import AccountFull, AIQueueError, BadInput, Corrupt, DiskFull, NotFound, Stale
from ..job import Job
from ..journal import RETRY, STARTED, WRITE_TRIES_MAX, Writer
from ..lanes import Delivery
from ..processes import Processes, Quarantine, Suspect
from ..requests import AGAIN_S, Claims
from ..topology import Family
from .context import JobContext, WorkerResources
from .settlement import Opened, Settlement, retry_move
from .watchdog import Watchdog

log = logging.getLogger("aiqueue.runner")

WAITS_MIN_S = 1.0  # what is due sooner begins
BELIEVED_LEASES = 2  # for so long a message's earlier delivery gives way to a later one: their numbers can begin anew
MOVE_BYTES = 512  # of headers that a move adds, at most
_ASKING = frozenset({headers.PARKED, headers.DEADLINE, headers.HISTORY, *headers.DOCUMENTS})


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
        """`ended` is called with each delivery that has been run, and when that began, monotonic seconds."""
        self._journal = claims.journal
        self._settlement = settlement
        self._claims = claims
        self._handlers = handlers
        self._families = resources.families
        self._worker = worker
        self._state = state
        self._processes = processes
        self._quarantine = quarantine
        self._watchdog = watchdog
        self._ended = ended
        self._threads = Threads("aiqueue-handler")
        self._means = resources
        self._limits = Limits()
        self.stops = Cancellations(claims.journal.connection, resources.families.values(), self._limits)

    async def drain(self, timeout_s: float) -> None:
        """Wait for results that wait for room on the server."""
        await self._settlement.overflow.wait(timeout_s)

    def close(self) -> None:
        self._settlement.overflow.close()
        self._threads.close()

    async def run(self, delivery: Delivery) -> None:
        """Carry one delivery to its end, in its task, and say so. Never raises for anything that the message or its
        handler does.
        """
        begun = time.monotonic()
        context: JobContext | None = None
        settlement = self._settlement
        try:
            opened = self._plain(delivery) or await self._open(delivery)
            handler = self._handlers.get((delivery.lane.key.family, opened.kind))
            context = JobContext(self._means, delivery, opened)
            try:
                outcome = await self._attempt(delivery, opened, handler, context)
                if context.streams and not isinstance(outcome, Interrupted | TakenOver | AlreadyEnded):
                    await context.flush()  # before anything is decided by the journal's newest entry
                if type(outcome) is Returned:
                    if settlement.try_ack_now(delivery, opened, handler):
                        return
                elif isinstance(outcome, Raised | Refused) and context.writer and not _looked(delivery, opened):
                    outcome = await self._reconsider(delivery, opened, context.writer, outcome)
                await settlement.settle(delivery, opened, handler, context.writer, outcome)
            except Stale as stale:
                outcome = AlreadyEnded() if stale.ended else TakenOver()
                await settlement.settle(delivery, opened, handler, context.writer, outcome)
        except asyncio.CancelledError:
            await settlement.release(delivery)
            raise
        except Exception as error:  # noqa: BLE001
            await settlement.comes_back(delivery, error)
        finally:
            try:
                if context is not None and context.streams:
                    context.close()
            finally:
                self._ended(delivery, begun)

    async def release(self, delivery: Delivery) -> None:
        """Give a job that was not run to the next worker."""
        await self._settlement.release(delivery)

    # -- before

    def _plain(self, delivery: Delivery) -> Opened | None:
        """What there is to know of a delivery that needs no look elsewhere, and asks for nothing: most jobs' first one.

        As `_open` would have it, which is asked where this is None.
        """
        told, key = delivery.message.headers, delivery.lane.key
        family = self._families[key.family]
        if delivery.delivered > 1 or family.claim or not _ASKING.isdisjoint(told):
            return None
        if told.get(headers.PRIORITY, key.priority) != key.priority or self._quarantine.suspects(delivery):
            return None
        raw = _parcel(family, delivery)
        opened = Opened.plainly(raw)
        attempt.fill(raw, opened)
        return opened

    async def _open(self, delivery: Delivery) -> Opened:
        """Read the body and, for a job that was delivered before, what its journal says of the earlier attempts.

        A suspect's body is not read here: that may be what ended its workers.
        """
        family = self._families[delivery.lane.key.family]
        raw = _parcel(family, delivery)
        refused = None
        if headers.DOCUMENT in raw.headers:
            raw, refused = await self._fetch(raw)
        doubtful = self._quarantine.suspects(delivery)
        if refused is not None:
            known = attempt.unread(raw) or attempt.nameless(raw)
            opened = Opened(**vars(known), raw=raw, verdict=refused)
        elif doubtful:
            opened = await self._look(raw)
        else:
            opened = Opened(job_id="", kind="", raw=raw)
            attempt.fill(raw, opened)
        opened.history = history_of(raw.headers)
        if headers.PARKED in raw.headers:
            opened.attempt = opened.first = max(1, headers.number(raw.headers.get(headers.ATTEMPT, "")))
        if opened.condemned:
            opened.verdict = Refused(raw.headers[headers.REASON], raw.headers.get(headers.ERROR, ""))
        if _looked(delivery, opened) and family.journal:
            await self._look_back(delivery, opened, subjects.journal(family.journal, delivery.tenant, opened.job_id))
        if doubtful:
            opened.suspect = self._quarantine.suspects(delivery, opened.attempt - opened.first + 1)
            if not opened.suspect and opened.data is None and opened.verdict is None:
                attempt.fill(raw, opened)
        return opened

    async def _fetch(self, raw: RawJob) -> tuple[RawJob, Refused | None]:
        """The parcel with the body that is kept as a document, or why there is none. Raises Unavailable."""
        try:
            return raw._replace(body=await self._means.documents.body(raw.tenant, raw.headers)), None
        except (NotFound, Corrupt, BadInput) as error:
            return raw, Refused("document", str(error))

    async def _look(self, raw: RawJob) -> Opened:
        found = await self._quarantine.look(raw)
        if isinstance(found, Refused):
            return Opened(**vars(attempt.nameless(raw)), raw=raw, verdict=found)
        return Opened(**vars(found), raw=raw)

    async def _look_back(self, delivery: Delivery, opened: Opened, subject: str) -> None:
        """Go on from what this run's journal says of earlier attempts."""
        word = headers.word(opened.raw.headers)
        record = opened.record = await self._journal.record(subject, delivery.run, delivery.enqueued_at, word)
        if record.told is not None and isinstance(record.told.data, dict):
            number = record.told.attempt + (record.told.event == RETRY)
            history = record.told.data.get("history")
            if isinstance(history, list) and number >= opened.attempt:
                opened.history = [each for each in history if isinstance(each, dict)]
        else:
            number = record.newest.attempt if record.newest else 1
        opened.attempt = max(opened.first, number)

    # -- during

    async def _attempt(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, context: JobContext
    ) -> Outcome:
        if not opened.plain:
            if (foregone := self._foregone(delivery, opened)) is not None:
                return foregone
            raw = opened.raw
            contended = delivery.delivered > 1 or headers.PARKED in raw.headers or raw.family.claim
            if contended and handler is not None and (writer := context.writer) is not None:
                lost = await self._begin(delivery, opened, writer)
                if lost is not None:
                    return lost
        context.begin()
        outcome: Outcome
        try:
            if self.stops.begin(context) and (writer := context.writer) is not None and await writer.ended():
                return AlreadyEnded()  # cancelled while it waited for a slot
            if not opened.suspect or opened.problem:
                outcome = await self._run(opened, handler, context)
            else:
                outcome = await self._try(opened, handler, context)
        except asyncio.CancelledError:
            if not context.asked:
                raise
            outcome = Interrupted()
        finally:
            leaves = self.stops.end(context)
        if not context.asked or isinstance(outcome, Returned):
            return outcome
        return Interrupted() if leaves else Cancelled()

    async def _try(self, opened: Opened, handler: Handler | None, context: JobContext) -> Outcome:
        raw = opened.raw
        if handler is None:
            return attempt.unknown_kind(raw, opened)

        async def here() -> Outcome:
            attempt.fill(raw, opened)
            context.silent = True
            return await self._run(opened, handler, context)

        suspect = Suspect(
            raw, opened.job_id, opened.attempt, handler, context.writer, context, opened.record.newest, context
        )
        return await self._quarantine.run(suspect, here)

    def _foregone(self, delivery: Delivery, opened: Opened) -> Outcome | None:
        """The outcome that no handler is asked for, None if one is."""
        if opened.record.ended:
            return AlreadyEnded()
        if opened.verdict is not None:
            return opened.verdict
        if (waits := _waits(delivery, opened)) is not None:
            return waits
        if (moved := attempt.misplaced(opened.raw)) is not None and self._movable(delivery):
            return moved
        if attempt.overdue(opened.raw):
            return Refused("deadline", "its deadline passed before it was run")
        return None

    def _movable(self, delivery: Delivery) -> bool:
        """Whether it can be stored again with what a move adds; one that hardly fitted is run where it is."""
        message = delivery.message
        told = sum(len(name) + len(value) + 4 for name, value in message.headers.items()) + MOVE_BYTES
        return told <= HEADERS_MAX and told + len(message.data) <= self._journal.connection.max_payload

    async def _begin(self, delivery: Delivery, opened: Opened, writer: Writer) -> Outcome | None:
        """Write `started`, so that no earlier attempt can write any more, and a cancellation neither: of those that
        contend, the journal takes the first. Only where there can be such: a first delivery writes nothing, but in a
        family that claims its ids. There of the messages of one id the first one to write this is run.
        """
        family = opened.raw.family
        mine = [delivery.seq, await self._made(delivery, family), delivery.delivered]
        for _ in range(WRITE_TRIES_MAX):
            newest, told = opened.record.newest, opened.record.told
            if opened.record.ended:
                return AlreadyEnded()
            if family.claim and newest is None and opened.record.head_seq:
                taken = await self._claims.taken(family, writer.subject, delivery.run, delivery.enqueued_at)
                if taken is not False:
                    return Duplicate() if taken else Postponed(AGAIN_S)
            if told is not None and told.event == STARTED and _later(told.data, mine):
                believed_s = BELIEVED_LEASES * delivery.lane.ack_wait_s
                if told.data["delivery"][0] != delivery.seq or time.time() - told.time < believed_s:
                    return TakenOver()
                log.warning("job %s: a later delivery began and has not been heard of since", opened.job_id)
            trials = newest.data.get("trials") if newest is not None and isinstance(newest.data, dict) else None
            said = {"seq": delivery.seq, "delivery": mine, "worker": self._worker}
            said |= {"history": trimmed(opened.history or []), **({} if trials is None else {"trials": trials})}
            try:
                if await writer.begin(said):
                    return None
            except (AccountFull, DiskFull) as error:  # only the ends of jobs make room: it is run, unfenced
                log.warning("job %s is run without a word in its journal: %s", opened.job_id, error)
                return None
            await self._look_back(delivery, opened, writer.subject)
            writer.start_over(opened.record, opened.attempt)
        raise Stale(f"{writer.subject}: {WRITE_TRIES_MAX} beginnings were overtaken", ended=False)

    async def _made(self, delivery: Delivery, family: Family) -> float:
        """When the consumer was made that delivered this, seconds since the epoch. One in memory may have been let go
        and made anew since this worker first asked; while a job of it is in flight, it stays.
        """
        lane = delivery.lane
        if delivery.delivered > 1 and family.lane_storage == "memory":
            with contextlib.suppress(AIQueueError):
                info = await self._journal.connection.api(f"CONSUMER.INFO.{lane.stream}.{lane.consumer}")
                lane.created = max(lane.created, timestamp(info["created"]))
        return lane.created

    async def _reconsider(self, delivery: Delivery, opened: Opened, writer: Writer, outcome: Outcome) -> Outcome:
        """A consumer made anew counts deliveries from 1: what was before a failure stands in the journal."""
        await self._look_back(delivery, opened, writer.subject)
        writer.resume(opened.record, opened.attempt)
        return outcome

    async def _run(self, opened: Opened, handler: Handler | None, progress: JobContext) -> Outcome:
        raw = opened.raw
        if handler is not None and handler.process and opened.data is not None:
            return await self._processes.run(raw, opened.attempt, handler, progress, progress)
        job = attempt.prepare(raw, opened, handler, attempt=opened.attempt, state=self._state, progress=progress)
        if not isinstance(job, Job):
            return job
        assert handler is not None  # a job has one
        task, timeout_s = progress.task, handler.timeout_s
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
            outcome = attempt.raised(error, handler.on)
        else:
            outcome = Returned(value)
        finally:
            if limit is not None:
                self._limits.stop(limit)
        if limit is not None and limit.expired:
            # also where the handler made something else of its cancellation: the time is up
            return Interrupted() if limit.absolve() else attempt.timed_out(timeout_s)
        if type(outcome) is not Returned and task.cancelling():
            return Interrupted()
        return outcome


def _parcel(family: Family, delivery: Delivery) -> RawJob:
    message = delivery.message
    return RawJob(
        family, delivery.tenant, delivery.lane.key.priority, delivery.seq, delivery.enqueued_at,
        message.headers, message.data,
    )  # fmt: skip


def _looked(delivery: Delivery, opened: Opened) -> bool:
    """Whether there may have been earlier attempts, by what the delivery says."""
    return delivery.delivered > 1 or opened.first > 1


def _waits(delivery: Delivery, opened: Opened) -> RetryPending | None:
    """What is to become of a delivery if the last attempt has failed and was to be parked: the worker died, or was cut
    off, before it said so to the server. If that attempt was of another message, which had been parked itself, and this
    one is not the next, then it is left over from before.
    """
    said = opened.record.newest
    if said is None or said.event != RETRY or not isinstance(said.data, dict):
        return None
    word = headers.word(opened.raw.headers)
    if word != said.word:
        left_over = said.word == retry_move(delivery, said.attempt) and word != retry_move(delivery, said.attempt + 1)
        return RetryPending(None) if left_over else None
    delay_s = said.data.get("delay_s")
    if said.data.get("parked") is not True or not isinstance(delay_s, int | float):
        return None
    left_s = min(delay_s, said.time + delay_s - time.time())
    return RetryPending(left_s) if left_s >= WAITS_MIN_S else None


def _later(said: Any, mine: list[Any]) -> bool:
    """Whether `started` was written by a later delivery than this one: a later place in the stream, a later consumer of
    the lane, or a later delivery of that.
    """
    theirs = said.get("delivery") if isinstance(said, dict) else None
    if not isinstance(theirs, list) or len(theirs) != len(mine):
        return False
    return all(isinstance(each, int | float) for each in theirs) and theirs > mine
