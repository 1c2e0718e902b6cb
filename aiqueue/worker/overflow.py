"""Results that the server has no room for: its storage, or the account's, is used up, and only acks make room.

To wait for room before the ack would be for ever: every slot would wait for room that only another slot could make. So
after a while the job is acknowledged first, and its result waits here, outside of the slots, while other jobs end and
make room (docs/decisions/full-disk.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ..errors import AccountFull, AIQueueError, DiskFull

log = logging.getLogger("aiqueue.room")

NO_ROOM_S = 5.0  # how long a result waits for room before its ack
PATIENCE_S = 600.0  # and after it
FIRST_S, CAP_S = 0.005, 1.0  # between tries; short at first: nobody else is to take what the ack has freed
HELD_MAX = 1_000  # results of one worker that wait outside of the slots

Act = Callable[[], Awaitable[None]]


class Overflow:
    """The results of one worker that wait for room."""

    def __init__(self) -> None:
        self._held: set[asyncio.Task[None]] = set()

    async def put(self, name: str, write: Act, ack: Act) -> None:
        """Return when `write` was done, or after `ack` where there is no room: it is then done later. Raises what
        `write` raises, but for AccountFull and DiskFull.
        """
        # where others wait already it is known that patience is in vain
        if await _written(write, 0.0 if self._held else NO_ROOM_S) is None:
            return
        while len(self._held) >= HELD_MAX:
            if await _written(write, CAP_S) is None:
                return
        log.warning("%s: acknowledged before its result, to make room", name)
        task = asyncio.create_task(self._later(name, write))
        self._held.add(task)
        task.add_done_callback(self._held.discard)
        await ack()

    async def wait(self, timeout_s: float) -> None:
        """Return when all are written, or after `timeout_s` seconds."""
        if self._held:
            await asyncio.wait(self._held, timeout=timeout_s)

    def close(self) -> None:
        """Give up those that still wait. Safe twice."""
        if self._held:
            log.error("%d results are lost for want of room on the server", len(self._held))
        for task in self._held:
            task.cancel()

    async def _later(self, name: str, write: Act) -> None:
        try:
            problem: AIQueueError | None = await _written(write, PATIENCE_S)
        except AIQueueError as error:
            problem = error
        if problem is not None:
            log.error("%s: its result is lost: %s", name, problem)


async def _written(write: Act, within_s: float) -> AIQueueError | None:
    """Write as soon as there is room. What was in the way, where there was none within so many seconds."""
    end, wait_s = time.monotonic() + within_s, FIRST_S
    while True:
        try:
            await write()
        except (AccountFull, DiskFull) as error:
            if time.monotonic() >= end:
                return error
        else:
            return None
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, CAP_S)
