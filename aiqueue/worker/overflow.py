"""Results that the server has no space for: its storage, or the account's, is full, and only acks free some.

Waiting for space before the ack would never end: each slot would wait for space that only another slot's ack can free.
So after NO_ROOM_S the job is acknowledged first. Its result waits here, outside of the slots, while other jobs end and
free space (docs/decisions/full-disk.md).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

from ..errors import AccountFull, AIQueueError, DiskFull, Unavailable

log = logging.getLogger(__name__)

NO_ROOM_S = 5.0  # how long a result waits for space before its job is acknowledged
PATIENCE_S = 600.0  # and how long after that
FIRST_S, CAP_S = 0.005, 1.0  # between tries; short at first, so that no other writer takes the space that an ack freed
HELD_MAX = 1_000  # results of one worker that wait outside of the slots

Act = Callable[[], Awaitable[None]]


class Overflow:
    """The results of one worker that wait for space on the server."""

    def __init__(self) -> None:
        self._held: dict[asyncio.Task[None], str] = {}

    async def write_or_defer(self, name: str, write: Act) -> bool:
        """Call `write` and return True. If the server has no space for NO_ROOM_S, return False, and call `write` later
        in a task: the caller then acknowledges the job.

        While other results wait here, the first try decides. Raises what `write` raises, except AccountFull, DiskFull.
        """
        if await write_within(write, 0.0 if self._held else NO_ROOM_S) is None:
            return True
        while len(self._held) >= HELD_MAX:
            if await write_within(write, CAP_S) is None:
                return True
        log.warning("%s: acknowledged before its result is stored, to free space", name)
        task = asyncio.create_task(self._write_later(name, write))
        self._held[task] = name
        task.add_done_callback(self._held.pop)
        return False

    def holds(self, name: str) -> bool:
        """Return whether a result of this name waits here."""
        return name in self._held.values()

    async def wait(self, timeout_s: float) -> None:
        """Return when all results are written, or after `timeout_s` seconds."""
        if self._held:
            await asyncio.wait(self._held, timeout=timeout_s)

    def close(self) -> None:
        """Drop the results that still wait. Safe twice."""
        if self._held:
            log.error("%d results are lost: the server has no space for them", len(self._held))
        for task in self._held:
            task.cancel()

    async def _write_later(self, name: str, write: Act) -> None:
        """Write one result within PATIENCE_S, or log that it is lost."""
        try:
            problem: AIQueueError | None = await write_within(write, PATIENCE_S, AccountFull, DiskFull, Unavailable)
        except AIQueueError as error:
            problem = error
        if problem is not None:
            log.error("%s: its result is lost: %s", name, problem)


async def write_within(write: Act, within_s: float, *passing: type[AIQueueError]) -> AIQueueError | None:
    """Call `write` until it raises none of the `passing` errors (default: AccountFull and DiskFull), for at most
    `within_s` seconds. Returns None, or the last of them.
    """
    caught = passing or (AccountFull, DiskFull)
    end, wait_s = time.monotonic() + within_s, FIRST_S
    while True:
        try:
            await write()
        except caught as error:
            if time.monotonic() >= end:
                return error
        else:
            return None
        await asyncio.sleep(wait_s)
        wait_s = min(wait_s * 2, CAP_S)
