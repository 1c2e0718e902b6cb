"""Pulls: from which lanes a worker requests jobs, and how many.

There are two kinds of pull requests on a lane's consumer:

- A *standing pull*, for a lane without jobs on the server: it stays open, so that the next job starts at once.
- *Grants*, for a lane with jobs on the server: pulls that the server answers at once with what it has (no_wait).
  There are as many as the worker has capacity; `fairness` shares them among the lanes.

A credit is a delivery that was requested and has not arrived yet. The puller counts credits, and corrects the count by
the server's status messages (404, 408, 409) and by missing heartbeats (ADR-37).
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .. import headers
from ..connection import Connection, Received, Status, Subscription, ack_info
from ..errors import AIQueueError
from ..subjects import Lane
from . import fairness

log = logging.getLogger(__name__)

EXPIRES_S = 30.0
HEARTBEAT_S = 5.0
STANDING_LOST_AFTER_S = 2.5 * HEARTBEAT_S  # without a message, a standing pull is taken as lost
GRANT_LOST_AFTER_S = 2.5  # the same for a grant, which the server answers at once
PREFETCH_S = 0.02  # hold about as many waiting jobs as the slots finish in this time
STEP_MAX = 8  # jobs that a lane gets in one turn
STANDING_MAX = 16  # credits of one standing pull
STANDING_LANES_MAX = 512  # lanes with a standing pull at a time; the poll finds jobs of the other lanes


class Delivery:
    """A leased job as it arrived from the server.

    - `stored_at`: when this message was stored. `enqueued_at`: when its run was first stored, also if it was parked
      since then. Both in seconds since the epoch. `run`: the sequence that names the run.
    - `delivery_count`: how often this message was delivered, this time included.
    - `arrived_at`: monotonic seconds.
    - `location`: stream and sequence of the stored message.
    - `task`: runs the job, once it has a slot.
    - `obsolete`: the stream was recreated, and `seq` is another job's now. Nothing may be acknowledged or written.
    """

    __slots__ = (
        "arrived_at", "delivery_count", "enqueued_at", "lane", "location", "message", "obsolete", "reply", "run", "seq",
        "stored_at", "task", "tenant",
    )  # fmt: skip

    def __init__(
        self, lane: LanePull, message: Received, seq: int, delivery_count: int, stored_at: float, arrived_at: float
    ) -> None:
        self.lane = lane
        self.message = message
        self.reply = message.reply
        self.seq = seq
        self.location = lane.stream, seq
        self.delivery_count = delivery_count
        self.stored_at = stored_at
        self.arrived_at = arrived_at
        self.task: asyncio.Task[None] | None = None
        self.obsolete = False
        # from the subject, because a shared lane has many tenants; as `subjects.tenant_of`, without a call for each job
        self.tenant = message.subject.split(".", 4)[3]
        self.run, self.enqueued_at = seq, stored_at
        if headers.PARKED in message.headers:
            self.run, self.enqueued_at = headers.run(message.headers, seq, stored_at)

    def renew(self, message: Received) -> None:
        """Take over the lease of a redelivery of the same job: `message` is the one to acknowledge now."""
        self.message = message
        self.reply = message.reply


@dataclass(slots=True, eq=False)
class LanePull(fairness.StrideState):
    """A lane's consumer, the credits that are open on it, and its scheduling state. `Puller` changes the counters.

    `pending`: jobs that the server holds for this consumer, as last known. `last_heard_at`: when the last message or
    status came; `last_delivery_at`: when the last job came; `jobs_reported_at`: when a poll or hint last reported jobs
    in the lane; all in monotonic seconds.
    """

    key: Lane
    stream: str
    consumer: str
    ack_wait_s: float
    token: str = ""  # part of the reply subjects of its pulls
    pending: int = 1
    grants: dict[int, int] = field(default_factory=dict)  # request number -> credits left, the oldest first
    standing_request: int = 0  # the request number of the standing pull, 0: none
    standing_credits: int = 0
    waiting: int = 0  # deliveries in the worker that have no slot yet
    last_heard_at: float = 0.0
    last_delivery_at: float = 0.0
    jobs_reported_at: float = 0.0
    created: float = 0.0  # when the server created the consumer, seconds since the epoch; 0: unknown
    retiring: bool = False  # idle: released when its last pull has expired
    remove_when_drained: bool = False  # found with a backlog: its consumer may be removed when the lane is empty

    @property
    def granted(self) -> int:
        """Credits of its open grants."""
        return sum(self.grants.values())

    @property
    def idle(self) -> bool:
        """No pull is open on it, and none of its deliveries waits for a slot."""
        return not self.grants and not self.standing_request and not self.waiting


def prefetch(concurrency: int, handler_s: float | None) -> int:
    """Return how many jobs to hold beyond the slots: what the slots finish in PREFETCH_S, at most one for each slot.

    `handler_s` is how long a job takes. None (no job has ended yet) gives 0, because a job must not wait here while
    another worker is idle.
    """
    if handler_s is None:
        return 0
    return min(concurrency, int(concurrency * PREFETCH_S / max(handler_s, 1e-6)))


class Puller:
    """The open pulls of one worker.

    Callbacks: `deliver` gets each delivery. `gone` gets a lane whose consumer no longer exists. `changed` is called
    when `refill` may have something to do. `drained` gets an empty lane with `remove_when_drained`; it returns True if
    the lane is to get no pull, because it is about to be removed.

    Counters: `_granted` is the sum of the credits in all `grants`; `_standing_count` is the number of lanes with a
    standing pull. Every method that changes a lane's `grants` or `standing_request` changes them too.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        deliver: Callable[[Delivery], None],
        gone: Callable[[LanePull], None],
        changed: Callable[[], None],
        drained: Callable[[LanePull], bool] | None = None,
    ) -> None:
        self._connection = connection
        self._drained = drained
        self._deliver = deliver
        self._gone = gone
        self._changed = changed
        self._lanes: dict[str, LanePull] = {}  # by token
        self._by_consumer: dict[tuple[str, str], LanePull] = {}
        self._busy: set[LanePull] = set()  # lanes with jobs on the server: they get grants
        self._without_pull: dict[LanePull, None] = {}  # empty lanes that are to get a standing pull, in order
        self._standing_count = 0
        self._granted = 0
        self._clock = fairness.StrideClock()
        self._numbers = itertools.count(1)
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pulling = False
        self._stopped = False
        self._off: Callable[[], None] | None = None  # ends the watch for a regained link
        self._restarting: asyncio.Task[None] | None = None

    @property
    def granted(self) -> int:
        """Jobs that open grants may still bring."""
        return self._granted

    @property
    def lanes(self) -> Iterable[LanePull]:
        """The lanes that are pulled on."""
        return self._by_consumer.values()

    async def open(self) -> None:
        """Start pulling. Raises Unavailable."""
        await self._subscribe_new_inbox()
        self._off = self._connection.on_regained(self.restart_pulls)
        self._pulling = True

    async def _subscribe_new_inbox(self) -> None:
        """Let deliveries and status messages of later pulls come to a new inbox."""
        inbox = self._connection.new_inbox() + "."
        self._subscription = await self._connection.subscribe(inbox + "*.*", self._on_message)
        self._inbox = inbox

    def stop(self) -> None:
        """Send no more pulls. What the open pulls still bring is delivered."""
        self._pulling = False
        self._stopped = True

    async def close(self) -> None:
        """Unsubscribe from the inbox. The server then drops the open pulls; what it sent before is still delivered.

        Safe twice and unopened.
        """
        self.stop()
        if self._off is not None:
            self._off()
            self._off = None
        if self._restarting is not None:
            await asyncio.wait([self._restarting])
        if self._subscription is not None:
            await self._subscription.drain()
            self._subscription = None

    def add(self, lane: LanePull) -> None:
        """Start to pull on a lane."""
        lane.token = f"{next(self._numbers):x}"
        lane.last_delivery_at = lane.last_heard_at = time.monotonic()
        self._lanes[lane.token] = lane
        self._by_consumer[lane.stream, lane.consumer] = lane
        self._set_pending(lane, lane.pending)

    def remove(self, lane: LanePull) -> None:
        """Stop pulling on a lane. Jobs of its open pulls are ignored: after the lease others get them."""
        self._forget_pulls(lane)
        self._busy.discard(lane)
        self._without_pull.pop(lane, None)
        self._lanes.pop(lane.token, None)
        if self._by_consumer.get((lane.stream, lane.consumer)) is lane:
            del self._by_consumer[lane.stream, lane.consumer]

    def note_jobs(self, lane: LanePull, jobs: int) -> None:
        """A poll or hint reports `jobs` in a lane. An open pull knows better, so this counts only without one."""
        lane.retiring = False
        if jobs > 0 and lane.idle:
            self._set_pending(lane, max(lane.pending, jobs))

    def pull_again(self, lane: LanePull) -> None:
        """Give a drained lane a pull after all: it is not removed."""
        self._set_pending(lane, lane.pending)

    def refill(self, free: int, extra: int) -> None:
        """Open grants and standing pulls for `free` slots, and for `extra` jobs to hold beyond the slots."""
        if not self._pulling or not self._connection.connected:
            return
        budget = free + extra - self._granted
        # a small part of `extra` alone is not worth a request: wait until half of it is missing
        if self._busy and budget > 0 and (self._granted < free or budget * 2 >= extra):
            wanting = [lane for lane in self._busy if lane.pending > lane.granted]
            step = min(STEP_MAX, max(1, extra // 16))  # a large `extra` means short jobs: larger steps, fewer requests
            shares = fairness.share_budget(self._clock, wanting, budget, time.monotonic(), step=step)
            for lane, jobs in shares:
                self._open_grant(lane, jobs)
            if shares:
                self._connection.push()
        if free > 0 and self._without_pull:
            batch = min(STANDING_MAX, 1 + extra // max(1, len(self._by_consumer)))
            while self._without_pull and self._standing_count < STANDING_LANES_MAX:
                lane = next(iter(self._without_pull))
                del self._without_pull[lane]
                self._open_standing_pull(lane, batch)

    def drop_lost_pulls(self) -> None:
        """Forget pulls whose replies or heartbeats are missing, so that they are opened again. Call once a second."""
        now = time.monotonic()
        for lane in list(self._by_consumer.values()):
            quiet_s = now - lane.last_heard_at
            if (lane.grants and quiet_s > GRANT_LOST_AFTER_S) or (
                lane.standing_request and quiet_s > STANDING_LOST_AFTER_S
            ):
                log.info("lane %s: no reply to a pull request for %.0f s; pulling again", lane.key, quiet_s)
                self._forget_pulls(lane)
                self._set_pending(lane, max(lane.pending, 1))

    def _set_pending(self, lane: LanePull, pending: int) -> None:
        """Store how many jobs the server holds for a lane, and decide which kind of pull the lane gets next.

        1. Jobs on the server: grants.
        2. None, and a pull is open, or the lane is to be released: nothing now.
        3. None, and no pull is open: a standing pull, unless `drained` takes the lane.
        """
        lane.pending = pending
        if pending > 0:
            if lane not in self._busy:
                self._clock.join(lane, time.monotonic())
                self._busy.add(lane)
            self._without_pull.pop(lane, None)
            return
        self._busy.discard(lane)
        if lane.standing_request or lane.grants or lane.retiring:
            return
        if not (lane.remove_when_drained and self._drained is not None and self._drained(lane)):
            self._without_pull[lane] = None

    def _open_grant(self, lane: LanePull, batch: int) -> None:
        if number := self._send_pull(lane, {"batch": batch, "no_wait": True}):
            lane.grants[number] = batch
            self._granted += batch

    def _open_standing_pull(self, lane: LanePull, batch: int) -> None:
        request = {"batch": batch, "expires": int(EXPIRES_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        if number := self._send_pull(lane, request):
            lane.standing_request, lane.standing_credits = number, batch
            self._standing_count += 1

    def _send_pull(self, lane: LanePull, request: dict[str, int | bool]) -> int:
        """Send a pull request, and return its number; 0 if the link is down."""
        number = next(self._numbers)
        try:
            self._connection.tell(
                f"$JS.API.CONSUMER.MSG.NEXT.{lane.stream}.{lane.consumer}",
                json.dumps(request).encode(),
                reply=f"{self._inbox}{lane.token}.{number:x}",
            )
        except AIQueueError as error:
            log.debug("pull on %s: %s", lane.key, error)
            return 0
        lane.last_heard_at = time.monotonic()
        return number

    def _on_message(self, message: Received) -> None:
        """Deliver a job, or handle a status message of the server."""
        if not message.reply:  # only jobs have an ack subject; a job may carry a status that its publisher set
            # a status of the former inbox is about pulls that are forgotten
            if message.status is not None and message.subject.startswith(self._inbox):
                self._on_status(message, message.status)
            return
        stream, consumer, delivery_count, seq, stored_at, pending = ack_info(message.reply)
        lane = self._by_consumer.get((stream, consumer))
        if lane is None:
            return  # the lane was removed while its pull was open: after the lease another worker gets the job
        now = time.monotonic()
        lane.last_heard_at = lane.last_delivery_at = now
        lane.retiring = False
        self._use_credit(lane)
        if pending > 0 and lane in self._busy:
            lane.pending = pending
        else:
            self._set_pending(lane, pending)
        self._deliver(Delivery(lane, message, seq, delivery_count, stored_at, now))

    def _use_credit(self, lane: LanePull) -> None:
        """Count off the credit of a delivery: the standing pull goes first, as it is older than any grant."""
        if lane.standing_request:
            lane.standing_credits -= 1
            if not lane.standing_credits:
                lane.standing_request = 0
                self._standing_count -= 1
            return
        for number, left in lane.grants.items():
            self._granted -= 1
            if left > 1:
                lane.grants[number] = left - 1
            else:
                del lane.grants[number]
            return

    def _on_status(self, message: Received, status: Status) -> None:
        """Handle the server's status message about a pull.

        1. 100: a heartbeat. 2. 503, or 409 "Consumer Deleted": the consumer no longer exists. 3. 404, 408, or 409
        because of MaxAckPending: no more jobs now. 4. Anything else: the pull has ended, pull again.
        """
        token, _, number = message.subject[len(self._inbox) :].partition(".")
        lane = self._lanes.get(token)
        if lane is None:
            return
        lane.last_heard_at = time.monotonic()
        if status.code == 100:
            return
        ended = int(number, 16)
        was_grant = ended in lane.grants
        if was_grant:
            self._granted -= lane.grants.pop(ended)
        elif ended == lane.standing_request:
            lane.standing_request = lane.standing_credits = 0
            self._standing_count -= 1
        if status.code == 503 or (status.code == 409 and "Deleted" in status.description):
            self._gone(lane)
        elif status.code in (404, 408) or "MaxAckPending" in status.description:
            if was_grant or lane.pending <= 0:  # a standing pull brings what comes later
                self._set_pending(lane, 0)
        else:
            log.debug("pull on %s ended: %d %s", lane.key, status.code, status.description)
            self._set_pending(lane, max(lane.pending, 1))
        self._changed()

    def _forget_pulls(self, lane: LanePull) -> None:
        """Count the open pulls of a lane as ended."""
        self._granted -= lane.granted
        lane.grants.clear()
        if lane.standing_request:
            lane.standing_request = lane.standing_credits = 0
            self._standing_count -= 1

    def restart_pulls(self) -> None:
        """Take all open pulls as lost, as after a lost link, and open new ones on a new inbox.

        The inbox must be new: the server drops the former pulls when nobody listens to their inbox. On the same inbox
        it would keep them beside the new ones.
        """
        self._pulling, was_pulling = False, self._pulling
        for lane in list(self._by_consumer.values()):
            self._forget_pulls(lane)
            self._set_pending(lane, max(lane.pending, 1))
        if was_pulling:
            self._restarting = asyncio.create_task(self._change_inbox())

    async def _change_inbox(self) -> None:
        """Subscribe to a new inbox, resume pulling, and unsubscribe from the former inbox."""
        former = self._subscription
        try:
            await self._subscribe_new_inbox()
        except AIQueueError as error:
            log.debug("pulls: %s", error)  # the link is lost again; when it is back, the pulls restart again
        finally:
            self._pulling = not self._stopped
            self._changed()
        if former is not None and former is not self._subscription:
            await former.drain()
