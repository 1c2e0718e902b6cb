"""Cancelling a job: parked, queued, between two attempts, or while a worker runs it.

The job's journal decides. A cancellation writes `cancelled`; an attempt writes `started`, `retry` or its result. All
writes use optimistic concurrency, so the first one wins. Then the workers get a notice, and the one that runs the job
stops it. The first attempt of a queued job does not read the journal before it starts. Therefore a queued job is
taken out of its lane by way of parking. All orders of writes are in docs/decisions/parking.md and
docs/decisions/cancelling.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import NamedTuple

from .. import headers, subjects
from ..connection import Connection, Stored
from ..documents import Documents
from ..enqueue import Enqueued, Parents, ParkedJob, Parking, park_copy, parse_parked_job
from ..errors import AIQueueError, NotFound, TooLarge, Unavailable
from ..inspect import FoundJob, find_job
from ..journal import CANCELLED, RETRY, WHILE_RUNNING, ChildEnd, ChildRecord, Entry, Journal, RunRecord, kind_header
from ..subjects import Lane
from ..topology import Family, Topology
from .cancel_children import cancel_children
from .timeouts import TimeoutReasons

TRIES_MAX = 8
OWN_TRIES_MAX = 2  # after so many stale writes, the running attempt is asked to pause
PAUSE_FIRST_S = 0.05


class Verdict(NamedTuple):
    """Whether a job was cancelled, and a clause that explains it. If not, nothing was changed."""

    cancelled: bool
    detail: str


ALREADY_ENDED = Verdict(False, "it has already ended")
ALREADY_CANCELLED = Verdict(True, "it was cancelled before")
WILL_NOT_RUN = Verdict(True, "it will not run")
TOO_LARGE = Verdict(False, "it waits in its lane, and is too large to be taken out safely")
STOPPING = Verdict(True, "it has started, and its worker is told to stop it")


class Canceller:
    """Cancels jobs, wherever they are."""

    def __init__(
        self, connection: Connection, topology: Topology, timeout_reasons: TimeoutReasons | None = None
    ) -> None:
        """`timeout_reasons`: for handles, which find it here."""
        self.timeout_reasons = timeout_reasons
        self._connection = connection
        self.topology = topology
        self._journal = Journal(connection, topology.journal_stream.name)
        self.documents = Documents(connection, topology)
        self.parking = Parking(connection, topology)
        self._parents = Parents(connection, topology)

    async def cancel_by_id(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> Verdict:
        """Cancel the job of this id, or of this `unique`, wherever it is, then its children.

        Raises NotFound if nothing is known of it, BadInput if several tenants or families have the id, and Unavailable;
        after that, cancelling again is safe.
        """
        found = await find_job(self._connection, self.topology, job_id, family=family, tenant=tenant)
        job_id = subjects.job_id(job_id)
        verdict = await self._cancel_found(found, job_id)
        if verdict.cancelled:
            await self.cancel_children_of(found.family.name, found.tenant, job_id)
        return verdict

    async def cancel_enqueued(self, job: Enqueued) -> Verdict:
        """Cancel the job of a handle, wherever it is, then its children. Raises Unavailable; then do it again."""
        verdict = await self.cancel_where_it_is(job)
        if verdict.cancelled:
            await self.cancel_children_of(job.lane.family, job.lane.tenant, job.job_id)
        return verdict

    async def cancel_children_of(self, family: str, tenant: str, job_id: str) -> None:
        """Cancel the children of a job that was cancelled. Raises Unavailable."""
        if await cancel_children(self._connection, self.topology, family, tenant, job_id, self._cancel_child):
            await self._delete_late_waits(family, tenant, job_id)

    async def _delete_late_waits(self, family: str, tenant: str, job_id: str) -> None:
        """Delete the messages of cancelled runs that were parked after the canceller had looked for them.

        A worker that parks such a message later sees the end of what the run keeps (`Parents.wake_if_reached`).
        """
        lane = Lane(family, tenant, "*")
        subject = journal_subject(self.topology.family(family), lane, job_id)
        for parked in await self.parking.find_all(lane, job_id):
            if headers.GATHER in parked.stored.headers and not parked.subject.is_due:
                record = await self._journal.read_run(subject, parked.run, 0.0, parked.parking_id)
                if record.newest is not None and record.newest.event == CANCELLED:
                    await self._delete_job(self.parking.stream, parked.subject.lane, parked.stored)

    async def _cancel_child(self, where: Enqueued | None, child: ChildRecord, tenant: str) -> None:
        if where is not None:
            await self.cancel_enqueued(where)
        else:  # of a child that is not stored yet, or is not found, its worker sees that its parent was cancelled
            with contextlib.suppress(NotFound):
                await self.cancel_by_id(child.job_id, family=child.family, tenant=tenant)

    async def _cancel_found(self, found: FoundJob, job_id: str) -> Verdict:
        lane = Lane(found.family.name, found.tenant, "*")
        verdict = ALREADY_ENDED
        for parked in found.parked:
            one = await self.cancel_parked(found.family, parked)
            verdict = one if one.cancelled or not verdict.cancelled else verdict
        if found.stored is not None:
            one = await self.cancel_queued(found.family, lane, job_id, found.stored)
            verdict = one if one.cancelled or not verdict.cancelled else verdict
        elif not found.parked and found.head is not None and found.head.event == CANCELLED:
            return ALREADY_CANCELLED
        return verdict

    async def cancel_where_it_is(self, job: Enqueued) -> Verdict:
        family = self.topology.family(job.lane.family)
        if job.parking_id:
            return await self._cancel_delayed(family, job)
        stored = await self._connection.get(job.stream, job.seq)
        if stored is not None and stored.headers.get(headers.JOB_ID, job.job_id) == job.job_id:
            return await self.cancel_queued(family, job.lane, job.job_id, stored)
        for parked in await self.parking.find_all(job.lane, job.job_id):
            if parked.run == job.seq:
                return await self.cancel_parked(family, parked)
        subject = journal_subject(family, job.lane, job.job_id)
        record = await self._journal.read_run(subject, job.seq, 0.0)
        if record.newest is not None and record.newest.event == CANCELLED:
            return ALREADY_CANCELLED
        return await self._cancel_moved(family, job, record)

    async def _cancel_moved(self, family: Family, job: Enqueued, record: RunRecord) -> Verdict:
        """Cancel a job that is no longer found at its first location: it was parked after a failed attempt, or moved to
        the lane of its limited key.

        1. It is on its way to its lane, or waits there: write `cancelled`; its next attempt sees that before it starts.
        2. It has started again at another sequence: cancel it there.
        3. Neither: it has ended.
        """
        recap = record.recap
        data = recap.data if recap is not None and not record.ended else None
        if recap is None or not isinstance(data, dict):
            return ALREADY_ENDED
        if recap.event == RETRY and data.get("parked"):
            verdict = await self.write_cancelled(
                family, job.lane, job.job_id, run=job.seq, enqueued_at=0.0, parking_id=recap.parking_id
            )
            if verdict.cancelled and data.get("limit_key"):
                await self._delete_moved(family, job)
            return verdict
        seq = data.get("seq")
        stored = await self._connection.get(job.stream, seq) if isinstance(seq, int) and seq else None
        if stored is None or headers.number(stored.headers.get(headers.RUN, "")) != job.seq:
            return ALREADY_ENDED
        return await self.cancel_queued(family, job.lane, job.job_id, stored)

    async def _delete_moved(self, family: Family, job: Enqueued) -> None:
        """Delete a cancelled job from the lane of its limited key, where it may wait long, and takes up a place."""
        with contextlib.suppress(NotFound):
            found = await find_job(
                self._connection, self.topology, job.job_id, family=family.name, tenant=job.lane.tenant
            )
            stored = found.stored
            if stored is not None and headers.run(stored.headers, stored.seq, stored.time)[0] == job.seq:
                await self._delete_job(family.stream, job.lane, stored)

    async def _cancel_delayed(self, family: Family, job: Enqueued) -> Verdict:
        """Cancel a job that was enqueued with a delay.

        1. An attempt has started: its entry names the run, which is cancelled like any other.
        2. None has: the parking id identifies the job, parked or in its lane. Write `cancelled`, then delete the job.
        """
        subject = journal_subject(family, job.lane, job.job_id)
        newest = await self._journal.newest_of_run(subject, 0, math.inf, job.parking_id)
        if newest is not None and newest.run:
            return await self.cancel_where_it_is(job._replace(stream=family.stream, seq=newest.run, parking_id=""))
        first = await self._connection.get(job.stream, job.seq)
        verdict = await self.write_cancelled(
            family, job.lane, job.job_id, run=0, enqueued_at=math.inf, parking_id=job.parking_id,
            kind="" if first is None else headers.stated_kind(first.headers),
        )  # fmt: skip
        if verdict.cancelled:
            found = await self.parking.find_all(job.lane, job.job_id)  # it may be due, or parked again
            for stored in [first, *(parked.stored for parked in found if parked.parking_id == job.parking_id)]:
                if stored is not None:
                    await self._delete_job(job.stream, job.lane, stored)
        return verdict

    async def cancel_parked(self, family: Family, job: ParkedJob) -> Verdict:
        """Write `cancelled` for a parked job, then delete the job, also if it became due meanwhile."""
        lane, job_id, dedup_key, _ = job.subject
        enqueued_at = headers.decimal(job.stored.headers.get(headers.ENQUEUED, "")) or math.inf
        verdict = await self.write_cancelled(
            family, lane, job_id, run=job.run, enqueued_at=enqueued_at, parking_id=job.parking_id,
            kind=headers.stated_kind(job.stored.headers),
        )  # fmt: skip
        if verdict.cancelled:
            await self._delete_job(self.parking.stream, lane, job.stored)
            stored = await self._connection.last(
                self.parking.stream, subjects.parked(lane, job_id, dedup_key, is_due=True)
            )
            due = parse_parked_job(stored) if stored is not None else None
            if due is not None and due.parking_id == job.parking_id:
                await self._connection.delete(self.parking.stream, due.stored.seq)
        return verdict

    async def cancel_queued(self, family: Family, lane: Lane, job_id: str, stored: Stored) -> Verdict:
        """Cancel a job in its lane.

        1. It was neither parked nor delivered: take it out of the lane.
        2. Otherwise: write `cancelled`, then delete the job. An attempt of it reads the journal before it starts, or
           has started already and is stopped.
        """
        lane = subjects.parse_lane(stored.subject) or lane
        parking_id = headers.parking_id(stored.headers)
        run, enqueued_at = headers.run(stored.headers, stored.seq, stored.time)
        newest = await self._journal.newest_of_run(journal_subject(family, lane, job_id), run, enqueued_at, parking_id)
        may_run = not parking_id and (newest is not None or stored.seq <= await self.last_delivered_seq(family, lane))
        if not parking_id and not may_run:
            return await self._take_out(family, lane, job_id, stored)
        verdict = await self.write_cancelled(
            family, lane, job_id, run=run, enqueued_at=enqueued_at, parking_id=parking_id, may_run=may_run,
            kind=headers.stated_kind(stored.headers),
        )  # fmt: skip
        if verdict.cancelled:
            await self._delete_job(family.stream, lane, stored)
        return verdict

    async def write_cancelled(
        self,
        family: Family,
        lane: Lane,
        job_id: str,
        *,
        run: int,
        enqueued_at: float,
        parking_id: str,
        may_run: bool = False,
        kind: str = "",
    ) -> Verdict:
        """Write `cancelled` to the journal unless the run has ended, and send workers a notice.

        `may_run`: an attempt may be running that has written nothing yet. If the running attempt writes so fast that
        OWN_TRIES_MAX writes were stale, the notice is sent first: the attempt then stores nothing for a moment.
        `kind`: that of the job, if it is known. Raises Unavailable.
        """
        subject = journal_subject(family, lane, job_id)
        for number in range(TRIES_MAX):
            record = await self._journal.read_run(subject, run, enqueued_at, parking_id)
            newest = record.newest
            if newest is not None and newest.final:
                if newest.event != CANCELLED:
                    return ALREADY_ENDED
                return (
                    ALREADY_CANCELLED if not number else STOPPING
                )  # after the first try: its attempt wrote it, as asked
            run = run or (newest.run if newest is not None else 0)
            is_running = newest.event != RETRY if newest is not None else may_run
            data, attempt = cancelled_entry(newest, is_running=is_running)
            if await self._journal.append_if_unchanged(
                subject, CANCELLED, data, run=run, attempt=attempt, parking_id=parking_id, record=record,
                extra=kind_header(kind),
            ):  # fmt: skip
                await self._notify_workers(family, lane, job_id, run)
                return STOPPING if is_running else WILL_NOT_RUN
            if is_running and number >= OWN_TRIES_MAX:
                await self._notify_workers(family, lane, job_id, run)
                await asyncio.sleep(PAUSE_FIRST_S * 2 ** (number - OWN_TRIES_MAX))
        raise Unavailable(f"job {job_id} is not cancelled: its journal changed before each of {TRIES_MAX} writes")

    async def _notify_workers(self, family: Family, lane: Lane, job_id: str, run: int) -> None:
        """Tell the family's workers that a job is cancelled. One that misses this reads the journal."""
        if not run:  # a delayed job of which no attempt has started
            return
        with contextlib.suppress(AIQueueError):
            payload = f"{lane.tenant} {job_id} {run}".encode()
            await self._connection.publish(f"{subjects.CANCEL}.{family.name}", payload)

    async def _take_out(self, family: Family, lane: Lane, job_id: str, stored: Stored) -> Verdict:
        """Cancel an undelivered job: park a copy, delete the job from its lane, write `cancelled`, delete the copy.

        If this process dies on the way, the copy comes back to the lane after the time of a lease, and the job is not
        lost. If a worker gets the job just now, it is stopped like any running job.
        """
        try:
            copy = await park_copy(self._connection, self.parking, family, lane, job_id, stored)
        except TooLarge:
            return TOO_LARGE
        if not await self._connection.delete(family.stream, stored.seq):
            await self._connection.delete(self.parking.stream, copy.seq)
            return ALREADY_ENDED
        may_run = stored.seq <= await self.last_delivered_seq(family, lane)
        verdict = await self.write_cancelled(
            family, lane, job_id, run=stored.seq, enqueued_at=stored.time, parking_id=copy.parking_id, may_run=may_run,
            kind=headers.stated_kind(stored.headers),
        )  # fmt: skip
        if verdict.cancelled:
            await self._tell_parent(lane, job_id, stored)
        await self._connection.delete(self.parking.stream, copy.seq)
        if verdict.cancelled:
            await self.documents.end_holds(lane.tenant, stored.headers)
        return verdict

    async def _delete_job(self, stream: str, lane: Lane, stored: Stored) -> None:
        """Tell its parent of a cancelled job, delete it from its stream, and release its documents."""
        job_id = stored.headers.get(headers.JOB_ID, "")
        await self._tell_parent(lane, job_id, stored)
        await self._connection.delete(stream, stored.seq)
        if headers.DOCUMENT_REF in stored.headers:
            await self.documents.end_holds(lane.tenant, stored.headers)
        if job_id:  # without one, the worker knows its steps, and they expire
            run, enqueued_at = headers.run(stored.headers, stored.seq, stored.time)
            kept = subjects.kept_run(run, enqueued_at, stored.headers.get(headers.RESUMES, ""))
            await self.documents.release_run(lane.tenant, subjects.ParentRun(lane.family, job_id, kept))

    async def _tell_parent(self, lane: Lane, job_id: str, stored: Stored) -> None:
        """Tell the parent of a cancelled job, if it has one. Until then the job's message is kept: see `Parents`.

        The parent learns what the entry says, also if another canceller or the attempt wrote it: when it was cancelled.
        """
        if headers.PARENT not in stored.headers:
            return
        head = await self._journal.head(journal_subject(self.topology.family(lane.family), lane, job_id))
        if head is not None and head.event == CANCELLED:
            end = ChildEnd.of_entry(job_id, head, 0.0)
        else:  # a later run of the id has written since
            end = ChildEnd(job_id, CANCELLED, reason=CANCELLED, error=CANCELLED)
        await self._parents.report(stored.headers, lane.tenant, end, journaled=True)

    async def last_delivered_seq(self, family: Family, lane: Lane) -> int:
        """Return the last sequence of a lane that was delivered to a worker; 0 if the lane has no consumer."""
        name = family.lane_name(*lane[1:])
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{family.stream}.{name}")
        except NotFound:
            return 0
        return int(info["delivered"]["stream_seq"])


def cancelled_entry(newest: Entry | None, *, is_running: bool) -> tuple[dict[str, str], int]:
    """Return data and attempt number of a `cancelled` entry. `newest` is the run's newest entry so far."""
    if is_running:
        return WHILE_RUNNING, newest.attempt if newest is not None else 1
    if newest is not None:
        return {"reason": CANCELLED, "error": "cancelled between attempts"}, newest.attempt
    return {"reason": CANCELLED, "error": "cancelled before it started"}, 0


def journal_subject(family: Family, lane: Lane, job_id: str) -> str:
    """Return the subject of a job's journal. Raises NotFound if its family has none."""
    if family.journal is None:
        raise NotFound(f"family {family.name} keeps no journal, so its jobs cannot be cancelled")
    return subjects.journal(family.journal, lane.tenant, job_id)
