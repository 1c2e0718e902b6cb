"""What a worker holds of a lane: the deliveries that have arrived from it, and the pulls that are open on it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import headers
from ..connection import Received, ack_frame
from ..limits import BatchCall, Credit, CreditBatch
from ..subjects import Lane
from . import fairness
from .ack_window import AckWindow
from .key_pool import KeyPool
from .refusals import PullLimits

UNLIMITED = 1 << 30
SMALL_CAP = 256  # jobs; of a lane with at most so many in flight, other workers may well hold all that are allowed
SETTLED_S = 0.1  # after the last delivery of a lane to be removed: by then its ack should have reached the server


class Delivery:
    """A leased job as it arrived from the server.

    - `stored_at`: when this message was stored. `enqueued_at`: when its run was first stored, also if it was parked
      since then. Both in seconds since the epoch. `run`: the sequence that names the run.
    - `delivery_count`: how often this message was delivered, this time included.
    - `arrived_at`: monotonic seconds.
    - `location`: stream and sequence of the stored message. That of an obsolete delivery is no other delivery's.
    - `plain`: what the headers state, if they are those of a plain job. None: read `message.headers`.
    - `credit`: what it may start with, if it is of a limited key and the credit was here before it.
    - `task`: runs the job, once it has a slot.
    - `own_lane`: the lane of the job's own tenant, also where all tenants share one, or a limited key has its own.
    - `run_started_at`, `run_ended_at`: of its handler, monotonic seconds; 0 before.
    - `obsolete`: the stream was recreated, and `seq` is another job's now. Nothing may be acknowledged or written.
    """

    __slots__ = (
        "arrived_at", "credit", "delivery_count", "enqueued_at", "lane", "location", "message", "obsolete", "own_lane",
        "plain", "reply", "run", "run_ended_at", "run_started_at", "seq", "stored_at", "task", "tenant",
    )  # fmt: skip

    def __init__(
        self, lane: LanePull, message: Received, seq: int, delivery_count: int, stored_at: float, arrived_at: float
    ) -> None:
        self.lane = lane
        self.message = message
        self.reply = message.reply
        self.seq = seq
        self.location: tuple[object, ...] = lane.stream, seq
        self.delivery_count = delivery_count
        self.stored_at = stored_at
        self.arrived_at = arrived_at
        self.credit: Credit | CreditBatch | BatchCall | None = None
        self.task: asyncio.Task[None] | None = None
        self.obsolete = False
        self.run_started_at = self.run_ended_at = 0.0
        key = lane.key
        if key.tenant == "*":  # a lane that all tenants share: as `subjects.tenant_of`, without a call for each job
            self.tenant = message.subject.split(".", 4)[3]
            self.own_lane = Lane(key.family, self.tenant, key.priority)
        else:
            self.tenant, self.own_lane = key.tenant, lane.own
        self.run, self.enqueued_at = seq, stored_at
        self.plain = headers.read_plain(message.block)
        if self.plain is not None:
            return
        fields = message.headers
        if headers.KIND not in fields or headers.JOB_ID not in fields or headers.CONTENT_TYPE not in fields:
            headers.restore_case(fields)  # a plain publisher's
        if headers.PARKED in fields:
            self.run, self.enqueued_at = headers.run(fields, seq, stored_at)

    def ack_frame(self) -> bytes:
        """Return the PUB of its ack."""
        acks = self.lane.acks
        acks.left -= 1
        return ack_frame(self.reply) if acks.left else acks.frame(self.reply, self.lane.token)

    def make_obsolete(self) -> None:
        """Note that another job is at this location now."""
        self.obsolete = True
        self.location = (*self.location, self.reply)

    def begin_credit(self) -> bool:
        """Return whether the delivery may start with its credit; if not, it is given back. `settle` may follow."""
        credit = self.credit
        if credit is not None and credit.begin():
            if type(credit) is not BatchCall:
                self.credit = None  # nothing is owed any more
            return True
        self.credit = None
        return False

    def settle(self, cost: float) -> None:
        """The handler says what it uses: the rest of a credit with which it has begun is given back."""
        if type(self.credit) is BatchCall:
            self.credit.settle(cost)

    def give_back_credit(self) -> None:
        """Call for a delivery that does not start."""
        credit, self.credit = self.credit, None
        if isinstance(credit, CreditBatch):
            credit.give_back()
        elif credit is not None:
            credit.release()

    def renew(self, message: Received) -> None:
        """Take over the lease of a redelivery of the same job: `message` is the one to acknowledge now."""
        headers.restore_case(message.headers)
        self.message = message
        self.reply = message.reply


class Turn(fairness.StrideState):
    """What the lanes of a tenant and priority share: their place among others, and the cap of jobs under way.

    `running`: deliveries of these lanes that have a slot. `wanted`: how many jobs may be asked for now. `cap`: the
    tenant's max_ack_pending, of which the server knows only for each lane by itself.
    """

    def __init__(self, rank: int, weight: float, cap: int) -> None:
        super().__init__(rank=rank, weight=weight)
        self.cap = cap
        self.lanes: list[LanePull] = []
        self.running = 0
        self.wanted = 0
        self._next = 0

    @property
    def room(self) -> int:
        """How many more deliveries the tenant may have here. Standing pulls take no room: most bring nothing for long,
        and what one brings while the turn is full goes back.
        """
        return self.cap - self.running - sum(each.granted + each.waiting for each in self.lanes)

    @property
    def is_full(self) -> bool:
        """Whether as many of its deliveries run as may be."""
        return self.running >= self.cap

    def share(self, rooms: Mapping[LanePull, int], jobs: int) -> list[tuple[LanePull, int]]:
        """Share `jobs` among lanes that have room for so many each, evenly, beginning with another one each time."""
        lanes = [each for each in self.lanes if rooms.get(each, 0) > 0]
        given = dict.fromkeys(lanes, 0)
        self._next += 1
        start = self._next % max(1, len(lanes))
        order = lanes[start:] + lanes[:start]
        while jobs > 0 and order:
            part = max(1, jobs // len(order))
            for lane in list(order):
                more = min(part, jobs, rooms[lane] - given[lane])
                given[lane] += more
                jobs -= more
                if given[lane] >= rooms[lane]:
                    order.remove(lane)
        return [(lane, each) for lane, each in given.items() if each > 0]


@dataclass(slots=True, eq=False)
class LanePull(fairness.StrideState):
    """A lane's consumer, the credits that are open on it, and its scheduling state. `Puller` changes the counters.

    `pending`: jobs that the server holds for this consumer, as last known. `last_heard_at`: when the last message or
    status came; `last_delivery_at`: when the last job came; `jobs_reported_at`: when a poll or hint last reported jobs
    in the lane; all in monotonic seconds.

    `cap`: its max_ack_pending, the deliveries that all workers may have of it at a time. `running`: those that have a
    slot here. `is_full`: it gets no grants until one of its runs here ends. `may_be_silent`: the server may leave its
    grants without an answer, because other workers hold all that it may have in flight.
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
    running: int = 0
    cap: int = UNLIMITED
    is_full: bool = False
    may_be_silent: bool = False
    last_heard_at: float = 0.0
    last_delivery_at: float = 0.0
    jobs_reported_at: float = 0.0
    created: float = 0.0  # when the server created the consumer, seconds since the epoch; 0: unknown
    retiring: bool = False  # idle: released when its last pull has expired
    paused: bool = False  # its jobs are paused: it gets no pull, and what still arrives returns to the queue
    limits: PullLimits = field(default_factory=PullLimits)
    turn: Turn | None = None  # of its tenant and priority, in a family with limited keys
    pool: KeyPool | None = None  # the credits of its key: without one, it is not pulled on
    asking: int = 0  # deliveries in the worker that wait for a credit
    acks: AckWindow = field(default_factory=AckWindow)  # of its worker
    may_wait: bool = False  # it may have to stand in line
    settle_s: float = SETTLED_S  # before the next try to remove its consumer
    in_line: bool = False  # it stands in line, so it gets no pull; what still arrives is run
    turn_at: float = 0.0  # when it last began to hold jobs or had its turn in line, monotonic seconds
    turn_pass: float = 0.0  # its pass value then
    owed: float = 0.0  # of its turn: jobs that it was given beyond its last one, divided by its weight
    counts: dict[str, Any] = field(default_factory=dict)  # what the worker counts of its jobs, by kind
    own: Lane = field(init=False)  # `key` without the limited key

    def __post_init__(self) -> None:
        self.own = self.key.without_key

    remove_when_drained: bool = False  # found with a backlog: its consumer may be removed when the lane is empty

    @property
    def granted(self) -> int:
        """Credits of its open grants."""
        return sum(self.grants.values())

    @property
    def room(self) -> int:
        """How many more deliveries it may have here."""
        return self.cap - self.running - self.waiting - self.granted

    @property
    def wanted(self) -> int:
        """How many more of its jobs may be asked for."""
        granted = sum(self.grants.values())
        jobs, room = self.pending - granted, self.cap - self.running - self.waiting - granted
        return min(jobs, room)

    def begin_run(self) -> None:
        """A delivery got a slot."""
        self.running += 1
        if self.turn is not None:
            self.turn.running += 1

    def end_run(self) -> None:
        """The run of a delivery has ended."""
        self.running -= 1
        if self.turn is not None:
            self.turn.running -= 1

    def set_cap(self, cap: int) -> None:
        """Note its max_ack_pending; 0 or less: none. The lanes of a turn have theirs in common."""
        if self.turn is None:
            self.cap = cap if cap > 0 else UNLIMITED
            self.may_be_silent = self.may_be_silent or self.cap <= SMALL_CAP

    @property
    def is_held_back(self) -> bool:
        """It may hold jobs that are not pulled for on purpose: it is paused, in line, or its key has no credits."""
        if self.paused or self.in_line:
            return True
        if self.turn is None:
            return False
        return self.asking > 0 or self.turn.room <= 0 or (self.pool is not None and self.pool.is_exhausted)

    @property
    def turn_jobs(self) -> float:
        """Jobs that it was given since its turn in line began, divided by its weight."""
        return (self.turn or self).pass_value - self.turn_pass

    @property
    def given_at(self) -> float:
        """When it was last given a job, or began to hold some, monotonic seconds."""
        return (self.turn or self).served_at

    @property
    def idle(self) -> bool:
        """No pull is open on it, and none of its deliveries waits for a slot."""
        return not self.grants and not self.standing_request and not self.waiting
