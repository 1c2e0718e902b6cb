"""Standing pulls: a worker's open requests for jobs, kept at the right number on every lane.

The server answers a pull request with messages until its batch is full or it expires; what it then says
(408, 409, Nats-Pending-Messages) or fails to say (heartbeats) repairs our count of open credits (ADR-37).
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .connection import Connection, Received, Status, Subscription, ack_info
from .errors import AIQueueError
from .subjects import Lane

log = logging.getLogger("aiqueue.puller")

EXPIRES_S = 30.0
HEARTBEAT_S = 5.0
DEAF_AFTER_S = 2.5 * HEARTBEAT_S
PREFETCH_S = 0.02  # hold about as many waiting jobs as the slots finish in this time


@dataclass(slots=True)
class Delivery:
    """A leased job as it came in. `enqueued_at` is when it was stored, seconds since the epoch."""

    lane: LanePull
    message: Received
    seq: int
    delivered: int
    enqueued_at: float
    arrived: float

    @property
    def reply(self) -> str:
        return self.message.reply


@dataclass(slots=True, eq=False)
class LanePull:
    """A lane's consumer and the credits that are open on it."""

    key: Lane
    stream: str
    consumer: str
    ack_wait_s: float
    token: str = ""
    pending: int = 1  # what the server holds for us beyond the credits, as far as we were told
    requests: dict[int, int] = field(default_factory=dict)  # request -> credits left, the oldest first
    waiting: deque[Delivery] = field(default_factory=deque)  # delivered, no slot yet
    heard: float = 0.0
    active: float = 0.0
    retiring: bool = False  # idle: to be let go when its last pull has expired

    @property
    def credits(self) -> int:
        """Deliveries that open requests may still bring."""
        return sum(self.requests.values())


def prefetch(concurrency: int, handler_s: float | None) -> int:
    """How many jobs to hold beyond the slots: what `concurrency` slots end in PREFETCH_S seconds, at most as many
    as there are slots. None (no job has ended yet) is none: a job must not wait here while another worker idles.
    """
    if handler_s is None:
        return 0
    return min(concurrency, int(concurrency * PREFETCH_S / max(handler_s, 1e-6)))


def shares(lanes: Iterable[LanePull], free: int) -> list[tuple[LanePull, int]]:
    """How many more credits each lane with waiting jobs gets of `free`: equal parts, and what a short lane does not
    need goes to the longer ones. A lane below half of its part waits until it is worth a request.
    """
    busy = sorted((lane for lane in lanes if lane.pending > 0 and not lane.retiring), key=lambda lane: lane.pending)
    budget = free - sum(lane.credits for lane in busy)
    parts: list[tuple[LanePull, int]] = []
    left = free
    for position, lane in enumerate(busy):
        part = max(1, left // (len(busy) - position))
        target = min(part, lane.pending)
        left -= target
        more = min(target - lane.credits, budget)
        if more > 0 and (more * 2 >= target or lane.credits == 0):
            parts.append((lane, more))
            budget -= more
    return parts


class Puller:
    """The open pulls of one worker. `deliver` is called with each delivery, `gone` with a lane whose consumer the
    server no longer has.
    """

    def __init__(
        self, connection: Connection, *, deliver: Callable[[Delivery], None], gone: Callable[[LanePull], None]
    ) -> None:
        self._connection = connection
        self._deliver = deliver
        self._gone = gone
        self._lanes: dict[str, LanePull] = {}
        self._by_consumer: dict[tuple[str, str], LanePull] = {}
        self._turn: deque[LanePull] = deque()
        self._numbers = itertools.count(1)
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pulling = False
        self._off: Callable[[], None] | None = None

    @property
    def lanes(self) -> Iterable[LanePull]:
        return self._by_consumer.values()

    async def open(self) -> None:
        self._inbox = self._connection.new_inbox() + "."
        self._subscription = await self._connection.subscribe(self._inbox + "*.*", self._on_message)
        self._off = self._connection.on_regained(self._forget_requests)
        self._pulling = True

    def stop(self) -> None:
        """Ask for no more; what open pulls still bring is delivered."""
        self._pulling = False

    async def close(self) -> None:
        """Take the interest away: the server drops the open pulls, and what it had sent by then is still delivered.
        Safe twice and unopened.
        """
        self.stop()
        if self._off is not None:
            self._off()
            self._off = None
        if self._subscription is not None:
            await self._subscription.drain()
            self._subscription = None

    def add(self, lane: LanePull) -> None:
        lane.token = f"{next(self._numbers):x}"
        lane.active = lane.heard = time.monotonic()
        self._lanes[lane.token] = lane
        self._by_consumer[lane.stream, lane.consumer] = lane
        self._turn.append(lane)

    def remove(self, lane: LanePull) -> None:
        self._lanes.pop(lane.token, None)
        if self._by_consumer.get((lane.stream, lane.consumer)) is lane:
            del self._by_consumer[lane.stream, lane.consumer]
            self._turn.remove(lane)

    async def refill(self, free: int) -> None:
        """Open credits for `free` more deliveries, to lanes with waiting jobs in turn; a lane without any keeps one
        open credit, so that its next job starts at once.
        """
        if not self._pulling or not self._connection.connected:
            return
        for lane, more in shares(self._turn, free):
            await self._pull(lane, more)
        self._turn.rotate(-1)
        if free > 0:
            for lane in [lane for lane in self._turn if not lane.requests and not lane.retiring]:
                await self._pull(lane, 1)

    def tend(self) -> None:
        """To be called once a second: pulls whose heartbeats stay away are given up, so that refill opens new ones."""
        now = time.monotonic()
        for lane in self._turn:
            if lane.requests and now - lane.heard > DEAF_AFTER_S:
                log.info("no heartbeat on lane %s for %.0f s: pulling again", lane.key, now - lane.heard)
                lane.requests.clear()
                lane.pending = max(lane.pending, 1)

    async def _pull(self, lane: LanePull, batch: int) -> None:
        number = next(self._numbers)
        request = {"batch": batch, "expires": int(EXPIRES_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        try:
            await self._connection.publish(
                f"$JS.API.CONSUMER.MSG.NEXT.{lane.stream}.{lane.consumer}",
                json.dumps(request).encode(),
                reply=f"{self._inbox}{lane.token}.{number:x}",
            )
        except AIQueueError as error:
            log.debug("pull on %s: %s", lane.key, error)
            return
        lane.requests[number] = batch
        lane.heard = time.monotonic()

    def _on_message(self, message: Received) -> None:
        if message.subject.startswith(self._inbox):
            if message.status is not None:
                self._on_status(message, message.status)
            return
        info = ack_info(message.reply)
        lane = self._by_consumer.get((info.stream, info.consumer))
        if lane is None:
            return  # a lane let go while its pull was open: the lease runs out and another worker has it
        now = time.monotonic()
        lane.heard = lane.active = now
        lane.retiring = False
        lane.pending = info.pending
        for number, left in lane.requests.items():
            if left > 1:
                lane.requests[number] = left - 1
            else:
                del lane.requests[number]
            break
        self._deliver(Delivery(lane, message, info.seq, info.delivered, info.time, now))

    def _on_status(self, message: Received, said: Status) -> None:
        token, _, number = message.subject[len(self._inbox) :].partition(".")
        lane = self._lanes.get(token)
        if lane is None:
            return
        lane.heard = time.monotonic()
        if said.code == 100:
            return
        lane.requests.pop(int(number, 16), None)
        if said.code in (404, 408):
            # expired with credits left: the server had nothing more for this pull
            lane.pending = max(0, lane.pending if lane.requests else 0)
        elif said.code == 503 or (said.code == 409 and "Deleted" in said.description):
            self._gone(lane)
        else:
            log.debug("pull on %s ended: %d %s", lane.key, said.code, said.description)
            lane.pending = max(lane.pending, 1)

    def _forget_requests(self) -> None:
        """The link was lost, and with it every open pull."""
        for lane in self._turn:
            lane.requests.clear()
            lane.pending = max(lane.pending, 1)
