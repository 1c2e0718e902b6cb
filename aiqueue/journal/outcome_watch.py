"""Waits for a job's outcome: its final entry, or its end without one. Goes on over lost links and through parking."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Awaitable, Callable, Collection
from typing import Any

from .. import headers, subjects
from ..connection import Received, Subscription, timestamp
from ..errors import AccessDenied, JobGone, NotFound, ResultTimeout, Unavailable
from .entries import (
    FINAL,
    LIVE,
    PROGRESS,
    RETRY,
    STARTED,
    Entry,
    entry_from_live,
    entry_from_stored,
    is_live_chunk,
)
from .journal import Journal

SETTLED_PAUSES_S = (0.02, 0.1, 0.5, 2.0)  # after the job's ack was seen: a cluster deletes the job a little later
NEW_S = 0.25  # before the first look for a job that was stored just now, unless it is heard to begin
ABSENT_PAUSE_S = 0.05  # before a job is read again that is gone although no ack was heard: the ack may be on its way
SEEN_FOR_S = 2.0  # a job that is stored so long after its acks were listened to was not acked before
CLOCK_SLACK_S = 0.5  # how exactly this clock is compared with the server's
UNANSWERED_PAUSE_S, UNANSWERED_PAUSE_MAX_S = 0.25, 4.0  # after a read that no server answered
POLL_S, POLL_MAX_S = 5.0, 60.0  # between reads without a notice: in a cluster a notice may be lost


async def wait_for_outcome(
    journal: Journal,
    subject: str,
    *,
    run: int,
    timeout_s: float | None,
    job: tuple[str, int] | None = None,
    parking_id: str = "",
    parked: Callable[[], Awaitable[bool]] | None = None,
    consumers: Collection[str] = (),
    later_runs: bool = True,
) -> Entry | None:
    """Wait until the job whose journal is on `subject` has ended. `job`: stream and sequence of the stored job.

    1. Run `run` writes its final entry: returns the entry. With `later_runs`: or a later run of the job id does, and
       the newest such entry is returned.
    2. The stored job is gone, left no final entry, and `parked()` is false. If a worker has ended it: returns None.
       Otherwise: raises JobGone. `consumers`: those of the lanes that the job may be in. Without `job` this case cannot
       be seen.
    3. Neither happens within `timeout_s` seconds: raises ResultTimeout. None: waits without end.

    A job that was enqueued with a delay has no run yet: its run and sequence are 0, and the entry that its first
    attempt writes under `parking_id` names the run.

    The wait goes on while the link or the server is away. Raises Unavailable when the connection is closed.
    """
    watch = OutcomeWatch(journal, subject, run, job, parking_id, parked, consumers, later_runs=later_runs)
    try:
        async with asyncio.timeout(timeout_s):
            return await watch.wait()
    except TimeoutError:
        _, job_id = subjects.parse_journal(subject)
        raise ResultTimeout(f"timed out after {timeout_s:g} s waiting for the result of job {job_id}") from None
    finally:
        await watch.close()


class _Pauses:
    """How long to wait for a notice before the journal is read again, in seconds."""

    def __init__(self) -> None:
        self.planned: list[float] = []  # the next pauses after reads that found nothing
        self._unanswered_s, self._poll_s = UNANSWERED_PAUSE_S, POLL_S

    def after_no_answer(self) -> float:
        """Return the pause after a read that no server answered."""
        pause_s, self._unanswered_s = self._unanswered_s, min(self._unanswered_s * 2, UNANSWERED_PAUSE_MAX_S)
        return pause_s

    def after_no_outcome(self) -> float:
        """Return the pause after a read that found no outcome."""
        self._unanswered_s = UNANSWERED_PAUSE_S
        if self.planned:
            return self.planned.pop(0)
        pause_s, self._poll_s = self._poll_s, min(self._poll_s * 2, POLL_MAX_S)
        return pause_s


class OutcomeWatch:
    """One wait for a job's outcome. Without `subscribes` its owner passes the live entries to `on_live`. `is_new`: see
    `follower.follow_batches`.
    """

    def __init__(
        self,
        journal: Journal,
        subject: str,
        run: int,
        job: tuple[str, int] | None,
        parking_id: str,
        parked: Callable[[], Awaitable[bool]] | None,
        consumers: Collection[str] = (),
        *,
        subscribes: bool = True,
        later_runs: bool = True,
        is_new: bool = False,
    ) -> None:
        self._journal = journal
        self._connection = journal.connection
        self._subject = subject
        self.run = run
        self._job = job
        self._parking_id = parking_id
        self._parked = parked
        self._consumers = consumers
        self._later_runs = later_runs
        self._is_new = is_new
        self._has_begun = False  # it was heard to begin where it was stored
        self._acked = False  # a worker's ack of the job was heard
        self._first_seen_at: float | None = None  # monotonic seconds, since its acks are listened to without a break
        self._seen = False  # it was still stored SEEN_FOR_S later, so no ack of it can have been missed
        self._absences = 0  # reads in a row that did not find the job
        self._enqueued_at = 0.0
        self._woken = asyncio.Event()
        self._live_finals: list[Entry] = []
        self._pauses = _Pauses()
        self._to_subscribe: dict[str, Callable[[Received], None]] = (
            {f"{LIVE}.{subject}": self.on_live} if subscribes else {}
        )
        self._subscriptions: list[Subscription] = []
        self._remove_listener: Callable[[], None] | None = None

    async def wait(self) -> Entry | None:
        """Wait until the job has ended. Returns its final entry, None if it left none.

        Raises JobGone, Unavailable, AccessDenied.
        """
        self._remove_listener = self._connection.on_regained(self._on_regained)
        if self._job is not None and self.run:
            self._watch_acks(self._job)
        while True:
            self._woken.clear()
            try:
                if self._is_new:
                    await self._await_news()
                ended, final = await self._read_outcome()
            except Unavailable:
                if self._connection.closing:
                    raise
                pause_s = self._pauses.after_no_answer()
            else:
                if ended:
                    return final
                pause_s = self._pauses.after_no_outcome()
            await self._pause(pause_s)

    async def _await_news(self) -> None:
        """In place of a first look for a new job, which would find that it is stored, and has not ended: return when a
        look may find more. What is listened to from here on, once it has begun, tells of all that follows.
        """
        self._is_new = False
        await self._subscribe()
        self._first_seen_at = time.monotonic()
        await self._pause(NEW_S)
        if self._has_begun and not self._woken.is_set():
            await self._pause(POLL_S)

    async def _pause(self, seconds: float) -> None:
        """Return after so many seconds, or when there may be news."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._woken.wait()

    async def _subscribe(self) -> None:
        while self._to_subscribe:
            subject, callback = next(iter(self._to_subscribe.items()))
            self._subscriptions.append(await self._connection.subscribe(subject, callback))
            del self._to_subscribe[subject]

    async def close(self) -> None:
        if self._remove_listener is not None:
            self._remove_listener()
        for subscription in self._subscriptions:
            await subscription.close()

    def on_live(self, message: Received) -> None:
        """Take a live entry: keep a final one, and wake the wait for every entry that may change the outcome."""
        if is_live_chunk(message):
            return
        event = message.headers.get(headers.EVENT)
        if event in FINAL:
            self._live_finals.append(entry_from_live(message))
        if event != PROGRESS and not (event == STARTED and self._is_no_news(entry_from_live(message))):
            self._woken.set()

    def _is_no_news(self, started: Entry) -> bool:
        """Whether a read would only find what is known: the job is stored where it was, and runs."""
        if self._job is None or self._first_seen_at is None or started.run != self.run:
            return False
        is_here = (_stored_seq(started) or started.run) == self._job[1]
        self._has_begun |= is_here
        return is_here and (self._seen or time.monotonic() - self._first_seen_at < SEEN_FOR_S)

    def _on_regained(self) -> None:
        """Notices were missed: read the journal."""
        self._forget_seen()
        self._woken.set()

    def _note_seen(self) -> None:
        """The job is stored. An ack may be on its way all the same: the server removes a job a little after its ack."""
        now, self._absences = time.monotonic(), 0
        if self._first_seen_at is None:
            self._first_seen_at = now
        self._seen = now - self._first_seen_at >= SEEN_FOR_S

    def _forget_seen(self) -> None:
        self._first_seen_at, self._seen = None, False

    def _on_ack(self, message: Received) -> None:
        if message.data.startswith((b"+ACK", b"+TERM")) and self._is_ours(message.subject.split(".")[3]):
            self._acked = True
            self._pauses.planned[:] = SETTLED_PAUSES_S
            self._woken.set()

    def _watch_acks(self, job: tuple[str, int]) -> None:
        """Be woken by the ack of the stored job `job`, which a worker sends when the job has ended."""
        self._job = job
        self._acked = False
        self._forget_seen()
        self._to_subscribe[f"$JS.ACK.{job[0]}.*.*.{job[1]}.>"] = self._on_ack

    async def _read_outcome(self) -> tuple[bool, Entry | None]:
        """Return whether the job has ended, and its final entry if there is one."""
        await self._subscribe()
        if not self.run and self._parking_id:
            return await self._read_outcome_of_delayed()
        if (live := self._live_final()) is not None:
            return True, live
        # the job is read before the journal: its final entry was written before the job went
        stored = await self._connection.get(*self._job) if self._job is not None else None
        if stored is not None:
            self._note_seen()
        self._enqueued_at = stored.time if stored is not None else self._enqueued_at
        final = self._live_final() or await self._journal.final_entry(
            self._subject, self.run, self._enqueued_at, later_runs=self._later_runs
        )
        if final is not None:
            return True, final
        for subscription in self._subscriptions:  # the server has answered the read, so it has taken or denied these
            subscription.check()
        if self._job is None or stored is not None:
            return False, None
        return await self._read_outcome_of_moved(self._job)

    async def _read_outcome_of_delayed(self) -> tuple[bool, Entry | None]:
        """As `_read_outcome`, for a job that was enqueued with a delay and has no known attempt yet."""
        entry = await self._journal.newest_of_run(self._subject, 0, math.inf, self._parking_id)
        for subscription in self._subscriptions:
            subscription.check()
        if entry is None or entry.final:
            return entry is not None, entry
        self.run = entry.run
        if self._job is not None:
            self._watch_acks((self._job[0], _stored_seq(entry) or entry.run))
        return await self._read_outcome()

    async def _read_outcome_of_moved(self, job: tuple[str, int]) -> tuple[bool, Entry | None]:
        """As `_read_outcome`, for a job that is not where it was stored and had no final entry.

        1. Its final entry was written meanwhile: ended.
        2. It was stored again, under another sequence: watch it there.
        3. It is parked: not ended.
        4. A worker has ended it: ended, without a final entry.
        5. Otherwise: raises JobGone.
        """
        seq, last = 0, None
        async for stored in self._connection.read(self._journal.stream, self._subject):
            entry = entry_from_stored(stored)
            if entry.run == self.run:
                last = entry
                if entry.event == STARTED:
                    seq = _stored_seq(entry) or seq
        if last is not None and last.final:
            return True, last
        was_parked = last is not None and last.event == RETRY and bool(_data(last).get("parked"))
        if not was_parked and seq not in (0, job[1]):
            self._watch_acks((job[0], seq))
            return await self._read_outcome()
        if was_parked or (self._parked is not None and await self._parked()):
            return False, None
        if self._acked or await self._was_ended(job, last):
            return True, None
        self._absences += 1
        if self._absences == 1:
            self._pauses.planned.insert(0, ABSENT_PAUSE_S)
            return False, None
        raise JobGone(subjects.parse_journal(self._subject)[1])

    async def _was_ended(self, job: tuple[str, int], last: Entry | None) -> bool:
        """Whether a worker has ended a job that is gone, although no ack of it was heard. `last`: its newest entry.

        1. It waited for its next attempt, which would have written `started`: no.
        2. Acks were listened to while it was stored for SEEN_FOR_S: no. In a cluster an ack may be missed: go on.
        3. It has begun: yes.
        4. A consumer of its lane has delivered this far, since the job was enqueued: yes. Otherwise no.
        """
        if last is not None and last.event == RETRY:
            return False
        if self._seen and self._consumers and not self._connection.cluster:
            return False
        return last is not None or await self._was_delivered(job)

    async def _was_delivered(self, job: tuple[str, int]) -> bool:
        """Whether a consumer of the job's lane has delivered the job's sequence, and was active since it was enqueued.

        A purge moves the consumer past the sequence too, but does not make it active. True also if this user may not
        ask.
        """
        for name in self._consumers:
            try:
                info = await self._connection.api(f"CONSUMER.INFO.{job[0]}.{name}")
            except NotFound:
                continue
            except AccessDenied:
                return True
            if info["delivered"]["stream_seq"] < job[1]:
                continue
            last_active = info["delivered"].get("last_active")
            if last_active and timestamp(last_active) >= self._enqueued_by_server(info) - CLOCK_SLACK_S:
                return True
        return False

    def _enqueued_by_server(self, info: dict[str, Any]) -> float:
        """Return when the job was enqueued, by the clock of the server that answered `info` just now; 0 if unknown."""
        made_at = subjects.made_at(subjects.parse_journal(self._subject)[1])
        if self._enqueued_at or made_at is None or "ts" not in info:
            return self._enqueued_at
        return made_at + timestamp(info["ts"]) - time.time()

    def _live_final(self) -> Entry | None:
        """Return the awaited outcome, if the server has told of it."""
        return next((entry for entry in self._live_finals if self._counts(entry)), None)

    def _counts(self, final: Entry) -> bool:
        """Whether a final entry is the awaited outcome."""
        return final.run == self.run or (self._later_runs and final.run > self.run)

    def _is_ours(self, consumer: str) -> bool:
        """Whether a consumer is the lane's, and not one of another program."""
        return not self._consumers or consumer in self._consumers


def _data(entry: Entry) -> dict[str, Any]:
    return entry.data if isinstance(entry.data, dict) else {}


def _stored_seq(started: Entry) -> int:
    """Return the sequence of the stored job whose attempt wrote `started`, 0 if the entry does not name it."""
    seq = _data(started).get("seq", 0)
    return seq if isinstance(seq, int) else 0
