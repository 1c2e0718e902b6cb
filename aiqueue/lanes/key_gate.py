"""The gate of limited keys: which of their lanes a worker pulls on, and for how many jobs.

A lane of a limited key is granted no more jobs than this process has credits for. A key without credits is not pulled
on: its jobs stay in the stream, undelivered, and cost nothing. The credits of a tenant and key are in one pool, which
the lanes of all priorities share.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Callable, Collection

from .. import headers, subjects
from ..connection import Connection
from ..errors import AboveLimit, AIQueueError
from ..limits import Credit, Limiter
from ..subjects import Lane
from ..topology import Family
from .delivery import LanePull, Turn

log = logging.getLogger(__name__)

ASKED_MAX = 50  # credits of one pool that are asked for and not granted yet
COSTLY_ASKED_MAX = 4  # the same where calls have costs, which are known only when a job is here
FRESH_S = 0.05  # a credit whose call would have to start sooner than this is given back
TICK_S = 0.25
FAILED_S = 1.0  # after an error, a pool asks no more for so long
SMOOTHING = 0.1  # weight of the newest cost in the mean
TEXTS_MAX = 100_000


class KeyPool:
    """The credits of a tenant and key that no job has yet. `lanes`: its lanes, one a priority."""

    def __init__(self, limiter: Limiter, family: str, tenant: str, key: str, changed: Callable[[], None]) -> None:
        self._limiter = limiter
        self.family, self.tenant, self.key = family, tenant, key
        self._changed = changed
        self.lanes: list[LanePull] = []
        self._credits: deque[Credit] = deque()
        self._asks: dict[object, Callable[[], None]] = {}  # what stops each
        self._mean_cost = 0.0
        self._head_cost: float | None = None  # of a job that went back to its lane for want of a credit
        self._failed_at = -FAILED_S

    @property
    def free(self) -> int:
        """Credits that no open grant of a lane will use."""
        return max(0, len(self._credits) - sum(each.granted for each in self.lanes))

    @property
    def is_exhausted(self) -> bool:
        """Whether a credit is waited for, so that no lane of the pool is pulled on."""
        return bool(self._asks) or time.monotonic() - self._failed_at < FAILED_S

    @property
    def cost(self) -> float:
        """What the next job costs, as far as that is known."""
        return self._mean_cost if self._head_cost is None else self._head_cost

    def want(self, jobs: int) -> int:
        """Have credits for `jobs` that are not asked for yet, as far as the limit allows. Return how many are here."""
        self.trim()
        need = jobs - self.free - len(self._asks)
        if need > 0 and time.monotonic() - self._failed_at >= FAILED_S:
            try:
                self._get(need)
            except AboveLimit:  # the job itself will tell that
                self._mean_cost, self._head_cost = 0.0, None
            except AIQueueError as error:
                self._fail(error)
        for each in list(self._asks)[: max(0, -need)]:
            self._asks.pop(each)()
        return self.free

    def _get(self, need: int) -> None:
        limiter, name, cost = self._limiter, (self.family, self.key, self.tenant), self.cost
        while need > 0 and not self._asks and (credit := limiter.try_acquire(*name, cost=cost)) is not None:
            self._credits.append(credit)
            need -= 1
        most = COSTLY_ASKED_MAX if cost else ASKED_MAX
        while need > 0 and len(self._asks) < most:
            ask = object()
            stop = limiter.ask(*name, lambda outcome, ask=ask: self._on_outcome(ask, outcome), cost=cost)  # type: ignore[misc]
            if stop is None:  # paused, without a rule
                return
            self._asks[ask] = stop
            need -= 1

    def _on_outcome(self, ask: object, outcome: Credit | Exception) -> None:
        self._asks.pop(ask, None)
        if isinstance(outcome, Credit):
            self._credits.append(outcome)
        elif isinstance(outcome, AboveLimit):
            self._mean_cost, self._head_cost = 0.0, None
        else:
            self._fail(outcome)
        self._changed()

    def _fail(self, error: Exception) -> None:
        self._failed_at = time.monotonic()
        log.warning("no job of key %r of %s %s is started: %s", self.key, self.family, self.tenant, error)

    def spend(self) -> Credit | None:
        """Take a credit out, for a job that has arrived. None: there is none."""
        self.trim()
        self._head_cost = None
        return self._credits.popleft() if self._credits else None

    def note_cost(self, cost: float) -> None:
        """A job of this cost is about to start."""
        self._mean_cost += SMOOTHING * (cost - self._mean_cost) if self._mean_cost else cost

    def note_return(self, cost: float) -> None:
        """A job of this cost goes back to its lane without having had a credit: the next one is asked for it."""
        self._head_cost = cost
        self._stop_asking()

    def trim(self) -> None:
        """Give credits back that are too old."""
        latest = self._limiter.clock() + FRESH_S
        while self._credits and self._credits[0].start_by < latest:
            self._credits.popleft().release()

    def _stop_asking(self) -> None:
        asks, self._asks = list(self._asks.values()), {}
        for stop in asks:
            stop()

    def close(self) -> None:
        """Give back all credits."""
        self._stop_asking()
        while self._credits:
            self._credits.popleft().release()


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
