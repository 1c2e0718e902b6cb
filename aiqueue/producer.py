"""Enqueueing: from a message to a stored job."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from . import codec, headers, subjects
from .connection import Connection
from .errors import BadInput, QueueFull, Unavailable
from .job import Message
from .topology import Family, Topology
from .units import seconds

HINT_EVERY_S = 20.0  # below the time after which a worker lets an idle lane go (lanes.IDLE_S)
HINTED_MAX = 10_000
FULL_FIRST_S, FULL_CAP_S = 0.05, 2.0

OnFull = Literal["raise", "wait"]


@dataclass(frozen=True)
class Enqueued:
    """A stored job: where its message is, and whether it had been there before."""

    job_id: str
    lane: subjects.Lane
    stream: str
    seq: int
    duplicate: bool


class Producer:
    """Stores jobs and tells workers about lanes that may be new to them."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._topology = topology
        self._hinted: dict[subjects.Lane, float] = {}

    async def enqueue(
        self,
        message: Message,
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        unique: str | None = None,
        extra: Mapping[str, str] | None = None,
        deadline: str | float | None = None,
        on_full: OnFull = "raise",
        timeout_s: float = 30.0,
    ) -> Enqueued:
        """Store one job; see `Client.enqueue`, which this is."""
        family = self._topology.family(message.aiq_family)
        lane = _lane(family, tenant, priority)
        own = _own_key(family, message) if unique is None else None
        job_id = _job_id(own, unique)
        told = _headers(family, message, lane, job_id, deadline)
        told.update(_extra(family, extra))
        body = codec.encode(message)
        await self._hint(lane)
        end = time.monotonic() + timeout_s
        wait_s = FULL_FIRST_S
        while True:
            try:
                ack = await self._connection.store(
                    subjects.work(family.name, tenant, priority), body, told,
                    timeout_s=max(0.05, end - time.monotonic()),
                )  # fmt: skip
            except QueueFull as error:
                left = end - time.monotonic()
                if on_full == "raise" or left <= 0:
                    raise _full(error, family, lane) from None
                await asyncio.sleep(min(wait_s, left))
                wait_s = min(wait_s * 2, FULL_CAP_S)
            else:
                # a fresh id can only be known to the server from an earlier try of this very call
                by_caller = unique is not None or own is not None
                return Enqueued(job_id, lane, ack.stream, ack.seq, ack.duplicate and by_caller)

    async def _hint(self, lane: subjects.Lane) -> None:
        now = time.monotonic()
        if self._hinted.get(lane, -HINT_EVERY_S) + HINT_EVERY_S > now:
            return
        if len(self._hinted) >= HINTED_MAX:
            self._hinted.clear()
        try:
            await self._connection.publish(subjects.hint(lane))
        except Unavailable:
            return  # the poll of the workers finds the lane
        self._hinted[lane] = now


async def relocate(
    connection: Connection, to: subjects.Lane, job_id: str, seq: int, told: Mapping[str, str], body: bytes
) -> None:
    """Store a job of sequence `seq` again in another lane of its family; the caller acks it afterwards.

    Doing it twice stores one: the Msg-Id has a hop for this move. Raises QueueFull, Unavailable.
    """
    kept = {name: headers.ascii_line(value, 1_000) for name, value in told.items() if not name.startswith("Nats-")}
    kept |= {
        headers.MSG_ID: subjects.msg_id(to.family, to.tenant, job_id, f"lane-{seq}"),
        headers.JOB_ID: job_id,
        headers.PRIORITY: to.priority,
    }
    await connection.publish(subjects.hint(to))
    await connection.store(subjects.work(*to), body, kept)


def _lane(family: Family, tenant: str, priority: str) -> subjects.Lane:
    subjects.token("tenant", tenant)
    if not family.priorities:
        raise BadInput(f"family {family.name} takes no jobs (it has no priorities)")
    if priority not in family.priorities:
        raise BadInput(f"priority {priority!r} is none of {family.name}'s: {', '.join(family.priorities)}")
    return subjects.Lane(family.name, tenant, priority)


def _own_key(family: Family, message: Message) -> str | None:
    if family.key is None:
        return None
    value = message.__dict__.get(family.key) or (message.model_extra or {}).get(family.key)
    if value is None or value == "":
        return None
    if isinstance(value, UUID) or type(value) is int:
        return str(value)
    return subjects.token(family.key, value)


def _job_id(own: str | None, unique: str | None) -> str:
    if unique is not None:
        return subjects.token("unique key", unique)
    return own if own is not None else subjects.new_id()


def _headers(
    family: Family, message: Message, lane: subjects.Lane, job_id: str, deadline: str | float | None
) -> dict[str, str]:
    told = {
        headers.MSG_ID: subjects.msg_id(family.name, lane.tenant, job_id),
        headers.CONTENT_TYPE: codec.CBOR,
        headers.KIND: message.aiq_kind,
        headers.JOB_ID: job_id,
        headers.PRIORITY: lane.priority,
    }
    if family.key:
        told[family.key] = job_id
    if deadline is not None:
        told[headers.DEADLINE] = str(round((time.time() + duration("deadline", deadline)) * 1000))
    return told


def duration(what: str, value: str | float) -> float:
    """Seconds of a caller's argument. Raises BadInput, naming it."""
    try:
        return seconds(value)
    except ValueError as error:
        raise BadInput(f"{what}: {error}") from None


def _extra(family: Family, extra: Mapping[str, str] | None) -> Mapping[str, str]:
    for name in extra or {}:
        lower = str(name).lower()
        if lower.startswith(("nats-", "aiq-", "content-type")):
            raise BadInput(f"header {name!r} is not the caller's to set")
        if lower in (headers.PRIORITY, family.key):
            argument = "priority" if lower == headers.PRIORITY else "unique"
            raise BadInput(f"header {name!r} is not the caller's to set: use the argument `{argument}`")
    return extra or {}


def _full(error: QueueFull, family: Family, lane: subjects.Lane) -> QueueFull:
    """The server's refusal, with what the caller can act on."""
    if "per subject" in error.reason:
        limit = family.max_msgs_per_subject
        return QueueFull(str(lane), "the lane holds as many jobs as it may", limit=limit, retry_after_s=1.0)
    return QueueFull(str(lane), error.reason, retry_after_s=5.0)
