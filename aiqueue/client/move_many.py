"""Moves queued jobs to the lanes of another priority: each runs once, also if who moves them dies on the way.

A job must not be given to a worker while it is taken out of its lane. So the lane's consumer is paused for the time of
one chunk, and what it has delivered stays. Then, for each job:

1. A copy is parked for one lease, for the new lane (enqueue/take_out.py).
2. The original is deleted.
3. The journal says that the job is on its way: who awaits its result does not take it for gone.
4. The job is stored in its new lane, under the Msg-Id that its copies would have there: the server takes one of them.
5. The copy is deleted, after 2 also those of movers that have died on the way.

docs/decisions/job-lists.md has what a death between two of these does.
"""

from __future__ import annotations

import asyncio
import contextlib

from .. import headers, subjects
from ..connection import Connection, Stored
from ..enqueue import ParkedCopy, Parking, copy_msg_id, delete_other_copies, note_on_its_way, park_copy
from ..errors import AIQueueError, Conflict, NotFound, QueueFull
from ..inspect import Source
from ..journal import Journal
from ..subjects import Lane
from ..topology import Family, Topology
from .cancel_many import Chunk
from .job_plans import Target
from .lane_pause import LanePause

AT_ONCE = 32
STARTED = "it has started"

Moved = dict[Target, str | AIQueueError]  # "": moved; else what the job does instead


class MoveMany:
    """Moves the jobs of a plan to a priority, chunk by chunk."""

    def __init__(self, connection: Connection, topology: Topology, parking: Parking, to: str) -> None:
        self._connection = connection
        self._parking = parking
        self._journal = Journal(connection, topology.journal_stream.name)
        self._to = to
        self._gate = asyncio.Semaphore(AT_ONCE)

    async def run(self, source: Source, chunk: Chunk) -> Moved:
        """Move the jobs of a chunk, and return what became of each, or the error because of which it is not moved."""
        family, moved = source.family, Moved()
        assert family is not None
        moved |= {target: "it has started, ended or was moved" for target, stored in chunk if stored is None}
        there = [(target, stored) for target, stored in chunk if stored is not None]
        try:
            taken = await self._take_out_all(family, there, moved)
        except Conflict as error:
            return moved | {target: error for target, _ in there if target not in moved}
        await asyncio.gather(*(self._finish(family, *each, moved) for each in taken))
        return moved

    async def _take_out_all(
        self, family: Family, there: list[tuple[Target, Stored]], moved: Moved
    ) -> list[tuple[Target, Stored, ParkedCopy]]:
        """Take jobs out of their lanes while these are paused, and return them.

        One that a worker may have got all the same, because the pause has ended, is left to the worker. Its copy takes
        its place if the worker dies: the forwarder asks for who holds the original.
        """
        async with LanePause(self._connection, family, {target.lane for target, _ in there}) as pause:
            delivered = await pause.read_delivered()
            moved |= {target: STARTED for target, stored in there if stored.seq <= delivered.get(target.lane, 0)}
            waiting = [(target, stored) for target, stored in there if target not in moved]
            copies = await asyncio.gather(*(self._take_out(family, *each, moved) for each in waiting))
            delivered = await pause.read_delivered()  # as before, unless the pause has ended
        taken = [(*each, copy) for each, copy in zip(waiting, copies, strict=True) if copy is not None]
        with contextlib.suppress(AIQueueError):  # the lanes take each job once for some minutes, whatever its copies do
            await delete_other_copies(self._connection, self._parking, family, [copy for *_, copy in taken])
        moved |= {target: STARTED for target, stored, _ in taken if stored.seq <= delivered.get(target.lane, 0)}
        return [each for each in taken if each[0] not in moved]

    async def _take_out(self, family: Family, target: Target, stored: Stored, moved: Moved) -> ParkedCopy | None:
        """Replace a job in its lane by a parked copy. None: that is not done, and `moved` says why."""
        to = target.lane._replace(priority=self._to)
        async with self._gate:
            try:
                if headers.PARKED in stored.headers:  # under its old parking id, which its handle knows
                    await self._note(family, target, stored, headers.parking_id(stored.headers))
                copy = await park_copy(self._connection, self._parking, family, to, target.job_id, stored)
                if await self._connection.delete(family.stream, stored.seq):
                    return copy
                await self._connection.delete(self._parking.stream, copy.seq)
                moved[target] = "it has ended, or was cancelled or moved"
            except AIQueueError as error:
                moved[target] = error
        return None

    async def _finish(self, family: Family, target: Target, stored: Stored, copy: ParkedCopy, moved: Moved) -> None:
        """Store a job that was taken out in its new lane."""
        async with self._gate:
            try:
                await self._note(family, target, stored, copy.parking_id)
                await self._store(target.lane._replace(priority=self._to), stored, copy)
                moved[target] = ""
            except AIQueueError:
                moved[target] = ""  # its copy comes to the new lane

    async def _note(self, family: Family, target: Target, stored: Stored, parking_id: str) -> None:
        """Write to the journal that the job is on its way."""
        run, enqueued_at = headers.run(stored.headers, stored.seq, stored.time)
        to = target.lane._replace(priority=self._to)
        await note_on_its_way(self._journal, family, to, target.job_id, run, enqueued_at, parking_id)

    async def _store(self, to: Lane, stored: Stored, copy: ParkedCopy) -> None:
        """Store a job in its new lane, and delete the copy. If the lane takes none now, the copy waits for room."""
        job_headers = headers.carried(copy.headers, ours=True)
        job_headers.pop(headers.ORIGINAL, None)
        job_headers |= {headers.JOB_ID: copy.job_id, headers.MSG_ID: copy_msg_id(to, copy.job_id, copy.headers)}
        await self._connection.publish(subjects.hint(to), subjects.hint_body(to, headers.limit_key(job_headers)))
        with contextlib.suppress(QueueFull, NotFound):
            await self._connection.store(subjects.work(*to), stored.data, job_headers)
            await self._connection.delete(self._parking.stream, copy.seq)
