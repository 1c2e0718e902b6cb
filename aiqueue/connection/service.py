"""A NATS micro service (ADR-32): endpoints in a queue group, found and counted by the usual ``$SRV`` requests.

nats-py's own awaits one request before it reads the next, and dies with its client; this one answers each in a task of
its own, and its subscriptions outlive rebuilt clients.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

from ..errors import AIQueueError
from .frames import Headers, Received
from .link import Connection
from .subscription import Subscription

log = logging.getLogger("aiqueue.service")

QUEUE = "q"  # the queue group that micro services have by default


class Answer(NamedTuple):
    """What goes back. `error`: a line for the statistics, empty for none."""

    headers: Headers
    body: bytes
    error: str = ""


@dataclass
class Endpoint:
    """A subject that is answered by `answer`, which is called for each request in a task and must not raise."""

    name: str
    subject: str
    answer: Callable[[Received], Awaitable[Answer]]
    queue: str = QUEUE
    requests: int = 0
    errors: int = 0
    last_error: str = ""
    took_ns: int = field(default=0, repr=False)

    def info(self) -> dict[str, Any]:
        return {"name": self.name, "subject": self.subject, "queue_group": self.queue, "metadata": {}}

    def stats(self) -> dict[str, Any]:
        return {
            "name": self.name, "subject": self.subject, "queue_group": self.queue,
            "num_requests": self.requests, "num_errors": self.errors, "last_error": self.last_error,
            "processing_time": self.took_ns, "average_processing_time": self.took_ns // max(1, self.requests),
        }  # fmt: skip


class Service:
    """From `start` to `stop`; stop is safe twice and unstarted."""

    def __init__(
        self, connection: Connection, endpoints: Sequence[Endpoint], *, name: str, version: str, description: str
    ) -> None:
        self._connection = connection
        self.endpoints = tuple(endpoints)
        self._who = {"name": name, "id": secrets.token_hex(11), "version": version, "metadata": {}}
        self._description = description
        self._started = ""
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """Requests that are not answered yet."""
        return len(self._tasks)

    async def start(self) -> None:
        """Raises AccessDenied, Unavailable."""
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        try:
            for endpoint in self.endpoints:
                await self._listen(endpoint.subject, self._asked(endpoint), queue=endpoint.queue)
            for verb, told in (("PING", self._ping), ("INFO", self._info), ("STATS", self._stats)):
                for where in ("", f".{self._who['name']}", f".{self._who['name']}.{self._who['id']}"):
                    await self._listen(f"$SRV.{verb}{where}", self._telling(told))
            await self._connection.flush()
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, timeout_s: float) -> None:
        """Take no more requests, and let those under way end in so many seconds; the rest are cancelled, and `answer`
        may still say so.
        """
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions:
            await subscription.drain()
        if self._tasks:
            _, late = await asyncio.wait(self._tasks, timeout=timeout_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=2.0)

    async def _listen(self, subject: str, callback: Callable[[Received], None], *, queue: str = "") -> None:
        self._subscriptions.append(await self._connection.subscribe(subject, callback, queue=queue))

    def _asked(self, endpoint: Endpoint) -> Callable[[Received], None]:
        def on_request(message: Received) -> None:
            if message.reply:  # else nobody waits
                task = asyncio.create_task(self._serve(endpoint, message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        return on_request

    async def _serve(self, endpoint: Endpoint, message: Received) -> None:
        begun = time.monotonic_ns()
        try:
            answer = await endpoint.answer(message)
            endpoint.requests += 1
            endpoint.took_ns += time.monotonic_ns() - begun
            if answer.error:
                endpoint.errors += 1
                endpoint.last_error = answer.error
            await self._connection.publish(message.reply, answer.body, headers=answer.headers)
        except AIQueueError as error:
            log.info("an answer on %s could not be sent: %s", endpoint.subject, error)
        except Exception:
            log.exception("answering on %s", endpoint.subject)

    def _telling(self, told: Callable[[], dict[str, Any]]) -> Callable[[Received], None]:
        def on_request(message: Received) -> None:
            if not message.reply:
                return
            try:
                self._connection.tell(message.reply, json.dumps({**self._who, **told()}).encode())
            except AIQueueError as error:
                log.debug("%s: %s", message.subject, error)

        return on_request

    def _ping(self) -> dict[str, Any]:
        return {"type": "io.nats.micro.v1.ping_response"}

    def _info(self) -> dict[str, Any]:
        return {
            "type": "io.nats.micro.v1.info_response",
            "description": self._description,
            "endpoints": [each.info() for each in self.endpoints],
        }

    def _stats(self) -> dict[str, Any]:
        return {
            "type": "io.nats.micro.v1.stats_response",
            "started": self._started,
            "endpoints": [each.stats() for each in self.endpoints],
        }
