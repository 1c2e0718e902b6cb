"""A subscription that outlives the nats-py client."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from ..errors import AccessDenied
from .frames import Received, check_subject
from .nats_client import NatsClient

DRAIN_S = 2.0

Callback = Callable[[Received], None]


class Subscription:
    """A subscription to one subject. It outlives reconnects and replaced clients."""

    def __init__(self, forget: Callable[[Subscription], None], subject: str, callback: Callback, queue: str) -> None:
        """Raises BadInput for a subject or queue that is none."""
        check_subject("subject", subject)
        if queue:
            check_subject("queue", queue)
        self._forget = forget
        self.subject = subject
        self.queue = queue
        self.callback = callback
        self.denied: AccessDenied | None = None  # set once the server has denied it, before its reply to what follows
        self.on_denied: Callable[[AccessDenied], None] | None = None  # called when the server denies it
        self._attached: tuple[NatsClient, Any] | None = None

    async def attach(self, client: NatsClient) -> None:
        """Subscribe on `client`: the first one, or one that has replaced it."""
        self.denied = None
        self._attached = client, await client.subscribe_direct(self.subject, self.queue, self.callback)

    def deny(self, problem: AccessDenied) -> None:
        """Note that the server has denied this subscription: it gets no messages (any more)."""
        self.denied = problem
        if self.on_denied is not None:
            self.on_denied(problem)

    def check(self) -> None:
        """Raise AccessDenied if the server has denied this subscription."""
        if self.denied is not None:
            raise AccessDenied(str(self.denied))

    async def close(self) -> None:
        """Unsubscribe, and drop messages that are on their way. Safe to call twice."""
        self._forget(self)
        if self._attached is not None:
            (client, subscription), self._attached = self._attached, None
            client.remove_callback(subscription)
            with contextlib.suppress(Exception):
                await subscription.unsubscribe()

    async def drain(self) -> None:
        """Unsubscribe, and return once the callback has had all messages that were on their way, or after DRAIN_S
        seconds if the server does not confirm. Safe to call twice.
        """
        self._forget(self)
        if self._attached is not None:
            (client, subscription), self._attached = self._attached, None
            with contextlib.suppress(Exception):
                async with asyncio.timeout(DRAIN_S):
                    await subscription.drain()
            client.remove_callback(subscription)
