"""Following a job: its journal from the beginning or after a cursor, live, over lost links, each entry once.

Live entries come by one subscription; what it has missed is read from the stream. Every entry names the one before it
(its expected sequence), so that a gap shows. No consumer is made.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import headers
from ..connection import Received, Subscription
from ..errors import BadInput, ResultTimeout, Unavailable
from .journal import CANCELLED, CHUNK, FAILED, FINAL, LIVE, RETRY, Entry, Journal, entry_of, heard
from .outcome import LOOK_AGAIN_MAX_S, LOOK_AGAIN_S, QUIET_MAX_S, QUIET_S, Watch

RESTART, GAP = "restart", "gap"  # items that are no entries
HELD_MAX, HELD_BYTES_MAX = 256, 1024 * 1024  # live entries that the reader has not taken; then he reads the stream
LAG_S, LAGS_MAX = 0.01, 8  # a replica may be behind what was heard: asked so often, twice as late each time

_NONCE = re.compile(r"[0-9a-f]{1,32}")
_CURSOR = re.compile(r"1-([0-9a-f]{8})" + r"-(\d{1,19})" * 5 + r"-([0-9a-f]*)")


@dataclass(frozen=True, slots=True)
class StreamItem:
    """What a follower gets: an entry of the journal, one chunk of it, or a word about them.

    **restart**: an attempt other than the one whose items came before writes from here on, and begins from the start;
    `data` has its `attempt` and `why`. **gap**: entries are missing here, expired or never kept for want of room;
    `data` has the number of `chunks` where it is known. `cursor`: `after` this item, for a later stream.
    """

    event: str
    data: Any
    attempt: int
    run: int
    time: float
    cursor: str

    @property
    def final(self) -> bool:
        return self.event in FINAL


class _Place(NamedTuple):
    """A place in a journal: `taken` items of entry `seq` are passed, `left` are not. `writer` wrote what came last,
    its `nth` entry, in `run`.
    """

    run: int = 0
    seq: int = 0
    taken: int = 0
    left: int = 0
    nth: int = 0
    writer: str = ""

    def cursor(self, subject: str) -> str:
        run, seq, taken, left, nth, writer = self
        return f"1-{_mark(subject)}-{run}-{seq}-{taken}-{left}-{nth}-{writer}"

    @classmethod
    def read(cls, cursor: str, subject: str) -> _Place:
        found = _CURSOR.fullmatch(cursor) if isinstance(cursor, str) else None
        if found is None:
            raise BadInput(f"{cursor!r} is no cursor: give the `cursor` of an item of this job's stream")
        if found[1] != _mark(subject):
            raise BadInput(f"cursor {cursor} is another job's")
        run, seq, taken, left, nth = (int(found[n]) for n in range(2, 7))
        return cls(run, seq, taken, left, nth, found[7])


def _mark(subject: str) -> str:
    return f"{zlib.crc32(subject.encode()):08x}"


async def follow(
    journal: Journal,
    subject: str,
    *,
    run: int,
    after: str | None = None,
    timeout_s: float | None = None,
    job: tuple[str, int] | None = None,
    word: str = "",
    parked: Callable[[], Awaitable[bool]] | None = None,
) -> AsyncGenerator[StreamItem, None]:
    """The items of run `run` of a job id, or of a later one that begins to write; ends after the final one, or when the
    job has ended without. The other arguments are those of `lastword.last_word`.

    Raises BadInput for a wrong cursor, ResultTimeout when the job has not ended after `timeout_s` seconds, Unavailable
    when the connection is closed.
    """
    place = _Place(run) if after is None else _Place.read(after, subject)
    following = _Following(journal, subject, place, job, word, parked)
    end = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        while True:
            async with aclosing(following.items()) as items:
                async for item in items:
                    yield item
            if following.over:
                return
            if not await following.wait(end):
                raise ResultTimeout(f"not ended within {timeout_s:g} s: {subject}")
    finally:
        await following.close()


class _Following:
    """One reader's way through a journal."""

    def __init__(
        self,
        journal: Journal,
        subject: str,
        place: _Place,
        job: tuple[str, int] | None,
        word: str,
        parked: Callable[[], Awaitable[bool]] | None,
    ) -> None:
        self.over = False
        self._journal = journal
        self._connection = journal.connection
        self._subject = subject
        self._place = place
        self._job = job
        self._word = word
        self._parked = parked
        self._born: float | None = None
        self._said = ""  # what the last retry said
        self._missed = False
        self._behind = True  # there may be entries in the stream that were not heard
        self._live: deque[Received] = deque()
        self._live_bytes = 0
        self._lags = 0
        self._pause_s = 0.0  # before the next look, whatever is heard meanwhile
        self._again_s, self._quiet_s = LOOK_AGAIN_S, QUIET_S
        self._woken = asyncio.Event()
        self._subscription: Subscription | None = None
        self._off = self._connection.on_regained(self._on_regained)
        self._await_end()

    async def close(self) -> None:
        self._off()
        if self._subscription is not None:
            await self._subscription.close()
        await self._leave_end()

    def _await_end(self) -> None:
        """Have the end watched for: it may come without a final entry."""
        self._watch = Watch(
            self._journal, self._subject, self._place.run, self._job, self._word, self._parked, listens=False
        )
        self._ending = asyncio.create_task(self._watch.wait())
        self._ending.add_done_callback(lambda _: self._woken.set())

    async def _leave_end(self) -> None:
        self._ending.cancel()
        await asyncio.wait([self._ending])
        if not self._ending.cancelled():
            self._ending.exception()
        await self._watch.close()

    def _on_regained(self) -> None:
        self._behind = True
        self._woken.set()

    def _on_live(self, message: Received) -> None:
        self._watch.hear(message)
        self._live.append(message)
        self._live_bytes += len(message.data)
        if len(self._live) > HELD_MAX or self._live_bytes > HELD_BYTES_MAX:
            self._live.clear()  # the reader is slow: what he has not taken he reads from the stream
            self._live_bytes = 0
            self._behind = True
        self._woken.set()

    async def wait(self, end: float | None) -> bool:
        """Until there may be more; False at the `end` of the reader's patience."""
        left_s = math.inf if end is None else end - time.monotonic()
        if left_s <= 0:
            return False
        if self._pause_s:
            await asyncio.sleep(min(self._pause_s, left_s))
            return True
        try:
            async with asyncio.timeout(min(self._quiet_s, left_s)):
                await self._woken.wait()
        except TimeoutError:
            self._quiet_s = min(self._quiet_s * 2, QUIET_MAX_S)
            self._behind = True
        return True

    async def items(self) -> AsyncGenerator[StreamItem, None]:
        """All that is there now."""
        self._pause_s = 0.0
        self._woken.clear()
        try:
            await self._open()
            while self._more():
                if self._behind or not self._live:
                    ended = self._ending.done()  # asked first: all that its job said was stored before
                    self._behind = False
                    begin = self._place.seq + (not self._place.left)
                    stream, subject = self._journal.stream, self._subject
                    async with aclosing(self._connection.read(stream, subject, seq=max(1, begin))) as read:
                        async for stored in read:
                            for item in self._take(entry_of(stored)):
                                yield item
                    if ended and not self.over and not await self._moved():
                        for item in await self._take_end():
                            yield item
                else:
                    for item in self._take_live():
                        yield item
            self._again_s = LOOK_AGAIN_S
        except Unavailable:
            if self._connection.closing:
                raise
            self._behind = True
            self._pause_s, self._again_s = self._again_s, min(self._again_s * 2, LOOK_AGAIN_MAX_S)

    def _more(self) -> bool:
        return not self.over and not self._pause_s and bool(self._behind or self._live or self._ending.done())

    async def _open(self) -> None:
        if self._subscription is None:
            self._subscription = await self._connection.subscribe(f"{LIVE}.{self._subject}", self._on_live)
        if self._born is None:
            stored = await self._connection.get(*self._job) if self._job is not None and self._place.run else None
            self._born = stored.time if stored is not None else 0.0

    async def _moved(self) -> bool:
        """Whether another run is followed than the one whose end was awaited; then that one's is."""
        if self._watch.run in (0, self._place.run):
            return False
        await self._leave_end()
        self._job = None if self._job is None else (self._job[0], self._place.run)
        self._await_end()
        return True

    def _take_live(self) -> list[StreamItem]:
        message = self._live.popleft()
        self._live_bytes -= len(message.data)
        entry = heard(message)
        if entry.seq == 0:  # a result that the stream has no room for yet
            if not entry.final or not self._ours(entry):
                return []
            self.over = True
            return [self._item(entry, entry.event, entry.data, self._place)]
        if entry.before > self._place.seq and self._lags < LAGS_MAX:
            self._live.appendleft(message)
            self._live_bytes += len(message.data)
            self._lag()
            return []
        return self._take(entry)

    def _lag(self) -> None:
        """Read again what a replica of the stream did not have yet."""
        self._behind = True
        self._pause_s = LAG_S * 2**self._lags if self._lags else 0.0
        self._lags += 1

    async def _take_end(self) -> list[StreamItem]:
        last = self._ending.result()
        end = last if last is not None else await self._journal.head(self._subject)
        if end is not None and end.seq > self._place.seq and self._lags < LAGS_MAX:
            self._lag()
            return []
        self.over = True
        return self._take(last) if last is not None else []

    def _ours(self, entry: Entry) -> bool:
        if self._word and entry.word == self._word:
            return True
        return 0 < self._place.run <= entry.run and entry.time >= (self._born or 0.0)

    def _take(self, entry: Entry) -> list[StreamItem]:
        """What the reader gets of an entry, which is the next one that there is."""
        place = self._place
        if entry.seq < place.seq or (entry.seq == place.seq and not place.left):
            return []
        self._lags, self._quiet_s = 0, QUIET_S
        writer, nth = _pen(entry, self._subject)
        self._missed |= place.left > 0 and entry.seq > place.seq
        if not self._ours(entry):
            self._place = place._replace(seq=entry.seq, taken=0, left=0)
            return []
        if writer and entry.seq > place.seq:
            self._missed |= nth != (place.nth + 1 if writer == place.writer else 1)
        items = []
        later = 0 < place.run < entry.run
        if writer and writer != place.writer and (later or entry.event not in (RETRY, FAILED, CANCELLED)):
            if place.writer:
                why = "a later run of this id" if later else self._said or "the attempt before ended without a word"
                place = place._replace(run=entry.run, left=0, nth=0, writer=writer)
                items.append(self._item(entry, RESTART, {"attempt": entry.attempt, "why": why}, place))
            place = place._replace(writer=writer)
        nth = nth if writer == place.writer else place.nth
        parts = entry.data if entry.event == CHUNK and isinstance(entry.data, list) else [entry.data]
        passed = place.taken if entry.seq == place.seq else 0
        place = _Place(entry.run, entry.seq, passed, len(parts) - passed, nth, place.writer)
        if (self._missed or entry.lost) and not passed:
            items.append(self._item(entry, GAP, {"chunks": entry.lost or None}, place))
        for part in parts[passed:]:
            place = place._replace(taken=place.taken + 1, left=place.left - 1)
            items.append(self._item(entry, entry.event, part, place))
        self._missed = False
        self._place = place
        self._said = str(entry.data.get("error", "")) if entry.event == RETRY and isinstance(entry.data, dict) else ""
        self.over = entry.final
        return items

    def _item(self, entry: Entry, event: str, data: Any, place: _Place) -> StreamItem:
        return StreamItem(event, data, entry.attempt, entry.run, entry.time, place.cursor(self._subject))


def _pen(entry: Entry, subject: str) -> tuple[str, int]:
    """Which attempt wrote an entry, and as its how manyth; "" for what nobody's attempt wrote."""
    parts = entry.msg_id.removeprefix(f"{subject}/").split("/")
    if len(parts) != 3 or not _NONCE.fullmatch(parts[0]):
        return "", 0
    return parts[0], headers.number(parts[2].partition("-")[0])
