"""Group commit: publishes that wait at the same time go into their stream as one atomic batch, where batches are faster
than singles. That depends on server settings which a client cannot read (docs/decisions/group-commit.md), so `pace`
measures both ways.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

from ..errors import AIQueueError, BadInput, Conflict, QueueFull, Unavailable
from . import faults, frames
from .pace import Pace
from .publish_types import Publish

log = logging.getLogger(__name__)

BATCH_MAX = 1_000  # messages: the server's limit
BATCH_BYTES_MAX = 4 * 1024 * 1024  # of one part; a batch that was opened early has two parts
FEW = 16  # fewer than this go as singles: a batch costs the server some six writes to disk
ENOUGH = 200  # from twice as many on, half of them go: the server stores these while the callers of the others run
BATCHES_IN_FLIGHT_MAX = 2  # the server can start on the second as soon as the first is stored
TRIAL_MAX = 32  # singles in flight during a trial of singles: the batch after the trial waits for them
PAUSE_S, PAUSE_MAX_S = 10.0, 600.0  # without batches, after the stream has refused one


class Batch:
    """Publishes that a stream stores all together or not at all. The window counts each of them as in flight.

    `open`: more messages follow. The server stores the batch once it has the last one.
    """

    __slots__ = ("deadline", "members", "name", "open", "token")

    def __init__(self, name: str, token: bytes, deadline: float) -> None:
        self.name = name
        self.token = token
        self.members: list[Publish] = []
        self.open = True
        self.deadline = deadline


class BatchWindow(Protocol):
    """What a batcher needs of its window."""

    @property
    def connected(self) -> bool: ...
    @property
    def ready(self) -> bool: ...
    @property
    def room(self) -> int: ...
    @property
    def max_payload(self) -> int: ...
    def now(self) -> float: ...
    def send(self, publish: Publish) -> None: ...
    def new_batch(self) -> Batch: ...
    def send_batch(self, batch: Batch, members: list[Publish], *, last: bool) -> None: ...
    def remove_in_flight(self, publishes: Iterable[Publish]) -> None: ...
    def requeue(self, publishes: Sequence[Publish]) -> None: ...
    def set_timer(self, due_at: float) -> None: ...
    def pump(self) -> None: ...


class StreamBatcher:
    """One connection's publishes to one stream: gathers them, and sends them as batches or as singles.

    The window reports what happens to publishes in flight: `count_sent`, `count_reply`, `forget`, `deny_subject`,
    `expire_batches`, `on_reply`, `reset`.
    """

    def __init__(self, window: BatchWindow, stream: str) -> None:
        self.gathered: deque[Publish] = deque()  # not sent yet, in order
        self.batches: dict[bytes, Batch] = {}  # in flight, by token
        self.pace = Pace()
        self._stream = stream
        self._window = window
        self._in_flight = 0  # publishes, those in batches included
        self._few = True  # few publishes were waiting at the last flush, so the next one is not held back
        self._flush_handle: asyncio.Handle | None = None
        self._pause_s = PAUSE_S

    @property
    def gathers(self) -> bool:
        """Whether `gather` may keep a publish now."""
        return bool(self.gathered) or self.pace.batches or self.pace.trying

    def gather(self, publish: Publish) -> bool:
        """Keep `publish` for the next flush. Returns False if the window must send it as a single now."""
        if not self.gathered:
            if not (self.pace.batches or self.pace.trying):
                return False
            if self._few and self._in_flight < FEW:
                return False
        if publish.unbatched:
            return False
        self.gathered.append(publish)
        self._window.set_timer(publish.deadline)
        self.flush_soon()
        self._few = False
        if len(self.gathered) == FEW and not (self._in_flight or self.batches) and self.pace.batches:
            self._open_batch()
        return True

    # -- what the window reports

    def count_sent(self, now: float, count: int) -> None:
        if not self._in_flight:
            self.pace.start_load(now)
        self._in_flight += count

    def count_reply(self) -> None:
        """The reply to one single has come."""
        measure_now = self.pace.count_replies(1, self._in_flight)
        self._in_flight -= 1
        if measure_now:
            self.pace.measure(self._window.now(), self._in_flight)
        if self.gathered:
            self.flush_soon()

    def forget(self, publish: Publish) -> None:
        """`publish` is no longer in flight: nobody waits for its reply."""
        publish.batch_token = b""
        self._in_flight -= 1

    def reset(self) -> deque[Publish]:
        """The connection is lost, and all replies with it. Returns the gathered publishes, and keeps none."""
        self.batches.clear()
        self._in_flight = 0
        gathered, self.gathered = self.gathered, deque()
        return gathered

    def deny_subject(self, denied: str) -> None:
        """The server dropped a message on `denied` (in lower case), so a batch with such a message cannot complete."""
        for batch in list(self.batches.values()):
            if any(each.subject.lower() == denied for each in batch.members):
                self._fail_batch(batch, faults.denied("publish", denied))

    def expire_batches(self, now: float) -> None:
        """Fail batches that got no reply in time."""
        for batch in list(self.batches.values()):
            if batch.deadline <= now:
                self._fail_batch(batch, Unavailable("no reply to a batch of jobs", maybe_stored=True))

    def on_reply(self, token: bytes, data: bytes, block: bytes | None) -> bool:
        """Handle a reply. Returns False if it belongs to no batch in flight."""
        batch = self.batches.get(token)
        if batch is None:
            return False
        if not data and not block:
            return True  # the server has accepted one part of the batch
        try:
            if block:  # status 503
                raise Unavailable("no stream stores the jobs of this batch")
            ack = frames.parse_stream_reply(data, self._stream)
            if ack is None:
                return True  # from another subscriber of the subject: the stream's reply is still to come
            if ack.get("count") != len(batch.members):
                raise Unavailable(
                    "the reply to a batch of jobs came from another program than the server", maybe_stored=True
                )
            last_seq = int(ack["seq"])
        except AIQueueError as error:
            self._fail_batch(batch, error)
            self._window.pump()
        else:
            self._settle_batch(batch, ack["stream"], last_seq)
        return True

    # -- sending

    def flush_soon(self) -> None:
        """Flush at the end of this turn of the event loop, with all that is gathered until then."""
        if self._flush_handle is None:
            self._flush_handle = asyncio.get_running_loop().call_soon(self._flush_gathered)

    def _flush_gathered(self, returning: int = 0) -> None:
        """Send what may be sent now. `returning`: so many publishes were answered just now, so about as many new ones
        are likely to follow.
        """
        if self._flush_handle is not None:
            self._flush_handle.cancel()
            self._flush_handle = None
        window, pace, gathered = self._window, self.pace, self.gathered
        for batch in self.batches.values():
            if batch.open and window.connected:  # without a connection the batch is lost, and `reset` follows
                self._complete_batch(batch, self._next_size(returning))
                break
        while gathered and len(self.batches) < BATCHES_IN_FLIGHT_MAX:
            if not window.ready:
                window.requeue(self.gathered)
                self.gathered = deque()
                return
            count = len(gathered)
            if self.batches:
                if pace.batches and count >= max(ENOUGH, self._in_flight * 2 // 3):
                    self._send_gathered(self._next_size(returning))
                return
            if count + self._in_flight < FEW:
                self._few = True
            elif pace.batches:
                if count < max(FEW, self._in_flight):
                    return  # the next reply flushes again
                self._send_gathered(self._next_size(returning))
                continue
            elif pace.trying and self._in_flight >= TRIAL_MAX:
                return
            window.send(gathered.popleft())

    def _next_size(self, returning: int) -> int:
        """How many of the gathered publishes go now, if `returning` more are about to follow."""
        count = len(self.gathered)
        half = (count + returning + self._in_flight + 1) // 2
        return count if half < ENOUGH else min(count, half)

    def _open_batch(self) -> None:
        """Send the first messages of a batch early: the server creates the batch's files while other callers run. The
        next flush, at the end of this turn of the event loop, completes the batch.
        """
        if self._window.ready and (members := self._pop_members(FEW - 1)):
            self._start_batch(members, last=False)

    def _complete_batch(self, batch: Batch, count: int) -> None:
        """Send the rest of an open batch: `count` messages, or as many as the limits allow."""
        members = self._pop_members(max(1, min(count, BATCH_MAX - len(batch.members), self._window.room)))
        if members:
            self._window.send_batch(batch, members, last=True)
        else:  # the next publish was abandoned meanwhile, or has no room for a batch's headers
            self._retry_as_singles(batch, "its atomic batch was not completed")
            self._window.pump()

    def _send_gathered(self, count: int) -> None:
        members = self._pop_members(min(count, BATCH_MAX, self._window.room))
        if len(members) > 1:
            self._start_batch(members, last=True)
        else:
            self._window.send(members[0] if members else self.gathered.popleft())
            self.flush_soon()

    def _start_batch(self, members: list[Publish], *, last: bool) -> None:
        batch = self._window.new_batch()
        self.batches[batch.token] = batch
        self._window.send_batch(batch, members, last=last)

    def _pop_members(self, limit: int) -> list[Publish]:
        """Up to `limit` of the gathered publishes, in order. Stops before one that has no room for a batch's headers,
        and once BATCH_BYTES_MAX is reached.
        """
        gathered, bytes_left = self.gathered, BATCH_BYTES_MAX
        block_max = frames.HEADERS_MAX - frames.BATCH_HEADERS_MAX
        size_max = self._window.max_payload - frames.BATCH_HEADERS_MAX
        members: list[Publish] = []
        while gathered and len(members) < limit and bytes_left > 0:
            publish = gathered[0]
            block_size = len(publish.block)
            size = block_size + len(publish.body)
            if block_size > block_max or size > size_max:
                break
            bytes_left -= size
            members.append(gathered.popleft())
        return members

    # -- the outcome of a batch

    def _settle_batch(self, batch: Batch, stream: str, last_seq: int) -> None:
        """The stream has stored the batch. Its messages have consecutive sequences, up to `last_seq`."""
        self._pause_s = PAUSE_S
        self.pace.count_replies(len(batch.members), self._in_flight)
        awaited = [each.batch_token == batch.token for each in batch.members]
        self._remove_batch(batch)
        self.pace.measure(self._window.now(), self._in_flight)
        if len(self.gathered) >= ENOUGH:
            self._flush_gathered(len(batch.members))  # before the callers run: the server must not wait for them
        for seq, publish in enumerate(batch.members, last_seq - len(batch.members) + 1):
            if awaited[seq - last_seq - 1]:
                publish.outcome = frames.PubAck(stream, seq, False)
                publish.settled()
        if self.gathered:
            self.flush_soon()

    def _fail_batch(self, batch: Batch, error: AIQueueError) -> None:
        """The batch failed with `error`. Unless one member is the cause, pause batches on this stream."""
        if not isinstance(error, Conflict | QueueFull | BadInput):  # these a single message would meet as well
            log.debug("stream %s: no atomic batches for %g s: %s", self._stream, self._pause_s, error)
            if self.pace.batches or self.pace.trying:
                self.pace.pause_batches(self._window.now(), self._pause_s)
                self._pause_s = min(self._pause_s * 2, PAUSE_MAX_S)
        maybe_stored = isinstance(error, Unavailable) and error.maybe_stored
        self._retry_as_singles(batch, str(error), maybe_stored=maybe_stored)

    def _retry_as_singles(self, batch: Batch, problem: str, *, maybe_stored: bool = False) -> None:
        """The stream has stored nothing of the batch, or its state is unknown. Send its members again, as singles."""
        members = self._remove_batch(batch)
        for publish in members:
            publish.unbatched, publish.problem = True, problem
            publish.maybe_stored = publish.maybe_stored or maybe_stored
        self._window.requeue(members)
        if self.gathered:
            self.flush_soon()

    def _remove_batch(self, batch: Batch) -> list[Publish]:
        """The batch is no longer in flight. Returns the members that nobody has abandoned."""
        del self.batches[batch.token]
        members = [each for each in batch.members if each.batch_token == batch.token]
        self._window.remove_in_flight(members)
        return members
