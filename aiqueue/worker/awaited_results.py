"""Warns of handlers that hold all slots of a worker while they await the results of other jobs."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable

from ..client import tasks_awaiting_results
from ..lanes import Delivery

log = logging.getLogger(__name__)

WARN_EVERY_S = 60.0


class AwaitedResults:
    """Looks at the running jobs of a worker with so many slots. A handler that awaits in a task of its own is not seen.

    `_stuck`: all running jobs, if all of them awaited results at the last look.
    """

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._stuck: set[Delivery] = set()
        self._warned_at = -WARN_EVERY_S  # monotonic seconds

    def look(self, running: Iterable[Delivery]) -> None:
        """Log a warning if the same jobs have all slots and await results, at two looks one after the other."""
        jobs = set(running)
        if len(jobs) < self._slots or not all(each.task in tasks_awaiting_results for each in jobs):
            self._stuck = set()
            return
        is_stuck, self._stuck = jobs == self._stuck, jobs
        if is_stuck and time.monotonic() - self._warned_at >= WARN_EVERY_S:
            self._warned_at = time.monotonic()
            log.warning(
                "all %d slots are taken by handlers that await the results of jobs (Handle.result): jobs that need a "
                "slot here do not run meanwhile. Await children with `job.gather`, which holds no slot",
                self._slots,
            )
