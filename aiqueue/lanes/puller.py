"""Pulls: which lanes a worker asks for jobs, and for how many.

Two kinds of request go out. A lane without waiting jobs has one *standing* pull, so that its next job starts at once.
A lane with waiting jobs gets *grants*: pulls that the server answers at once with what it has (no_wait), as many as
there are free slots, shared out by `turns`. What the server then says (404, 408, 409) or fails to say (heartbeats)
repairs our count of open credits (ADR-37).
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

log = logging.getLogger("aiqueue.puller")

EXPIRES_S = 30.0
HEARTBEAT_S = 5.0
DEAF_AFTER_S = 2.5 * HEARTBEAT_S
GRANT_LOST_AFTER_S = 2.5  # a grant is answered at once, or its answer is lost
PREFETCH_S = 0.02  # hold about as many waiting jobs as the slots finish in this time
STEP_MAX = 8  # jobs of one turn
STANDING_MAX = 16  # credits of one standing pull
STANDING_LANES_MAX = 512  # lanes with a standing pull at a time; the poll finds the jobs of the others


class Delivery:
    """A leased job as it came in. `stored_at` is when this message was stored, seconds since the epoch. `run` is the
    sequence that names its run and `enqueued_at` when that run was first stored: before it was parked, if ever.
    `place` is where it is stored, and `task` what runs it, once it has a slot. `void`: its stream has been made anew,
    and what is said of its sequence would be taken for another job's.
    """

    __slots__ = (
        "arrived", "delivered", "enqueued_at", "lane", "message", "place", "reply", "run", "seq", "stored_at", "task",
        "tenant", "void",
    )  # fmt: skip

    def __init__(
        self, lane: LanePull, message: Received, seq: int, delivered: int, stored_at: float, arrived: float
    ) -> None:
        self.lane = lane
        self.message = message
        self.reply = message.reply
        self.seq = seq
        self.place = lane.stream, seq
        self.delivered = delivered
        self.stored_at = stored_at
        self.arrived = arrived
        self.task: asyncio.Task[None] | None = None
        self.void = False
        self.tenant = message.subject.split(".", 4)[3]  # a shared lane has all tenants
        self.run, self.enqueued_at = seq, stored_at
        if headers.PARKED in message.headers:
            self.run, self.enqueued_at = headers.run(message.headers, seq, stored_at)

    def renew(self, message: Received) -> None:
        """This message is the lease now."""
        self.message = message
        self.reply = message.reply


@dataclass(slots=True, eq=False)
class LanePull(fairness.Turn):
    """A lane's consumer, the credits that are open on it, and its turn among the others."""

    key: Lane
    stream: str
    consumer: str
    ack_wait_s: float
    token: str = ""
    pending: int = 1  # jobs that the server holds for us, as far as we were told
    grants: dict[int, int] = field(default_factory=dict)  # request -> credits left, the oldest first
    standing: int = 0  # the standing pull's request, 0: none
    standing_left: int = 0
    waiting: int = 0  # jobs delivered that have no slot yet
    heard: float = 0.0
    active: float = 0.0
    held: float = 0.0  # when the lane was last said to hold jobs
    created: float = 0.0  # when the server made the consumer, seconds since the epoch; 0: not known
    retiring: bool = False  # idle: to be let go when its last pull has expired
    passing: bool = False  # found with a backlog: may be let go when that is done

    @property
    def granted(self) -> int:
        """Deliveries that open grants may still bring."""
        return sum(self.grants.values())

    @property
    def idle(self) -> bool:
        """Nothing is open on it and nothing of it is here."""
        return not self.grants and not self.standing and not self.waiting


def prefetch(concurrency: int, handler_s: float | None) -> int:
    """How many jobs to hold beyond the slots: what `concurrency` slots end in PREFETCH_S seconds, at most as many
    as there are slots. None (no job has ended yet) is none: a job must not wait here while another worker idles.
    """
    if handler_s is None:
        return 0
    return min(concurrency, int(concurrency * PREFETCH_S / max(handler_s, 1e-6)))


class Puller:
    """The open pulls of one worker. `deliver` is called with each delivery, `gone` with a lane whose consumer the
    server no longer has, `changed` when there may be something to pull again, `drained` with a passing lane that has no
    more jobs: True says that it is taken care of and gets no pull.
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
        self._lanes: dict[str, LanePull] = {}
        self._by_consumer: dict[tuple[str, str], LanePull] = {}
        self._busy: set[LanePull] = set()  # lanes with waiting jobs on the server
        self._quiet: dict[LanePull, None] = {}  # lanes to be given a standing pull, in order
        self._standing = 0
        self._granted = 0
        self._clock = fairness.Clock()
        self._numbers = itertools.count(1)
        self._inbox = ""
        self._subscription: Subscription | None = None
        self._pulling = False
        self._stopped = False
        self._off: Callable[[], None] | None = None
        self._renewing: asyncio.Task[None] | None = None

    @property
    def granted(self) -> int:
        """Jobs that open grants may still bring."""
        return self._granted

    @property
    def lanes(self) -> Iterable[LanePull]:
        return self._by_consumer.values()

    async def open(self) -> None:
        await self._listen()
        self._off = self._connection.on_regained(self.anew)
        self._pulling = True

    async def _listen(self) -> None:
        """Have the answers come to a new inbox."""
        inbox = self._connection.new_inbox() + "."
        self._subscription = await self._connection.subscribe(inbox + "*.*", self._on_message)
        self._inbox = inbox

    def stop(self) -> None:
        """Ask for no more; what open pulls still bring is delivered."""
        self._pulling = False
        self._stopped = True

    async def close(self) -> None:
        """Take the interest away: the server drops the open pulls, and what it had sent by then is still delivered.
        Safe twice and unopened.
        """
        self.stop()
        if self._off is not None:
            self._off()
            self._off = None
        if self._renewing is not None:
            await asyncio.wait([self._renewing])
        if self._subscription is not None:
            await self._subscription.drain()
            self._subscription = None

    def add(self, lane: LanePull) -> None:
        lane.token = f"{next(self._numbers):x}"
        lane.active = lane.heard = time.monotonic()
        self._lanes[lane.token] = lane
        self._by_consumer[lane.stream, lane.consumer] = lane
        self._note(lane, lane.pending)

    def remove(self, lane: LanePull) -> None:
        self._forget(lane)
        self._busy.discard(lane)
        self._quiet.pop(lane, None)
        self._lanes.pop(lane.token, None)
        if self._by_consumer.get((lane.stream, lane.consumer)) is lane:
            del self._by_consumer[lane.stream, lane.consumer]

    def told(self, lane: LanePull, jobs: int) -> None:
        """Somebody says that the lane holds jobs. A lane with an open pull knows better."""
        lane.retiring = False
        if jobs > 0 and lane.idle:
            self._note(lane, max(lane.pending, jobs))

    def keep(self, lane: LanePull) -> None:
        """A drained lane stays: it is to have a pull again."""
        self._note(lane, lane.pending)

    def refill(self, free: int, extra: int) -> None:
        """Open credits: `free` slots to be filled, and `extra` jobs to be held beyond them."""
        if not self._pulling or not self._connection.connected:
            return
        budget = free + extra - self._granted
        # small top-ups of what is held beyond the slots wait until they are worth a request
        if self._busy and budget > 0 and (self._granted < free or budget * 2 >= extra):
            wanting = [lane for lane in self._busy if lane.pending > lane.granted]
            step = min(STEP_MAX, max(1, extra // 16))  # jobs that are soon done are worth fewer requests
            shares = fairness.share(self._clock, wanting, budget, time.monotonic(), step=step)
            for lane, credits_ in shares:
                self._grant(lane, credits_)
            if shares:
                self._connection.push()
        if free > 0 and self._quiet:
            batch = min(STANDING_MAX, 1 + extra // max(1, len(self._by_consumer)))
            while self._quiet and self._standing < STANDING_LANES_MAX:
                lane = next(iter(self._quiet))
                del self._quiet[lane]
                self._stand(lane, batch)

    def tend(self) -> None:
        """To be called once a second: pulls whose answer or heartbeats stay away are given up."""
        now = time.monotonic()
        for lane in list(self._by_consumer.values()):
            silent = now - lane.heard
            if (lane.grants and silent > GRANT_LOST_AFTER_S) or (lane.standing and silent > DEAF_AFTER_S):
                log.info("lane %s is silent for %.0f s: pulling again", lane.key, silent)
                self._forget(lane)
                self._note(lane, max(lane.pending, 1))

    def _note(self, lane: LanePull, pending: int) -> None:
        """What the server holds for a lane decides which kind of pull it gets."""
        lane.pending = pending
        if pending > 0:
            if lane not in self._busy:
                self._clock.join(lane, time.monotonic())
                self._busy.add(lane)
            self._quiet.pop(lane, None)
            return
        self._busy.discard(lane)
        if lane.standing or lane.grants or lane.retiring:
            return
        if not (lane.passing and self._drained is not None and self._drained(lane)):
            self._quiet[lane] = None

    def _grant(self, lane: LanePull, batch: int) -> None:
        if number := self._pull(lane, {"batch": batch, "no_wait": True}):
            lane.grants[number] = batch
            self._granted += batch

    def _stand(self, lane: LanePull, batch: int) -> None:
        request = {"batch": batch, "expires": int(EXPIRES_S * 1e9), "idle_heartbeat": int(HEARTBEAT_S * 1e9)}
        if number := self._pull(lane, request):
            lane.standing, lane.standing_left = number, batch
            self._standing += 1

    def _pull(self, lane: LanePull, request: dict[str, int | bool]) -> int:
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
        lane.heard = time.monotonic()
        return number

    def _on_message(self, message: Received) -> None:
        if not message.reply:  # the server's word: a job has an ack subject, and may have a status of its own
            if message.status is not None and message.subject.startswith(self._inbox):  # none from before a reconnect
                self._on_status(message, message.status)
            return
        stream, consumer, delivered, seq, stored_at, pending = ack_info(message.reply)
        lane = self._by_consumer.get((stream, consumer))
        if lane is None:
            return  # a lane let go while its pull was open: the lease runs out and another worker has it
        now = time.monotonic()
        lane.heard = lane.active = now
        lane.retiring = False
        self._count(lane)
        if pending > 0 and lane in self._busy:
            lane.pending = pending
        else:
            self._note(lane, pending)
        self._deliver(Delivery(lane, message, seq, delivered, stored_at, now))

    def _count(self, lane: LanePull) -> None:
        """One credit is used: the standing pull's, which is older than any grant, or the oldest grant's."""
        if lane.standing:
            lane.standing_left -= 1
            if not lane.standing_left:
                lane.standing = 0
                self._standing -= 1
            return
        for number, left in lane.grants.items():
            self._granted -= 1
            if left > 1:
                lane.grants[number] = left - 1
            else:
                del lane.grants[number]
            return

    def _on_status(self, message: Received, said: Status) -> None:
        token, _, number = message.subject[len(self._inbox) :].partition(".")
        lane = self._lanes.get(token)
        if lane is None:
            return
        lane.heard = time.monotonic()
        if said.code == 100:
            return
        ended = int(number, 16)
        was_grant = ended in lane.grants
        if was_grant:
            self._granted -= lane.grants.pop(ended)
        elif ended == lane.standing:
            lane.standing = lane.standing_left = 0
            self._standing -= 1
        if said.code == 503 or (said.code == 409 and "Deleted" in said.description):
            self._gone(lane)
        elif said.code in (404, 408) or "MaxAckPending" in said.description:
            # nothing (more) to be had now: the standing pull brings what comes
            if was_grant or lane.pending <= 0:
                self._note(lane, 0)
        else:
            log.debug("pull on %s ended: %d %s", lane.key, said.code, said.description)
            self._note(lane, max(lane.pending, 1))
        self._changed()

    def _forget(self, lane: LanePull) -> None:
        self._granted -= lane.granted
        lane.grants.clear()
        if lane.standing:
            lane.standing = lane.standing_left = 0
            self._standing -= 1

    def anew(self) -> None:
        """Take every open pull for lost, as after a lost link, and begin anew on another inbox. The pulls on the former
        one end for want of interest: were it kept, the server would go on to hold them beside the new ones.
        """
        self._pulling, was_pulling = False, self._pulling
        for lane in list(self._by_consumer.values()):
            self._forget(lane)
            self._note(lane, max(lane.pending, 1))
        if was_pulling:
            self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        former = self._subscription
        try:
            await self._listen()
        except AIQueueError as error:
            log.debug("pulls: %s", error)  # lost again meanwhile: the next regain renews
        finally:
            self._pulling = not self._stopped
            self._changed()
        if former is not None and former is not self._subscription:
            await former.drain()
