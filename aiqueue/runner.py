"""How one delivery is run, and the single place that decides what becomes of its job."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any

from . import attempt, headers, subjects
from .attempt import (
    Cancelled,
    Contents,
    Ended,
    Handler,
    Misplaced,
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
from .deadletter import DeadLetters, Obituary, history_of, trimmed
from .document import Document
from .documents import Documents
from .errors import AccountFull, AIQueueError, BadInput, Corrupt, DiskFull, EncodeError, NotFound, Stale, TooLarge
from .job import Job, Progress
from .journal import FAILED, PROGRESS, RESULT, RETRY, STARTED, Entry, Journal, Writer
from .processes import Processes
from .producer import relocate
from .puller import Delivery
from .quarantine import Quarantine, Suspect
from .threads import Threads
from .timers import Limits
from .topology import Family
from .watchdog import Watchdog

log = logging.getLogger("aiqueue.runner")

UNKNOWN_KIND_DELAY_S = 5.0
UNKNOWN_KIND_PATIENCE_S = 60.0
UNKNOWN_SEEN_MAX = 10_000
SETTLE_AGAIN_S, SETTLE_AGAIN_MAX_S = 5.0, 600.0  # a job whose outcome could not be written comes back
HAND_BACK_S = 0.1
NO_ROOM_S, ROOM_PATIENCE_S = 5.0, 120.0  # how long a result waits for room on the server, before the ack and after it
ROOM_FIRST_S, ROOM_CAP_S = 0.005, 0.25
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
    said: Entry | None = None  # the newest journal entry of this run, where it was looked for
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
        self._documents = dead.documents
        self._loop = asyncio.get_running_loop()
        self._handlers = handlers
        self._families = families
        self._worker = worker
        self._state = state
        self._processes = processes
        self._quarantine = quarantine
        self._watchdog = watchdog
        self._threads = Threads("aiqueue-handler")
        self._limits = Limits()
        self._unknown: dict[tuple[str, int], float] = {}  # jobs of unknown kind, and when each was first met

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
            try:
                outcome = await self._attempt(delivery, opened, handler, writer)
                await self._settle(delivery, opened, handler, writer, outcome)
            except Stale as stale:
                await self._settle(delivery, opened, handler, writer, Ended() if stale.ended else TakenOver())
        except asyncio.CancelledError:
            await self.hand_back(delivery)
            raise
        except Exception as error:
            # what became of the job could not be written: it must come back, less often each time
            delay_s = min(SETTLE_AGAIN_MAX_S, SETTLE_AGAIN_S * 2.0 ** min(delivery.delivered - 1, 16))
            trace = None if isinstance(error, AIQueueError) else error  # else it is a fault of our own
            log.warning("job in %s comes back in %g s: %s", delivery.lane.key, delay_s, error, exc_info=trace)
            await self._give_back(delivery, delay_s)

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
        refused = None
        if headers.DOCUMENT in parcel.headers:
            parcel, refused = await self._fetch(parcel)
        doubtful = self._quarantine.suspects(delivery)
        if refused is not None:
            known = attempt.unread(parcel) or attempt.nameless(parcel)
            opened = Opened(**vars(known), parcel=parcel, verdict=refused)
        elif doubtful:
            opened = await self._look(parcel)
        else:
            opened = Opened(job_id="", kind="", parcel=parcel)
            attempt.fill(parcel, opened)
        opened.history = history_of(parcel.headers)
        if delivery.delivered > 1 and family.journal:
            await self._look_back(delivery, opened, _journal_subject(family, delivery, opened))
        if doubtful:
            opened.suspect = self._quarantine.suspects(delivery, opened.attempt)
            if not opened.suspect and opened.data is None and opened.verdict is None:
                attempt.fill(parcel, opened)
        return opened

    async def _fetch(self, parcel: Parcel) -> tuple[Parcel, Refused | None]:
        """The parcel with the body that is kept as a document, or why there is none. Raises Unavailable."""
        try:
            return parcel._replace(body=await self._documents.body(parcel.tenant, parcel.headers)), None
        except (NotFound, Corrupt, BadInput) as error:
            return parcel, Refused("document", str(error))

    async def _look(self, parcel: Parcel) -> Opened:
        found = await self._quarantine.look(parcel)
        if isinstance(found, Refused):
            return Opened(**vars(attempt.nameless(parcel)), parcel=parcel, verdict=found)
        return Opened(**vars(found), parcel=parcel)

    async def _look_back(self, delivery: Delivery, opened: Opened, subject: str) -> None:
        """Go on from what this run's journal says of earlier attempts."""
        word = headers.word(opened.parcel.headers)
        said = await self._journal.of_run(subject, delivery.run, delivery.born, word)
        opened.said = said
        if said is None:
            return
        if said.event == RETRY and isinstance(said.data, dict):
            opened.attempt = said.attempt + 1
            history = said.data.get("history")
            opened.history = [each for each in history if isinstance(each, dict)] if isinstance(history, list) else []
        else:
            opened.attempt = max(1, said.attempt)

    def _voice(self, opened: Opened, writer: Writer | None) -> _Voice:
        return _Voice(self._documents, self._loop, opened.parcel.tenant, writer)

    def _writer(self, delivery: Delivery, opened: Opened) -> Writer | None:
        family = self._families[delivery.lane.key.family]
        if not family.journal:
            return None
        return self._journal.writer(
            _journal_subject(family, delivery, opened),
            run=delivery.run,
            born=delivery.born,
            attempt=opened.attempt,
            head=opened.said,
            word=headers.word(opened.parcel.headers),
        )

    # -- during

    async def _attempt(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None
    ) -> Outcome:
        if opened.said is not None and opened.said.final:
            return Ended()
        parcel = opened.parcel
        if (moved := attempt.misplaced(parcel)) is not None:
            return moved
        if attempt.overdue(parcel):
            return Refused("deadline", "its deadline passed before it was run")
        if opened.verdict is not None:
            return opened.verdict
        if handler is not None and writer is not None and headers.PARKED in parcel.headers:
            # a cancellation may contend with it: of the two, the journal takes the first
            await writer.write(STARTED, {"seq": delivery.seq})
        if not opened.suspect or opened.problem:
            return await self._run(opened, handler, self._voice(opened, writer))
        if handler is None:
            return attempt.unknown_kind(parcel, opened)
        suspect = Suspect(
            parcel, opened.job_id, opened.attempt, handler, writer, self._voice(opened, writer), opened.said
        )

        async def here() -> Outcome:
            attempt.fill(parcel, opened)
            return await self._run(opened, handler, self._voice(opened, None))  # progress would hide the trial's entry

        return await self._quarantine.run(suspect, here)

    async def _run(self, opened: Opened, handler: Handler | None, progress: Progress) -> Outcome:
        parcel = opened.parcel
        if handler is not None and handler.process and opened.data is not None:
            return await self._processes.run(parcel, opened.attempt, handler, progress)
        job = attempt.prepare(parcel, opened, handler, attempt=opened.attempt, state=self._state, progress=progress)
        if not isinstance(job, Job):
            return job
        assert handler is not None  # a job has one
        return await self._call(handler, job)

    async def _call(self, handler: Handler, job: Job[Any]) -> Outcome:
        task = asyncio.current_task()
        assert task is not None
        limit = None if handler.timeout_s is None else self._limits.start(task, handler.timeout_s)
        outcome: Outcome
        try:
            if handler.is_async:
                self._watchdog.began(handler.timeout_s)
                try:
                    value = await handler.call(job)
                finally:
                    self._watchdog.ended(handler.timeout_s)
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
            return Cancelled() if limit.absolve() else attempt.timed_out(handler.timeout_s)
        if task.cancelling() and not isinstance(outcome, Returned):
            return Cancelled()
        return outcome

    # -- after

    async def _settle(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, outcome: Outcome
    ) -> None:
        """The fate of a job. What it says goes to the journal, or the dead letters, before its lease is given up."""
        if isinstance(outcome, Raised | Refused) and delivery.delivered == 1 and writer is not None:
            outcome = await self._reconsider(delivery, opened, writer, outcome)
        match outcome:
            case Returned(value):
                await self._finish(delivery, opened, handler, writer, value)
            case Raised(error, trace, after_s, rule):
                retry = handler.backoff(rule) if handler else Backoff()
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
                if self._unknown_for_s(delivery) >= UNKNOWN_KIND_PATIENCE_S:
                    await self._bury(delivery, opened, writer, "unknown_kind", error)
                else:
                    log.warning("job %s in %s handed back: %s", opened.job_id, delivery.lane.key, error)
                    await self._give_back(delivery, UNKNOWN_KIND_DELAY_S)
            case Misplaced(priority):
                to = subjects.Lane(delivery.lane.key.family, _tenant(delivery), priority)
                message = delivery.message
                await relocate(self._connection, to, opened.job_id, delivery.seq, message.headers, message.data)
                await self._ack(delivery)
            case Postponed(after_s):
                await self._give_back(delivery, after_s)
            case Ended():
                await self._ack(delivery)
                await self._release_ended(delivery, opened.said)
            case TakenOver():
                log.info("job %s attempt %d was taken over", opened.job_id, opened.attempt)
            case Cancelled():
                await self.hand_back(delivery)

    async def _reconsider(self, delivery: Delivery, opened: Opened, writer: Writer, outcome: Outcome) -> Outcome:
        """A consumer made anew counts deliveries from 1: what was before a failure stands in the journal."""
        await self._look_back(delivery, opened, writer.subject)
        writer.attempt = opened.attempt
        return Ended() if opened.said is not None and opened.said.final else outcome

    def _unknown_for_s(self, delivery: Delivery) -> float:
        """Seconds since this worker first met the job, whose kind or version it does not know."""
        now = time.monotonic()
        if len(self._unknown) >= UNKNOWN_SEEN_MAX:
            self._unknown.pop(next(iter(self._unknown)))
        return now - self._unknown.setdefault((delivery.lane.stream, delivery.seq), now)

    async def _finish(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, value: Any
    ) -> None:
        if writer is not None and handler is not None and handler.keeps_result:
            try:
                await self._keep(delivery, writer, value)
            except (EncodeError, TooLarge) as error:
                opened.history = _with_attempt(opened, self._worker, str(error), "")
                await self._bury(delivery, opened, writer, "result", f"the result cannot be kept: {error}")
                return
        await self._ack(delivery)
        if _holds(delivery):
            await self._release(delivery)

    async def _keep(self, delivery: Delivery, writer: Writer, value: Any) -> None:
        """Write a result. Where all storage is used up only an ack makes room, and to wait for the room before it would
        be for ever: after NO_ROOM_S the ack comes first (docs/decisions/full-disk.md).
        """
        for acked, patience_s in ((False, NO_ROOM_S), (True, ROOM_PATIENCE_S)):
            end = time.monotonic() + patience_s
            wait_s = ROOM_FIRST_S  # short at first: nobody else is to take what the ack freed
            while time.monotonic() < end:
                try:
                    await writer.write(RESULT, value)
                except (AccountFull, DiskFull) as error:
                    problem = error
                else:
                    return
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, ROOM_CAP_S)
            if not acked:
                log.warning("%s: acknowledged before its result, to make room: %s", writer.subject, problem)
                await self._ack(delivery)
        log.error("%s: the result is lost for want of room: %s", writer.subject, problem)

    async def _try_again(
        self, delivery: Delivery, opened: Opened, writer: Writer | None, error: str, delay_s: float
    ) -> None:
        log.info("job %s attempt %d failed, again in %.1f s: %s", opened.job_id, opened.attempt, delay_s, error)
        if writer is not None:
            told = {"error": error, "delay_s": delay_s, "history": trimmed(opened.history or [])}
            await writer.write(RETRY, told)
        await self._nak(delivery, delay_s)

    async def _bury(self, delivery: Delivery, opened: Opened, writer: Writer | None, reason: str, error: str) -> None:
        family = self._families[delivery.lane.key.family]
        key = subjects.Lane(family.name, _tenant(delivery), delivery.lane.key.priority)
        obituary = Obituary(
            job_id=opened.job_id, kind=opened.kind, lane=key, seq=delivery.seq, reason=reason, error=error,
            attempt=opened.attempt, worker=self._worker, enqueued_at=delivery.enqueued_at,
            history=opened.history or [],
        )  # fmt: skip
        await self._dead.bury(obituary, delivery.message.headers, delivery.message.data)
        log.warning("job %s of %s is a dead letter (%s): %s", opened.job_id, key, reason, error)
        if writer is not None:
            await writer.write(FAILED, {"reason": reason, "error": error, "history": trimmed(opened.history or [])})
        await self._ack(delivery)

    async def _ack(self, delivery: Delivery) -> None:
        """Waits a while for a lost link: without the ack the job is delivered again, if only to be ended."""
        if not self._connection.connected:
            with contextlib.suppress(AIQueueError):
                await self._connection.wait_up(SAY_WAIT_S)
        self._say(delivery, b"+ACK")

    async def _release(self, delivery: Delivery) -> None:
        """The job is no more, and holds no documents."""
        await self._documents.release(_tenant(delivery), delivery.message.headers)

    async def _release_ended(self, delivery: Delivery, said: Entry | None) -> None:
        """As whoever wrote the last word did, if it lived. A dead letter goes on holding."""
        if _holds(delivery) and said is not None and said.final and said.event != FAILED:
            await self._release(delivery)

    async def _give_back(self, delivery: Delivery, delay_s: float) -> None:
        """A nak that is nobody's fault: it makes no suspect."""
        await self._quarantine.handed_back(delivery)
        await self._nak(delivery, delay_s)

    async def _nak(self, delivery: Delivery, delay_s: float) -> None:
        self._say(delivery, b'-NAK {"delay": %d}' % max(1, round(delay_s * 1e9)))

    def _say(self, delivery: Delivery, word: bytes) -> None:
        """Tell the server. Without a link the lease runs out instead, and the journal knows."""
        if delivery.void:
            return
        try:
            self._connection.tell(delivery.reply, word)
        except AIQueueError as error:
            log.info("%s of a job in %s could not be said: %s", word[:4].decode(), delivery.lane.key, error)


class _Voice:
    """What a job may ask for while it runs: see `job.Progress`."""

    __slots__ = ("_documents", "_tenant", "_writer", "loop")

    def __init__(
        self, documents: Documents, loop: asyncio.AbstractEventLoop, tenant: str, writer: Writer | None
    ) -> None:
        self.loop = loop
        self._documents = documents
        self._tenant = tenant
        self._writer = writer

    async def progress(self, fraction: float, note: str) -> None:
        if self._writer is not None:
            await self._writer.write(PROGRESS, {"fraction": fraction, "note": note})

    def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        if document.tenant != self._tenant:  # a child's word for it is not enough
            raise BadInput(f"a document of tenant {document.tenant} cannot be read by a job of {self._tenant}")
        return self._documents.chunks(document)


def _holds(delivery: Delivery) -> bool:
    told = delivery.message.headers
    return headers.DOCUMENT_REF in told or headers.DOCUMENT in told


def _tenant(delivery: Delivery) -> str:
    """The subject says it: a shared lane has all tenants."""
    return delivery.message.subject.split(".")[3]


def _parcel(family: Family, delivery: Delivery) -> Parcel:
    message = delivery.message
    return Parcel(
        family, _tenant(delivery), delivery.lane.key.priority, delivery.seq, delivery.born,
        message.headers, message.data,
    )  # fmt: skip


def _journal_subject(family: Family, delivery: Delivery, opened: Opened) -> str:
    assert family.journal is not None
    return subjects.journal(family.journal, _tenant(delivery), opened.job_id)


def _with_attempt(opened: Opened, worker: str, error: str, trace: str) -> list[dict[str, Any]]:
    entry: dict[str, Any] = {"attempt": opened.attempt, "at": round(time.time(), 3), "worker": worker, "error": error}
    if trace:
        entry["traceback"] = trace
    return [*(opened.history or []), entry][-HISTORY_MAX:]
