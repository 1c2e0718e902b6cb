"""Leases kept alive: every job that a worker holds is told to the server as in progress in good time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from .connection import Connection
from .errors import AIQueueError

log = logging.getLogger("aiqueue.leases")

PARTS = 3  # a heartbeat every third of the lease: two may be lost
TICK_MIN_S, TICK_MAX_S = 0.1, 1.0


class Leases:
    """Sends +WPI for every held delivery at a third of its lease."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._held: dict[str, tuple[float, float]] = {}  # ack subject -> (every, next), monotonic seconds
        self._task: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        return len(self._held)

    def hold(self, reply: str, ack_wait_s: float) -> None:
        every = ack_wait_s / PARTS
        self._held[reply] = (every, time.monotonic() + every)

    def let_go(self, reply: str) -> None:
        self._held.pop(reply, None)

    def start(self, *, shortest_s: Callable[[], float]) -> None:
        """Begin; `shortest_s` gives the shortest lease in use, in seconds."""
        self._task = asyncio.create_task(self._run(shortest_s))

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def _run(self, shortest_s: Callable[[], float]) -> None:
        while True:
            await asyncio.sleep(min(TICK_MAX_S, max(TICK_MIN_S, shortest_s() / PARTS / 4)))
            now = time.monotonic()
            for reply, (every, due) in list(self._held.items()):
                if due > now or reply not in self._held:
                    continue
                try:
                    self._connection.tell(reply, b"+WPI")
                except AIQueueError as error:
                    log.debug("heartbeat: %s", error)  # the link is down; the next tick tries again
                    break
                if reply in self._held:
                    self._held[reply] = (every, now + every)
