"""What every worker does for work whose time comes: delayed jobs go to their lanes, and schedules fire."""

from __future__ import annotations

from ..client import Client
from ..enqueue import Forwarder
from ..schedules import Declared, Declarer, Ticker


class TimedWork:
    """The forwarder and the ticker of one worker, and its declared schedules, from `start` to `stop`."""

    def __init__(self, client: Client, declared: Declared) -> None:
        connection, topology, key_lanes = client.connection, client.topology, client.key_lanes
        self._forwarder = Forwarder(connection, topology, key_lanes)
        self._ticker = Ticker(
            connection, topology, key_lanes, owner=declared.owner, makers=declared.makers,
            make_headers=client.make_headers,
        )  # fmt: skip
        self._declarer = Declarer(connection, topology, declared)

    async def start(self) -> None:
        """Raises Unavailable."""
        await self._forwarder.start()
        await self._ticker.start()
        await self._declarer.start()

    async def stop(self) -> None:
        """Safe twice and unstarted."""
        await self._declarer.stop()
        await self._ticker.stop()
        await self._forwarder.stop()
