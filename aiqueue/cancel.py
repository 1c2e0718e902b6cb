"""Taking back a job that has not begun.

What decides is the job's journal, where there is one to contend for: the attempt of a job that comes from parking, or
is tried again, writes `started` before its handler runs, a cancellation writes `cancelled`, and the server takes the
first. A job that waits in its lane for the first time has no such entry, and is taken out by way of parking. All orders
of writes are in docs/decisions/parking.md.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

from . import headers, subjects
from .connection import Connection, Stored
from .documents import Documents
from .errors import NotFound, TooLarge, Unavailable
from .journal import CANCELLED, RETRY, Journal
from .lookup import find
from .parking import Parking, Waiting, waiting
from .producer import Enqueued
from .subjects import Lane
from .topology import Family, Topology

TRIES_MAX = 8


class Verdict(NamedTuple):
    """Whether the job will never run (again), and a sentence about it. If not, nothing has changed."""

    cancelled: bool
    said: str


BEGUN = Verdict(False, "it has begun: a worker runs it, or holds it")
ENDED = Verdict(False, "it has ended already")
DONE = Verdict(True, "it will not run")


class Cancels:
    """Cancels jobs: those that are parked, queued or between two attempts."""

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
        said = await self._journal.of_run(subject, job.seq, 0.0)
        return DONE if said is not None and said.event == CANCELLED else ENDED

    async def _delayed(self, family: Family, job: Enqueued) -> Verdict:
        """A job that was enqueued with a delay. Before its first attempt its word is enough, wherever it is by now;
        afterwards it is the run that this attempt has told.
        """
        said = await self._journal.of_run(_journal(family, job.lane, job.job_id), 0, math.inf, job.word)
        if said is not None and said.run:
            return await self.enqueued(job._replace(stream=family.stream, seq=said.run, word=""))
        verdict = await self._forbid(family, job.lane, job.job_id, run=0, born=math.inf, word=job.word)
        if verdict.cancelled:
            stored = await self._connection.get(job.stream, job.seq)
            found = await self.parking.of(job.lane, job.job_id)  # due, or parked again since
            for one in [stored, *(each.stored for each in found if each.word == job.word)]:
                if one is not None:
                    await self._remove(job.stream, job.lane, one)
        return verdict

    async def _parked(self, family: Family, job: Waiting) -> Verdict:
        place, born = job.place, headers.decimal(job.stored.headers.get(headers.ENQUEUED, "")) or math.inf
        verdict = await self._forbid(family, place.lane, place.job_id, run=job.run, born=born, word=job.word)
        if verdict.cancelled:
            await self._remove(self.parking.stream, place.lane, job.stored)
            due = subjects.parked(place.lane, place.job_id, place.hop, due=True)
            there = await self._connection.last(self.parking.stream, due)
            moved = waiting(there) if there is not None else None
            if moved is not None and moved.word == job.word:
                await self._connection.delete(self.parking.stream, moved.stored.seq)
        return verdict

    async def _queued(self, family: Family, lane: Lane, job_id: str, stored: Stored) -> Verdict:
        told = stored.headers
        word, run = headers.word(told), headers.number(told.get(headers.RUN, "")) or stored.seq
        born = headers.decimal(told.get(headers.ENQUEUED, "")) or stored.time
        said = await self._journal.of_run(_journal(family, lane, job_id), run, born, word)
        if word or (said is not None and (said.final or said.event == RETRY)):
            # its next attempt writes `started` first: the journal decides
            verdict = await self._forbid(family, lane, job_id, run=run, born=born, word=word)
            if verdict.cancelled:
                await self._remove(family.stream, lane, stored)
            return verdict
        if said is not None or stored.seq <= await self._delivered(family, lane):
            return BEGUN
        return await self._take_out(family, lane, job_id, stored, word)

    async def _forbid(self, family: Family, lane: Lane, job_id: str, *, run: int, born: float, word: str) -> Verdict:
        """Write `cancelled`, if nothing has been written since the job last waited."""
        subject = _journal(family, lane, job_id)
        for _ in range(TRIES_MAX):
            head = await self._journal.head(subject)
            said = await self._journal.of_run(subject, run, born, word)
            if said is not None and said.event == CANCELLED:
                return DONE
            if said is not None and said.event != RETRY:
                return ENDED if said.final else BEGUN
            told = {
                "reason": CANCELLED,
                "error": "taken back before it began" if said is None else "taken back between attempts",
            }
            attempt = said.attempt if said is not None else 0
            if await self._journal.append(subject, CANCELLED, told, run=run, attempt=attempt, word=word, head=head):
                return DONE
        raise Unavailable(f"{subject}: {TRIES_MAX} writes were overtaken")

    async def _take_out(self, family: Family, lane: Lane, job_id: str, stored: Stored, word: str) -> Verdict:
        """Take a job that was not delivered out of its lane. A worker may get it at this very moment: so a copy is
        parked first, for as long as a lease. It comes back if that has happened, or if this process dies on the way;
        where the worker has ended the job by then, the journal says so.
        """
        told = dict(stored.headers) | {headers.RUN: str(stored.seq), headers.ENQUEUED: f"{stored.time:.6f}"}
        lane = subjects.parse_lane(stored.subject) or lane
        hop = subjects.new_id()
        try:
            copy = await self.parking.park(lane, job_id, time.time() + family.ack_wait_s, told, stored.data, hop=hop)
        except TooLarge:
            return Verdict(False, "it waits in its lane, and is too large to be taken out safely")
        if not await self._connection.delete(family.stream, stored.seq):
            await self._connection.delete(self.parking.stream, copy.seq)
            return ENDED
        verdict = BEGUN
        if stored.seq > await self._delivered(family, lane):
            verdict = await self._forbid(family, lane, job_id, run=stored.seq, born=stored.time, word=hop)
        if verdict is not BEGUN:
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


def _journal(family: Family, lane: Lane, job_id: str) -> str:
    if family.journal is None:
        raise NotFound(f"family {family.name} keeps no journal, so its jobs cannot be cancelled")
    return subjects.journal(family.journal, lane.tenant, job_id)
