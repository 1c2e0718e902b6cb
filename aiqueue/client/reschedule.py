"""Gives a parked job another time to start."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Literal

from .. import subjects
from ..connection import ServerClock
from ..enqueue import SOON_S, Enqueued, ParkedJob, Parking
from ..errors import Conflict, JobState, NotFound, NotParked, Unavailable
from ..inspect import JobStats
from ..journal import Journal
from ..topology import Family

TRIES_MAX = 8


async def reschedule(
    parking: Parking,
    journal: Journal,
    clock: ServerClock,
    family: Family,
    job: Enqueued,
    due_at: float | None,
    status: Callable[[], Awaitable[JobStats]],
) -> Enqueued:
    """Have a parked job become due at `due_at`, in seconds since the epoch (None: now). Return it with its new time.

    The job keeps its parking id, so whatever was told about its parking stays true. `status` says what a job does that
    is not parked. Raises NotParked, Unavailable.
    """
    for _ in range(TRIES_MAX):
        found = await _find(parking, journal, family, job)
        now = clock.now()
        if found is None or found.subject.is_due:
            if found is not None and due_at is None:
                return job._replace(due_at=found.due_at)  # on its way
            raise NotParked(job.job_id, await _state(status, found))
        left_s = found.fires_at - now
        if left_s <= SOON_S:
            if due_at is None:
                return job._replace(due_at=found.due_at)
            raise NotParked(job.job_id, "due")
        new_due_at = math.ceil((now if due_at is None else due_at) * 1000) / 1000
        try:
            ack = await parking.move(found, new_due_at, timeout_s=min(left_s, 30.0))
        except Conflict:
            continue
        return job._replace(due_at=new_due_at, seq=ack.seq if job.parking_id else job.seq)
    raise Unavailable(f"job {job.job_id} is not rescheduled: others moved it before each of {TRIES_MAX} tries")


async def _find(parking: Parking, journal: Journal, family: Family, job: Enqueued) -> ParkedJob | None:
    """Return where a job is parked: until its first attempt, or until its next one."""
    found = await parking.find_all(job.lane, job.job_id)
    if not found:
        return None
    run = job.seq
    if job.parking_id:
        first = next((each for each in found if each.parking_id == job.parking_id), None)
        if first is not None or family.journal is None:
            return first
        subject = subjects.journal(family.journal, job.lane.tenant, job.job_id)
        newest = await journal.newest_of_run(subject, 0, math.inf, job.parking_id)
        run = newest.run if newest is not None else 0
    return next((each for each in found if run and each.run == run), None)


async def _state(
    status: Callable[[], Awaitable[JobStats]], found: ParkedJob | None
) -> JobState | Literal["due", "gone"]:
    if found is not None:
        return "due"
    try:
        return (await status()).state
    except NotFound:
        return "gone"
