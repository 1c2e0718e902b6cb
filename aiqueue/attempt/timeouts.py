"""Time limits for many jobs at once: one timer for all of them instead of one each."""

from __future__ import annotations

import asyncio
import logging
import math
import time

log = logging.getLogger(__name__)

TICK_S = 0.05
REPEAT_S = 1.0
CANCELS_MAX = 10


class Limit:
    """What may be cancelled at a time. `cancel_at`: when, in monotonic seconds; `cancels`: how often it was.

    An attempt is a limit itself, so that a job needs no object for its timeout.
    """

    task: asyncio.Task[None]
    cancel_at = math.inf
    cancels = 0

    @property
    def expired(self) -> bool:
        """Whether the time was up before the task had ended."""
        return self.cancels > 0


class TaskLimit(Limit):
    """A limit that is nothing else."""

    def __init__(self, task: asyncio.Task[None]) -> None:
        self.task = task


class Limits:
    """The limits of one event loop, with one timer: for the limit that was due first when the timer was last set.

    Most limits are stopped before they are due, so the timer mostly finds none that is due, and is set again. A task is
    cancelled at most TICK_S after its limit, never before it, and once a second after that while it goes on.
    """

    def __init__(self) -> None:
        self._limits: dict[Limit, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf  # monotonic seconds

    def start(self, limit: Limit, cancel_at: float) -> None:
        """Cancel the limit's task at `cancel_at`, monotonic seconds, unless `stop` is called before."""
        limit.cancel_at = cancel_at
        self._limits[limit] = None
        if cancel_at < self._timer_at:
            self._set_timer(cancel_at)

    def start_task(self, task: asyncio.Task[None], after_s: float) -> Limit:
        """Cancel `task` in `after_s` seconds, unless `stop` is called before with what this returns."""
        limit = TaskLimit(task)
        self.start(limit, time.monotonic() + after_s)
        return limit

    def cancel(self, task: asyncio.Task[None], repeat_s: float) -> Limit:
        """Cancel `task` now, and from `repeat_s` seconds on as after a limit."""
        limit = self.start_task(task, repeat_s)
        limit.cancels = 1
        task.cancel()
        return limit

    def stop(self, limit: Limit) -> None:
        """Remove a limit. Safe twice."""
        self._limits.pop(limit, None)

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - time.monotonic()), self._cancel_due)

    def _cancel_due(self) -> None:
        """Cancel the tasks of all limits that are due, and set the timer for the next limit."""
        self._timer, self._timer_at = None, math.inf
        now = time.monotonic()
        for limit in [each for each in self._limits if each.cancel_at <= now]:
            limit.cancels += 1
            limit.cancel_at = now + REPEAT_S
            try:
                limit.task.cancel()
            except Exception:
                log.exception("cancelling a handler: what it awaits cannot be cancelled")
            if limit.cancels >= CANCELS_MAX:  # a handler may have swallowed the cancellation
                del self._limits[limit]
                log.error("a handler has swallowed %d cancellations and keeps its slot", limit.cancels)
        if self._limits:
            self._set_timer(max(min(each.cancel_at for each in self._limits), now + TICK_S))
