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
BATCH_BYTES_MAX = 4 * 1024 * 1024
FEW = 16  # below so many, singles are as fast: a batch costs the server some six writes to disk
ENOUGH = 100  # from twice as many up, half of them go: the others' callers and the server then work side by side
TRIAL_MAX = 64  # singles under way while they are tried
PAUSE_S, PAUSE_MAX_S = 10.0, 600.0  # without batches, where the stream does not take them


class Batch:
    """Publishes that a stream stores all, or none. In the window they are under way like others."""

    __slots__ = ("due", "members", "token")

    def __init__(self, token: bytes, members: list[Publish], due: float) -> None:
        self.token = token
        self.members = members
        self.due = due


class Group:
    """One connection's publishes to one stream: those gathered here are not sent yet, first come first."""

    def __init__(self, window: Window, stream: str) -> None:
        self.gathered: deque[Publish] = deque()
        self.batch: Batch | None = None  # the one under way
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
        self._quiet = False
        self.gathered.append(publish)
        self._window.watch(publish.end)
        self.flush_soon()
        return True

    # -- what the window says of publishes under way

    def sent(self, now: float) -> None:
        if not self._under_way:
            self.pace.begin(now)
        self._under_way += 1

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
        self.batch = None
        self._under_way = 0
        gathered, self.gathered = self.gathered, deque()
        return gathered

    def refused(self, denied: str) -> None:
        """A message of a batch on this subject, in lower case, was not let in: that batch cannot be whole."""
        batch = self.batch
        if batch is not None and any(each.subject.lower() == denied for each in batch.members):
            self._failed(batch, AccessDenied(f"this user may not publish to {denied}"))

    def expire(self, now: float) -> None:
        """Give up a batch that was not answered in time."""
        if self.batch is not None and self.batch.due <= now:
            self._failed(self.batch, Unavailable("no answer to a batch", maybe_stored=True))

    def told(self, token: bytes, data: bytes, block: bytes | None) -> bool:
        """An answer; False if it belongs to no batch under way."""
        batch = self.batch
        if batch is None or batch.token != token:
            return False
        if not data and not block:
            return True  # the first message is taken in
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
        while gathered and self.batch is None:
            if not window.ready:
                window.first(self.gathered)
                self.gathered = deque()
                return
            count = len(gathered)
            if count + self._under_way < FEW:
                self._quiet = True
            elif pace.batches:
                if count >= max(FEW, self._under_way):
                    half = (count + back + 1) // 2
                    self._send_batch(count if half < ENOUGH else min(count, half))
                return  # the next answer flushes again
            elif pace.trying and self._under_way >= TRIAL_MAX:
                return
            window.send(gathered.popleft())

    def _send_batch(self, count: int) -> None:
        window, gathered = self._window, self.gathered
        most = min(count, BATCH_MAX, window.room)
        members: list[Publish] = []
        size = 0
        while gathered and len(members) < most and size < BATCH_BYTES_MAX:
            publish = gathered[0]
            if not window.leaves_room(publish, frames.BATCH_HEADERS_MAX):
                break
            size += len(publish.block) + len(publish.body)
            members.append(gathered.popleft())
        if len(members) > 1:
            self.batch = window.send_batch(members)
        else:
            window.send(members[0] if members else gathered.popleft())
            self.flush_soon()

    # -- what came of a batch

    def _stored(self, batch: Batch, stream: str, last: int) -> None:
        """Its messages have the sequences up to `last`, without a gap."""
        self._pause_s = PAUSE_S
        self.pace.count(len(batch.members), self._under_way)
        waiting = set(map(id, self._ended(batch)))
        self.pace.look(self._window.now(), self._under_way)
        if len(self.gathered) >= ENOUGH:
            self._flush(len(batch.members))  # the server is not to wait until their callers have run
        for seq, publish in enumerate(batch.members, last - len(batch.members) + 1):
            if id(publish) in waiting:
                publish.outcome = frames.PubAck(stream, seq, False)
                publish.settled()
        if self.gathered:
            self.flush_soon()

    def _failed(self, batch: Batch, error: AIQueueError) -> None:
        """Nothing of it is stored, or nobody knows. Its members go again, each by itself."""
        if not isinstance(error, Conflict | QueueFull | BadInput):  # those are one member's, as it would be alone
            log.debug("%s: no batches for %g s: %s", self._stream, self._pause_s, error)
            self.pace.rest(self._window.now(), self._pause_s)
            self._pause_s = min(self._pause_s * 2, PAUSE_MAX_S)
        members = self._ended(batch)
        for publish in members:
            publish.alone, publish.problem = True, str(error)
            publish.maybe_stored = publish.maybe_stored or (isinstance(error, Unavailable) and error.maybe_stored)
        self._window.first(members)
        if self.gathered:
            self.flush_soon()

    def _ended(self, batch: Batch) -> list[Publish]:
        """The batch is not under way any more. Returns the members that still wait for what comes of it."""
        self.batch = None
        members = [each for each in batch.members if each.batch == batch.token]
        self._window.take(members)
        return members
