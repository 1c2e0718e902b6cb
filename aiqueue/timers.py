"""Time limits for many jobs at once: one tick for all of them instead of a timer for each."""

from __future__ import annotations

import asyncio
import time

TICK_S = 0.05


class Limit:
    """The time limit of one task. `expired` says that it was this limit that cancelled the task."""

    __slots__ = ("expired", "task", "tick")

    def __init__(self, task: asyncio.Task[None], tick: int) -> None:
        self.task = task
        self.tick = tick
        self.expired = False


class Limits:
    """A wheel of buckets, each TICK_S wide: a limit is put in and taken out by one dictionary access.

    A task is cancelled at most one tick after its limit, never before. (The idea: Varghese and Lauck, *Hashed and
    Hierarchical Timing Wheels*, SOSP 1987.)
    """

    def __init__(self) -> None:
        self._buckets: dict[int, set[Limit]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self, task: asyncio.Task[None], after_s: float) -> Limit:
        limit = Limit(task, int((time.monotonic() + after_s) / TICK_S) + 1)
        bucket = self._buckets.get(limit.tick)
        if bucket is None:
            self._buckets[limit.tick] = {limit}
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(TICK_S, self._turn)
        else:
            bucket.add(limit)
        return limit

    def stop(self, limit: Limit) -> None:
        """Safe twice."""
        bucket = self._buckets.get(limit.tick)
        if bucket is not None:
            bucket.discard(limit)
            if not bucket:
                del self._buckets[limit.tick]

    def _turn(self) -> None:
        now = int(time.monotonic() / TICK_S)
        for tick in [tick for tick in self._buckets if tick <= now]:
            for limit in self._buckets.pop(tick):
                limit.expired = True
                limit.task.cancel()
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._turn) if self._buckets else None
