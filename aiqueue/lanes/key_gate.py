"""The gate of limited keys: which of their lanes a worker pulls on, and for how many jobs.

A lane of a limited key is granted no more jobs than this process has credits for. A key without credits is not pulled
on: its jobs stay in the stream, undelivered, and cost nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection

from .. import headers, subjects
from ..connection import Connection
from ..errors import AIQueueError
from ..limits import Limiter
from ..subjects import Lane
from ..topology import Family
from .delivery import LanePull, Turn
from .key_pool import KeyPool

TICK_S = 0.25
TEXTS_MAX = 100_000


class KeyGate:
    """The pools and turns of one worker. `changed` is called when there may be something to pull, `paused_changed` when
    keys were paused, or resumed.
    """

    def __init__(
        self, connection: Connection, limiter: Limiter, families: Collection[Family], *, changed: Callable[[], None],
        paused_changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._connection = connection
        self.limiter = limiter
        self._families = {each.name: each for each in families if each.limit_key}
        self._changed = changed
        self._paused_changed = paused_changed
        self._pools: dict[tuple[str, str, str], KeyPool] = {}
        self._turns: dict[tuple[str, str, str], Turn] = {}
        self._texts: dict[tuple[str, str], str] = {}  # by family and hashed key
        self._paused: set[tuple[str, str, str]] = set()
        self._ticker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Open the limiter. Raises NotFound, Unavailable, AccessDenied."""
        await self.limiter.open()
        self.limiter.controls.listeners.append(self._on_change)
        self._ticker = asyncio.create_task(self._tick())

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
        if len(self._texts) >= TEXTS_MAX:
            self._texts.clear()
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
        text = self._texts.get((lane.family, lane.key), "") if lane.key else ""
        if text:
            pull.pool = self._pool(lane.family, lane.tenant, text)
            pull.pool.lanes.append(pull)

    def leave(self, pull: LanePull) -> None:
        """A lane is pulled on no more."""
        turn, pool = pull.turn, pull.pool
        pull.turn = pull.pool = None
        if turn is not None:
            turn.lanes.remove(pull)
            if not turn.lanes and not turn.running:
                self._turns.pop(pull.key[:3], None)
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

    # -- pauses

    def is_paused(self, lane: Lane) -> bool:
        """Return whether the key of a lane is paused."""
        text = self._texts.get((lane.family, lane.key)) if lane.key else None
        return text is not None and self._is_paused(lane.family, lane.tenant, text)

    def _is_paused(self, family: str, tenant: str, text: str) -> bool:
        return self.limiter.controls.paused_until(family, text, tenant) > self.limiter.clock()

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
        while True:
            await asyncio.sleep(TICK_S)
            with contextlib.suppress(AIQueueError):
                for pool in self._pools.values():
                    if not any(each.pending > each.granted for each in pool.lanes):
                        pool.want(0)
                    pool.trim()
                if self._paused:
                    self._on_change()
