"""Tells parents of the ends of their children, and wakes those that wait for the last one.

Whoever ends a job that has a parent does this before the job is acknowledged: a crash in between has the job delivered
again, and told again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from .. import headers, subjects
from ..connection import Connection
from ..errors import AccessDenied, Conflict, NotFound, QueueFull
from ..journal import ChildEnd, ChildEnds, WakeAt, is_over
from ..subjects import Lane, ParentRun
from ..topology import Topology
from .parking import Parking, parse_parked_job

log = logging.getLogger(__name__)

ENDS_AT_ONCE, BYTES_AT_ONCE = 64, 256 * 1024  # in one entry
SOON_S = 0.5  # a parent that comes back so soon by itself is not woken


class _Queue:
    """The ends of one parent's children that are to be told: one write at a time. `users`: how many callers wait."""

    def __init__(self) -> None:
        self.ends: list[ChildEnd] = []
        self.lock = asyncio.Lock()
        self.users = 0

    def take(self) -> list[ChildEnd]:
        """Remove and return the first ends, as many as fit into an entry."""
        count = size = 0
        for end in self.ends[:ENDS_AT_ONCE]:
            size += len(end.result or b"")
            if count and size > BYTES_AT_ONCE:
                break
            count += 1
        taken, self.ends = self.ends[:count], self.ends[count:]
        return taken


class Parents:
    """The parents of the jobs that one process ends."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._stream = topology.checkpoints_stream.name
        self._parking = Parking(connection, topology)
        self._queues: dict[tuple[ParentRun, str], _Queue] = {}
        self._warned = False

    async def report(self, job_headers: Mapping[str, str], tenant: str, end: ChildEnd, *, journaled: bool) -> None:
        """Tell the parent of a job, if it has one, that the job has ended. Returns when that is stored.

        `journaled`: the child's journal or dead letter has its end, where the parent looks now and then. Then it is
        only logged if the report cannot be stored. Raises Unavailable, and else QueueFull, AccessDenied.
        """
        parent = ParentRun.parse(job_headers.get(headers.PARENT, ""))
        if parent is None:
            return
        key = parent, tenant
        queue = self._queues.setdefault(key, _Queue())
        queue.users += 1
        queue.ends.append(end)
        try:
            async with queue.lock:
                while any(each is end for each in queue.ends):  # else another caller has stored it with its own
                    await self._store_some(parent, tenant, queue)
        except (QueueFull, NotFound, AccessDenied) as error:
            if not journaled and not isinstance(error, NotFound):  # without the stream, nobody waits
                raise
            if not self._warned:
                log.warning(
                    "job %s is not told of the end of its child %s at once: %s", parent.job_id, end.job_id, error
                )
            self._warned = True
        finally:
            queue.ends = [each for each in queue.ends if each is not end]
            queue.users -= 1
            if not queue.users:
                self._queues.pop(key, None)

    async def _store_some(self, parent: ParentRun, tenant: str, queue: _Queue) -> None:
        """Store ends of the queue in one entry, and wake the parent if it waits for them. On an error put them back."""
        taken = queue.take()
        try:
            log_of_ends = ChildEnds(self._connection, self._stream, parent.child_ends(tenant))
            kept, newest = await asyncio.gather(
                self._connection.last(self._stream, parent.checkpoints(tenant)), log_of_ends.newest()
            )
            if is_over(kept):
                return
            if (wake_at := await log_of_ends.add(taken, newest)) is not None:
                await self._wake(parent, tenant, wake_at)
        except BaseException:
            queue.ends = [*taken, *queue.ends]
            raise

    async def wake_if_reached(self, parent: ParentRun, tenant: str, priority: str, dedup_key: str) -> None:
        """Wake a parent that has just been parked, if what it waits for came before that, or if it was cancelled.

        `priority`, `dedup_key`: where it is parked. Raises Unavailable.
        """
        kept, newest = await asyncio.gather(
            self._connection.last(self._stream, parent.checkpoints(tenant)),
            self._connection.last(self._stream, parent.child_ends(tenant)),
        )
        if kept is not None and is_over(kept):  # the canceller may have looked for it before: it is ended at once
            await self._wake(parent, tenant, WakeAt(0, priority, dedup_key))
        elif newest is not None and (wake_at := WakeAt.of(newest.headers)) is not None:
            await self._wake(parent, tenant, wake_at)

    async def _wake(self, parent: ParentRun, tenant: str, wake_at: WakeAt) -> None:
        """Have a parked parent become due now. One that is not parked runs, or looks itself once it is parked."""
        lane = Lane(parent.family, tenant, wake_at.priority)
        subject = subjects.parked(lane, parent.job_id, wake_at.dedup_key, is_due=False)
        stored = await self._connection.last(self._parking.stream, subject)
        job = parse_parked_job(stored) if stored is not None else None
        now = self._connection.clock.now()
        if job is None or job.due_at < now + SOON_S:
            return
        try:
            await self._parking.move(job, now)
        except Conflict:
            log.debug("job %s was woken by another", parent.job_id)
