"""Interest in a subject, which outlives the client that asked for it."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

from .frames import Received, plain_headers

Callback = Callable[[Received], Awaitable[None]]


class Subscription:
    """Interest in a subject; it outlives reconnects and rebuilt clients."""

    def __init__(self, forget: Callable[[Subscription], None], subject: str, callback: Callback, queue: str) -> None:
        self._forget = forget
        self.subject = subject
        self.queue = queue
        self.callback = callback
        self.client_sub: Any = None

    async def receive(self, message: Any) -> None:
        """What nats-py calls: the callback, the headers made plain for it."""
        if message.headers:
            plain_headers(message.headers)
        await self.callback(message)

    async def close(self) -> None:
        """Give the interest up; what is on its way is dropped. Safe twice."""
        client_sub = self._leave()
        if client_sub is not None:
            with contextlib.suppress(Exception):
                await client_sub.unsubscribe()

    async def drain(self) -> None:
        """Give the interest up and return when the callback has had all that was on its way. Safe twice."""
        client_sub = self._leave()
        if client_sub is not None:
            with contextlib.suppress(Exception):
                await client_sub.drain()

    def _leave(self) -> Any:
        self._forget(self)
        client_sub, self.client_sub = self.client_sub, None
        return client_sub
