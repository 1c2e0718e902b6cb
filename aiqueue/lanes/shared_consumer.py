"""One durable consumer that all workers share, for messages that are no jobs: due delayed jobs, and due ticks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from ..connection import Connection
from ..errors import AIQueueError, NotFound, Unavailable
from ..subjects import Lane
from .delivery import Delivery, LanePull
from .discovery import RECREATE_AFTER_S
from .puller import Puller
from .refusals import PullLimits

log = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
HEARTBEAT_S = 1.0  # of the standing pull: without it, messages would wait 12 s after the death of a leader
FORBIDDEN_S = 60.0
STANDING_MAX = 16  # messages that may arrive by the standing pull
NAK = b"-NAK"

Handle = Callable[[Delivery], Coroutine[Any, Any, None]]


@dataclass(frozen=True)
class SharedConsumerOptions:
    """What is consumed, and how. `held_max`: unacknowledged messages of one worker, `pending_max`: of all together.
    `missing_s`: how often it is tried again while the stream is missing.
    """

    stream: str
    name: str
    subject: str
    ack_wait_s: float
    pending_max: int
    held_max: int
    lane: Lane  # names the consumer in logs
    missing_s: float = CHECK_EVERY_S


class SharedConsumer:
    """Creates the consumer, pulls on it from `start` to `stop`, and runs `handle` in a task for each message.

    It goes on over lost links, and while the stream is missing. `handle` acknowledges by `reply`. `cannot` is called
    with the reason each time that the consumer cannot be created.
    """

    def __init__(
        self,
        connection: Connection,
        options: SharedConsumerOptions,
        handle: Handle,
        cannot: Callable[[AIQueueError], None],
    ) -> None:
        self._connection = connection
        self._options = options
        self._handle = handle
        self._cannot = cannot
        self._wake = asyncio.Event()
        self._puller = Puller(connection, deliver=self._on_message, gone=self._on_consumer_gone, changed=self._wake.set)
        self._pull: LanePull | None = None
        self._create_at = 0.0  # when the consumer is created or checked next, monotonic seconds
        self.tasks: set[asyncio.Task[None]] = set()  # one for each message that is being handled
        self._engine: asyncio.Task[None] | None = None
        self._stopped = False

    async def start(self) -> None:
        """Raises Unavailable."""
        if self._engine is None:
            await self._puller.open()
            self._engine = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Stop pulling, and finish the messages in progress. Safe twice and unstarted."""
        self._stopped = True
        self._puller.stop()
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.cancel()
            await asyncio.wait([engine])
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self._puller.close()

    async def _run(self) -> None:
        """Keep pulls open for free capacity. Runs whenever something changes, and at least every CHECK_EVERY_S."""
        checked_at = 0.0
        while True:
            try:
                now = time.monotonic()
                if self._pull is None and now >= self._create_at:
                    await self._create()
                if now - checked_at >= CHECK_EVERY_S:
                    checked_at = now
                    self._puller.drop_lost_pulls()
                self._puller.refill(self._options.held_max - len(self.tasks), STANDING_MAX)
            except Exception:
                log.exception("pulling on %s failed; the next try is in %g s", self._options.name, CHECK_EVERY_S)
            try:
                async with asyncio.timeout(CHECK_EVERY_S):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def _create(self) -> None:
        """Create the consumer, and pull on it. An existing one is used."""
        options = self._options
        self._create_at = time.monotonic() + CHECK_EVERY_S
        config = {
            "durable_name": options.name,
            "filter_subject": options.subject,
            "ack_policy": "explicit",
            "ack_wait": round(options.ack_wait_s * 1e9),
            "max_ack_pending": options.pending_max,
            "max_deliver": -1,  # without limit: each message must be handled
        }
        request = {"stream_name": options.stream, "config": config}
        try:
            await self._connection.api(f"CONSUMER.CREATE.{options.stream}.{options.name}", request)
        except Unavailable as error:
            log.debug("creating the consumer %s: %s", options.name, error)
            if "no such file" in str(error):  # its files are gone: until it is deleted, creating it fails every time
                await self._connection.api(f"CONSUMER.DELETE.{options.stream}.{options.name}")
        except AIQueueError as error:
            self._cannot(error)
            pause_s = options.missing_s if isinstance(error, NotFound) else FORBIDDEN_S
            self._create_at = time.monotonic() + pause_s
        else:
            limits = PullLimits(heartbeat_s=HEARTBEAT_S)
            self._pull = LanePull(
                options.lane, options.stream, options.name, options.ack_wait_s, pending=1, limits=limits
            )
            self._puller.add(self._pull)

    def _on_consumer_gone(self, pull: LanePull) -> None:
        """Create the consumer anew soon. The new one delivers all unacknowledged messages again."""
        self._puller.remove(pull)
        self._pull = None
        self._create_at = time.monotonic() + RECREATE_AFTER_S
        asyncio.get_running_loop().call_later(RECREATE_AFTER_S, self._wake.set)

    def _on_message(self, delivery: Delivery) -> None:
        """Start a task for a message; once stopped, return the message to the server."""
        if self._stopped:
            self.reply(delivery, NAK)
            return
        task = asyncio.create_task(self._handle(delivery))
        self.tasks.add(task)
        task.add_done_callback(self._on_handled)

    def _on_handled(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        self._wake.set()

    def reply(self, delivery: Delivery, reply: bytes) -> None:
        """Send an ack or nak. If the link is down, the server delivers the message again after the ack_wait."""
        try:
            self._connection.tell(delivery.reply, reply)
        except AIQueueError as error:
            log.debug("%s of a message of %s was not sent: %s", reply[:4].decode(), self._options.name, error)
