"""What every worker does for work whose time comes: delayed jobs go to their lanes, and schedules fire."""

from __future__ import annotations

from ..client import Client
from ..enqueue import Forwarder
from ..schedules import Makers, Ticker


class TimedWork:
    """The forwarder and the ticker of one worker, from `start` to `stop`.

    `owner` and `makers`: whose schedules' messages this worker makes, and by which functions.
    """

    def __init__(self, client: Client, *, owner: str = "", makers: Makers | None = None) -> None:
        connection, topology, key_lanes = client.connection, client.topology, client.key_lanes
        self._forwarder = Forwarder(connection, topology, key_lanes)
        self._ticker = Ticker(connection, topology, key_lanes, owner=owner, makers=makers)

    async def start(self) -> None:
        """Raises Unavailable."""
        await self._forwarder.start()
        await self._ticker.start()

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        await self._ticker.stop()
        await self._forwarder.stop()
