"""Has one worker heed the pauses: which lanes it pulls on, which jobs it starts, and which it stops."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from ..connection import Connection
from ..errors import AIQueueError
from ..lanes import LaneDiscovery, Pause, PauseScope, PauseWatch
from ..subjects import Lane
from ..topology import Family, Topology
from .context import JobContext
from .runner import Runner
from .unknown_kinds import UnknownKinds, Wanted

log = logging.getLogger(__name__)

FORWARD_WITHIN_S = 0.3  # after the end of a pause, at a random time: each job is then brought back by one worker
FORWARD_AGAIN_S = (0.0, 2.0, 5.0)  # a worker that heard late may have parked jobs meanwhile, or a try may have failed


class Pausing:
    """From `start` to `stop`: a change of the pauses reaches the pulls and the handlers of one worker.

    `runner` is set before `start`. `return_waiting` returns those that wait here for a slot, of lanes that are paused.
    `also_paused` returns whether the key of a lane is paused.
    """

    runner: Runner | None = None

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        families: Collection[Family],
        discovery: LaneDiscovery,
        unknown_kinds: UnknownKinds,
        return_waiting: Callable[[], None],
    ) -> None:
        self.watch = PauseWatch(connection, topology, self._on_change)
        self._families = {each.name: each for each in families}
        self._discovery = discovery
        self._unknown_kinds = unknown_kinds
        self._return_waiting = return_waiting
        self._tasks: set[asyncio.Task[None]] = set()
        self.also_paused: Callable[[Lane], bool] = lambda _lane: False

    async def start(self) -> None:
        """Read the pauses, so that no paused job starts. Raises Unavailable."""
        await self.watch.start()

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        await self.watch.stop()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def bring_forward(self, families: Iterable[str], wanted: Wanted) -> int:
        """As `UnknownKinds.bring_forward`, without the jobs that are paused."""

        def may_start(family: str, kind: str, tenant: str) -> bool:
            return wanted(family, kind, tenant) and self.watch.active.of_job(family, tenant, kind) is None

        return await self._unknown_kinds.bring_forward(families, may_start)

    def _on_change(self, begun: Sequence[Pause], ended: Sequence[Pause]) -> None:
        assert self.runner is not None
        self.runner.gate.pauses = self.watch.active or None
        self._discovery.set_paused(self._is_paused)
        self._return_waiting()
        for pause in begun:
            if pause.family in self._families:
                stopped = self.runner.interruptions.stop_handlers(partial(_covers, pause.scope)) if pause.now else 0
                log.info("%s%s", pause, f"; {stopped:,} running jobs return to the queue" if pause.now else "")
        mine = [each.scope for each in ended if each.family in self._families]
        for scope in mine:
            log.info("%s is paused no longer", scope)
        if aside := [each for each in mine if self._parks_aside(each)]:
            task = asyncio.create_task(self._end_hops(aside))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def look_again(self) -> None:
        """The keys that are paused have changed."""
        self._discovery.set_paused(self._is_paused)
        self._return_waiting()

    def _is_paused(self, lane: Lane) -> bool:
        return self.watch.active.of_lane(lane) is not None or (lane.key != "" and self.also_paused(lane))

    def _parks_aside(self, scope: PauseScope) -> bool:
        """Return whether the jobs of a pause are parked aside: they share their lanes with others."""
        return scope.kind is not None or (scope.tenant is not None and self._families[scope.family].lanes == "shared")

    async def _end_hops(self, ended: Sequence[PauseScope]) -> None:
        """Bring back the jobs that were parked aside. What is missed comes back when its hop ends. Never raises."""

        def was_paused(family: str, kind: str, tenant: str) -> bool:
            return any(each.covers(family, tenant, kind) for each in ended)

        for after_s in FORWARD_AGAIN_S:
            await asyncio.sleep(after_s + random.uniform(0, FORWARD_WITHIN_S))  # noqa: S311  (no secret)
            try:
                await self.bring_forward({each.family for each in ended}, was_paused)
            except AIQueueError as error:
                log.debug("jobs of a pause that has ended are not brought back yet: %s", error)
            except Exception:
                log.exception("bringing jobs back after a pause failed")


def _covers(scope: PauseScope, running: JobContext) -> bool:
    delivery = running.delivery
    return scope.covers(delivery.lane.key.family, delivery.tenant, running.kind)
