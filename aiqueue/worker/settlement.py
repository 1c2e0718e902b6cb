"""Decide what becomes of a job, once its attempt has an outcome. No other module does.

The order is always the same: first the journal or the dead letter is written, then the server gets its reply (ack or
nak). A crash between the two repeats an attempt, and loses no job.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from .. import attempt, headers, subjects
from ..attempt import (
    AlreadyEnded,
    Cancelled,
    Duplicate,
    Handler,
    Interrupted,
    KindPaused,
    Outcome,
    Postponed,
    Raised,
    Refused,
    RetryPending,
    Returned,
    TakenOver,
    Unknown,
    Waiting,
    WrongLane,
)  # fmt: skip
from ..codec import secret_paths
from ..connection import Connection
from ..enqueue import DeadLetters, FailedJob, Parents, Parking, history_text, last_trace, trimmed
from ..errors import AccessDenied, AIQueueError, EncodeError, NotFound, QueueFull, Stale, TooLarge, Unavailable
from ..journal import CANCELLED, FAILED, RETRY, WHILE_RUNNING, ChildEnd, Writer
from ..lanes import Delivery
from ..processes import Quarantine
from .counting import Notes
from .gathering import wait_key
from .moving import move_job
from .opening import OpenedJob
from .replies import Replies, holds_documents
from .results import ResultRefused, Results
from .unknown_kinds import Hops, UnknownKinds

log = logging.getLogger(__name__)

WAIT_IN_LANE_S = 10.0  # how long a job waits for its children in its lane, where it cannot be parked
UNKNOWN_KIND_DELAY_S = 5.0  # how long a job of unknown kind waits in its lane, where it cannot be parked aside
PAUSED_IN_LANE_S = 60.0  # the same for a job of a paused kind
DEAD_FULL_S = 600.0  # while the dead letters are full, a failed job is parked for this long before the next try
PARK_AFTER_S = 5.0  # a retry after this delay or more is parked: in its lane the job would count as in flight
SETTLE_RETRY_S, SETTLE_RETRY_MAX_S = 5.0, 600.0  # until a job is redelivered whose outcome could not be written
RELEASE_DELAY_S = 0.1


def retry_dedup_key(delivery: Delivery, number: int) -> str:
    """Return the key under which a run is parked for attempt `number`. Parked twice under it, one job is stored."""
    return f"r{delivery.run}-{int(delivery.enqueued_at)}-a{number}"


class Settlement:
    """Writes the outcomes of one worker's attempts, and replies to the server.

    Methods raise what the journal, the dead letters and parking raise. The runner then calls `redeliver_later`.
    """

    def __init__(
        self,
        connection: Connection,
        dead: DeadLetters,
        parking: Parking,
        parents: Parents,
        *,
        worker: str,
        quarantine: Quarantine,
        notes: Notes,
    ) -> None:
        self._connection = connection
        self._dead = dead
        self._replies = Replies(connection, dead.documents)
        self._parking = parking
        self._parents = parents
        self._worker = worker
        self._quarantine = quarantine
        self.results = Results(dead.documents)
        self._unknown_kinds = UnknownKinds(connection, parking)
        self.notes, self._tally, self._rehearsal = notes, notes.tally, notes.rehearsal

    def ack(self, delivery: Delivery, opened: OpenedJob) -> None:
        """Acknowledge a job whose result is stored."""
        self._replies.send_ack(delivery)
        if self._tally is not None:
            self._tally.count_done(delivery, opened)
        if self._rehearsal is not None:
            self.notes.rehearse(delivery, opened, "done")

    def try_ack_now(self, delivery: Delivery, opened: OpenedJob, handler: Handler | None) -> bool:
        """Acknowledge a job that returned, if nothing has to be written or awaited for it. False: call `settle`.

        This is the fast path for handlers that keep no result.
        """
        if handler is None or handler.keeps_result or delivery.obsolete:
            return False
        if not opened.plain and (
            opened.family.claim or holds_documents(delivery) or headers.PARENT in delivery.message.headers
        ):
            return False
        try:
            self._connection.tell_frame(delivery.ack_frame())
        except Unavailable:
            return False
        if self._tally is not None:
            self._tally.count_done(delivery, opened)
        if self._rehearsal is not None:
            self.notes.rehearse(delivery, opened, "done")
        return True

    async def settle(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, writer: Writer | None, outcome: Outcome
    ) -> None:
        """Write the outcome to the journal or the dead letters, then reply to the server: ack, nak or nothing."""
        outcome = self._without_secrets(opened, handler, outcome)
        match outcome:
            case Returned(value):
                await self._settle_returned(delivery, opened, handler, writer, value)
            case Raised():
                await self._settle_raised(delivery, opened, handler, writer, outcome)
            case Refused(reason, error, trace):
                if not opened.refused_before:
                    opened.note_failure(self._worker, error, trace)
                await self._dead_letter(delivery, opened, writer if outcome.holds_id else None, reason, error)
            case Unknown() | KindPaused():
                await self._settle_unknown(delivery, opened, writer, outcome)
            case WrongLane():
                await move_job(self._connection, delivery, opened, writer, outcome)
                await self._replies.ack(delivery)
            case Postponed(after_s):
                await self.return_to_queue(delivery, after_s)
            case RetryPending(None):
                await self._replies.ack(delivery)
            case RetryPending(int() | float() as after_s):
                await self._park_or_nak(delivery, opened, opened.attempt, after_s)
            case Waiting():
                await self._settle_waiting(delivery, opened, writer, outcome)
            case AlreadyEnded() | Duplicate():
                await self._ack_ended(delivery, opened, writer, is_duplicate=isinstance(outcome, Duplicate))
            case Cancelled():
                await self._settle_cancelled(delivery, opened, writer)
            case TakenOver():
                log.info("job %s attempt %d was taken over", opened.job_id, opened.attempt)
            case Interrupted():
                await self.release(delivery)

    def _without_secrets(self, opened: OpenedJob, handler: Handler | None, outcome: Outcome) -> Outcome:
        """Return an outcome whose error repeats no secret. Note which fields are secret, for a dead letter."""
        if type(outcome) is Returned:
            return outcome
        opened.secrets = attempt.secrets_of_body(opened, opened.raw.headers, handler)
        return attempt.without_secrets(outcome, opened.secrets, opened.data, opened.raw.body)

    async def redeliver_later(self, delivery: Delivery, error: Exception) -> None:
        """Return to the queue a job whose outcome could not be written, for a longer time after each delivery."""
        delay_s = min(SETTLE_RETRY_MAX_S, SETTLE_RETRY_S * 2.0 ** min(delivery.delivery_count - 1, 16))
        trace = None if isinstance(error, AIQueueError) else error  # anything else is a fault of aiqueue's own
        log.warning("job in %s is redelivered in %g s: %s", delivery.lane.key, delay_s, error, exc_info=trace)
        await self.return_to_queue(delivery, delay_s)

    async def release(self, delivery: Delivery) -> None:
        """Return a job that was not run, or not to its end, to the queue at once, for another worker."""
        await self.return_to_queue(delivery, RELEASE_DELAY_S)

    async def return_to_queue(self, delivery: Delivery, delay_s: float) -> None:
        """Nak a delivery that ends through no fault of its job, so that the job becomes no suspect by it."""
        await self._quarantine.note_return(delivery)
        self._replies.nak(delivery, delay_s)

    # -- one outcome each

    async def _settle_returned(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, writer: Writer | None, value: Any
    ) -> None:
        """Write the result, then ack. A result that cannot be kept makes the job a dead letter.

        In a family with `claim` an empty result is written even where the handler keeps none: it ends the claim.
        """
        keeps = handler is not None and handler.keeps_result
        if writer is not None and (keeps or opened.family.claim):
            try:
                kept_s = opened.family.journal_ttl_s
                await self.results.write(writer, value if keeps else None, tenant=delivery.tenant, kept_s=kept_s)
            except (EncodeError, TooLarge, ResultRefused) as error:
                opened.secrets = attempt.secrets_of_body(opened, opened.raw.headers, handler)
                text = secret_paths.redact(str(error), opened.data, opened.secrets)
                opened.note_failure(self._worker, text, "")
                await self._dead_letter(delivery, opened, writer, "result", attempt.unkept_result(text))
                return
        if headers.PARENT in delivery.message.headers:
            end = ChildEnd.of_value(
                opened.job_id, value if keeps else None, run=delivery.run, enqueued_at=delivery.enqueued_at
            )
            await self._report_end(delivery, end, writer if keeps else None)
        await self._replies.ack_and_release(delivery)
        self.notes.note(delivery, opened, "done")

    async def _report_end(self, delivery: Delivery, end: ChildEnd, writer: Writer | None) -> None:
        """Tell the parent of a job that it has ended, before the job is acknowledged. `writer`: has written the end."""
        await self._parents.report(delivery.message.headers, delivery.tenant, end, journaled=writer is not None)

    async def _settle_waiting(
        self, delivery: Delivery, opened: OpenedJob, writer: Writer | None, waiting: Waiting
    ) -> None:
        """Park a job that waits for its children, then look whether they have ended meanwhile, then ack.

        The journal gets a `retry` of the attempt before this one: so this attempt goes on, and is not counted. A run
        has one such parked message. A delivery after a crash in between runs the handler again, and replaces it.
        """
        if writer is not None:
            writer.attempt = opened.attempt - 1
            data = {"error": "", "delay_s": 0.0, "history": trimmed(opened.history or []), "parked": True}
            await writer.write(RETRY, data | {"children": waiting.children})
        key, number = wait_key(delivery), {headers.GATHER: str(waiting.number)}
        parking_id = f"{key}-n{waiting.number}"
        if await self._try_park(
            delivery, opened, opened.attempt, waiting.fallback_s, number, key, parking_id=parking_id
        ):
            await self._parents.wake_if_reached(
                opened.run_of(delivery), delivery.tenant, delivery.own_lane.priority, key
            )
            await self._replies.ack(delivery)
        else:
            await self.return_to_queue(delivery, WAIT_IN_LANE_S)
        self.notes.note(delivery, opened, "waiting")

    async def _settle_raised(
        self, delivery: Delivery, opened: OpenedJob, handler: Handler | None, writer: Writer | None, outcome: Raised
    ) -> None:
        """Schedule the next attempt. Without attempts left, or time before the deadline, make it a dead letter."""
        error = outcome.error
        if outcome.pauses_key and opened.family.limit_key is None:
            attempt.warn_of_no_key(f"job {opened.job_id}", f"family {opened.family.name} has no limit_key")
        opened.note_failure(self._worker, error, outcome.trace)
        delay_s = attempt.delay_after(handler, outcome, opened.attempt)
        if delay_s is None:
            await self._dead_letter(delivery, opened, writer, "attempts", error)
        elif attempt.is_past_deadline(opened.raw, self._connection.clock.now() + delay_s):
            await self._dead_letter(delivery, opened, writer, "deadline", attempt.too_late(error, delay_s))
        else:
            await self._schedule_retry(delivery, opened, writer, error, delay_s)

    async def _schedule_retry(
        self, delivery: Delivery, opened: OpenedJob, writer: Writer | None, error: str, delay_s: float
    ) -> None:
        """Write `retry`, then have the job come back: by a nak after a short delay, by parking after a long one."""
        log.info(
            "job %s (%s) of %s: attempt %d failed, retry in %.1f s: %s%s",
            opened.job_id, opened.kind, delivery.own_lane, opened.attempt, delay_s, error, last_trace(opened.history),
        )  # fmt: skip
        parks = delay_s >= PARK_AFTER_S
        if writer is not None:
            data = {"error": error, "delay_s": delay_s, "history": trimmed(opened.history or []), "parked": parks}
            await writer.write(RETRY, data)
        if parks:
            await self._park_or_nak(delivery, opened, opened.attempt + 1, delay_s)
        else:
            self._replies.nak(delivery, delay_s if self._rehearsal is None else 0.0)
        self.notes.note(delivery, opened, "retry", "", error, delay_s)

    async def _settle_unknown(
        self, delivery: Delivery, opened: OpenedJob, writer: Writer | None, outcome: Unknown | KindPaused
    ) -> None:
        """Park the job aside until a worker knows its kind, or the kind's pause ends. After a day, dead-letter it if it
        is unknown.

        The journal gets a `retry` of the attempt before this one: so this attempt is the next one, and is not counted.
        The entry tells those who await the result that the job is parked.
        """
        aside, family, pause_s = self._unknown_kinds, opened.family, None
        if isinstance(outcome, KindPaused):
            pause_s = math.inf if outcome.until is None else outcome.until - self._connection.clock.now()
        elif aside.is_given_up(delivery):
            await self._dead_letter(delivery, opened, writer, "unknown_kind", outcome.error)
            return
        else:
            aside.warn(family.name, opened.kind, outcome.error)
        if writer is not None and opened.record.recap is None:
            writer.attempt = opened.attempt - 1
            data = {"error": outcome.error, "delay_s": 0.0, "history": trimmed(opened.history or []), "parked": True}
            await writer.write(RETRY, data)
        if await aside.park_aside(delivery, family, opened.job_id, opened.kind, opened.attempt, pause_s=pause_s):
            await self._replies.ack(delivery)
        else:
            await self.return_to_queue(delivery, UNKNOWN_KIND_DELAY_S if pause_s is None else PAUSED_IN_LANE_S)

    async def _settle_cancelled(self, delivery: Delivery, opened: OpenedJob, writer: Writer | None) -> None:
        """Write `cancelled`, then ack.

        Usually the canceller has written it. Then the write raises Stale, and the runner settles as AlreadyEnded.
        """
        if self._tally is not None:
            self._tally.count("cancelled", delivery, opened)
        if writer is not None:
            await writer.write(CANCELLED, WHILE_RUNNING)
        await self._ack_ended(delivery, opened, writer)
        self.notes.note(delivery, opened, "cancelled")

    async def _ack_ended(
        self, delivery: Delivery, opened: OpenedJob, writer: Writer | None, *, is_duplicate: bool = False
    ) -> None:
        """Acknowledge a job that is over, and release its documents unless a dead letter of it still needs them.

        1. A duplicate: its documents are always released, because another message with its job id runs or has run.
        2. A run that failed: its dead letter goes on holding the documents.
        3. Any other final entry: they are released, and those of the run's steps. The journal is read if the record
           does not show the end yet.
        """
        newest, is_child = opened.record.newest, headers.PARENT in delivery.message.headers
        if (is_child or holds_documents(delivery)) and writer is not None and not opened.record.ended:
            newest = await writer.read_newest()
        if is_child and newest is not None and newest.final:
            end = ChildEnd.of_entry(opened.job_id, newest, delivery.enqueued_at)
            await self._report_end(delivery, end, writer)
        releases = newest is not None and newest.final and newest.event != FAILED
        if is_duplicate:
            log.info("job %s of %s is a duplicate of one that runs or has run", opened.job_id, delivery.lane.key)
            releases = True
        if releases:
            await self._replies.ack_and_release(delivery)
            if not is_duplicate:  # the attempt that ended it may have died before it could
                await self._dead.documents.release_run(delivery.tenant, opened.run_of(delivery))
        else:
            await self._replies.ack(delivery)

    # -- parking

    async def _park_or_nak(self, delivery: Delivery, opened: OpenedJob, number: int, delay_s: float) -> None:
        """Park the job for attempt `number` and ack, or nak it where it cannot be parked."""
        if await self._try_park(delivery, opened, number, delay_s, {}, retry_dedup_key(delivery, number)):
            await self._replies.ack(delivery)
        else:
            self._replies.nak(delivery, delay_s)

    async def _try_park(
        self,
        delivery: Delivery,
        opened: OpenedJob,
        number: int,
        delay_s: float,
        refusal: Mapping[str, str],
        dedup_key: str,
        *,
        parking_id: str = "",
    ) -> bool:
        """Park the job for `delay_s` seconds; it comes back for attempt `number`, with the headers of `refusal`.

        If it is too large with its history, park it without. False: parking refuses it, so it must wait in its lane.
        Raises Unavailable.
        """
        due_at = self._connection.clock.now() + delay_s
        lane = delivery.own_lane
        parked_headers = dict(delivery.message.headers) | {
            headers.RUN: str(delivery.run),
            headers.ENQUEUED: f"{delivery.enqueued_at:.6f}",
            headers.ATTEMPT: str(number),
            **refusal,
        }
        if headers.UNKNOWN in parked_headers:
            parked_headers[headers.UNKNOWN] = Hops.of(delivery, due_at).header_after_run(due_at)
        for history in (opened.history or [], []):
            parked_headers[headers.HISTORY] = history_text(history)
            try:
                await self._parking.park(
                    lane, opened.job_id, due_at, parked_headers, delivery.message.data, dedup_key=dedup_key,
                    parking_id=parking_id,
                )  # fmt: skip
            except (TooLarge, QueueFull, NotFound, AccessDenied) as error:
                problem: AIQueueError = error
            else:
                return True
        log.warning(
            "job %s cannot be parked, and waits in its lane, where it counts as in flight: %s", opened.job_id, problem
        )
        return False

    # -- dead letters

    async def _dead_letter(
        self, delivery: Delivery, opened: OpenedJob, writer: Writer | None, reason: str, error: str
    ) -> None:
        """Store the job as a dead letter, write `failed`, then ack. Without space for it, park the job.

        Raises Stale if a newer attempt has written: before the dead letter is stored, or after it.
        """
        if writer is not None:
            await writer.raise_if_stale()
        lane = delivery.own_lane
        failed = FailedJob(
            job_id=opened.job_id, kind=opened.kind, lane=lane, seq=delivery.seq, reason=reason, error=error,
            attempt=opened.attempt, worker=self._worker, enqueued_at=delivery.enqueued_at,
            history=opened.history or [], secrets=opened.secrets, run=delivery.run,
        )  # fmt: skip
        try:
            letter_seq = await self._dead.add(failed, delivery.message.headers, delivery.message.data)
        except QueueFull as full:
            await self._wait_for_dead_letter_space(delivery, opened, reason, error, full)
            return
        trace = last_trace(opened.history) if reason in ("attempts", "deadline") else ""
        log.warning(
            "job %s (%s) of %s is a dead letter (%s): %s%s", opened.job_id, opened.kind, lane, reason, error, trace
        )
        if writer is not None:
            await self._write_failed(opened, writer, reason, error, letter_seq)
        if headers.PARENT in delivery.message.headers:
            end = ChildEnd(
                opened.job_id, FAILED, reason=reason, error=error, attempt=opened.attempt, run=delivery.run,
                enqueued_at=delivery.enqueued_at,
            )  # fmt: skip
            await self._report_end(delivery, end, writer)
        await self._replies.ack(delivery)
        self.notes.note(delivery, opened, "failed", reason, error)

    async def _write_failed(self, opened: OpenedJob, writer: Writer, reason: str, error: str, letter_seq: int) -> None:
        """Write `failed` after the dead letter was stored. Raises Stale if the run has ended or was taken over.

        If the job was cancelled meanwhile, purge the dead letter first: a job must not be both cancelled and failed.
        """
        try:
            await writer.write(FAILED, {"reason": reason, "error": error, "history": trimmed(opened.history or [])})
        except Stale as stale:
            newest = await writer.read_newest() if stale.ended else None
            if newest is not None and newest.event == CANCELLED:
                await self._dead.purge(await self._dead.get(letter_seq))
            raise

    async def _wait_for_dead_letter_space(
        self, delivery: Delivery, opened: OpenedJob, reason: str, error: str, full: QueueFull
    ) -> None:
        """Park a failed job while the dead letters are full. It keeps its reason and error, and does not run again."""
        log.error(
            "job %s failed and its dead letter cannot be stored, %s: free space with `aiqueue dead purge`, or raise "
            "max_bytes in streams/dead.toml; the job is kept, next try in %g s",
            opened.job_id, full.reason, DEAD_FULL_S,
        )  # fmt: skip
        refusal = {headers.REASON: reason, headers.ERROR: headers.ascii_line(error)}
        if await self._try_park(delivery, opened, opened.attempt, DEAD_FULL_S, refusal, subjects.new_id()):
            await self._replies.ack(delivery)
        else:
            self._replies.nak(delivery, DEAD_FULL_S)
