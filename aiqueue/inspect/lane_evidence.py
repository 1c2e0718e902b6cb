"""Reads what is known of a lane and of who serves it, once for all jobs of the lane that are asked about together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

from ..connection import Connection
from ..errors import AccessDenied, NotFound, Unavailable
from ..lanes import ActivePauses
from ..subjects import Lane
from ..topology import Family, Topology
from .explanation import LaneEvidence
from .limit_stats import LimitStats, LimitUse, read_limits
from .pauses import read_pauses
from .stats import count_pending
from .worker_stats import WorkerStats
from .workers import read_workers

if TYPE_CHECKING:
    from ..limits import Rules

T = TypeVar("T")
VALID_S = 1.0  # how long what was read of a lane is used again


class LaneReader:
    """Reads lanes. What was read less than VALID_S ago is not read again; several callers wait for one read, and lanes
    share what does not depend on them: with thousands of workers and lanes that is nearly all of it.
    """

    def __init__(self, connection: Connection, topology: Topology, rules: Rules | None = None) -> None:
        self._connection, self._topology, self._rules = connection, topology, rules
        self._denied: dict[str, str] = {}  # what this user may not read, and why: not asked again
        self._reads: dict[Hashable, tuple[float, asyncio.Task[Any]]] = {}  # the oldest first

    async def read(self, family: Family, lane: Lane, key: str = "") -> LaneEvidence:
        """Return what is known of a lane. `key`: the value of its limited key. Raises nothing that one part raises."""
        return await self._once((lane, key), lambda: self._read(family, lane, key))

    async def _once(self, what: Hashable, read: Callable[[], Coroutine[Any, Any, T]]) -> T:
        now = time.monotonic()
        while self._reads and now - next(iter(self._reads.values()))[0] > VALID_S:
            self._reads.pop(next(iter(self._reads)))
        if what not in self._reads:
            self._reads[what] = now, asyncio.create_task(read())
        found: T = await asyncio.shield(self._reads[what][1])
        return found

    async def _read(self, family: Family, lane: Lane, key: str) -> LaneEvidence:
        unknown: list[str] = []

        async def part(what: str, read: Callable[[], Awaitable[T]]) -> T | None:
            if what not in self._denied:
                try:
                    return await read()
                except AccessDenied as error:
                    self._denied[what] = str(error)
                except (NotFound, Unavailable) as error:
                    unknown.append(f"{what}: {error}")
                    return None
            unknown.append(f"{what}: {self._denied[what]}")
            return None

        consumer, workers, pauses, pending, limits = await asyncio.gather(
            part("who asks for jobs of its lane", lambda: self._read_consumer(family, lane)),
            part("who works", lambda: self._once("workers", self._read_workers)),
            part("what is paused", lambda: self._once("pauses", self._read_pauses)),
            part(
                "what waits in other lanes",
                lambda: self._once(family.name, lambda: count_pending(self._connection, family)),
            ),
            part("the limits of its key", lambda: self._read_limits(family, lane, key)),
        )
        return LaneEvidence(
            family, lane._replace(tenant="*") if family.lanes == "shared" else lane, consumer,
            workers, pauses, pending, limits or (), tuple(unknown),
        )  # fmt: skip

    async def _read_workers(self) -> tuple[WorkerStats, ...]:
        return tuple(await read_workers(self._connection, self._topology, with_pauses=False))

    async def _read_pauses(self) -> ActivePauses:
        return ActivePauses(await read_pauses(self._connection, self._topology))

    async def _read_consumer(self, family: Family, lane: Lane) -> dict[str, Any]:
        """Return the information about the lane's consumer, empty if there is none."""
        try:
            name = family.lane_name(lane.tenant, lane.priority, lane.key)
            return await self._connection.api(f"CONSUMER.INFO.{family.stream}.{name}")
        except NotFound:
            return {}

    async def _read_limits(self, family: Family, lane: Lane, key: str) -> tuple[tuple[LimitStats, LimitUse], ...]:
        """Return the rules for a value of the family's limited key, each with what the lane's tenant uses of it."""
        if family.limit_key is None or not key:
            return ()
        from ..limits import Rules  # noqa: PLC0415  (few need the room of limits)

        found = await read_limits(self._connection, self._topology, self._rules or Rules(), family.name)
        return tuple(
            (rule, use) for rule in found for use in rule.uses if use.key == key and use.tenant in (None, lane.tenant)
        )
