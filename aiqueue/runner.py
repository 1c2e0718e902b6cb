"""How one delivery is run, and the single place that decides what becomes of its job."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import attempt, subjects
from .attempt import (
    Cancelled,
    Contents,
    Ended,
    Handler,
    Outcome,
    Parcel,
    Postponed,
    Raised,
    Refused,
    Returned,
    TakenOver,
    Unknown,
)  # fmt: skip
from .backoff import Backoff
from .connection import Connection
from .deadletter import DeadLetters, Obituary, history_of
from .errors import AIQueueError, EncodeError, Stale, TooLarge
from .job import Job
from .journal import FAILED, PROGRESS, RESULT, RETRY, Entry, Journal, Writer
from .processes import Processes
from .puller import Delivery
from .quarantine import Quarantine, Suspect
from .threads import Threads
from .topology import Family
from .watchdog import Watchdog

log = logging.getLogger("aiqueue.runner")

UNKNOWN_KIND_DELAY_S = 5.0
UNKNOWN_KIND_PATIENCE_S = 60.0
SETTLE_RETRY_S = 5.0  # a job whose outcome could not be written comes back after this
HAND_BACK_S = 0.1
SAY_WAIT_S = 10.0
HISTORY_MAX = 50


@dataclass(kw_only=True)
class Opened(Contents):
    """What is known of a delivery once its body and journal have been looked at.

    `verdict`: what looking at the body has led to already. A suspect's body has not been read here.
    """

    parcel: Parcel
    attempt: int = 1
    history: list[dict[str, Any]] | None = None
    head: Entry | None = None
    suspect: bool = False
    verdict: Refused | None = None


class Runner:
    """Runs deliveries with the handlers of one worker."""

    def __init__(
        self,
        connection: Connection,
        journal: Journal,
        dead: DeadLetters,
        *,
        handlers: Mapping[tuple[str, str], Handler],
        families: Mapping[str, Family],
        worker: str,
        state: Any,
        processes: Processes,
        quarantine: Quarantine,
        watchdog: Watchdog,
    ) -> None:
        self._connection = connection
        self._journal = journal
        self._dead = dead
        self._handlers = handlers
        self._families = families
        self._worker = worker
        self._state = state
        self._processes = processes
        self._quarantine = quarantine
        self._watchdog = watchdog
        self._threads = Threads("aiqueue-handler")

    def close(self) -> None:
        self._threads.close()

    async def run(self, delivery: Delivery) -> None:
        """Carry one delivery to its end. Never raises for anything that the message or its handler does."""
        opened: Opened | None = None
        writer: Writer | None = None
        handler: Handler | None = None
        try:
            opened = await self._open(delivery)
            handler = self._handlers.get((delivery.lane.key.family, opened.kind))
            writer = self._writer(delivery, opened)
            outcome = await self._attempt(delivery, opened, handler, writer)
            try:
                await self._settle(delivery, opened, handler, writer, outcome)
            except Stale as stale:
                await self._settle(delivery, opened, handler, writer, Ended() if stale.ended else TakenOver())
        except asyncio.CancelledError:
            await self.hand_back(delivery)
            raise
        except AIQueueError as error:
            # what became of the job could not be written: it must come back, and its outcome with it
            log.warning("job in %s comes back in %g s: %s", delivery.lane.key, SETTLE_RETRY_S, error)
            await self._give_back(delivery, SETTLE_RETRY_S)
        except Exception:
            log.exception("job in %s comes back in %g s: a fault of aiqueue's own", delivery.lane.key, SETTLE_RETRY_S)
            await self._give_back(delivery, SETTLE_RETRY_S)

    async def hand_back(self, delivery: Delivery) -> None:
        """Give a job that was not run to the next worker."""
        await self._give_back(delivery, HAND_BACK_S)

    # -- before

    async def _open(self, delivery: Delivery) -> Opened:
        """Read the body and, for a job that was delivered before, what its journal says of the earlier attempts.

        A suspect's body is not read here: that may be what ended its workers.
        """
        family = self._families[delivery.lane.key.family]
        parcel = _parcel(family, delivery)
        doubtful = self._quarantine.suspects(delivery)
        if doubtful:
            opened = await self._look(parcel)
        else:
            opened = Opened(job_id="", kind="", parcel=parcel)
            attempt.fill(parcel, opened)
        opened.history = history_of(parcel.headers)
        if delivery.delivered > 1 and family.journal:
            head = await self._journal.head(_journal_subject(family, delivery, opened))
            self._continue_from(delivery, opened, head)
        if doubtful:
            opened.suspect = self._quarantine.suspects(delivery, opened.attempt)
            if not opened.suspect and opened.data is None:
                attempt.fill(parcel, opened)
        return opened

    async def _look(self, parcel: Parcel) -> Opened:
        found = await self._quarantine.look(parcel)
        if isinstance(found, Refused):
            return Opened(**vars(attempt.nameless(parcel)), parcel=parcel, verdict=found)
        return Opened(**vars(found), parcel=parcel)

    def _continue_from(self, delivery: Delivery, opened: Opened, head: Entry | None) -> None:
        opened.head = head
        if head is None or not _of_this_run(delivery, head):
            return
        if head.event == RETRY and isinstance(head.data, dict):
            opened.attempt = head.attempt + 1
            opened.history = [each for each in head.data.get("history", []) if isinstance(each, dict)]
        else:
            opened.attempt = max(1, head.attempt)

    def _writer(self, delivery: Delivery, opened: Opened) -> Writer | None:
        family = self._families[delivery.lane.key.family]
        if not family.journal:
            return None
        return self._journal.writer(
            _journal_subject(family, delivery, opened),
            run=delivery.seq,
            born=delivery.enqueued_at,
            attempt=opened.attempt,
            head=opened.head,
        )

    # -- during

    async def _attempt(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None
    ) -> Outcome:
        if _has_ended(delivery, opened):
            return Ended()
        parcel = opened.parcel
        if attempt.overdue(parcel):
            return Refused("deadline", "its deadline passed before it was run")
        if opened.verdict is not None:
            return opened.verdict
        if not opened.suspect or opened.problem:
            return await self._run(opened, handler, _Progress(writer))
        if handler is None:
            return attempt.unknown_kind(parcel, opened)
        head = opened.head if opened.head and _of_this_run(delivery, opened.head) else None
        suspect = Suspect(parcel, opened.job_id, opened.attempt, handler, writer, _Progress(writer), head)

        async def here() -> Outcome:
            attempt.fill(parcel, opened)
            return await self._run(opened, handler, _Progress(None))  # progress would hide the trial's entry

        return await self._quarantine.run(suspect, here)

    async def _run(self, opened: Opened, handler: Handler | None, progress: _Progress) -> Outcome:
        parcel = opened.parcel
        if handler is not None and handler.process and opened.data is not None:
            return await self._processes.run(parcel, opened.attempt, handler, progress)
        job = attempt.prepare(parcel, opened, handler, attempt=opened.attempt, state=self._state, progress=progress)
        if not isinstance(job, Job):
            return job
        assert handler is not None  # a job has one
        return await self._call(handler, job)

    async def _call(self, handler: Handler, job: Job[Any]) -> Outcome:
        limit = asyncio.timeout(handler.timeout_s)
        try:
            async with limit:
                if handler.is_async:
                    self._watchdog.began(handler.timeout_s)
                    try:
                        value = await handler.call(job)
                    finally:
                        self._watchdog.ended(handler.timeout_s)
                else:
                    value = await self._threads.run(lambda: handler.call(job))
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                return Cancelled()
            return Raised("the handler was cancelled from within", "")
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            if limit.expired() and isinstance(error, TimeoutError):
                return attempt.timed_out(handler.timeout_s)
            return attempt.raised(error)
        return Returned(value)

    # -- after

    async def _settle(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, outcome: Outcome
    ) -> None:
        """The fate of a job. What it says goes to the journal, or the dead letters, before its lease is given up."""
        if isinstance(outcome, Raised | Refused) and delivery.delivered == 1 and writer is not None:
            # a consumer made anew counts deliveries from 1: what was before stands in the journal
            self._continue_from(delivery, opened, await self._journal.head(writer.subject))
            writer.attempt = opened.attempt
            if _has_ended(delivery, opened):
                outcome = Ended()
        match outcome:
            case Returned(value):
                await self._finish(delivery, opened, handler, writer, value)
            case Raised(error, trace, after_s):
                retry = handler.retry if handler else Backoff()
                opened.history = _with_attempt(opened, self._worker, error, trace)
                if opened.attempt >= retry.attempts:
                    await self._bury(delivery, opened, writer, "attempts", error)
                else:
                    delay_s = retry.delay_s(opened.attempt) if after_s is None else after_s
                    await self._try_again(delivery, opened, writer, error, delay_s)
            case Refused(reason, error, trace):
                opened.history = _with_attempt(opened, self._worker, error, trace)
                await self._bury(delivery, opened, writer, reason, error)
            case Unknown(error):
                handed_back = delivery.delivered - opened.attempt  # the other deliveries failed as attempts
                if handed_back * UNKNOWN_KIND_DELAY_S >= UNKNOWN_KIND_PATIENCE_S:
                    await self._bury(delivery, opened, writer, "unknown_kind", error)
                else:
                    log.warning("job %s in %s handed back: %s", opened.job_id, delivery.lane.key, error)
                    await self._give_back(delivery, UNKNOWN_KIND_DELAY_S)
            case Postponed(after_s):
                await self._give_back(delivery, after_s)
            case Ended():
                await self._ack(delivery)
            case TakenOver():
                log.info("job %s attempt %d was taken over", opened.job_id, opened.attempt)
            case Cancelled():
                await self.hand_back(delivery)

    async def _finish(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, value: Any
    ) -> None:
        if writer is not None and handler is not None and handler.keeps_result:
            try:
                await writer.write(RESULT, value)
            except (EncodeError, TooLarge) as error:
                opened.history = _with_attempt(opened, self._worker, str(error), "")
                await self._bury(delivery, opened, writer, "result", f"the result cannot be kept: {error}")
                return
        await self._ack(delivery)

    async def _try_again(
        self, delivery: Delivery, opened: Opened, writer: Writer | None, error: str, delay_s: float
    ) -> None:
        log.info("job %s attempt %d failed, again in %.1f s: %s", opened.job_id, opened.attempt, delay_s, error)
        if writer is not None:
            await writer.write(RETRY, {"error": error, "delay_s": delay_s, "history": opened.history})
        await self._nak(delivery, delay_s)

    async def _bury(self, delivery: Delivery, opened: Opened, writer: Writer | None, reason: str, error: str) -> None:
        family = self._families[delivery.lane.key.family]
        key = subjects.Lane(family.name, _tenant(delivery), delivery.lane.key.priority)
        obituary = Obituary(
            job_id=opened.job_id, kind=opened.kind, lane=key, seq=delivery.seq, reason=reason, error=error,
            attempt=opened.attempt, worker=self._worker, enqueued_at=delivery.enqueued_at,
            history=opened.history or [],
        )  # fmt: skip
        await self._dead.bury(obituary, delivery.message.headers or {}, delivery.message.data)
        log.warning("job %s of %s is a dead letter (%s): %s", opened.job_id, key, reason, error)
        if writer is not None:
            await writer.write(FAILED, {"reason": reason, "error": error, "history": opened.history})
        await self._ack(delivery)

    async def _ack(self, delivery: Delivery) -> None:
        await self._say(delivery, b"+ACK")

    async def _give_back(self, delivery: Delivery, delay_s: float) -> None:
        """A nak that is nobody's fault: it makes no suspect."""
        await self._quarantine.handed_back(delivery)
        await self._nak(delivery, delay_s)

    async def _nak(self, delivery: Delivery, delay_s: float) -> None:
        await self._say(delivery, b'-NAK {"delay": %d}' % max(1, round(delay_s * 1e9)))

    async def _say(self, delivery: Delivery, word: bytes) -> None:
        """Tell the server, waiting a while for a lost link. Without one the lease runs out, and the journal knows."""
        try:
            await self._connection.wait_up(SAY_WAIT_S)
            await self._connection.publish(delivery.reply, word)
        except AIQueueError as error:
            log.info("%s of a job in %s could not be said: %s", word[:4].decode(), delivery.lane.key, error)


class _Progress:
    def __init__(self, writer: Writer | None) -> None:
        self._writer = writer

    async def progress(self, fraction: float, note: str) -> None:
        if self._writer is not None:
            await self._writer.write(PROGRESS, {"fraction": fraction, "note": note})


def _of_this_run(delivery: Delivery, head: Entry) -> bool:
    return head.run == delivery.seq and head.time >= delivery.enqueued_at


def _has_ended(delivery: Delivery, opened: Opened) -> bool:
    return opened.head is not None and opened.head.final and _of_this_run(delivery, opened.head)


def _tenant(delivery: Delivery) -> str:
    """The subject says it: a shared lane has all tenants."""
    return delivery.message.subject.split(".")[3]


def _parcel(family: Family, delivery: Delivery) -> Parcel:
    message = delivery.message
    return Parcel(
        family, _tenant(delivery), delivery.lane.key.priority, delivery.seq, delivery.enqueued_at,
        message.headers or {}, message.data,
    )  # fmt: skip


def _journal_subject(family: Family, delivery: Delivery, opened: Opened) -> str:
    assert family.journal is not None
    return subjects.journal(family.journal, _tenant(delivery), opened.job_id)


def _with_attempt(opened: Opened, worker: str, error: str, trace: str) -> list[dict[str, Any]]:
    entry: dict[str, Any] = {"attempt": opened.attempt, "at": round(time.time(), 3), "worker": worker, "error": error}
    if trace:
        entry["traceback"] = trace
    return [*(opened.history or []), entry][-HISTORY_MAX:]
