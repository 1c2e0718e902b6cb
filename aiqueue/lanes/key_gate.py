"""The gate of limited keys: which of their lanes a worker pulls on, and for how many jobs.

A lane of a limited key is granted no more jobs than this process has credits for. A key without credits is not pulled
on: its jobs stay in the stream, undelivered, and cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection

from .. import headers, subjects
from ..connection import Connection
from ..errors import AIQueueError
from ..limits import Limiter
from ..subjects import Lane
from ..topology import Family, Topology
from .delivery import LanePull, Turn
from .key_pool import KeyPool
from .worker_records import WorkerRecords, without_key_lanes

TICK_S = 0.25
TEXTS_MAX = 100_000
USED_S = 5.0  # how long a key counts among those of a tenant to whose lane a job has gone
RECORDS_EVERY = 20  # ticks between two looks at the records of workers

log = logging.getLogger(__name__)


class KeyGate:
    """The pools and turns of one worker. `changed` is called when there may be something to pull, `paused_changed` when
    keys were paused, or resumed.
    """

    def __init__(
        self, connection: Connection, topology: Topology, limiter: Limiter, *, changed: Callable[[], None],
        paused_changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._connection = connection
        self.limiter = limiter
        self._families = {each.name: each for each in topology.families.values() if each.limit_key}
        self._changed = changed
        self._paused_changed = paused_changed
        self._pools: dict[tuple[str, str, str], KeyPool] = {}
        self._turns: dict[tuple[str, str, str], Turn] = {}
        self._texts: dict[tuple[str, str], str] = {}  # by family and hashed key
        self._paused: set[tuple[str, str, str]] = set()
        self._used: dict[
            tuple[str, str], dict[str, float]
        ] = {}  # by family and tenant: keys with a lane, and until when
        self._listed: dict[str, bool] = {}  # by family: whether its stream takes jobs into lanes of keys
        self._records = WorkerRecords(connection, topology)
        self._hindering: dict[str, str] = {}  # by family: a worker that would not serve such lanes
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the limiter. Raises NotFound, Unavailable, AccessDenied."""
        await self.limiter.open()
        await self._look_for_former_workers()
        self.limiter.controls.listeners.append(self._on_change)
        self._ticker = asyncio.create_task(self._tick())

    @property
    def started(self) -> bool:
        """Whether limits are heeded."""
        return self._ticker is not None

    async def stop(self) -> None:
        """Give back what is not spent. Safe twice and unstarted."""
        ticker, self._ticker = self._ticker, None
        if ticker is not None:
            ticker.cancel()
            await asyncio.wait([ticker])
        for pool in self._pools.values():
            pool.close()
        await self.limiter.close()

    # -- lanes

    def learn(self, family: str, key: str) -> None:
        """Note what a hashed key stands for."""
        if len(self._texts) >= TEXTS_MAX:  # others are read from their lanes again
            self._texts = {(name, subjects.hashed(text)): text for name, _, text in self._pools}
        self._texts[family, subjects.hashed(key)] = key

    async def find_text(self, family: Family, lane: Lane) -> None:
        """Learn which key a lane is of, from its newest job. Raises Unavailable, AccessDenied."""
        if lane.key == subjects.REST or (lane.family, lane.key) in self._texts:
            return
        stored = await self._connection.last(family.stream, subjects.lane(*lane))
        text = headers.limit_key(stored.headers) if stored is not None else ""
        if subjects.hashed(text) == lane.key:
            self.learn(lane.family, text)

    def join(self, pull: LanePull) -> None:
        """A lane of a family with a limit_key is about to be pulled on: give it its turn and its pool."""
        family, lane = self._families.get(pull.key.family), pull.key
        if family is None:
            return
        where = lane[:3]
        turn = self._turns.get(where)
        if turn is None:
            cap = family.lane_limits(lane.tenant)["max_ack_pending"]
            turn = self._turns[where] = Turn(pull.rank, pull.weight, cap if cap > 0 else 1_000_000)
        turn.lanes.append(pull)
        pull.turn = turn
        if lane.key not in ("", subjects.REST):
            self._used.setdefault(lane[:2], {})[lane.key] = math.inf
        self.find_pool(pull)

    def find_pool(self, pull: LanePull) -> None:
        """Give the lane of a key its pool, once it is known what its hashed key stands for."""
        lane = pull.key
        text = self._texts.get((lane.family, lane.key), "") if lane.key else ""
        if text and pull.pool is None:
            pull.pool = self._pool(lane.family, lane.tenant, text)
            pull.pool.lanes.append(pull)
            if pull.paused and self._is_paused(lane.family, lane.tenant, text):
                self._paused.add((lane.family, lane.tenant, text))

    def leave(self, pull: LanePull) -> None:
        """A lane is pulled on no more."""
        turn, pool = pull.turn, pull.pool  # its jobs that still run go on counting in its turn
        pull.pool = None
        used = self._used.get(pull.key[:2], {})
        if pull.key.key in used:
            used[pull.key.key] = time.monotonic() + USED_S
        if turn is not None:
            turn.lanes.remove(pull)
        if pool is not None:
            pool.lanes.remove(pull)
            if not pool.lanes:
                self._pools.pop((pool.family, pool.tenant, pool.key), None)
                pool.close()

    def _pool(self, family: str, tenant: str, text: str) -> KeyPool:
        name = family, tenant, text
        pool = self._pools.get(name)
        if pool is None:
            pool = self._pools[name] = KeyPool(self.limiter, family, tenant, text, self._changed)
        return pool

    # -- which lane

    def find_token(self, family: Family, tenant: str, key: str) -> str:
        """Return the key of the lane in which a tenant's jobs of a key wait: its hash, or REST for a key for which the
        tenant has no lane left. "": jobs stay in the ordinary lane, because the stream has no lanes of keys yet, or a
        worker of a former version runs, which would not serve them.
        """
        if not self._listed.get(family.name) or family.name in self._hindering:
            return ""
        token, now = subjects.hashed(key), time.monotonic()
        used = self._used.setdefault((family.name, tenant), {})
        if token not in used and len(used) >= subjects.KEY_LANES_MAX:
            for each in [each for each, until in used.items() if until < now]:
                del used[each]
            if len(used) >= subjects.KEY_LANES_MAX:
                return subjects.REST
        used[token] = max(used.get(token, 0.0), now + USED_S)
        return token

    def note_subjects(self, family: Family, listed: Collection[str]) -> None:
        """The family's stream takes these subjects."""
        self._listed[family.name] = family.takes_keys(listed)

    async def _look_for_former_workers(self) -> None:
        """Note for which families a worker runs that serves no lanes of keys.

        Raises Unavailable, NotFound, AccessDenied.
        """
        former = without_key_lanes(await self._records.read())
        found = {family: names[-1] for family, names in former.items() if family in self._families}
        for family in found.keys() - self._hindering.keys():
            log.warning(
                "%s: worker %s is of a former version, so its limited jobs wait among all others", family, found[family]
            )
        self._hindering = found

    # -- pauses

    def is_paused(self, lane: Lane) -> bool:
        """Return whether the key of a lane is paused."""
        text = self._texts.get((lane.family, lane.key)) if lane.key else None
        return text is not None and self._is_paused(lane.family, lane.tenant, text)

    def _is_paused(self, family: str, tenant: str, text: str) -> bool:
        return self.limiter.controls.is_paused(family, text, tenant)

    def _on_change(self) -> None:
        """Rules or pauses have changed, or a pause may have ended."""
        paused = {name for name in self._pools if self._is_paused(*name)}
        if paused == self._paused:
            self._changed()
            return
        for name in paused - self._paused:
            self._pools[name].close()
        self._paused = paused
        self._paused_changed()

    async def _tick(self) -> None:
        for number in itertools.count(1):
            await asyncio.sleep(TICK_S)
            if number % RECORDS_EVERY == 0:
                with contextlib.suppress(AIQueueError):
                    await self._look_for_former_workers()
            with contextlib.suppress(AIQueueError):
                for pool in self._pools.values():
                    if not any(each.pending > each.granted for each in pool.lanes):
                        pool.want(0)
                    pool.trim()
                if self._paused:
                    self._on_change()
            for name in [name for name, turn in self._turns.items() if not turn.lanes and not turn.running]:
                del self._turns[name]
