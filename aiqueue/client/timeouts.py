"""Why an awaited job has not ended in time: for the error, within 0.3 s, asked once a lane for all who wait there."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import Counter
from typing import TYPE_CHECKING

from ..connection import Connection
from ..enqueue import Enqueued
from ..errors import AccessDenied, AIQueueError, ResultTimeout
from ..subjects import Lane
from ..topology import Family, Topology

if TYPE_CHECKING:
    from ..inspect import Explanation, LaneReader
    from ..limits import Rule

EXPLAIN_S = 0.25  # and at most 0.05 s more, until the error is raised
AGAIN_S = 1.0  # of several jobs of a lane that time out within this time, one is looked at by itself
DENIED_S = 600.0  # until the next question of a user who may not ask
LANES_MAX = 1_000
LANES_AT_ONCE = 16  # of more that time out together, the error has no reason: none would be known in time


class TimeoutReasons:
    """Adds to errors of timeouts why the job waits. `declared`: the declared rules of limits."""

    def __init__(self, connection: Connection, topology: Topology, declared: tuple[Rule, ...] = ()) -> None:
        self._connection, self._topology, self._declared = connection, topology, declared
        self._lanes: LaneReader | None = None
        self._asked: dict[Lane, float] = {}  # when a job of a lane was last looked at by itself, monotonic seconds
        self._quiet_until = 0.0
        self._asking: Counter[Lane] = Counter()  # who waits for what is known of a lane

    async def explain(self, error: ResultTimeout, job: Enqueued, family: Family) -> ResultTimeout:
        """Return the error with the reason in its text; with the command that tells, if EXPLAIN_S are too short; and
        unchanged for a user who may not ask.
        """
        lane, asking = job.lane, self._asking
        is_late = lane not in asking and len(asking) >= LANES_AT_ONCE
        if time.monotonic() < self._quiet_until:
            return error
        unknown = ResultTimeout(f"{error}: `aiqueue explain {shlex.quote(job.job_id)}` says why")
        if is_late or not self._connection.connected:
            return unknown
        reader = self._reader()
        asking[lane] += 1
        self._connection.optional += 1
        try:
            async with asyncio.timeout(EXPLAIN_S):
                found = await self._find(reader, job, family)
        except AccessDenied:
            self._quiet_until = time.monotonic() + DENIED_S
            return error
        except (AIQueueError, TimeoutError):
            return unknown
        finally:
            self._connection.optional -= 1
            asking[lane] -= 1
            if not asking[lane]:
                del asking[lane]
        if found is None or not found.remedy:
            return error
        explained = ResultTimeout(f"{error}: {found}")
        explained.reason, explained.evidence = found.reason, found.evidence
        return explained

    def _reader(self) -> LaneReader:
        """Return what reads lanes. The first call imports for 0.1 s or more, before EXPLAIN_S begins: few wait for too
        long, and the first error of a program has a reason, too.
        """
        if self._lanes is None:
            from ..inspect import LaneReader, explain_enqueued  # noqa: F401, PLC0415
            from ..limits import Rules  # noqa: PLC0415

            self._lanes = LaneReader(self._connection, self._topology, Rules(self._declared))
        return self._lanes

    async def _find(self, reader: LaneReader, job: Enqueued, family: Family) -> Explanation | None:
        from ..inspect import explain_enqueued, explain_lane  # noqa: PLC0415

        now, lane = time.monotonic(), job.lane
        if lane.priority != "*" and not job.parking_id and now - self._asked.get(lane, -AGAIN_S) < AGAIN_S:
            return await explain_lane(self._connection, reader, family, lane, job.job_id, job.seq)
        if len(self._asked) >= LANES_MAX:
            self._asked.clear()
        self._asked[lane] = now
        return await explain_enqueued(self._connection, self._topology, reader, family, job)
