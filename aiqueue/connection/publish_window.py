"""The window: a connection's publishes that await a PubAck. A bounded number is in flight, the rest is queued behind
them, and failed tries are retried.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from ..config import Settings
from ..errors import AIQueueError, Conflict, NotFound, Unavailable
from . import faults, frames
from .batches import Batch, StreamBatcher
from .dial import reconnect_delay_s
from .publish_types import Publish
from .stream_lookup import NO_LEADER, StreamLookups, split_by_deadline

log = logging.getLogger(__name__)

IN_FLIGHT_MAX = 4_096  # publishes of one connection that await the server's reply
IN_FLIGHT_BYTES_MAX = 32 * 1024 * 1024
TRY_S = 5.0  # one try; the caller's own timeout spans all tries
ASK_S = 1.0  # a try without a reply for so long: does a stream match the subject at all?
NO_REPLY = "no PubAck in time"
FOREIGN_REPLY = "no PubAck in time, only replies of other subscribers to the subject"
CONNECTION_LOST = "the connection was lost before the PubAck"


class WindowConnection(Protocol):
    """What the window needs of its connection."""

    @property
    def connected(self) -> bool: ...
    @property
    def closing(self) -> bool: ...
    @property
    def max_payload(self) -> int: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def reply_prefix(self) -> bytes: ...
    def write(self, encoded: bytes) -> None: ...
    def push(self) -> None: ...
    async def api(self, subject: str, request: dict[str, Any] | None = None) -> dict[str, Any]: ...


class Window:
    """The publishes of one connection, sent in order. One timer serves all their time limits.

    A publish is in one place at a time: queued, gathered by a batcher, in flight, waiting for its retry, or waiting for
    a lookup of its stream.
    """

    def __init__(self, connection: WindowConnection) -> None:
        self._connection = connection
        self._in_flight: dict[bytes, Publish] = {}  # by token, in the order of sending
        self._in_flight_bytes = 0
        self._queue: deque[Publish] = deque()
        self._retries: list[Publish] = []  # sent again together, by the retry timer
        self._overdue: set[bytes] = set()  # tokens of tries in flight for more than ASK_S
        self._lookups = StreamLookups(connection.api, self._on_lookup)
        self._batchers: dict[str, StreamBatcher] = {}  # by stream
        self._batch_name = secrets.token_hex(6)
        self._count = 0
        self.patient = 0  # callers who store several messages at once: the first is not pushed ahead of the others
        self._loop: asyncio.AbstractEventLoop | None = None  # cached: getting it is a system call in Python 3.11
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._retry_timer: asyncio.TimerHandle | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def add(self, publish: Publish, timeout_s: float) -> None:
        """Send `publish`, or queue it. The window settles it within `timeout_s` seconds, unless it is abandoned."""
        publish.deadline = publish.check_at = self.loop.time() + timeout_s
        if publish.stream and publish.batcher is None:
            publish.batcher = self._get_batcher(publish.stream)
        if self._queue or not self.ready:
            if self._connection.closing:
                self._end_publish(publish, Unavailable("the connection was closed"))
                return
            self._queue.append(publish)
            self.set_timer(publish.deadline)
        else:
            self._send_or_gather(publish)

    def add_all(self, publishes: Sequence[Publish], timeout_s: float) -> None:
        """As `add` for each of these publishes, which have one `stream`, or none."""
        batcher = self._get_batcher(publishes[0].stream) if publishes[0].stream else None
        if self._queue or self.room < len(publishes) or not self.ready or (batcher is not None and batcher.gathers):
            for publish in publishes:
                self.add(publish, timeout_s)
            return
        now = self.loop.time()
        deadline = now + timeout_s
        for publish in publishes:
            publish.deadline, publish.batcher = deadline, batcher
        self._register_in_flight(publishes, now)
        self._connection.write(frames.stream_publish_frames(publishes, self._connection.reply_prefix))

    def abandon(self, publishes: Iterable[Publish]) -> None:
        """Forget these publishes: those not yet sent are never sent, and none of them is settled."""
        unsent = set()
        for publish in publishes:
            if self._in_flight.get(publish.token) is publish:
                self.remove_in_flight((publish,))
            else:
                unsent.add(id(publish))
        if unsent:
            self._drop_unsent(unsent)
        self.pump()

    def on_reply(self, token: bytes, data: bytes, block: bytes | None) -> bool:
        """Handle a reply of the server. Returns False if it belongs to no publish in flight."""
        publish = self._in_flight.pop(token, None)
        if publish is None:
            return any(batcher.on_reply(token, data, block) for batcher in self._batchers.values())
        outcome = None if block else frames.parse_usual_ack(data)
        if outcome is None:
            self._on_unusual_reply(publish, token, data, block)
        else:
            self._in_flight_bytes -= len(publish.body)
            if publish.batcher is not None:
                publish.batcher.count_reply()
            publish.outcome = outcome
            publish.settled()
        if self._queue:
            self.pump()
        return True

    def _on_unusual_reply(self, publish: Publish, token: bytes, data: bytes, block: bytes | None) -> None:
        """Handle a reply that is not a new message's PubAck, or not a stream's reply at all."""
        status = frames.read_headers(block)[1] if block else None
        no_responders = status is not None and status.code == 503
        outcome: frames.PubAck | AIQueueError | None = None
        if not no_responders:
            try:
                outcome = frames.PubAck.parse(data, publish.subject)
            except AIQueueError as error:
                outcome = error
            if outcome is None:  # not a stream's reply: it may be still to come
                publish.problem = FOREIGN_REPLY
                self._in_flight[token] = publish
                return
        self._in_flight_bytes -= len(publish.body)
        if publish.batcher is not None:
            publish.batcher.count_reply()
        if no_responders:
            self.set_timer(publish.deadline)
            self._lookups.add(publish)
        elif isinstance(outcome, frames.PubAck):
            publish.outcome = outcome
            publish.settled()
        elif isinstance(outcome, Unavailable) or (isinstance(outcome, Conflict) and not publish.fenced):
            self._retry_later(
                publish, outcome
            )  # a conflict of err_code 10158: a message with this Msg-Id is being stored
        elif outcome is not None:
            self._end_publish(publish, outcome)

    def on_disconnected(self) -> None:
        """The connection is lost: what was in flight goes to the head of the queue, in its order."""
        unsent = sorted(self._in_flight.values(), key=lambda each: int(each.token, 16))
        self._in_flight.clear()
        self._in_flight_bytes = 0
        for publish in unsent:
            publish.maybe_stored, publish.problem = True, CONNECTION_LOST
            publish.unbatched, publish.batch_token = bool(publish.batch_token), b""
            self.set_timer(publish.deadline)
        for batcher in self._batchers.values():
            unsent += batcher.reset()
        self.requeue(unsent)

    def on_reconnected(self) -> None:
        self.pump()

    def deny_subject(self, denied: str) -> None:
        """End the publishes on `denied`, a subject that this user may not publish to. `denied` is in lower case, as
        nats-py reports it.
        """
        for publish in list(self._in_flight.values()):
            if publish.subject.lower() == denied:
                self.remove_in_flight((publish,))
                error = faults.denied("publish", publish.subject)
                self._end_publish(publish, error)
        for batcher in self._batchers.values():
            batcher.deny_subject(denied)
        self.pump()

    def close(self) -> set[asyncio.Task[None]]:
        """End all publishes with Unavailable, and stop all timers. Returns the cancelled tasks that still run."""
        for timer in (self._timer, self._retry_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._retry_timer = None
        self._timer_at = math.inf
        for publish in self._in_flight.values():
            publish.maybe_stored = True
        looked_up, tasks = self._lookups.close()
        gathered = [each for batcher in self._batchers.values() for each in batcher.reset()]
        unsettled = [*self._in_flight.values(), *self._retries, *looked_up, *gathered, *self._queue]
        self._in_flight.clear()
        self._in_flight_bytes = 0
        self._queue.clear()
        self._retries.clear()
        for publish in unsettled:
            self._end_publish(publish, Unavailable("the connection was closed", maybe_stored=publish.maybe_stored))
        return tasks

    # -- for the batchers

    @property
    def ready(self) -> bool:
        """Whether the window may send one more publish."""
        return (
            len(self._in_flight) < IN_FLIGHT_MAX
            and self._in_flight_bytes <= IN_FLIGHT_BYTES_MAX
            and self._connection.connected
        )

    @property
    def room(self) -> int:
        """How many more publishes may be in flight."""
        return IN_FLIGHT_MAX - len(self._in_flight)

    def now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    @property
    def connected(self) -> bool:
        return self._connection.connected

    @property
    def max_payload(self) -> int:
        return self._connection.max_payload

    def send(self, publish: Publish) -> None:
        self._register_in_flight((publish,), self.now())
        self._connection.write(frames.stream_publish_frames((publish,), self._connection.reply_prefix))

    def new_batch(self) -> Batch:
        self._count += 1
        # no other token starts with "g"
        return Batch(f"{self._batch_name}-{self._count:x}", b"g%x" % self._count, self.now() + TRY_S)

    def send_batch(self, batch: Batch, members: list[Publish], *, last: bool) -> None:
        """Send the next `members` of `batch` at once, so that the server works while callers run. With `last`, they
        complete it.
        """
        self._register_in_flight(members, self.now(), batch.token)
        first = len(batch.members) + 1
        batch.members += members
        batch.open = not last
        reply = self._connection.reply_prefix + batch.token
        self._connection.write(frames.batch_frames(batch.name.encode(), members, first, reply, last=last))
        self._connection.push()
        self.set_timer(batch.deadline)

    def remove_in_flight(self, publishes: Iterable[Publish]) -> None:
        """Take these publishes out of flight."""
        for publish in publishes:
            del self._in_flight[publish.token]
            self._in_flight_bytes -= len(publish.body)
            if publish.batcher is not None:
                publish.batcher.forget(publish)

    def requeue(self, publishes: Sequence[Publish]) -> None:
        """Put these publishes at the head of the queue, in their order."""
        self._queue.extendleft(reversed(publishes))

    def set_timer(self, due_at: float) -> None:
        """Have `_check_time_limits` called at `due_at` or earlier."""
        if self._timer_at <= due_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(due_at, self._check_time_limits)
        self._timer_at = due_at

    def pump(self) -> None:
        """Send from the queue what may be sent."""
        queue = self._queue
        while queue and self.ready:
            self._send_or_gather(queue.popleft())
        for batcher in self._batchers.values():
            if batcher.gathered:
                batcher.flush_soon()

    # -- private

    def _get_batcher(self, stream: str) -> StreamBatcher:
        batcher = self._batchers.get(stream)
        if batcher is None:
            batcher = self._batchers[stream] = StreamBatcher(self, stream)
        return batcher

    def _send_or_gather(self, publish: Publish) -> None:
        if publish.batcher is None or not publish.batcher.gather(publish):
            self.send(publish)

    def _register_in_flight(self, publishes: Sequence[Publish], now: float, batch_token: bytes = b"") -> None:
        """Register `publishes` as in flight. They all have the same batcher, or none."""
        ask_at = soonest = check_at = now + ASK_S
        count, size, deadline = self._count, 0, 0.0
        for count, publish in enumerate(publishes, count + 1):  # noqa: B020
            publish.token = token = b"%x" % count
            if batch_token:
                publish.batch_token = batch_token
            if publish.deadline != deadline:  # most have that of the one before
                deadline = publish.deadline
                check_at = min(deadline, ask_at)
                soonest = min(soonest, check_at)
            publish.check_at = check_at
            self._in_flight[token] = publish
            size += len(publish.body)
        self._count = count
        self._in_flight_bytes += size
        batcher = publishes[0].batcher
        if batcher is not None:
            batcher.count_sent(now, len(publishes))
        if soonest < self._timer_at:
            self.set_timer(soonest)

    def _drop_unsent(self, dropped: set[int]) -> None:
        """Remove the publishes with these `id`s from wherever they wait."""
        self._queue = deque(each for each in self._queue if id(each) not in dropped)
        self._retries = [each for each in self._retries if id(each) not in dropped]
        self._lookups.drop(dropped)
        for batcher in self._batchers.values():
            batcher.gathered = deque(each for each in batcher.gathered if id(each) not in dropped)

    def _end_publish(self, publish: Publish, error: AIQueueError) -> None:
        publish.outcome = error
        publish.settled()

    def _time_out_publish(self, publish: Publish) -> None:
        problem = publish.problem or f"no connection to {self._connection.settings.addresses}"
        self._end_publish(publish, Unavailable(f"{publish.subject}: {problem}", maybe_stored=publish.maybe_stored))

    def _check_time_limits(self) -> None:
        """End the publishes that are past their deadline, look up the streams of those that wait long, retry those that
        got no reply, and set the next timer.
        """
        self._timer, self._timer_at = None, math.inf
        now = asyncio.get_running_loop().time() + 0.001
        for batcher in self._batchers.values():
            batcher.expire_batches(now)
        self._overdue.intersection_update(self._in_flight)
        for publish in [each for each in self._in_flight.values() if each.check_at <= now]:
            if publish.deadline > now and publish.token not in self._overdue:
                self._overdue.add(publish.token)
                publish.check_at = min(now + TRY_S - ASK_S, publish.deadline)
                self._lookups.start(publish.subject)
                continue
            self.remove_in_flight((publish,))
            publish.maybe_stored = True
            if publish.problem != FOREIGN_REPLY:
                publish.problem = NO_REPLY
            if publish.deadline <= now:
                self._time_out_publish(publish)
            else:
                self._retries.append(publish)
        self._queue, late = split_by_deadline(self._queue, now)
        retries, late_retries = split_by_deadline(self._retries, now)
        self._retries = list(retries)
        late += self._lookups.take_late(now)
        for batcher in self._batchers.values():
            batcher.gathered, late_gathered = split_by_deadline(batcher.gathered, now)
            late += late_gathered
        for publish in [*late_retries, *late]:
            self._time_out_publish(publish)
        if self._retries:
            self._schedule_retries(0.0)
        limits = [each.check_at for each in self._in_flight.values()]
        limits += [each.deadline for each in (*self._queue, *self._retries, *self._lookups.publishes())]
        for batcher in self._batchers.values():
            limits += [each.deadline for each in batcher.gathered]
            limits += [each.deadline for each in batcher.batches.values()]
        if limits:
            self.set_timer(min(limits))
        self.pump()

    def _retry_later(self, publish: Publish, error: AIQueueError) -> None:
        """Retry after a backoff, together with the other publishes that wait for the retry timer."""
        publish.problem = str(error)
        publish.maybe_stored = publish.maybe_stored or (isinstance(error, Unavailable) and error.maybe_stored)
        if self._connection.closing:
            self._time_out_publish(publish)
            return
        log.debug("publish to %s failed, will retry: %s", publish.subject, error)
        self._retries.append(publish)
        self.set_timer(publish.deadline)
        self._schedule_retries(reconnect_delay_s(publish.tries))
        publish.tries += 1

    def _schedule_retries(self, delay_s: float) -> None:
        if self._retry_timer is None:
            self._retry_timer = asyncio.get_running_loop().call_later(delay_s, self._send_retries)

    def _send_retries(self) -> None:
        self._retry_timer = None
        retries, self._retries = self._retries, []
        self._queue.extendleft(reversed(retries))
        self.pump()

    def _on_lookup(self, subject: str, waiting: list[Publish], problem: str, final: bool) -> None:
        """A lookup of a stream has ended. If its problem is final, end the publishes that wait for it, and those of the
        subject that wait long; else retry those that nobody took.
        """
        if final:
            overdue = [
                each for each in self._in_flight.values() if each.subject == subject and each.token in self._overdue
            ]
            self.remove_in_flight(overdue)
            waiting += overdue
        for publish in waiting:
            if not final:
                self._retry_later(publish, Unavailable(problem))
            elif problem is NO_LEADER:
                missing = f"no stream matches subject {subject}: run `aiqueue apply` on this server first"
                self._end_publish(publish, NotFound(missing))
            else:
                self._end_publish(publish, Unavailable(problem, maybe_stored=publish.maybe_stored))
