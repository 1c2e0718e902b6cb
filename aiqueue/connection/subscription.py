"""Interest in a subject."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from .frames import Received
from .wire import Link

DRAIN_S = 2.0

Callback = Callable[[Received], None]


class Subscription:
    """Interest in a subject; it outlives reconnects and rebuilt clients."""

    def __init__(self, forget: Callable[[Subscription], None], subject: str, callback: Callback, queue: str) -> None:
        self._forget = forget
        self.subject = subject
        self.queue = queue
        self.callback = callback
        self._at: tuple[Link, Any] | None = None

    async def attach(self, link: Link) -> None:
        """Subscribe on a client: the first one, or one that was built anew."""
        self._at = link, await link.listen(self.subject, self.queue, self.callback)

    async def close(self) -> None:
        """Give the interest up; what is on its way is dropped. Safe twice."""
        self._forget(self)
        if self._at is not None:
            (link, subscription), self._at = self._at, None
            link.unlisten(subscription)
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()

    async def drain(self) -> None:
        """Give the interest up and return when the callback has had all that was on its way, or after DRAIN_S seconds
        without the server's word. Safe twice.
        """
        self._forget(self)
        if self._at is not None:
            (link, subscription), self._at = self._at, None
            with contextlib.suppress(Exception):
                async with asyncio.timeout(DRAIN_S):
                    await subscription.drain()
            link.unlisten(subscription)
