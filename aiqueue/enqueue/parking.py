"""Parked jobs: jobs that wait for a time outside of the work stream.

A parked job is a scheduled message of the server (ADR-51) on ``ai.parked.at…``. At its time the server moves the
message to ``ai.parked.due…``. A forwarder (`forwarder`) then stores the job in its lane. The orders of writes, and what
a crash between two of them does, are in docs/decisions/parking.md.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple, cast

from .. import headers, subjects
from ..connection import Connection, PubAck, ServerClock, Stored, block, is_still_stored, read_headers, timestamp
from ..errors import BadInput, Conflict, Unavailable
from ..subjects import Lane, ParkedSubject
from ..topology import Topology
from ..units import DELAY_MAX_S, Duration, Time, parse_duration, parse_time
from .producer import Enqueued
from .templates import JobTemplate

ASIDE_KEY = "aside"  # of jobs that are parked aside, because a worker does not know their kind: one for each job id
NEW_JOB_KEY = "new"  # the dedup key of a job enqueued with a delay: at most one is parked for each job id
DELAY_TRIES_MAX = 8
MOVE_S = 1.0
SOON_S = 0.1  # a job that becomes due so soon is not moved or replaced any more


class ScheduledMessage(NamedTuple):
    """The message that is stored for a parked job."""

    subject: str
    headers: dict[str, str]


def scheduled_message(
    lane: Lane, job_id: str, due_at: float, job_headers: Mapping[str, str], *, dedup_key: str, parking_id: str
) -> ScheduledMessage:
    """Return the message that brings a job back to its lane at `due_at`, seconds since the epoch.

    `job_headers` are the headers that the job gets in its lane. `dedup_key` ends the subject: parked twice under one
    key, a job is stored once. `parking_id` distinguishes this parking from all others of the job id, also under the
    same key. Raises BadInput for a time that the server cannot represent.
    """
    due_at = math.ceil(due_at * 1000) / 1000  # rounded up, so that no job is early
    try:
        at = datetime.fromtimestamp(due_at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    except (OverflowError, ValueError, OSError):
        raise BadInput(
            f"a job cannot wait until {due_at!r} seconds since the epoch: use a time before the year 10000"
        ) from None
    kept = headers.carried(job_headers, ours=True)
    kept.pop(headers.WAITED, None)
    kept |= {
        headers.MSG_ID: subjects.msg_id(lane.family, lane.tenant, job_id, f"park-{parking_id}"),
        headers.JOB_ID: job_id,
        headers.PARKED: parking_id,
        headers.DUE: str(round(due_at * 1000)),
        headers.SCHEDULE: f"@at {at}",
        headers.SCHEDULE_TARGET: subjects.parked(lane, job_id, dedup_key, is_due=True),
    }
    return ScheduledMessage(subjects.parked(lane, job_id, dedup_key, is_due=False), kept)


def delayed_job_message(
    template: JobTemplate, headers_block: bytes, job_id: str, due_at: float, *, by_caller: bool
) -> ScheduledMessage:
    """Return the message that stores a new job to start at `due_at`, seconds since the epoch.

    `by_caller`: the caller chose the job id. The message then expects an empty subject, and the server refuses it with
    a Conflict if a job of this id is parked already.
    """
    job_headers, _ = read_headers(headers_block)
    message = scheduled_message(
        template.lane, job_id, due_at, job_headers, dedup_key=NEW_JOB_KEY, parking_id=subjects.new_id()
    )
    if by_caller:
        message.headers[headers.EXPECTED] = "0"
    return message


class ParkedJob(NamedTuple):
    """A parked job as it is stored. `due_at` is in seconds since the epoch. `kind`: empty if the headers do not say."""

    subject: ParkedSubject
    parking_id: str
    due_at: float
    kind: str
    run: int  # its run's sequence in the work stream, 0 for a job that was not there yet
    stored: Stored

    @property
    def is_waiting(self) -> bool:
        """Whether the job is due already, and waits for its lane to take it."""
        return self.subject.is_due or headers.WAITED in self.stored.headers

    @property
    def fires_at(self) -> float:
        """When the server makes the job due, in seconds since the epoch; 0 if it has done so.

        The server reads the message at that time and removes it a moment later. What is stored in its place between the
        two is lost. So a parked job is moved or replaced before that time only (SOON_S).
        """
        schedule = self.stored.headers.get(headers.SCHEDULE, "")
        if self.subject.is_due or not schedule.startswith("@at "):
            return 0.0
        with contextlib.suppress(ValueError):  # a plain publisher's
            return timestamp(schedule.removeprefix("@at "))
        return 0.0


def parse_parked_job(stored: Stored) -> ParkedJob | None:
    """Return the parked job in a stored message; None if the subject is not that of a parked job."""
    subject = subjects.parse_parked(stored.subject)
    if subject is None:
        return None
    parking_id = headers.parking_id(stored.headers) or subject.dedup_key
    due_at = headers.number(stored.headers.get(headers.DUE, "")) / 1000
    kind = headers.stated_kind(stored.headers)
    return ParkedJob(subject, parking_id, due_at, kind, headers.number(stored.headers.get(headers.RUN, "")), stored)


class Parking:
    """Stores and finds parked jobs, in the stream of parked jobs."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.stream = topology.parked_stream.name

    async def park(
        self,
        lane: Lane,
        job_id: str,
        due_at: float,
        job_headers: Mapping[str, str],
        body: bytes,
        *,
        dedup_key: str,
        parking_id: str = "",
        timeout_s: float = 30.0,
    ) -> PubAck:
        """Store a job that comes back to its lane at `due_at`, seconds since the epoch; a past time means at once.

        Parked twice under the same `dedup_key`, for example one made of run and attempt, the job is stored once. In its
        lane the job has the headers `job_headers` and the `parking_id` (Aiq-Parked; default: the `dedup_key`).

        Raises BadInput (InvalidToken, TooLarge), QueueFull, Unavailable, NotFound (the stream is missing).
        """
        dedup_key = subjects.token("dedup key", dedup_key)
        job_id = subjects.token("job id", job_id)
        message = scheduled_message(
            lane, job_id, due_at, job_headers, dedup_key=dedup_key, parking_id=parking_id or dedup_key
        )
        return await self._connection.store(message.subject, body, message.headers, timeout_s=timeout_s)

    async def move(self, job: ParkedJob, due_at: float, *, timeout_s: float = MOVE_S) -> PubAck:
        """Have a parked job become due at `due_at`, instead of its own time.

        Raises Conflict if it has left parking or somebody else has moved it, and Unavailable. See `ParkedJob.fires_at`.
        """
        return await self._store_instead(job, due_at, job.stored.headers, job.stored.data, timeout_s)

    async def replace(
        self, job: ParkedJob, due_at: float, headers_block: bytes, body: bytes, *, timeout_s: float
    ) -> Enqueued:
        """Store a new job in the place of a parked one. It has the parking id of that one, whose handles are its too.

        Raises what `move` raises.
        """
        new_headers, _ = read_headers(headers_block)
        subject = job.subject
        ack = await self._store_instead(job, due_at, new_headers, body, timeout_s)
        return Enqueued(subject.job_id, subject.lane, ack.stream, ack.seq, False, due_at, job.parking_id)

    async def _store_instead(
        self, job: ParkedJob, due_at: float, job_headers: Mapping[str, str], body: bytes, timeout_s: float
    ) -> PubAck:
        """Store a message in the place of a parked job's, under its parking id, if the job is still where it was."""
        subject, seq = job.subject, job.stored.seq
        message = scheduled_message(
            subject.lane, subject.job_id, due_at, job_headers, dedup_key=subject.dedup_key, parking_id=job.parking_id
        )
        message.headers[headers.MSG_ID] += f"-{subjects.new_id()}"  # the stream remembers the id of the first one
        message.headers[headers.EXPECTED] = str(seq)
        try:
            return await self._connection.store(message.subject, body, message.headers, timeout_s=timeout_s)
        except Conflict:
            stored = await self._connection.last(self.stream, message.subject)
            if stored is None or stored.headers.get(headers.MSG_ID) != message.headers[headers.MSG_ID]:
                raise
            return PubAck(self.stream, stored.seq, False)  # an earlier try, whose PubAck was lost

    async def store_delayed(
        self,
        template: JobTemplate,
        job_id: str,
        due_at: float,
        headers_block: bytes,
        body: bytes,
        *,
        by_caller: bool,
        timeout_s: float,
    ) -> Enqueued:
        """Store a new job that starts at `due_at`, seconds since the epoch.

        With `by_caller` (the caller chose the id), a job of the same id that is parked already is returned as a
        duplicate, and nothing is stored. Raises what `park` raises.
        """
        message = delayed_job_message(template, headers_block, job_id, due_at, by_caller=by_caller)
        parking_id = message.headers[headers.PARKED]
        message_block = block(message.headers)
        end = time.monotonic() + timeout_s
        for _ in range(DELAY_TRIES_MAX):
            try:
                ack = await self._connection.store_block(
                    message.subject,
                    message_block,
                    body,
                    fenced=by_caller,
                    timeout_s=max(0.05, end - time.monotonic()),
                )
            except Conflict:
                found = await self.find_delayed(template.lane, job_id)
                if found is not None:
                    duplicate = found.parking_id != parking_id  # else an earlier try, whose PubAck was lost
                    seq = found.stored.seq
                    return Enqueued(job_id, template.lane, self.stream, seq, duplicate, found.due_at, found.parking_id)
            else:
                due_at = headers.number(message.headers[headers.DUE]) / 1000
                return Enqueued(job_id, template.lane, ack.stream, ack.seq, False, due_at, parking_id)
        raise Unavailable(
            f"{message.subject}: other programs wrote to this subject before each of {DELAY_TRIES_MAX} tries",
            maybe_stored=True,
        )

    async def find_delayed(self, lane: Lane, job_id: str) -> ParkedJob | None:
        """Return the job of this id that was enqueued with a delay and is not due yet; None if there is none."""
        stored = await self._connection.last(self.stream, subjects.parked(lane, job_id, NEW_JOB_KEY, is_due=False))
        return parse_parked_job(stored) if stored else None

    async def find_all(self, lane: Lane, job_id: str) -> list[ParkedJob]:
        """Return all parked jobs of an id, due ones too, for any priority: a job may have been moved to another one.

        Family and tenant may be ``*``.
        """
        lane = lane._replace(priority="*")
        found: list[ParkedJob | None] = []
        for is_due in (False, True):  # in this order, so that a job that becomes due meanwhile is found
            read = self._connection.read(self.stream, subjects.parked(lane, job_id, is_due=is_due))
            parked = [each async for each in read]
            there = [each for each in parked if await is_still_stored(self._connection, self.stream, each.seq)]
            found += map(parse_parked_job, there)
        return [each for each in found if each is not None]


def resolve_due_at(delay: Duration | None, at: Time | None, clock: ServerClock) -> float | None:
    """Return when a job is due, in seconds since the epoch, from a caller's arguments; None: at once.

    A delay counts from now, by the server's clock. Raises BadInput.
    """
    if delay is None and at is None:
        return None
    if delay is not None and at is not None:
        raise BadInput("`delay` and `at` both set the start time: give only one of them")
    now = clock.now()
    due_at = now + parse_duration("delay", delay) if delay is not None else parse_time("at", cast("Time", at))
    if due_at - now > DELAY_MAX_S:
        days, days_max = (due_at - now) / 86_400, DELAY_MAX_S / 86_400
        raise BadInput(f"a job can be delayed by at most {days_max:.0f} days, not {days:,.0f} days")
    return due_at if due_at > now else None
