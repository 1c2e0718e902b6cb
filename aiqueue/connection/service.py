"""A NATS micro service (ADR-32): endpoints in a queue group, discovered and counted through the ``$SRV`` subjects.

nats-py's micro service handles one request after the other, and ends with its client. This one handles each request in
a task of its own, and its subscriptions outlive replaced clients.
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
from .connection import Connection
from .frames import Headers, Received
from .subscription import Subscription

log = logging.getLogger(__name__)

QUEUE = "q"  # the default queue group of micro services


class Answer(NamedTuple):
    """The response to one request. `error`: one line for the statistics, empty if the request succeeded."""

    headers: Headers
    body: bytes
    error: str = ""


@dataclass
class Endpoint:
    """A subject and its handler. The service calls `answer` for each request, in a task; `answer` must not raise."""

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
    """A micro service. It serves from `start` to `stop`; `stop` is safe to call twice, and before `start`."""

    def __init__(
        self, connection: Connection, endpoints: Sequence[Endpoint], *, name: str, version: str, description: str
    ) -> None:
        self._connection = connection
        self.endpoints = tuple(endpoints)
        self._identity = {"name": name, "id": secrets.token_hex(11), "version": version, "metadata": {}}
        self._description = description
        self._started_at = ""
        self._subscriptions: list[Subscription] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def running(self) -> int:
        """How many requests are being handled."""
        return len(self._tasks)

    async def start(self) -> None:
        """Subscribe the endpoints and the ``$SRV`` subjects. Raises AccessDenied, Unavailable."""
        self._started_at = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        try:
            for endpoint in self.endpoints:
                await self._subscribe(endpoint.subject, self._on_request_to(endpoint), queue=endpoint.queue)
            for verb, describe in (
                ("PING", self._describe_ping),
                ("INFO", self._describe_info),
                ("STATS", self._describe_stats),
            ):
                for suffix in ("", f".{self._identity['name']}", f".{self._identity['name']}.{self._identity['id']}"):
                    await self._subscribe(f"$SRV.{verb}{suffix}", self._on_discovery(describe))
            await self._connection.flush()
            for subscription in self._subscriptions:
                subscription.check()
        except BaseException:
            await self.stop(0.0)
            raise

    async def stop(self, timeout_s: float) -> None:
        """Accept no more requests, and let the running ones finish within `timeout_s` seconds. The rest is cancelled;
        a cancelled `answer` can still return an error response.
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

    async def _subscribe(self, subject: str, callback: Callable[[Received], None], *, queue: str = "") -> None:
        self._subscriptions.append(await self._connection.subscribe(subject, callback, queue=queue))

    def _on_request_to(self, endpoint: Endpoint) -> Callable[[Received], None]:
        def on_request(message: Received) -> None:
            if message.reply:  # without a reply subject nobody waits
                task = asyncio.create_task(self._handle_request(endpoint, message))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        return on_request

    async def _handle_request(self, endpoint: Endpoint, message: Received) -> None:
        started_ns = time.monotonic_ns()
        try:
            answer = await endpoint.answer(message)
            endpoint.requests += 1
            endpoint.took_ns += time.monotonic_ns() - started_ns
            if answer.error:
                endpoint.errors += 1
                endpoint.last_error = answer.error
            await self._connection.publish(message.reply, answer.body, headers=answer.headers)
        except AIQueueError as error:
            log.info("cannot send the response to a request on %s: %s", endpoint.subject, error)
        except Exception:
            log.exception("the handler of %s raised", endpoint.subject)

    def _on_discovery(self, describe: Callable[[], dict[str, Any]]) -> Callable[[Received], None]:
        def on_request(message: Received) -> None:
            if not message.reply:
                return
            try:
                self._connection.tell(message.reply, json.dumps({**self._identity, **describe()}).encode())
            except AIQueueError as error:
                log.debug("cannot respond to %s: %s", message.subject, error)

        return on_request

    def _describe_ping(self) -> dict[str, Any]:
        return {"type": "io.nats.micro.v1.ping_response"}

    def _describe_info(self) -> dict[str, Any]:
        return {
            "type": "io.nats.micro.v1.info_response",
            "description": self._description,
            "endpoints": [each.info() for each in self.endpoints],
        }

    def _describe_stats(self) -> dict[str, Any]:
        return {
            "type": "io.nats.micro.v1.stats_response",
            "started": self._started_at,
            "endpoints": [each.stats() for each in self.endpoints],
        }
