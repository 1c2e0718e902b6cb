"""What a worker does for the schedules that its code declares: it stores them, and keeps them as they are declared."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..connection import Connection, read_last
from ..errors import AccessDenied, AIQueueError, NotFound, Unavailable
from ..lanes import WarnOnce
from ..topology import Topology
from .declarations import DeclaredSet, DeclaredSets
from .document import ScheduleDocument, ScheduleSpec
from .jobs import Makers
from .schedules import Schedules
from .store import parse

log = logging.getLogger(__name__)

EVERY_S = 30.0
REFRESH_S = 20.0  # of several workers with the same declarations, the first one that finds them this old looks
FIRST_S = 5.0  # for which the start of a worker waits
AT_ONCE = 32


@dataclass(frozen=True)
class Declared:
    """What the code of one worker declares. `owner` "": nothing."""

    owner: str = ""
    generation: int = 0
    specs: Collection[ScheduleSpec] = ()
    makers: Makers = field(default_factory=dict)


class Reconciled(NamedTuple):
    """What a pass has found: how many schedules were added and changed, and how many newer workers decide about."""

    added: int = 0
    changed: int = 0
    newer: int = 0


class Declarer:
    """Stores the declared schedules at `start`, and looks every EVERY_S whether they are as declared, until `stop`.

    A schedule that running workers of a newer version declare too is left to them. Without an owner, this does nothing.
    """

    def __init__(self, connection: Connection, topology: Topology, declared: Declared) -> None:
        self._clock = connection.clock
        self._schedules = Schedules(connection, topology)
        self._sets = DeclaredSets(self._schedules.store)
        self._declared = declared
        self._warn_once = WarnOnce(log)
        self._said_newer = False
        self._first_done = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when the schedules are stored, or that has failed, or takes longer than FIRST_S. Never raises."""
        if self._declared.owner and self._task is None:
            self._task = asyncio.create_task(self._run())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FIRST_S):
                    await self._first_done.wait()

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def _run(self) -> None:
        while True:
            try:
                await self.reconcile(is_first=not self._first_done.is_set())
            except (NotFound, AccessDenied) as error:
                self._warn_once(f"the schedules that this worker declares are not stored: {error}")
            except AIQueueError as error:
                log.debug("storing declared schedules: %s", error)
            except Exception:
                log.exception("storing declared schedules failed; the next try is in %g s", EVERY_S)
            self._first_done.set()
            await asyncio.sleep(EVERY_S * random.uniform(0.9, 1.1))  # noqa: S311  (no secret)

    async def reconcile(self, *, is_first: bool = True) -> Reconciled | None:
        """Store what is declared. None: another worker with the same declarations has just looked (not if `is_first`).

        Its own set is stored before the others are read: of two workers that start at once, one sees the other.
        Raises NotFound, AccessDenied, Unavailable.
        """
        owner, specs = self._declared.owner, self._declared.specs
        await self._clock.ensure(self._schedules.store.stream)
        now = round(self._clock.now(), 3)
        mine = DeclaredSet.of_specs(specs, self._declared.generation, now)
        stored = await self._sets.get(owner, mine.fingerprint)
        is_fresh = stored is not None and abs(now - stored.seen) < REFRESH_S  # in the future: a clock was set back
        if is_fresh and not is_first:
            return None
        if stored is not None:
            mine = stored._replace(seen=now)
        if not is_fresh and not await self._sets.refresh(owner, mine) and not is_first:
            return None
        newer = [each for each in await self._sets.list(owner) if each.is_alive(now) and each.rank > mine.rank]
        theirs = frozenset().union(*(each.names for each in newer))
        ours = [each for each in specs if (each.tenant, each.id) not in theirs]
        if len(ours) < len(specs):
            self._say_newer(len(specs) - len(ours))
        actions: list[str] = []
        todo = await self._find_different(ours)
        for at in range(0, len(todo), AT_ONCE):
            actions += await asyncio.gather(*(self._store(each) for each in todo[at : at + AT_ONCE]))
        return Reconciled(actions.count("added"), actions.count("changed"), len(specs) - len(ours))

    async def _find_different(self, specs: Sequence[ScheduleSpec]) -> list[ScheduleSpec]:
        """Return those that are not stored as they are declared, as far as a server of the cluster knows."""
        store = self._schedules.store
        subjects = [store.key(each.tenant, each.id) for each in specs]
        same: set[tuple[str, str, str, int]] = set()
        for stored in await read_last(store.connection, store.stream, subjects):
            found = parse(stored).document
            if found is not None:
                same.add((found.tenant, found.id, found.fingerprint, found.generation))
        wanted = [
            (each.tenant, each.id, ScheduleDocument.of_spec(each, 0.0).fingerprint, each.generation) for each in specs
        ]
        return [spec for spec, each in zip(specs, wanted, strict=True) if each not in same]

    async def _store(self, spec: ScheduleSpec) -> str:
        """Store one schedule, and return what was done. One that cannot be stored does not keep others from it."""
        try:
            action = (await self._schedules.add(spec)).action
        except (NotFound, AccessDenied, Unavailable):
            raise
        except AIQueueError as error:
            self._warn_once(str(error))
            return "failed"
        if action != "unchanged":
            log.info("schedule %s.%s: %s, as %s declares it", spec.tenant, spec.id, action, self._declared.owner)
        return action

    def _say_newer(self, count: int) -> None:
        if not self._said_newer:
            self._said_newer = True
            log.info("%d of the schedules that this worker declares are left to newer workers, which run too", count)
