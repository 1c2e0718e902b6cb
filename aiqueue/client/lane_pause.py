"""Has the consumers of lanes stand still while jobs are taken out, so that no worker is given one of them meanwhile.

What a consumer has delivered then stays as it is. A pause can be ended by anybody, and ends by itself: whoever takes
jobs out reads once more what was delivered, before the lanes go on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Self

from ..connection import Connection
from ..errors import AIQueueError, BadInput, Conflict, NotFound
from ..inspect import read_delivered
from ..subjects import Lane
from ..topology import Family

PAUSE_S = 5.0  # of a lane's consumer; it ends after each chunk, and by itself if this process dies
PAUSE_TRIES_MAX = 100
LOOK_AGAIN_S = 0.2  # others who take jobs out end their pause long before it would end by itself


class LanePause:
    """The pause of some lanes of a family: `async with` it. `Conflict`: others pause them again and again."""

    def __init__(self, connection: Connection, family: Family, lanes: Iterable[Lane]) -> None:
        self._connection = connection
        self._family = family
        self._names = _consumers(family, lanes)
        self._ours: list[str] = []

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(self._pause(name) for name in set(self._names.values())))
        except BaseException:
            await self._resume_all()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._resume_all()

    async def read_delivered(self) -> dict[Lane, int]:
        """Return the last delivered sequence of each lane that has a consumer."""
        where = {lane: (self._family.stream, name) for lane, name in self._names.items()}
        return await read_delivered(self._connection, where)

    async def _pause(self, name: str) -> None:
        """Pause a lane's consumer, after a short pause of somebody else, such as a worker's that removes it.

        A longer one is left as it is: nothing is delivered either. Raises Conflict.
        """
        consumer = f"{self._family.stream}.{name}"
        for _ in range(PAUSE_TRIES_MAX):
            try:
                info = await self._connection.api(f"CONSUMER.INFO.{consumer}")
            except NotFound:  # nobody serves the lane: it has delivered nothing
                return
            left_s = info.get("pause_remaining", 0) / 1e9 if info.get("paused") else 0.0
            if left_s > 2 * PAUSE_S:
                return
            if left_s <= 0:
                self._ours.append(name)
                until = datetime.fromtimestamp(self._connection.clock.now() + PAUSE_S, UTC).isoformat()
                await self._connection.api(f"CONSUMER.PAUSE.{consumer}", {"pause_until": until})
                return
            await asyncio.sleep(min(left_s, LOOK_AGAIN_S) + 0.01)
        raise Conflict(f"others pause consumer {name} of {self._family.stream} again and again: try later")

    async def _resume_all(self) -> None:
        await asyncio.gather(*map(self._resume, self._ours))
        self._ours.clear()

    async def _resume(self, name: str) -> None:
        with contextlib.suppress(AIQueueError):  # the pause ends by itself
            await self._connection.api(f"CONSUMER.PAUSE.{self._family.stream}.{name}", {})


def _consumers(family: Family, lanes: Iterable[Lane]) -> dict[Lane, str]:
    """Return the consumers of lanes, without those that nobody serves: their priority or tenant is a stranger's."""
    found: dict[Lane, str] = {}
    for lane in lanes:
        with contextlib.suppress(BadInput):
            found[lane] = family.lane_name(*lane[1:])
    return found
