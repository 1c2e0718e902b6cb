"""How much of a worker one tenant's slow URLs may hold."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from ..job import Retry

T = TypeVar("T")

SLOW_S: Final = 2.0  # from here on a fetch is slow
_AGAIN_S: Final = (1.0, 300.0)  # the least and most until a fetch that found no room is tried again


class NoRoom(Retry):
    """So many fetches of a tenant are slow that this one has to wait for its turn. It is no failure."""


@dataclass(slots=True)
class _Fetches:
    """A tenant's fetches. `busy_until`: when those that wait will have had their turns, by the event loop's time."""

    running: int = 0
    slow: int = 0
    mean_s: float = SLOW_S  # of the slow ones
    busy_until: float = 0.0


class FetchShare:
    """At most `slow_max` slow fetches of each tenant run at once.

    Fast fetches are not bounded, until half of the share is slow: then no more than `slow_max` run in all. What finds
    no room, or becomes slow where there is none for another slow one, goes back to the queue until about its turn: a
    wait here would hold a slot.
    """

    def __init__(self, slow_max: int) -> None:
        self.slow_max = slow_max
        self._tenants: defaultdict[str, _Fetches] = defaultdict(_Fetches)

    async def run(self, tenant: str, fetch: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Await a fetch of a tenant. Raises NoRoom, and what the fetch raises."""
        loop, mine = asyncio.get_running_loop(), self._tenants[tenant]
        if mine.slow * 2 >= self.slow_max and mine.running >= self.slow_max:
            raise self._no_room(mine)
        task = asyncio.create_task(fetch())
        started, is_slow = loop.time(), False
        mine.running += 1
        try:
            if (await asyncio.wait([task], timeout=SLOW_S))[1]:
                if mine.slow >= self.slow_max:
                    raise self._no_room(mine)
                mine.slow, is_slow = mine.slow + 1, True
            return await task
        finally:
            await _end(task)
            mine.running -= 1
            if is_slow:
                mine.slow -= 1
                mine.mean_s += (loop.time() - started - mine.mean_s) / 8
            if not mine.running:
                del self._tenants[tenant]

    def _no_room(self, mine: _Fetches) -> NoRoom:
        now, (least, most) = asyncio.get_running_loop().time(), _AGAIN_S
        mine.busy_until = min(max(mine.busy_until, now) + mine.mean_s / self.slow_max, now + most)
        return NoRoom(
            f"{mine.slow} URLs of this tenant are slow, and no more may be under way in a worker",
            after=max(least, mine.busy_until - now),
        )


async def _end(task: asyncio.Task[Any]) -> None:
    """Cancel a fetch that is not done, and wait for its end."""
    if not task.done():
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
