"""The ticks of schedules in the stream AI_TICKS: each schedule that is not paused has its next one parked there.

A parked tick is a scheduled message of the server (ADR-51). Shortly before its time the server moves the message to
``ai.ticks.due…``, where a worker takes it, so that the worker has it when its time comes.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import UTC, datetime

from .. import headers, subjects
from ..connection import Connection, timestamp
from ..errors import AIQueueError, Conflict
from ..lanes import Delivery
from ..topology import Topology
from .document import ScheduleDocument
from .recurrence import TICKS_END_MS

EARLY_S = 0.35  # the server's timer is up to 0.25 s late
PARK_S = 5.0
WAIT_MAX_S = 60.0  # how long a tick waits at most for room in its lane until it is tried again
STUCK_S = 60.0  # how long after its time a tick is still parked that will not become due
ASKED = "~"  # between a schedule and the id of a job that is asked for; no token has one


@dataclass(frozen=True, slots=True)
class DueTick:
    """A tick that a worker has taken. `tick_ms`: 0 for a message that names none. `fire_at`: seconds since the epoch.

    `tries`: how often its job was not stored because its lane was full. `job_id`: of a job that somebody has asked for;
    "" for the next tick of its schedule. `stored_at`: when it became due. `deliveries`: how often it has come.
    """

    route: str
    tenant: str
    schedule_id: str
    tick_ms: int
    fire_at: float
    tries: int
    job_id: str = ""
    stored_at: float = 0.0
    deliveries: int = 1

    @property
    def name(self) -> str:
        return f"{self.tenant}.{self.schedule_id}"


def parse_due(delivery: Delivery) -> DueTick:
    """Return the tick in a message. A plain publisher may have stored it: what is malformed counts as missing."""
    fields = delivery.message.headers
    _, _, _, route, tenant, last = delivery.message.subject.split(".")
    schedule_id = last.partition(ASKED)[0]
    tick = headers.decimal(fields.get(headers.SCHEDULED_FOR, "")) or 0.0
    tick_ms = round(tick * 1000) if 0 <= tick * 1000 < TICKS_END_MS else 0
    fire_at = headers.milliseconds(fields.get(headers.DUE, "")) or 0.0
    tries = headers.number(fields.get(headers.WAITED, ""))
    return DueTick(
        route, tenant, schedule_id, tick_ms, fire_at, tries, fields.get(headers.JOB_ID, ""), delivery.stored_at,
        delivery.delivery_count,
    )  # fmt: skip


def tick_text(tick_ms: int) -> str:
    """Return the value of Aiq-Scheduled-For: seconds since the epoch, in milliseconds."""
    return f"{tick_ms // 1000}.{tick_ms % 1000:03}"


def utc(at: float) -> str:
    """Return a time as the server's schedules have it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Ticks:
    """Parks ticks, and tells which are parked. Without state of its own."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.stream = topology.ticks_stream.name

    async def park(
        self, document: ScheduleDocument, *, at: float | None = None, tries: int = 0, timeout_s: float = PARK_S
    ) -> None:
        """Park the next tick of a schedule, if it has one and is not paused. One that is parked already stays.

        `at`: when it is to be due instead of at its own time, seconds since the epoch, because it is tried again after
        so many `tries`. Raises BadInput (the recurrence cannot be read here), NotFound (the stream is missing),
        Unavailable, AccessDenied.
        """
        tick_ms = document.next_ms
        if tick_ms is None or document.paused is not None:
            return
        fire_at = document.recurrence.jittered(document.name, tick_ms / 1000) if at is None else at
        where = document.route, document.tenant, document.id
        fields = {
            headers.MSG_ID: subjects.new_id(),
            headers.EXPECTED: "0",
            headers.SCHEDULED_FOR: tick_text(tick_ms),
            headers.DUE: str(round(fire_at * 1000)),
            headers.SCHEDULE: f"@at {utc(fire_at - EARLY_S)}",
            headers.SCHEDULE_TARGET: subjects.tick(*where),
        }
        if tries:
            fields[headers.WAITED] = str(tries)
        with contextlib.suppress(Conflict):  # it is parked
            await self._connection.store(subjects.tick(*where, tick_ms), b"", fields, timeout_s=timeout_s)

    async def ask(self, document: ScheduleDocument, tick_ms: int, job_id: str) -> None:
        """Have a worker of the schedule's owner make and enqueue one job of a tick, if that is not asked for already.

        The message has a subject of its own: on that of due ticks it would pass for the schedule's next one. Raises as
        `park`.
        """
        fields = {
            headers.MSG_ID: subjects.new_id(),
            headers.EXPECTED: "0",
            headers.SCHEDULED_FOR: tick_text(tick_ms),
            headers.JOB_ID: job_id,
        }
        subject = f"{subjects.tick(document.route, document.tenant, document.id)}{ASKED}{job_id}"
        with contextlib.suppress(Conflict):
            await self._connection.store(subject, b"", fields, timeout_s=PARK_S)

    async def unpark(self, document: ScheduleDocument) -> None:
        """Remove the parked tick of a schedule that is due no more. Never raises: when it comes, it is dropped."""
        if document.next_ms is not None:
            subject = subjects.tick(document.route, document.tenant, document.id, document.next_ms)
            with contextlib.suppress(AIQueueError):
                await self._connection.api(f"STREAM.PURGE.{self.stream}", {"filter": subject})

    async def drop_stuck(self, document: ScheduleDocument) -> bool:
        """Remove what is on the subject of a schedule's parked tick and has not become due: a message that is no tick,
        one of another time than the tick's, or one whose timer the server has lost. Return whether there was one.
        Raises as `list_subjects`, and BadInput as `park`.
        """
        tick_ms = document.next_ms or 0
        subject = subjects.tick(document.route, document.tenant, document.id, tick_ms)
        stored = await self._connection.last(self.stream, subject)
        if stored is None:
            return False
        latest = max(document.recurrence.jittered(document.name, tick_ms / 1000), stored.time + WAIT_MAX_S)
        due_at = stored.time
        with contextlib.suppress(ValueError):
            at = timestamp(stored.headers.get(headers.SCHEDULE, "").removeprefix("@at "))
            due_at = max(due_at, min(at, latest))
        if self._connection.clock.now() - due_at < STUCK_S:
            return False
        await self._connection.api(f"STREAM.PURGE.{self.stream}", {"filter": subject, "seq": stored.seq + 1})
        return True

    async def list_subjects(self) -> set[str]:
        """Return the subjects of all ticks, parked and due. Raises NotFound, Unavailable, AccessDenied."""
        found: set[str] = set()
        while True:
            request = {"subjects_filter": f"{subjects.TICKS}.>", "offset": len(found)}
            info = await self._connection.api(f"STREAM.INFO.{self.stream}", request)
            page = info["state"].get("subjects") or {}
            found.update(page)
            if not page or len(found) >= info.get("total", 0):
                return found

    async def has(self, document: ScheduleDocument) -> bool:
        """Return whether the next tick of a schedule is parked or due. Raises as `list_subjects`."""
        where = document.route, document.tenant, document.id
        for subject in (subjects.tick(*where, document.next_ms or 0), subjects.tick(*where)):
            if await self._connection.last(self.stream, subject) is not None:
                return True
        return False
