"""Since when workers take ticks without a break: what waits for its turn behind others is late, but not missed."""

from __future__ import annotations

import asyncio
import contextlib
from typing import NamedTuple

from .. import codec
from ..connection import Connection
from ..errors import AIQueueError, Conflict, DecodeError
from ..topology import Topology
from .store import ScheduleStore

LATE_S = 2.0  # ticks that are later than this have waited: from then on, workers note that they take ticks
NOTE_S = 1.0  # how often
BREAK_S = 8.0  # above an election: if nobody has noted that for so long, no worker was there
CONFLICTS_MAX = 8
WRITE_S = 2.0


class _Note(NamedTuple):
    """Since when workers take the ticks of a route, and when that was noted last. By the server's clock."""

    since: float
    seen: float

    def is_new(self, now: float) -> bool:
        return self.since <= self.seen and abs(now - self.seen) < NOTE_S  # in the future: a clock was set back


class Attendance:
    """Notes in a key of the bucket for each route that its ticks are taken, and tells since when they are.

    Only workers that have late ticks, or take long with one, read and write it. One worker alone would know its own
    start only: a new one would take the ticks that wait for their turn for those of an outage.
    """

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._clock = connection.clock
        self._store = ScheduleStore(connection, topology)
        self._notes: dict[str, _Note] = {}
        self._lock = asyncio.Lock()
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def since(self, route: str) -> float:
        """Note that this worker takes ticks of a route now, and return since when one of the workers has, without a
        break of BREAK_S. Raises as `ScheduleStore.put`.
        """
        async with self._lock:
            note = self._notes.get(route)
            if note is None or not note.is_new(self._clock.now()):
                note = self._notes[route] = await self._note(route)
            return note.since

    def keep(self, route: str) -> None:
        """Note the same in the background, if the last note is old."""
        note = self._notes.get(route)
        if route not in self._tasks and (note is None or not note.is_new(self._clock.now())):
            self._tasks[route] = task = asyncio.create_task(self._try_to_note(route))
            task.add_done_callback(lambda _: self._tasks.pop(route, None))

    async def _try_to_note(self, route: str) -> None:
        with contextlib.suppress(AIQueueError):
            await self.since(route)

    async def stop(self) -> None:
        """Wait for what runs in the background. Safe twice."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _note(self, route: str) -> _Note:
        subject = self._store.key(f"taken-{route}")
        for _ in range(CONFLICTS_MAX):
            stored, now = await self._store.last(subject), self._clock.now()
            since = now
            if stored is not None:
                with contextlib.suppress(DecodeError, KeyError, TypeError, ValueError):
                    read = codec.decode(stored.data, codec.CBOR)
                    former = _Note(float(read["since"]), float(read["seen"]))
                    if former.is_new(now):
                        return former
                    if abs(now - former.seen) < BREAK_S:
                        since = min(now, former.since)
            note = _Note(round(since, 3), round(now, 3))
            try:
                body = codec.dump(note._asdict())
                await self._store.write(subject, stored.seq if stored else 0, body, {}, WRITE_S)
            except Conflict:
                continue
            return note
        raise Conflict(f"{subject}: other workers wrote before each of {CONFLICTS_MAX} tries")
