"""What a worker holds of a lane: the deliveries that have arrived from it, and the pulls that are open on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from .. import headers
from ..connection import Received
from ..subjects import Lane
from . import fairness
from .refusals import PullLimits


class Delivery:
    """A leased job as it arrived from the server.

    - `stored_at`: when this message was stored. `enqueued_at`: when its run was first stored, also if it was parked
      since then. Both in seconds since the epoch. `run`: the sequence that names the run.
    - `delivery_count`: how often this message was delivered, this time included.
    - `arrived_at`: monotonic seconds.
    - `location`: stream and sequence of the stored message. That of an obsolete delivery is no other delivery's.
    - `plain`: what the headers state, if they are those of a plain job. None: read `message.headers`.
    - `task`: runs the job, once it has a slot.
    - `own_lane`: the lane of the job's own tenant, also where all tenants share one, or a limited key has its own.
    - `obsolete`: the stream was recreated, and `seq` is another job's now. Nothing may be acknowledged or written.
    """

    __slots__ = (
        "arrived_at", "delivery_count", "enqueued_at", "lane", "location", "message", "obsolete", "own_lane",
        "plain", "reply", "run", "seq", "stored_at", "task", "tenant",
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
        self.task: asyncio.Task[None] | None = None
        self.obsolete = False
        key = lane.key
        if key.tenant == "*":  # a lane that all tenants share: as `subjects.tenant_of`, without a call for each job
            self.tenant = message.subject.split(".", 4)[3]
            self.own_lane = Lane(key.family, self.tenant, key.priority)
        else:
            self.tenant, self.own_lane = key.tenant, key.without_key
        self.run, self.enqueued_at = seq, stored_at
        self.plain = headers.read_plain(message.block)
        if self.plain is not None:
            return
        fields = message.headers
        if headers.KIND not in fields or headers.JOB_ID not in fields or headers.CONTENT_TYPE not in fields:
            headers.restore_case(fields)  # a plain publisher's
        if headers.PARKED in fields:
            self.run, self.enqueued_at = headers.run(fields, seq, stored_at)

    def make_obsolete(self) -> None:
        """Note that another job is at this location now."""
        self.obsolete = True
        self.location = (*self.location, self.reply)

    def renew(self, message: Received) -> None:
        """Take over the lease of a redelivery of the same job: `message` is the one to acknowledge now."""
        headers.restore_case(message.headers)
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
    paused: bool = False  # its jobs are paused: it gets no pull, and what still arrives returns to the queue
    limits: PullLimits = field(default_factory=PullLimits)
    remove_when_drained: bool = False  # found with a backlog: its consumer may be removed when the lane is empty

    @property
    def granted(self) -> int:
        """Credits of its open grants."""
        return sum(self.grants.values())

    @property
    def idle(self) -> bool:
        """No pull is open on it, and none of its deliveries waits for a slot."""
        return not self.grants and not self.standing_request and not self.waiting
