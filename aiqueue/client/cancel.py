"""Taking back a job, wherever it is: parked, queued, between two attempts, or in a worker that runs it.

What decides is the job's journal: a cancellation writes `cancelled`, an attempt `started`, `retry` or its result, and
the server takes the first. Workers are then told, so that the one that runs the job stops it. A job that waits in its
lane for the first time is taken out by way of parking, for its attempt would not look at the journal before it begins.
All orders of writes are in docs/decisions/parking.md and docs/decisions/cancelling.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from typing import NamedTuple

from .. import headers, subjects
from ..connection import Connection, Stored
from ..documents import Documents
from ..enqueue import Enqueued, Parking, Waiting, waiting
from ..errors import AIQueueError, NotFound, TooLarge, Unavailable
from ..inspect import find
from ..journal import CANCELLED, RETRY, WHILE_RUNNING, Entry, Journal, RunRecord
from ..subjects import Lane
from ..topology import Family, Topology

TRIES_MAX = 8
ALONE_MAX = 2  # overtaken more often by what the job's attempt writes, the attempt is told, and ends the job itself
AGAIN_S = 0.05


class Verdict(NamedTuple):
    """Whether the job is cancelled, and a sentence about it. If not, nothing has changed."""

    cancelled: bool
    said: str


ENDED = Verdict(False, "it has ended already")
DONE = Verdict(True, "it will not run")
STOPPED = Verdict(True, "it has begun, and its worker is told to stop it")


class Cancels:
    """Cancels jobs: those that are parked, queued, between two attempts or running."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.topology = topology
        self._journal = Journal(connection, topology.journal_stream.name)
        self._documents = Documents(connection, topology)
        self.parking = Parking(connection, topology)

    async def by_id(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> Verdict:
        """The job of this id, wherever it waits. Raises NotFound without a trace of it, BadInput where several tenants
        or families have the id, and Unavailable, after which asking again is fine.
        """
        found = await find(self._connection, self.topology, job_id, family=family, tenant=tenant)
        lane = Lane(found.family.name, found.tenant, "*")
        verdict = ENDED
        for each in found.parked:
            one = await self._parked(found.family, each)
            verdict = one if one.cancelled or not verdict.cancelled else verdict
        if found.stored is not None:
            lane = subjects.parse_lane(found.stored.subject) or lane
            one = await self._queued(found.family, lane, job_id, found.stored)
            verdict = one if one.cancelled or not verdict.cancelled else verdict
        elif not found.parked and found.head is not None and found.head.event == CANCELLED:
            return DONE
        return verdict

    async def enqueued(self, job: Enqueued) -> Verdict:
        """The job of a handle. Raises Unavailable, after which asking again is fine."""
        family = self.topology.family(job.lane.family)
        if job.word:
            return await self._delayed(family, job)
        stored = await self._connection.get(job.stream, job.seq)
        if stored is not None and stored.headers.get(headers.JOB_ID, job.job_id) == job.job_id:
            return await self._queued(family, job.lane, job.job_id, stored)
        for each in await self.parking.of(job.lane, job.job_id):
            if each.run == job.seq:
                return await self._parked(family, each)
        subject = _journal(family, job.lane, job.job_id)
        record = await self._journal.record(subject, job.seq, 0.0)
        if record.newest is not None and record.newest.event == CANCELLED:
            return DONE
        return await self._elsewhere(family, job, record)

    async def _elsewhere(self, family: Family, job: Enqueued, record: RunRecord) -> Verdict:
        """A job that was parked after a failed attempt, and is on its way back, or has come to another place."""
        told = record.told.data if record.told is not None and not record.ended else None
        if record.told is None or not isinstance(told, dict):
            return ENDED
        if record.told.event == RETRY and told.get("parked"):  # its next attempt writes `started` first
            return await self._forbid(family, job.lane, job.job_id, run=job.seq, enqueued_at=0.0, word=record.told.word)
        place = told.get("seq")
        stored = await self._connection.get(job.stream, place) if isinstance(place, int) and place else None
        if stored is None or headers.number(stored.headers.get(headers.RUN, "")) != job.seq:
            return ENDED
        return await self._queued(family, job.lane, job.job_id, stored)

    async def _delayed(self, family: Family, job: Enqueued) -> Verdict:
        """A job that was enqueued with a delay. Before its first attempt its word is enough, wherever it is by now;
        afterwards it is the run that this attempt has told.
        """
        said = await self._journal.of_run(_journal(family, job.lane, job.job_id), 0, math.inf, job.word)
        if said is not None and said.run:
            return await self.enqueued(job._replace(stream=family.stream, seq=said.run, word=""))
        verdict = await self._forbid(family, job.lane, job.job_id, run=0, enqueued_at=math.inf, word=job.word)
        if verdict.cancelled:
            stored = await self._connection.get(job.stream, job.seq)
            found = await self.parking.of(job.lane, job.job_id)  # due, or parked again since
            for one in [stored, *(each.stored for each in found if each.word == job.word)]:
                if one is not None:
                    await self._remove(job.stream, job.lane, one)
        return verdict

    async def _parked(self, family: Family, job: Waiting) -> Verdict:
        place, enqueued_at = job.place, headers.decimal(job.stored.headers.get(headers.ENQUEUED, "")) or math.inf
        verdict = await self._forbid(
            family, place.lane, place.job_id, run=job.run, enqueued_at=enqueued_at, word=job.word
        )
        if verdict.cancelled:
            await self._remove(self.parking.stream, place.lane, job.stored)
            due = subjects.parked(place.lane, place.job_id, place.move, due=True)
            there = await self._connection.last(self.parking.stream, due)
            moved = waiting(there) if there is not None else None
            if moved is not None and moved.word == job.word:
                await self._connection.delete(self.parking.stream, moved.stored.seq)
        return verdict

    async def _queued(self, family: Family, lane: Lane, job_id: str, stored: Stored) -> Verdict:
        told = stored.headers
        word = headers.word(told)
        run, enqueued_at = headers.run(told, stored.seq, stored.time)
        said = await self._journal.of_run(_journal(family, lane, job_id), run, enqueued_at, word)
        begun = not word and (said is not None or stored.seq <= await self._delivered(family, lane))
        if not word and not begun:
            return await self._take_out(family, lane, job_id, stored)
        verdict = await self._forbid(family, lane, job_id, run=run, enqueued_at=enqueued_at, word=word, begun=begun)
        if verdict.cancelled:
            await self._remove(family.stream, lane, stored)
        return verdict

    async def _forbid(
        self, family: Family, lane: Lane, job_id: str, *, run: int, enqueued_at: float, word: str, begun: bool = False
    ) -> Verdict:
        """Write `cancelled`, if it has not ended, and tell the workers, of which one may run it. `begun`: one may do so
        without a word in its journal.
        """
        subject = _journal(family, lane, job_id)
        for number in range(TRIES_MAX):
            record = await self._journal.record(subject, run, enqueued_at, word)
            said = record.newest
            if said is not None and said.final:
                if said.event != CANCELLED:
                    return ENDED
                return DONE if not number else STOPPED  # by its own attempt, as it was told
            run = run or (said.run if said is not None else 0)
            runs = said.event != RETRY if said is not None else begun
            told, attempt = _last_word(said, runs=runs)
            if number < ALONE_MAX or not runs:
                if await self._journal.append(
                    subject, CANCELLED, told, run=run, attempt=attempt, word=word, record=record
                ):
                    await self._tell(family, lane, job_id, run)
                    return STOPPED if runs else DONE
            else:
                await self._tell(family, lane, job_id, run)
                await asyncio.sleep(AGAIN_S * 2 ** (number - ALONE_MAX))
        raise Unavailable(f"{subject}: {TRIES_MAX} writes were overtaken")

    async def _tell(self, family: Family, lane: Lane, job_id: str, run: int) -> None:
        """Tell the workers. One that does not hear it looks for itself."""
        if not run:  # enqueued with a delay, and no attempt has begun
            return
        with contextlib.suppress(AIQueueError):
            word = f"{lane.tenant} {job_id} {run}".encode()
            await self._connection.publish(f"{subjects.CANCEL}.{family.name}", word)

    async def _take_out(self, family: Family, lane: Lane, job_id: str, stored: Stored) -> Verdict:
        """Take a job that was not delivered out of its lane. A copy is parked first, for as long as a lease: it comes
        back if this process dies on the way. A worker may get the job at this very moment: then it is stopped.
        """
        told = dict(stored.headers) | {headers.RUN: str(stored.seq), headers.ENQUEUED: f"{stored.time:.6f}"}
        lane = subjects.parse_lane(stored.subject) or lane
        move = subjects.new_id()
        try:
            copy = await self.parking.park(lane, job_id, time.time() + family.ack_wait_s, told, stored.data, move=move)
        except TooLarge:
            return Verdict(False, "it waits in its lane, and is too large to be taken out safely")
        if not await self._connection.delete(family.stream, stored.seq):
            await self._connection.delete(self.parking.stream, copy.seq)
            return ENDED
        begun = stored.seq <= await self._delivered(family, lane)
        verdict = await self._forbid(
            family, lane, job_id, run=stored.seq, enqueued_at=stored.time, word=move, begun=begun
        )
        await self._connection.delete(self.parking.stream, copy.seq)
        if verdict.cancelled:
            await self._documents.release(lane.tenant, stored.headers)
        return verdict

    async def _remove(self, stream: str, lane: Lane, stored: Stored) -> None:
        """Take a cancelled job out of where it waits; it holds no documents any more."""
        await self._connection.delete(stream, stored.seq)
        if headers.DOCUMENT_REF in stored.headers:
            await self._documents.release(lane.tenant, stored.headers)

    async def _delivered(self, family: Family, lane: Lane) -> int:
        """The last sequence that was handed to a worker, 0 where the lane has no consumer."""
        name = family.lane_name(lane.tenant, lane.priority)
        try:
            info = await self._connection.api(f"CONSUMER.INFO.{family.stream}.{name}")
        except NotFound:
            return 0
        return int(info["delivered"]["stream_seq"])


def _last_word(said: Entry | None, *, runs: bool) -> tuple[dict[str, str], int]:
    """What `cancelled` says, and of which attempt it does."""
    if runs:
        return WHILE_RUNNING, said.attempt if said is not None else 1
    if said is not None:
        return {"reason": CANCELLED, "error": "taken back between attempts"}, said.attempt
    return {"reason": CANCELLED, "error": "taken back before it began"}, 0


def _journal(family: Family, lane: Lane, job_id: str) -> str:
    if family.journal is None:
        raise NotFound(f"family {family.name} keeps no journal, so its jobs cannot be cancelled")
    return subjects.journal(family.journal, lane.tenant, job_id)
