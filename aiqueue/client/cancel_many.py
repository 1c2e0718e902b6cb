"""Cancels many jobs, in few round trips for those that wait in their lanes and were never delivered.

The orders of writes are those of `cancel`, for each job: a parked copy, the deletion in the lane, `cancelled` in the
journal, the deletion of the copy. What a chunk of jobs has in common is asked once: which journals have entries, and
what the lanes' consumers have delivered. Any job that is not as simple as that is cancelled alone.

Where the filter names states or a priority, a job is cancelled only if they still hold. So that no queued job is
started between that look and its deletion, the consumers of the lanes are paused for the time of a chunk.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

from .. import headers, subjects
from ..connection import Connection, Stored, read_last
from ..enqueue import Enqueued, ParkedCopy, ParkedJob, find_original, park_copy, parse_parked_job
from ..errors import AIQueueError, BadInput, Conflict, NotFound, TooLarge
from ..inspect import IN_LANES, ListFilter, Source, read_delivered, state_when_parked
from ..journal import CANCELLED, EMPTY_RECORD, Entry, Journal, entry_from_stored, kind_header
from ..subjects import Lane
from ..topology import Family
from .cancel import ALREADY_CANCELLED, ALREADY_ENDED, TOO_LARGE, Canceller, Verdict, cancelled_entry, journal_subject
from .job_plans import ACTS_ON, Target
from .lane_pause import LanePause

AT_ONCE = 32  # jobs that are taken out, or cancelled alone, at the same time

Chunk = Sequence[tuple[Target, Stored | None]]
Verdicts = dict[Target, Verdict | AIQueueError]
BEGUN = Verdict(False, "it has started meanwhile, and runs on")
NOT_BEGUN = Verdict(False, "it is not in flight any more, and waits in its lane")
LEFT = Verdict(False, "it is no longer as the filter says: it has started, ended, or was parked or moved")


class CancelMany:
    """Cancels the jobs of a plan, chunk by chunk."""

    def __init__(self, connection: Connection, canceller: Canceller, wanted: ListFilter) -> None:
        """`wanted`: the filter of the plan, of which states and priority are to hold when a job is cancelled."""
        self._connection = connection
        self._wanted = wanted
        self._follows = wanted.states >= set(ACTS_ON["cancel"]) and wanted.priority is None
        self._canceller = canceller
        self._topology = canceller.topology
        self._journal = Journal(connection, canceller.topology.journal_stream.name)
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def run(self, source: Source, chunk: Chunk) -> Verdicts:
        """Cancel the jobs of a chunk, and return what became of each, or the error because of which it is not."""
        family = source.family
        if family is None or self._wanted.states >= IN_LANES:
            return await self._run(family, chunk, Verdicts())
        there = [(target, stored) for target, stored in chunk if stored is not None]
        pause = LanePause(self._connection, family, {target.lane for target, _ in there})
        try:
            async with pause if "queued" in self._wanted.states else contextlib.nullcontext():
                delivered = await pause.read_delivered()
                verdicts: Verdicts = {}
                for target, stored in there:
                    has_begun = stored.seq <= delivered.get(target.lane, 0)
                    if ("in_flight" if has_begun else "queued") not in self._wanted.states:
                        verdicts[target] = BEGUN if has_begun else NOT_BEGUN
                return await self._run(family, [each for each in chunk if each[0] not in verdicts], verdicts)
        except Conflict as error:  # the lanes cannot be paused: nothing was done
            return {target: error for target, _ in chunk}

    async def _run(self, family: Family | None, chunk: Chunk, verdicts: Verdicts) -> Verdicts:
        simple: list[tuple[Target, Stored]] = []
        if family is not None and family.journal is not None:
            heads = await self._read_heads(family, chunk)
            lanes = await self.read_delivered(family, [each.lane for each, stored in chunk if stored is not None])
            for target, stored in chunk:
                head = heads.get(journal_subject(family, target.lane, target.job_id))
                if stored is None and head is not None and head.final and target.run and head.run == target.run:
                    verdicts[target] = ALREADY_CANCELLED if head.event == CANCELLED else ALREADY_ENDED
                elif stored is not None and head is None and _is_simple(family, target, stored, lanes):
                    simple.append((target, stored))
            await self._cancel_simple(family, simple, verdicts)
        left = [(target, stored) for target, stored in chunk if target not in verdicts]
        await asyncio.gather(*(self._cancel_alone(target, stored, verdicts) for target, stored in left))
        return verdicts

    async def read_delivered(self, family: Family, lanes: Sequence[Lane]) -> Mapping[Lane, int]:
        """Return the last delivered sequence of each lane that has a consumer."""
        asked = {}
        for lane in set(lanes):
            try:
                asked[lane] = family.stream, family.lane_name(*lane[1:])
            except BadInput:  # a lane that nobody serves
                continue
        return await read_delivered(self._connection, asked)

    async def _read_heads(self, family: Family, chunk: Chunk) -> dict[str, Entry]:
        """Return the newest entries of the journals of a chunk. One server of a cluster may be behind."""
        asked = [journal_subject(family, target.lane, target.job_id) for target, _ in chunk]
        try:
            found = await read_last(self._connection, self._journal.stream, asked)
        except NotFound:
            return {}
        return {each.subject: entry_from_stored(each) for each in found}

    async def _cancel_simple(self, family: Family, jobs: list[tuple[Target, Stored]], verdicts: Verdicts) -> None:
        copies = await asyncio.gather(*(self._take_out(family, *each, verdicts) for each in jobs))
        taken = [(*each, copy) for each, copy in zip(jobs, copies, strict=True) if copy is not None]
        delivered = await self.read_delivered(family, [target.lane for target, _, _ in taken])

        async def cancel_one(target: Target, stored: Stored, copy: ParkedCopy) -> None:
            async with self._gate:
                may_run = stored.seq <= delivered.get(target.lane, 0)
                if may_run and "in_flight" not in self._wanted.states:  # somebody has ended the pause of the lane
                    verdicts[target] = BEGUN  # its copy takes its place if its worker dies
                    return
                try:
                    verdicts[target] = await self._write_cancelled(family, target, stored, copy, may_run=may_run)
                    await self._connection.delete(self._canceller.parking.stream, copy.seq)
                    if may_run:
                        await self._canceller.cancel_children_of(family.name, target.lane.tenant, target.job_id)
                    if headers.DOCUMENT_REF in stored.headers:
                        await self._canceller.documents.end_holds(target.lane.tenant, stored.headers)
                except AIQueueError as error:
                    verdicts[target] = error

        await asyncio.gather(*(cancel_one(*each) for each in taken))

    async def _take_out(self, family: Family, target: Target, stored: Stored, verdicts: Verdicts) -> ParkedCopy | None:
        """Take a job out of its lane. None: it is no longer there, or cannot be taken out."""
        parking = self._canceller.parking
        async with self._gate:
            try:
                copy = await park_copy(self._connection, parking, family, target.lane, target.job_id, stored)
                if await self._connection.delete(family.stream, stored.seq):
                    return copy
                await self._connection.delete(parking.stream, copy.seq)
            except TooLarge:
                return None
            except AIQueueError as error:
                verdicts[target] = error
        return None

    async def _write_cancelled(
        self, family: Family, target: Target, stored: Stored, copy: ParkedCopy, *, may_run: bool
    ) -> Verdict:
        """Write `cancelled` as the first entry of a journal, without a read; where it is not the first, with one."""
        data, attempt = cancelled_entry(None, is_running=False)
        subject, kind = journal_subject(family, target.lane, target.job_id), headers.stated_kind(stored.headers)
        if not may_run and await self._journal.append_if_unchanged(
            subject, CANCELLED, data, run=stored.seq, attempt=attempt, parking_id=copy.parking_id, record=EMPTY_RECORD,
            extra=kind_header(kind),
        ):  # fmt: skip
            return Verdict(True, "it will not run")
        return await self._canceller.write_cancelled(
            family, target.lane, target.job_id, run=stored.seq, enqueued_at=stored.time, parking_id=copy.parking_id,
            may_run=may_run, kind=kind,
        )  # fmt: skip

    async def _cancel_alone(self, target: Target, stored: Stored | None, verdicts: Verdicts) -> None:
        """Cancel a job that another attempt, a parking or a child makes less simple, wherever it is by now."""
        async with self._gate:
            try:
                verdict = ALREADY_ENDED
                if stored is not None:
                    verdict = await self._cancel_stored(target, stored)
                if not verdict.cancelled and verdict is not TOO_LARGE:  # it may have moved since it was read
                    verdict = await self._cancel_elsewhere(target)
                if verdict.cancelled:
                    await self._canceller.cancel_children_of(target.lane.family, target.lane.tenant, target.job_id)
                verdicts[target] = verdict
            except AIQueueError as error:
                verdicts[target] = error

    async def _cancel_elsewhere(self, target: Target) -> Verdict:
        """Cancel a job that is not where it was, wherever it is. If the filter names states or a priority: only if the
        job is parked, and they hold there.
        """
        if self._follows:
            return await self._canceller.cancel_where_it_is(self._where(target))
        family = self._topology.family(target.lane.family)
        for parked in await self._canceller.parking.find_all(target.lane, target.job_id):
            is_it = parked.run == target.run if target.run else parked.parking_id == target.parking_id
            if is_it and self._holds_for(parked):
                return await self._canceller.cancel_parked(family, parked)
        return LEFT

    def _holds_for(self, parked: ParkedJob) -> bool:
        is_state = state_when_parked(parked)[0] in self._wanted.states
        return is_state and self._wanted.priority in (None, parked.subject.lane.priority)

    async def _cancel_stored(self, target: Target, stored: Stored) -> Verdict:
        family = self._topology.family(target.lane.family)
        parked = parse_parked_job(stored)
        if parked is not None and not self._follows:
            there = await self._connection.get(self._canceller.parking.stream, stored.seq)
            if there is None or not self._holds_for(parked):
                return LEFT
        if parked is not None:
            original = await find_original(self._connection, family.stream, stored.headers)
            if original is None:
                return await self._canceller.cancel_parked(family, parked)
            if not self._wanted.states >= IN_LANES:
                return LEFT
            # who took it out has died before the deletion, or is about to delete it
            verdict = await self._canceller.cancel_queued(family, target.lane, target.job_id, original)
            if verdict.cancelled:
                await self._canceller.cancel_parked(family, parked)  # the copy
            return verdict
        return await self._canceller.cancel_queued(family, target.lane, target.job_id, stored)

    def _where(self, target: Target) -> Enqueued:
        return where_enqueued(target, self._topology.family(target.lane.family), self._canceller.parking.stream)


def where_enqueued(target: Target, family: Family, parking_stream: str) -> Enqueued:
    """Return a job of a plan as the client that enqueued it knows it."""
    if target.run:
        return Enqueued(target.job_id, target.lane, family.stream, target.run, True)
    return Enqueued(target.job_id, target.lane, parking_stream, target.seq, True, None, target.parking_id)


def _is_simple(family: Family, target: Target, stored: Stored, delivered: Mapping[Lane, int]) -> bool:
    """Whether a job in its lane was never parked or delivered, and has neither parent nor children."""
    if headers.PARKED in stored.headers or headers.PARENT in stored.headers:
        return False
    lane = subjects.parse_lane(stored.subject)
    return lane is not None and lane.priority in family.priorities and stored.seq > delivered.get(target.lane, 0)
