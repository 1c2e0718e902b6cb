"""Group commit: publishes that wait at the same time go into their stream as one atomic batch, where that is faster
than one by one. Whether it is depends on settings that the server does not tell (docs/decisions/group-commit.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING

from ..errors import AccessDenied, AIQueueError, BadInput, Conflict, QueueFull, Unavailable
from . import frames
from .pace import Pace

if TYPE_CHECKING:
    from .window import Publish, Window

log = logging.getLogger("aiqueue.connection")

BATCH_MAX = 1_000  # messages, by the server
BATCH_BYTES_MAX = 4 * 1024 * 1024  # of one part: a batch that was opened has two
FEW = 16  # below so many, singles are as fast: a batch costs the server some six writes to disk
ENOUGH = 200  # from twice as many up, half of them go: the others' callers and the server then work side by side
UNDER_WAY_MAX = 2  # batches: the server has the second one at hand when it is done with the first
TRIAL_MAX = 32  # singles under way while they are tried: a batch that is sent next waits for them
PAUSE_S, PAUSE_MAX_S = 10.0, 600.0  # without batches, where the stream does not take them


class Batch:
    """Publishes that a stream stores all, or none. In the window they are under way like others. `open`: more of them
    are to be sent, and until the last one is, the server stores none.
    """

    __slots__ = ("due", "members", "name", "open", "token")

    def __init__(self, name: str, token: bytes, due: float) -> None:
        self.name = name
        self.token = token
        self.members: list[Publish] = []
        self.open = True
        self.due = due


class Group:
    """One connection's publishes to one stream: those gathered here are not sent yet, first come first."""

    def __init__(self, window: Window, stream: str) -> None:
        self.gathered: deque[Publish] = deque()
        self.batches: dict[bytes, Batch] = {}  # those under way, by token
        self.pace = Pace()
        self._stream = stream
        self._window = window
        self._under_way = 0  # the batches' members among them
        self._quiet = True  # there were few: the next one is not held back
        self._flushing: asyncio.Handle | None = None
        self._pause_s = PAUSE_S

    def gather(self, publish: Publish) -> bool:
        """Take it along with others. False: it is to be sent by itself, now."""
        if not self.gathered:
            if not (self.pace.batches or self.pace.trying):
                return False
            if self._quiet and self._under_way < FEW:
                return False
        if publish.alone:
            return False
        self.gathered.append(publish)
        self._window.watch(publish.end)
        self.flush_soon()
        self._quiet = False
        if len(self.gathered) == FEW and not (self._under_way or self.batches) and self.pace.batches:
            self._open()
        return True

    # -- what the window says of publishes under way

    def sent(self, now: float, count: int) -> None:
        if not self._under_way:
            self.pace.begin(now)
        self._under_way += count

    def answered(self) -> None:
        """One that was sent by itself."""
        due = self.pace.count(1, self._under_way)
        self._under_way -= 1
        if due:
            self.pace.look(self._window.now(), self._under_way)
        if self.gathered:
            self.flush_soon()

    def gone(self, publish: Publish) -> None:
        """Nobody waits for its answer any more."""
        publish.batch = b""
        self._under_way -= 1

    def lost(self) -> deque[Publish]:
        """The link is gone, and with it all answers. Returns what was gathered, and is not any more."""
        self.batches.clear()
        self._under_way = 0
        gathered, self.gathered = self.gathered, deque()
        return gathered

    def refused(self, denied: str) -> None:
        """A message on this subject, in lower case, was not let in: no batch with one of these can be whole."""
        for batch in list(self.batches.values()):
            if any(each.subject.lower() == denied for each in batch.members):
                self._failed(batch, AccessDenied(f"this user may not publish to {denied}"))

    def expire(self, now: float) -> None:
        """Give up batches that were not answered in time."""
        for batch in list(self.batches.values()):
            if batch.due <= now:
                self._failed(batch, Unavailable("no answer to a batch", maybe_stored=True))

    def told(self, token: bytes, data: bytes, block: bytes | None) -> bool:
        """An answer; False if it belongs to no batch under way."""
        batch = self.batches.get(token)
        if batch is None:
            return False
        if not data and not block:
            return True  # a part of it is taken in
        try:
            if block:  # 503
                raise Unavailable("nobody takes it")
            told = frames.answer(data, self._stream)
            if told.get("count") != len(batch.members):
                raise Unavailable("something else than a stream answered", maybe_stored=True)
            last = int(told["seq"])
        except AIQueueError as error:
            self._failed(batch, error)
            self._window.pump()
        else:
            self._stored(batch, told["stream"], last)
        return True

    # -- sending

    def flush_soon(self) -> None:
        """Send what is gathered, with all that comes in this turn of the event loop."""
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self, back: int = 0) -> None:
        """Send what may go now. `back`: so many were answered at this moment, and as many are likely to follow."""
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        window, pace, gathered = self._window, self.pace, self.gathered
        for batch in self.batches.values():
            if batch.open and window.connected:  # else it is lost, and those that wait for it are told
                self._complete(batch, self._share(back))
                break
        while gathered and len(self.batches) < UNDER_WAY_MAX:
            if not window.ready:
                window.first(self.gathered)
                self.gathered = deque()
                return
            count = len(gathered)
            if self.batches:
                if pace.batches and count >= max(ENOUGH, self._under_way * 2 // 3):
                    self._send_batch(self._share(back))
                return
            if count + self._under_way < FEW:
                self._quiet = True
            elif pace.batches:
                if count < max(FEW, self._under_way):
                    return  # the next answer flushes again
                self._send_batch(self._share(back))
                continue
            elif pace.trying and self._under_way >= TRIAL_MAX:
                return
            window.send(gathered.popleft())

    def _share(self, back: int) -> int:
        """How many of those that wait go now, when `back` more come back soon."""
        count = len(self.gathered)
        half = (count + back + self._under_way + 1) // 2
        return count if half < ENOUGH else min(count, half)

    def _open(self) -> None:
        """Send the first messages of a batch ahead: the server makes its files while the others' callers run. The
        flush that follows in this turn of the event loop, or its end, sends the others.
        """
        if self._window.ready and (members := self._members(FEW - 1)):
            self._put(members, last=False)

    def _complete(self, batch: Batch, count: int) -> None:
        """Send the other messages of a batch, so many as there is room for."""
        members = self._members(max(1, min(count, BATCH_MAX - len(batch.members), self._window.room)))
        if members:
            self._window.put_batch(batch, members, last=True)
        else:  # the next one was given up meanwhile, or is too large
            self._again(batch, "its batch was not completed")
            self._window.pump()

    def _send_batch(self, count: int) -> None:
        members = self._members(min(count, BATCH_MAX, self._window.room))
        if len(members) > 1:
            self._put(members, last=True)
        else:
            self._window.send(members[0] if members else self.gathered.popleft())
            self.flush_soon()

    def _put(self, members: list[Publish], *, last: bool) -> None:
        batch = self._window.new_batch()
        self.batches[batch.token] = batch
        self._window.put_batch(batch, members, last=last)

    def _members(self, most: int) -> list[Publish]:
        """The first of those gathered, up to the first one that has no room for a batch's headers."""
        gathered, left = self.gathered, BATCH_BYTES_MAX
        block_max = frames.HEADERS_MAX - frames.BATCH_HEADERS_MAX
        size_max = self._window.max_payload - frames.BATCH_HEADERS_MAX
        members: list[Publish] = []
        while gathered and len(members) < most and left > 0:
            publish = gathered[0]
            block = len(publish.block)
            size = block + len(publish.body)
            if block > block_max or size > size_max:
                break
            left -= size
            members.append(gathered.popleft())
        return members

    # -- what came of a batch

    def _stored(self, batch: Batch, stream: str, last: int) -> None:
        """Its messages have the sequences up to `last`, without a gap."""
        self._pause_s = PAUSE_S
        self.pace.count(len(batch.members), self._under_way)
        waiting = [each.batch == batch.token for each in batch.members]
        self._ended(batch)
        self.pace.look(self._window.now(), self._under_way)
        if len(self.gathered) >= ENOUGH:
            self._flush(len(batch.members))  # the server is not to wait until their callers have run
        for seq, publish in enumerate(batch.members, last - len(batch.members) + 1):
            if waiting[seq - last - 1]:
                publish.outcome = frames.PubAck(stream, seq, False)
                publish.settled()
        if self.gathered:
            self.flush_soon()

    def _failed(self, batch: Batch, error: AIQueueError) -> None:
        if not isinstance(error, Conflict | QueueFull | BadInput):  # those are one member's, as it would be alone
            log.debug("%s: no batches for %g s: %s", self._stream, self._pause_s, error)
            if self.pace.batches or self.pace.trying:
                self.pace.rest(self._window.now(), self._pause_s)
                self._pause_s = min(self._pause_s * 2, PAUSE_MAX_S)
        self._again(batch, str(error), maybe_stored=isinstance(error, Unavailable) and error.maybe_stored)

    def _again(self, batch: Batch, problem: str, *, maybe_stored: bool = False) -> None:
        """Nothing of it is stored, or nobody knows. Its members go again, each by itself."""
        members = self._ended(batch)
        for publish in members:
            publish.alone, publish.problem = True, problem
            publish.maybe_stored = publish.maybe_stored or maybe_stored
        self._window.first(members)
        if self.gathered:
            self.flush_soon()

    def _ended(self, batch: Batch) -> list[Publish]:
        """The batch is not under way any more. Returns the members that still wait for what comes of it."""
        del self.batches[batch.token]
        members = [each for each in batch.members if each.batch == batch.token]
        self._window.take(members)
        return members
