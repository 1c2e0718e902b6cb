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
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime

from .. import headers, subjects
from ..connection import Connection, Stored
from ..enqueue import ParkedCopy, Parking, copy_msg_id, delete_other_copies, note_on_its_way, park_copy
from ..errors import AIQueueError, BadInput, Conflict, NotFound, QueueFull
from ..inspect import Source, read_delivered
from ..journal import Journal
from ..subjects import Lane
from ..topology import Family, Topology
from .cancel_many import Chunk
from .job_plans import Target

AT_ONCE = 32
PAUSE_S = 5.0  # of a lane's consumer; it ends after each chunk, and by itself if this process dies
PAUSE_TRIES_MAX = 100
LOOK_AGAIN_S = 0.2  # another mover ends its pause long before it would end by itself
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
        names = _consumers(family, {target.lane for target, _ in there})
        try:
            taken, delivered = await self._take_out_all(family, names, there, moved)
        except Conflict as error:
            return moved | {target: error for target, _ in there if target not in moved}
        await asyncio.gather(*(self._finish(family, *each, moved, delivered.get(each[0].lane, 0)) for each in taken))
        return moved

    async def _take_out_all(
        self, family: Family, names: dict[Lane, str], there: list[tuple[Target, Stored]], moved: Moved
    ) -> tuple[list[tuple[Target, Stored, ParkedCopy]], dict[Lane, int]]:
        """Take jobs out of their lanes while these are paused. Return them, and what the lanes had delivered then."""
        async with self._paused(family, names):
            delivered = await self._read_delivered(family, names)
            moved |= {target: STARTED for target, stored in there if stored.seq <= delivered.get(target.lane, 0)}
            waiting = [(target, stored) for target, stored in there if target not in moved]
            copies = await asyncio.gather(*(self._take_out(family, *each, moved) for each in waiting))
            delivered = await self._read_delivered(family, names)  # as before, unless somebody has ended the pause
        taken = [(*each, copy) for each, copy in zip(waiting, copies, strict=True) if copy is not None]
        with contextlib.suppress(AIQueueError):  # the lanes take each job once for some minutes, whatever its copies do
            await delete_other_copies(self._connection, self._parking, family, [copy for *_, copy in taken])
        return taken, delivered

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

    async def _finish(
        self, family: Family, target: Target, stored: Stored, copy: ParkedCopy, moved: Moved, delivered: int
    ) -> None:
        """Store a job that was taken out in its new lane. If a worker may have got it, the copy waits for one lease."""
        async with self._gate:
            try:
                if stored.seq > delivered:
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

    @contextlib.asynccontextmanager
    async def _paused(self, family: Family, names: dict[Lane, str]) -> AsyncIterator[None]:
        """Pause the consumers of these lanes while the block runs. Raises Conflict."""
        ours: list[str] = []
        try:
            await asyncio.gather(*(self._pause(family, name, ours) for name in set(names.values())))
            yield
        finally:
            await asyncio.gather(*(self._resume(family, name) for name in ours))

    async def _pause(self, family: Family, name: str, ours: list[str]) -> None:
        """Pause a lane's consumer, after a short pause of somebody else, such as a worker's that removes it.

        A longer one is left as it is: nothing is delivered either. Raises Conflict.
        """
        consumer = f"{family.stream}.{name}"
        for _ in range(PAUSE_TRIES_MAX):
            try:
                info = await self._connection.api(f"CONSUMER.INFO.{consumer}")
            except NotFound:  # nobody serves the lane: it has delivered nothing
                return
            left_s = info.get("pause_remaining", 0) / 1e9 if info.get("paused") else 0.0
            if left_s > 2 * PAUSE_S:
                return
            if left_s <= 0:
                ours.append(name)
                until = datetime.fromtimestamp(self._connection.clock.now() + PAUSE_S, UTC).isoformat()
                await self._connection.api(f"CONSUMER.PAUSE.{consumer}", {"pause_until": until})
                return
            await asyncio.sleep(min(left_s, LOOK_AGAIN_S) + 0.01)
        raise Conflict(f"others pause consumer {name} of {family.stream} again and again: try later")

    async def _resume(self, family: Family, name: str) -> None:
        with contextlib.suppress(AIQueueError):  # the pause ends by itself
            await self._connection.api(f"CONSUMER.PAUSE.{family.stream}.{name}", {})

    async def _read_delivered(self, family: Family, names: dict[Lane, str]) -> dict[Lane, int]:
        where = {lane: (family.stream, name) for lane, name in names.items()}
        return await read_delivered(self._connection, where)


def _consumers(family: Family, lanes: Iterable[Lane]) -> dict[Lane, str]:
    """Return the consumers of lanes, without those that nobody serves: their priority or tenant is a stranger's."""
    found: dict[Lane, str] = {}
    for lane in lanes:
        with contextlib.suppress(BadInput):
            found[lane] = family.lane_name(*lane[1:])
    return found
