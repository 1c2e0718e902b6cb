"""Streams a job's journal to a reader: from the beginning or after a cursor, live, over lost links, each entry once.

Live entries arrive on one core subscription; what it has missed is read from the stream. No consumer is made. Every
entry names the sequence it was written after, so that a missing one shows.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from contextlib import aclosing
from typing import Any

from .. import subjects
from ..codec import secret_paths
from ..connection import Received, Subscription
from ..errors import JobGone, ResultTimeout, Unavailable
from .entries import CHUNK, LIVE, RETRY, Entry, entry_from_live, entry_from_stored
from .journal import Journal
from .outcome_watch import POLL_MAX_S, POLL_S, UNANSWERED_PAUSE_MAX_S, UNANSWERED_PAUSE_S, OutcomeWatch
from .stream_items import GAP, RESTART, Cursor, StreamItem, is_gap_before, restarts_output, subject_mark, writer_of

LIVE_MAX, LIVE_BYTES_MAX = 256, 1024 * 1024  # live entries that wait for the reader; above, it reads the stream instead
BATCH_BYTES_MAX = 64 * 1024  # of live entries, above which no more of them are taken at once
NEW_S = 0.05  # how long a new job's first entry is waited for before the stream is read
LAG_S, LAGS_MAX = 0.01, 8  # a replica may be behind the live entries: read again so often, after doubling pauses


async def follow(journal: Journal, subject: str, *, run: int, **options: Any) -> AsyncGenerator[StreamItem, None]:
    """As `follow_batches`, one item after the other."""
    async with aclosing(follow_batches(journal, subject, run=run, **options)) as batches:
        async for batch in batches:
            for item in batch:
                yield item


async def follow_batches(
    journal: Journal,
    subject: str,
    *,
    run: int,
    after: str | None = None,
    timeout_s: float | None = None,
    job: tuple[str, int] | None = None,
    parking_id: str = "",
    parked: Callable[[], Awaitable[bool]] | None = None,
    consumers: Collection[str] = (),
    is_new: bool = False,
) -> AsyncGenerator[list[StreamItem], None]:
    """Yield the items of run `run` of a job id, then those of each later run that begins to write. Items that are there
    at once come together.

    Ends after a final item, or when the job has ended without one. `after`: the cursor of the last item that the reader
    has. `job`, `parking_id`, `parked` and `consumers` are as in `wait_for_outcome`. `is_new`: the job was stored just
    now, under an id that nobody had before, so its journal is empty: nothing is asked until something is missing.

    Raises JobGone as `wait_for_outcome` does, BadInput for a wrong cursor, ResultTimeout if the job has not ended after
    `timeout_s` seconds (None: no limit), Unavailable when the connection is closed.
    """
    cursor = Cursor(run) if after is None else Cursor.decode(after, subject)
    follower = _Follower(journal, subject, cursor, job, parking_id, parked, consumers, is_new)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while True:
            if follower.needs_only_heard():
                if heard := follower.take_heard():
                    yield heard
            else:
                async with aclosing(follower.read_batches()) as batches:
                    async for batch in batches:
                        yield batch
            if follower.over:
                return
            if not await follower.wait_for_more(deadline):
                _, job_id = subjects.parse_journal(subject)
                raise ResultTimeout(f"timed out after {timeout_s:g} s waiting for job {job_id} to end")
    finally:
        await follower.close()


class _Follower:
    """One reader's way through a journal. `over`: the reader has the final item, or the job ended without one."""

    def __init__(
        self,
        journal: Journal,
        subject: str,
        cursor: Cursor,
        job: tuple[str, int] | None,
        parking_id: str,
        parked: Callable[[], Awaitable[bool]] | None,
        consumers: Collection[str],
        is_new: bool,
    ) -> None:
        self.over = False
        self._journal = journal
        self._connection = journal.connection
        self._subject = subject
        self._mark = subject_mark(subject)
        self._cursor = cursor
        self._job = job
        self._parking_id = parking_id
        self._parked = parked
        self._consumers = consumers
        self._enqueued_at: float | None = 0.0 if is_new else None  # None: not read yet
        self._retry_error = ""  # the error of the newest entry, if that is a retry
        self._has_gap = False  # entries before the next one are missing
        self._behind = not is_new  # the stream may hold entries that did not arrive live
        self._live: deque[Received] = deque()
        self._live_bytes = 0
        self._lags = 0  # reads in a row that lacked what had arrived live
        self._pause_s = 0.0  # before the next read, even if entries arrive meanwhile
        self._unanswered_s, self._poll_s = UNANSWERED_PAUSE_S, NEW_S if is_new else POLL_S
        self._woken = asyncio.Event()
        self._alarm = _Alarm(self._woken)
        self._subscription: Subscription | None = None
        self._remove_listener = self._connection.on_regained(self._on_regained)
        self._start_outcome_watch(is_new)

    async def close(self) -> None:
        self._remove_listener()
        self._alarm.stop()
        if self._subscription is not None:
            await self._subscription.close()
        await self._stop_outcome_watch()

    # -- the outcome, which may come without a final entry

    def _start_outcome_watch(self, is_new: bool = False) -> None:
        self._watch = OutcomeWatch(
            self._journal, self._subject, self._cursor.run, self._job, self._parking_id, self._parked, self._consumers,
            subscribes=False, is_new=is_new,
        )  # fmt: skip
        self._outcome = asyncio.create_task(self._watch.wait())
        self._outcome.add_done_callback(lambda _: self._woken.set())

    async def _stop_outcome_watch(self) -> None:
        self._outcome.cancel()
        await asyncio.wait([self._outcome])
        if not self._outcome.cancelled():
            self._outcome.exception()  # else asyncio logs that nobody has retrieved it
        await self._watch.close()

    def _has_moved_to_later_run(self) -> bool:
        """Return whether the reader has gone on to a later run of the job id since the outcome watch started.

        Run 0 (a delayed job whose run is not known yet) is not a former one.
        """
        return self._watch.run not in (0, self._cursor.run)

    async def _watch_followed_run(self) -> None:
        """Replace the outcome watch by one of the run that is followed now."""
        await self._stop_outcome_watch()
        self._job = None if self._job is None else (self._job[0], self._cursor.run)
        self._start_outcome_watch()

    # -- waiting

    def _on_regained(self) -> None:
        self._behind = True
        self._woken.set()

    def _on_live(self, message: Received) -> None:
        self._watch.on_live(message)
        self._live.append(message)
        self._live_bytes += len(message.data)
        if len(self._live) > LIVE_MAX or self._live_bytes > LIVE_BYTES_MAX:
            self._live.clear()  # the reader is slow: it reads from the stream what it has not taken
            self._live_bytes = 0
            self._behind = True
        self._woken.set()

    async def wait_for_more(self, deadline: float | None) -> bool:
        """Wait until there may be more items. False once `deadline` (monotonic seconds) has passed."""
        left_s = math.inf if deadline is None else deadline - time.monotonic()
        if left_s <= 0:
            return False
        if self._pause_s:
            await asyncio.sleep(min(self._pause_s, left_s))
            return True
        if self._woken.is_set():
            return True
        self._alarm.set(min(self._poll_s, left_s))
        await self._woken.wait()
        if self._alarm.has_rung:
            self._poll_s = min(max(self._poll_s * 2, POLL_S), POLL_MAX_S)
            self._behind = True
        return True

    # -- reading

    def needs_only_heard(self) -> bool:
        """Whether all that there is was heard live, so that nobody must be asked: mostly so."""
        return (
            bool(self._live) and not self._behind and not self._pause_s and not self._outcome.done()
            and self._subscription is not None and self._enqueued_at is not None
        )  # fmt: skip

    def take_heard(self) -> list[StreamItem]:
        """As `read_batches`, where only what was heard is needed: a generator for each token costs more than it."""
        self._woken.clear()
        items = self._take_live()
        if self._live or self._behind:
            self._woken.set()
        return items

    async def read_batches(self) -> AsyncGenerator[list[StreamItem], None]:
        """Yield all items that are there now."""
        self._pause_s = 0.0
        self._woken.clear()
        try:
            await self._ensure_subscribed()
            await self._ensure_enqueued_at()
            while self._may_have_more():
                if self._behind or not self._live:
                    ended = self._outcome.done()  # asked before the read: all that the job wrote was stored before
                    self._behind = False
                    start = self._cursor.seq + (not self._cursor.left)
                    stream, subject = self._journal.stream, self._subject
                    async with aclosing(self._connection.read(stream, subject, seq=max(1, start))) as read:
                        async for stored in read:
                            if items := self._advance(entry_from_stored(stored)):
                                yield items
                    if self._subscription is not None:
                        self._subscription.check()  # the server has answered the read, so it has taken or denied this
                    if ended and not self.over:
                        if self._has_moved_to_later_run():
                            await self._watch_followed_run()
                        elif items := await self._take_outcome():
                            yield items
                elif items := self._take_live():
                    yield items
            self._unanswered_s = UNANSWERED_PAUSE_S
        except Unavailable:
            if self._connection.closing:
                raise
            self._behind = True
            self._pause_s = self._unanswered_s
            self._unanswered_s = min(self._unanswered_s * 2, UNANSWERED_PAUSE_MAX_S)

    def _may_have_more(self) -> bool:
        return not self.over and not self._pause_s and bool(self._behind or self._live or self._outcome.done())

    async def _ensure_subscribed(self) -> None:
        if self._subscription is None:
            self._subscription = await self._connection.subscribe(f"{LIVE}.{self._subject}", self._on_live)

    async def _ensure_enqueued_at(self) -> None:
        """Read when the followed run was enqueued, 0 if its job is not stored any more, for `_is_followed`."""
        if self._enqueued_at is None:
            stored = await self._connection.get(*self._job) if self._job is not None and self._cursor.run else None
            self._enqueued_at = stored.time if stored is not None else 0.0

    def _take_live(self) -> list[StreamItem]:
        """Take live entries, and return their items."""
        items: list[StreamItem] = []
        left = self._live_bytes - BATCH_BYTES_MAX
        while self._live and not self.over and not self._behind:
            items += self._take_oldest()
            if self._live_bytes <= left:
                break
        return items

    def _take_oldest(self) -> list[StreamItem]:
        """Take the oldest live entry, and return its items.

        1. It is not stored: a result that the server has no space for yet is passed on, anything else is dropped.
        2. Entries before it have not been read: keep it, and read the stream first.
        3. Otherwise it is the next entry.
        """
        message = self._live.popleft()
        self._live_bytes -= len(message.data)
        entry = entry_from_live(message)
        if entry.seq == 0:
            if not entry.final or not self._is_followed(entry):
                return []
            self.over = True
            return [self._make_item(entry, entry.event, entry.data, self._cursor)]
        if entry.expected_seq > self._cursor.seq and self._lags < LAGS_MAX:
            self._live.appendleft(message)
            self._live_bytes += len(message.data)
            self._plan_reread()
            return []
        return self._advance(entry)

    def _plan_reread(self) -> None:
        """Have the stream read again: the replica that answered may be behind. A first time at once, then later."""
        self._behind = True
        self._pause_s = LAG_S * 2**self._lags if self._lags else 0.0
        self._lags += 1

    async def _take_outcome(self) -> list[StreamItem]:
        """Take the outcome of the followed run, and return its items.

        Entries before the outcome that have not been read come first: they are read again. Without a final entry (the
        handler keeps no result) the journal's head shows whether there are such entries.
        """
        final, gone = None, None
        try:
            final = self._outcome.result()
        except JobGone as error:
            gone = error
        newest = final if final is not None else await self._journal.head(self._subject)
        if newest is not None and newest.seq > self._cursor.seq and self._lags < LAGS_MAX:
            self._plan_reread()
            return []
        self.over = True
        if gone is not None:
            raise gone
        return self._advance(final) if final is not None else []

    def _is_followed(self, entry: Entry) -> bool:
        """Whether an entry is of the run that is followed, or of a later one.

        1. Its parking id is the followed one: a delayed job, whose run is not known before its first attempt.
        2. Otherwise its run number, and its time: a recreated stream counts runs from 1 again.
        """
        if self._parking_id and entry.parking_id == self._parking_id:
            return True
        return 0 < self._cursor.run <= entry.run and entry.time >= (self._enqueued_at or 0.0)

    # -- from entries to items

    def _advance(self, entry: Entry) -> list[StreamItem]:
        """Take `entry`, the next one of the journal: return the reader's items of it, and move the cursor to its end.

        1. The reader has the entry already, or it is of a run that is not followed: no items.
        2. Otherwise: a restart if another attempt writes from here on, then the items of the entry.
        """
        cursor = self._cursor
        if entry.seq < cursor.seq or (entry.seq == cursor.seq and not cursor.left):
            return []
        self._lags, self._poll_s = 0, POLL_S
        nonce, number = writer_of(entry, self._subject)
        is_next = nonce == cursor.nonce and number == cursor.number + 1 and entry.run == cursor.run and not cursor.left
        if is_next and nonce and entry.event == CHUNK and not self._has_gap:  # as most are
            self._retry_error = ""
            return self._take_parts(entry, cursor._replace(number=number))
        if not self._is_followed(entry):
            self._has_gap |= cursor.left > 0 and entry.seq > cursor.seq
            self._cursor = cursor._replace(seq=entry.seq, taken=0, left=0)
            return []
        self._has_gap |= is_gap_before(entry, nonce, number, cursor)
        items: list[StreamItem] = []
        if restarts_output(entry, nonce, cursor):
            if cursor.nonce:
                item, cursor = self._restart(entry, nonce, cursor)
                items.append(item)
            cursor = cursor._replace(nonce=nonce)
        elif nonce and not cursor.nonce:  # the end of an attempt without output: the next attempt is a restart too
            cursor = cursor._replace(nonce=nonce)
        if nonce == cursor.nonce:
            cursor = cursor._replace(number=number)
        items += self._take_parts(entry, cursor)
        self._has_gap = False
        is_retry = entry.event == RETRY and isinstance(entry.data, dict)
        self._retry_error = str(entry.data.get("error", "")) if is_retry else ""
        self.over = entry.final
        return items

    def _take_parts(self, entry: Entry, cursor: Cursor) -> list[StreamItem]:
        """Return the items of one entry, its chunks or itself, and move the cursor to its end.

        A gap comes first, if entries before it are missing. A reader that has some of the chunks gets the others.
        """
        parts = entry.data if entry.event == CHUNK and isinstance(entry.data, list) else [entry.data]
        count, taken = len(parts), cursor.taken if entry.seq == cursor.seq else 0
        run, seq, number, nonce = entry.run, entry.seq, cursor.number, cursor.nonce
        items: list[StreamItem] = []
        if (self._has_gap or entry.lost_chunks) and not taken:
            cursor = Cursor(run, seq, 0, count, number, nonce)
            items.append(self._make_item(entry, GAP, {"chunks": entry.lost_chunks or None}, cursor))
        for place in range(taken, count):
            cursor = Cursor(run, seq, place + 1, count - place - 1, number, nonce)
            items.append(self._make_item(entry, entry.event, parts[place], cursor))
        self._cursor = Cursor(run, seq, max(taken, count), count - max(taken, count), number, nonce)
        return items

    def _restart(self, entry: Entry, nonce: str, cursor: Cursor) -> tuple[StreamItem, Cursor]:
        """Return the restart item that precedes an attempt's first entry, and the cursor after the item."""
        if 0 < cursor.run < entry.run:
            why = "a later run of this job id"
        else:
            why = self._retry_error or "the previous attempt was lost"
        cursor = cursor._replace(run=entry.run, left=0, number=0, nonce=nonce)
        return self._make_item(entry, RESTART, {"attempt": entry.attempt, "why": why}, cursor), cursor

    def _make_item(self, entry: Entry, event: str, data: Any, cursor: Cursor) -> StreamItem:
        secrets = "" if event in (RESTART, GAP) else entry.secrets
        if secrets and event == CHUNK:
            secrets = secret_paths.of_items(secrets)
        cursor_text = cursor.encode(self._mark)
        document = entry.document if event == entry.event else None
        return StreamItem(event, data, entry.attempt, entry.run, entry.time, cursor_text, secrets, document)


class _Alarm:
    """Sets an event after a time, once. The time can be set again and again without a new timer, which would cost more
    than what is waited for. `has_rung`: since it was set last.
    """

    def __init__(self, event: asyncio.Event) -> None:
        self.has_rung = False
        self._event = event
        self._loop = asyncio.get_running_loop()
        self._due = math.inf
        self._timer: asyncio.TimerHandle | None = None

    def set(self, after_s: float) -> None:
        self.has_rung, self._due = False, self._loop.time() + after_s
        if self._timer is not None and self._timer.when() > self._due:
            self.stop()
        if self._timer is None:
            self._timer = self._loop.call_at(self._due, self._look)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._loop.time() < self._due:
            self._timer = self._loop.call_at(self._due, self._look)
        else:
            self.has_rung = True
            self._event.set()
