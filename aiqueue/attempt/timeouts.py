"""Time limits for many jobs at once: one timer for all of them instead of one each."""

from __future__ import annotations

import asyncio
import logging
import time

log = logging.getLogger(__name__)

TICK_S = 0.05
REPEAT_TICKS = 20
CANCELS_MAX = 10


class Limit:
    """The time limit of one task. `cancels`: how often this limit has cancelled the task. `tick`: its bucket."""

    __slots__ = ("cancels", "task", "tick")

    def __init__(self, task: asyncio.Task[None], tick: int) -> None:
        self.task = task
        self.tick = tick
        self.cancels = 0

    @property
    def expired(self) -> bool:
        """Whether the time was up before the task had ended."""
        return self.cancels > 0


class Limits:
    """A timing wheel with buckets of TICK_S: a limit is added and removed by one dictionary access.

    A task is cancelled at most one tick after its limit, never before it, and once a second after that while it goes
    on. (Varghese and Lauck, *Hashed and Hierarchical Timing Wheels*, SOSP 1987.)
    """

    def __init__(self) -> None:
        self._buckets: dict[int, set[Limit]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self, task: asyncio.Task[None], after_s: float) -> Limit:
        """Cancel `task` after `after_s` seconds, unless `stop` is called before."""
        limit = Limit(task, int((time.monotonic() + after_s) / TICK_S) + 1)
        bucket = self._buckets.get(limit.tick)
        if bucket is None:
            self._buckets[limit.tick] = {limit}
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(TICK_S, self._turn)
        else:
            bucket.add(limit)
        return limit

    def cancel(self, task: asyncio.Task[None], repeat_s: float) -> Limit:
        """Cancel `task` now, and from `repeat_s` seconds on as after a limit."""
        limit = self.start(task, repeat_s)
        limit.cancels = 1
        task.cancel()
        return limit

    def stop(self, limit: Limit) -> None:
        """Remove a limit. Safe twice."""
        bucket = self._buckets.get(limit.tick)
        if bucket is not None:
            bucket.discard(limit)
            if not bucket:
                del self._buckets[limit.tick]

    def _turn(self) -> None:
        """Cancel the tasks of all buckets that are due, and set the timer for the next tick."""
        now = int(time.monotonic() / TICK_S)
        for tick in [tick for tick in self._buckets if tick <= now]:
            for limit in self._buckets.pop(tick):
                limit.cancels += 1
                limit.task.cancel()
                if limit.cancels < CANCELS_MAX:  # a handler may have swallowed the cancellation
                    limit.tick = now + REPEAT_TICKS
                    self._buckets.setdefault(limit.tick, set()).add(limit)
                else:
                    log.error("a handler has swallowed %d cancellations and keeps its slot", limit.cancels)
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._turn) if self._buckets else None
