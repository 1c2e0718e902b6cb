"""Returns jobs that did not start to the queue, for another worker, without waiting for it."""

from __future__ import annotations

import asyncio
import logging

from ..lanes import Delivery, Leases
from .runner import Runner

log = logging.getLogger(__name__)


class Returns:
    """The returns of one worker that are under way. `runner` is set once there is one, before the first delivery."""

    runner: Runner | None = None

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._tasks: set[asyncio.Task[None]] = set()

    def spawn(self, delivery: Delivery) -> None:
        """Return a job to the queue in a task of its own."""
        delivery.give_back_credit()
        task = asyncio.create_task(self._return(delivery))
        self._tasks.add(task)
        task.add_done_callback(self._on_returned)

    async def wait(self) -> None:
        """Wait until all are done."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _return(self, delivery: Delivery) -> None:
        assert self.runner is not None
        self._leases.drop_lease(delivery.reply)
        await self.runner.release(delivery)

    def _on_returned(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a job could not be returned to the queue; its lease has to expire first", exc_info=error)
