"""The single place that decides what becomes of a job, once its attempt has an outcome."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import attempt, headers, subjects
from ..attempt import (
    AlreadyEnded,
    Cancelled,
    DecodedJob,
    Duplicate,
    Handler,
    Interrupted,
    Outcome,
    Postponed,
    Raised,
    RawJob,
    Refused,
    RetryPending,
    Returned,
    TakenOver,
    Unknown,
    WrongLane,
)  # fmt: skip
from ..backoff import Backoff
from ..connection import Connection
from ..enqueue import DeadLetters, FailedJob, Parking, history_text, relocate, trimmed
from ..errors import AccessDenied, AIQueueError, EncodeError, NotFound, QueueFull, Stale, TooLarge, Unavailable
from ..journal import CANCELLED, FAILED, NOTHING, RESULT, RETRY, WHILE_RUNNING, RunRecord, Writer
from ..lanes import Delivery
from ..processes import Quarantine
from ..topology import Family
from .overflow import Overflow

log = logging.getLogger("aiqueue.settlement")

UNKNOWN_KIND_DELAY_S = 5.0
UNKNOWN_KIND_PATIENCE_S = 60.0
UNKNOWN_SEEN_MAX = 10_000
DEAD_FULL_S = 600.0  # a job that ended badly, while the dead letters are full, comes back to be buried after this
PARK_AFTER_S = 5.0  # a delay from here on is waited for away from the lane, where it would count as in flight
SETTLE_AGAIN_S, SETTLE_AGAIN_MAX_S = 5.0, 600.0  # a job whose outcome could not be written comes back
HAND_BACK_S = 0.1
SAY_WAIT_S = 10.0
HISTORY_MAX = 50
REASONS = frozenset({  # of dead letters; a word of anybody else in a job's headers means nothing
    "attempts", "deadline", "document", "invalid", "killed_worker", "rejected", "result", "undecodable", "unknown_kind",
})  # fmt: skip


@dataclass(kw_only=True)
class Opened(DecodedJob):
    """What is known of a delivery once its body and journal have been looked at.

    `first`: the number of the first attempt from this place in the stream; the earlier ones were before it was parked.
    `verdict`: what looking at the body has led to already. A suspect's body has not been read here.
    """

    raw: RawJob
    attempt: int = 1
    first: int = 1
    history: list[dict[str, Any]] | None = None
    record: RunRecord = NOTHING  # what its journal says of this run, where it was looked for
    suspect: bool = False
    verdict: Refused | None = None
    plain: bool = False  # a first delivery that asks for nothing: no deadline, document, other lane, claim or history

    @classmethod
    def plainly(cls, raw: RawJob) -> Opened:
        """Of a plain delivery; `attempt.fill` is to put in what its body holds."""
        opened = cls.__new__(cls)  # for __init__ would set a dozen fields to what they are in the class
        opened.raw = raw
        opened.plain = True
        return opened

    @property
    def condemned(self) -> bool:
        """Whether it was refused before, and only waited for a place among the dead letters."""
        return headers.PARKED in self.raw.headers and self.raw.headers.get(headers.REASON) in REASONS


def retry_move(delivery: Delivery, number: int) -> str:
    """The word under which a run of a job is parked for attempt `number`: twice parked for it, it is stored once."""
    return f"r{delivery.run}-{int(delivery.enqueued_at)}-a{number}"


class Settlement:
    """Writes the outcomes of one worker's attempts, and tells the server."""

    def __init__(
        self,
        connection: Connection,
        dead: DeadLetters,
        parking: Parking,
        *,
        families: Mapping[str, Family],
        worker: str,
        quarantine: Quarantine,
    ) -> None:
        self._connection = connection
        self._dead = dead
        self._documents = dead.documents
        self._parking = parking
        self._families = families
        self._worker = worker
        self._quarantine = quarantine
        self.overflow = Overflow()
        self._unknown: dict[tuple[str, int], float] = {}  # jobs of unknown kind, and when each was first met

    def try_ack_now(self, delivery: Delivery, opened: Opened, handler: Handler | None) -> bool:
        """Settle a job that has returned at once, where nothing is written of it and nobody needs to be waited for:
        most jobs of handlers that keep no result. False: it is for `settle`.
        """
        if handler is None or handler.keeps_result or not self._connection.connected:
            return False
        if not opened.plain and (opened.raw.family.claim or _holds(delivery)):
            return False
        self._say(delivery, b"+ACK")
        return True

    async def settle(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, outcome: Outcome
    ) -> None:
        """The fate of a job. What it says goes to the journal, or the dead letters, before its lease is given up."""
        match outcome:
            case Returned(value):
                await self._finish(delivery, opened, handler, writer, value)
            case Raised():
                await self._failed(delivery, opened, handler, writer, outcome)
            case Refused(reason, error, trace):
                if not opened.condemned:
                    opened.history = _with_attempt(opened, self._worker, error, trace)
                await self._bury(delivery, opened, writer, reason, error)
            case Unknown(error):
                if self._unknown_for_s(delivery) >= UNKNOWN_KIND_PATIENCE_S:
                    await self._bury(delivery, opened, writer, "unknown_kind", error)
                else:
                    log.warning("job %s in %s handed back: %s", opened.job_id, delivery.lane.key, error)
                    await self.return_to_queue(delivery, UNKNOWN_KIND_DELAY_S)
            case WrongLane(priority):
                to = subjects.Lane(delivery.lane.key.family, delivery.tenant, priority)
                message = delivery.message
                await relocate(self._connection, to, opened.job_id, delivery.seq, message.headers, message.data)
                await self._ack(delivery)
            case Postponed(after_s):
                await self.return_to_queue(delivery, after_s)
            case RetryPending(None):
                await self._ack(delivery)
            case RetryPending(int() | float() as after_s):
                await self._leave(delivery, opened, opened.attempt, after_s)
            case AlreadyEnded() | Cancelled() | Duplicate():
                await self._ended(delivery, opened, writer, outcome)
            case TakenOver():
                log.info("job %s attempt %d was taken over", opened.job_id, opened.attempt)
            case Interrupted():
                await self.release(delivery)

    async def _ended(
        self, delivery: Delivery, opened: Opened, writer: Writer | None, outcome: AlreadyEnded | Cancelled | Duplicate
    ) -> None:
        """The job has its last word, or another message's, or gets it now: mostly this is refused, for who cancelled it
        has written it.
        """
        if isinstance(outcome, Cancelled) and writer is not None:
            await writer.write(CANCELLED, WHILE_RUNNING)
        said = opened.record.newest
        if _holds(delivery) and writer is not None and not opened.record.ended:
            said = await writer.newest()
        lets_go = said is not None and said.final and said.event != FAILED  # a dead letter goes on holding
        if isinstance(outcome, Duplicate):
            log.info("job %s of %s is a duplicate of one that runs or has run", opened.job_id, delivery.lane.key)
            lets_go = True
        await (self._end_holding(delivery) if _holds(delivery) and lets_go else self._ack(delivery))

    async def comes_back(self, delivery: Delivery, error: Exception) -> None:
        """What became of the job could not be written: it must come back, less often each time."""
        delay_s = min(SETTLE_AGAIN_MAX_S, SETTLE_AGAIN_S * 2.0 ** min(delivery.delivered - 1, 16))
        trace = None if isinstance(error, AIQueueError) else error  # else it is a fault of our own
        log.warning("job in %s comes back in %g s: %s", delivery.lane.key, delay_s, error, exc_info=trace)
        await self.return_to_queue(delivery, delay_s)

    async def release(self, delivery: Delivery) -> None:
        """Give a job that was not run to the next worker."""
        await self.return_to_queue(delivery, HAND_BACK_S)

    def _unknown_for_s(self, delivery: Delivery) -> float:
        """Seconds since this worker first met the job, whose kind or version it does not know."""
        now = time.monotonic()
        if len(self._unknown) >= UNKNOWN_SEEN_MAX:
            self._unknown.pop(next(iter(self._unknown)))
        return now - self._unknown.setdefault((delivery.lane.stream, delivery.seq), now)

    async def _finish(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, value: Any
    ) -> None:
        keeps = handler is not None and handler.keeps_result
        if writer is not None and (keeps or opened.raw.family.claim):  # where ids are claimed, the end must be known
            try:
                await self._keep(delivery, writer, value if keeps else None)
            except (EncodeError, TooLarge) as error:
                opened.history = _with_attempt(opened, self._worker, str(error), "")
                await self._bury(delivery, opened, writer, "result", f"the result cannot be kept: {error}")
                return
        await (self._end_holding(delivery) if _holds(delivery) else self._ack(delivery))

    async def _keep(self, delivery: Delivery, writer: Writer, value: Any) -> None:
        async def ack() -> None:
            with contextlib.suppress(Unavailable):
                await writer.announce(RESULT, value)
            await self._ack(delivery)

        await self.overflow.put(writer.subject, lambda: writer.write(RESULT, value), ack)

    async def _failed(
        self, delivery: Delivery, opened: Opened, handler: Handler | None, writer: Writer | None, outcome: Raised
    ) -> None:
        """The next attempt, where there are some left and it would not come too late."""
        error = outcome.error
        retry = handler.backoff(outcome.rule) if handler else Backoff()
        opened.history = _with_attempt(opened, self._worker, error, outcome.trace)
        delay_s = retry.delay_s(opened.attempt) if outcome.after_s is None else outcome.after_s
        if opened.attempt >= retry.attempts:
            await self._bury(delivery, opened, writer, "attempts", error)
        elif attempt.overdue(opened.raw, in_s=delay_s):
            late = f"{error} (again in {delay_s:.1f} s would be after its deadline)"
            await self._bury(delivery, opened, writer, "deadline", late)
        else:
            await self._try_again(delivery, opened, writer, error, delay_s)

    async def _try_again(
        self, delivery: Delivery, opened: Opened, writer: Writer | None, error: str, delay_s: float
    ) -> None:
        """The next attempt: after a short delay from its lane, after a long one by way of parking."""
        log.info("job %s attempt %d failed, again in %.1f s: %s", opened.job_id, opened.attempt, delay_s, error)
        parks = delay_s >= PARK_AFTER_S
        if writer is not None:
            told = {"error": error, "delay_s": delay_s, "history": trimmed(opened.history or []), "parked": parks}
            await writer.write(RETRY, told)
        if parks:
            await self._leave(delivery, opened, opened.attempt + 1, delay_s)
        else:
            self._nak(delivery, delay_s)

    async def _leave(self, delivery: Delivery, opened: Opened, number: int, delay_s: float) -> None:
        if await self._park(delivery, opened, number, delay_s):
            await self._ack(delivery)
        else:
            self._nak(delivery, delay_s)

    async def _park(
        self, delivery: Delivery, opened: Opened, number: int, delay_s: float, verdict: Mapping[str, str] | None = None
    ) -> bool:
        """Have the job come back for attempt `number`, or with a `verdict`, after so many seconds. False where that
        cannot be stored: it waits in its lane. Raises Unavailable.
        """
        due = time.time() + delay_s
        lane = subjects.Lane(delivery.lane.key.family, delivery.tenant, delivery.lane.key.priority)
        told = dict(delivery.message.headers) | {
            headers.RUN: str(delivery.run),
            headers.ENQUEUED: f"{delivery.enqueued_at:.6f}",
            headers.ATTEMPT: str(number),
            **(verdict or {}),
        }
        move = subjects.new_id() if verdict else retry_move(delivery, number)
        for history in (opened.history or [], []):
            told[headers.HISTORY] = history_text(history)
            try:
                await self._parking.park(lane, opened.job_id, due, told, delivery.message.data, move=move)
            except (TooLarge, QueueFull, NotFound, AccessDenied) as error:
                problem: AIQueueError = error
            else:
                return True
        log.warning("job %s waits in its lane, where it counts as in flight: %s", opened.job_id, problem)
        return False

    async def _bury(self, delivery: Delivery, opened: Opened, writer: Writer | None, reason: str, error: str) -> None:
        if writer is not None:
            await writer.check()
        family = self._families[delivery.lane.key.family]
        key = subjects.Lane(family.name, delivery.tenant, delivery.lane.key.priority)
        obituary = FailedJob(
            job_id=opened.job_id, kind=opened.kind, lane=key, seq=delivery.seq, reason=reason, error=error,
            attempt=opened.attempt, worker=self._worker, enqueued_at=delivery.enqueued_at,
            history=opened.history or [],
        )  # fmt: skip
        try:
            letter = await self._dead.add(obituary, delivery.message.headers, delivery.message.data)
        except QueueFull as full:
            await self._wait_for_burial(delivery, opened, reason, error, full)
            return
        log.warning("job %s of %s is a dead letter (%s): %s", opened.job_id, key, reason, error)
        if writer is not None:
            told = {"reason": reason, "error": error, "history": trimmed(opened.history or [])}
            try:
                await writer.write(FAILED, told)
            except Stale as stale:
                newest = await writer.newest() if stale.ended else None
                if newest is not None and newest.event == CANCELLED:  # meanwhile: the job is not to be two things
                    await self._dead.purge(await self._dead.get(letter))
                raise
        await self._ack(delivery)

    async def _wait_for_burial(
        self, delivery: Delivery, opened: Opened, reason: str, error: str, full: QueueFull
    ) -> None:
        """There is no room for a dead letter: the job is kept, with its verdict, and not run again."""
        log.error(
            "job %s ended badly and there is no room for its dead letter, %s: make some (`aiqueue dead purge`, or a "
            "larger max_bytes in streams/dead.toml); it is kept, and tried again in %g s",
            opened.job_id, full.reason, DEAD_FULL_S,
        )  # fmt: skip
        verdict = {headers.REASON: reason, headers.ERROR: headers.ascii_line(error)}
        if await self._park(delivery, opened, opened.attempt, DEAD_FULL_S, verdict):
            await self._ack(delivery)
        else:
            self._nak(delivery, DEAD_FULL_S)

    async def _ack(self, delivery: Delivery) -> None:
        """Waits a while for a lost link: without the ack the job is delivered again, if only to be ended."""
        if not self._connection.connected:
            with contextlib.suppress(AIQueueError):
                await self._connection.wait_up(SAY_WAIT_S)
        self._say(delivery, b"+ACK")

    async def _end_holding(self, delivery: Delivery) -> None:
        """Acknowledge a job that holds documents, and let go of them when the server has confirmed it: delivered again
        for want of the ack, it would not find its body. Unconfirmed, they are left to the collector.
        """
        if delivery.void:
            return
        try:
            await self._connection.request(delivery.reply, b"+ACK", timeout_s=SAY_WAIT_S)
        except AIQueueError as error:
            log.info("ack of a job in %s is not confirmed: %s", delivery.lane.key, error)
        else:
            await self._documents.release(delivery.tenant, delivery.message.headers)

    async def return_to_queue(self, delivery: Delivery, delay_s: float) -> None:
        """A nak that is nobody's fault: it makes no suspect."""
        await self._quarantine.handed_back(delivery)
        self._nak(delivery, delay_s)

    def _nak(self, delivery: Delivery, delay_s: float) -> None:
        self._say(delivery, b'-NAK {"delay": %d}' % max(1, round(delay_s * 1e9)))

    def _say(self, delivery: Delivery, word: bytes) -> None:
        """Tell the server. Without a link the lease runs out instead, and the journal knows."""
        if delivery.void:
            return
        try:
            self._connection.tell(delivery.reply, word)
        except AIQueueError as error:
            log.info("%s of a job in %s could not be said: %s", word[:4].decode(), delivery.lane.key, error)


def _holds(delivery: Delivery) -> bool:
    told = delivery.message.headers
    return headers.DOCUMENT_REF in told or headers.DOCUMENT in told


def _with_attempt(opened: Opened, worker: str, error: str, trace: str) -> list[dict[str, Any]]:
    entry: dict[str, Any] = {"attempt": opened.attempt, "at": round(time.time(), 3), "worker": worker, "error": error}
    if trace:
        entry["traceback"] = trace
    return [*(opened.history or []), entry][-HISTORY_MAX:]
