"""The bare loop: what a program reaches with nats-py's own calls, well used, and without anything that makes a job.

It has no headers, no Msg-Id, no typed message, no lease, no limit, no retry and no fairness. Its bodies are
decoded, and each is acknowledged after its handler. It is the ceiling that the engine is measured against, not a peer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from itertools import islice

from nats.aio.client import Client as Raw
from nats.aio.msg import Msg

from .raw import opened

CHUNK = 1_000  # messages that share one future
CHUNKS = 4  # at a time
BATCH = 500  # messages that the pulls may bring
SLOTS = 100


class Publisher:
    """Publishes whose PubAcks come to one inbox, each to the call that waits for it."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._count = 0
        self._inbox = raw.new_inbox() + "."

    async def start(self) -> None:
        await self._raw.subscribe(self._inbox + "*", cb=self._on_ack, pending_msgs_limit=-1, pending_bytes_limit=-1)

    async def _on_ack(self, message: Msg) -> None:
        waiting = self._waiting.pop(message.subject[len(self._inbox) :], None)
        if waiting is not None and not waiting.done():
            if b'"seq"' in message.data and b'"error"' not in message.data:
                waiting.set_result(None)
            else:
                waiting.set_exception(RuntimeError(message.data.decode()))

    async def publish(self, subject: str, body: bytes) -> None:
        """Publish one message, and return when a stream has it."""
        self._count += 1
        token = f"{self._count:x}"
        waiting = self._waiting[token] = asyncio.get_running_loop().create_future()
        await self._raw.publish(subject, body, self._inbox + token)
        await waiting


async def publish_many(raw: Raw, subject: str, bodies: Iterable[bytes]) -> None:
    """Publish all, in chunks of CHUNK with one future each, and return when a stream has them."""
    inbox = raw.new_inbox() + "."
    left: dict[str, int] = {}
    ended: dict[str, asyncio.Future[None]] = {}
    problems: list[bytes] = []

    async def on_ack(message: Msg) -> None:
        token = message.subject[len(inbox) :]
        if b'"seq"' not in message.data or b'"error"' in message.data:
            problems.append(message.data)
        left[token] -= 1
        if not left[token]:
            ended[token].set_result(None)

    subscription = await raw.subscribe(inbox + "*", cb=on_ack, pending_msgs_limit=-1, pending_bytes_limit=-1)
    open_chunks: deque[asyncio.Future[None]] = deque()
    source, number, more = iter(bodies), 0, True
    while more:
        chunk = [*islice(source, CHUNK)]
        more = len(chunk) == CHUNK
        if chunk:
            number += 1
            token = f"{number:x}"
            left[token], ended[token] = len(chunk), asyncio.get_running_loop().create_future()
            open_chunks.append(ended[token])
            for sent, body in enumerate(chunk, 1):
                await raw.publish(subject, body, inbox + token)
                if not sent % 128:
                    await asyncio.sleep(0)
        while len(open_chunks) >= CHUNKS or (open_chunks and not more):
            await open_chunks.popleft()
    await subscription.unsubscribe()
    if problems:
        raise RuntimeError(problems[0].decode())


async def drain(
    raw: Raw, stream: str, consumer: str, jobs: int, handle: Callable[[dict[str, object]], Awaitable[object]]
) -> None:
    """Pull `jobs` messages, and acknowledge each after `handle`, at most SLOTS at a time in tasks of their own."""
    loop = asyncio.get_running_loop()
    subject, inbox = f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}", raw.new_inbox()
    done = loop.create_future()
    tasks: set[asyncio.Task[None]] = set()
    waiting: deque[Msg] = deque()
    requested = running = finished = 0

    async def refill() -> None:
        nonlocal requested
        if requested <= BATCH // 2 and len(waiting) < BATCH:
            count = BATCH - requested
            requested += count
            await raw.publish(subject, b'{"batch":%d,"expires":30000000000}' % count, inbox)

    async def run(message: Msg) -> None:
        nonlocal running, finished
        await handle(opened(message))
        await raw.publish(message.reply, b"+ACK")
        finished += 1
        running -= 1
        if waiting:
            start(waiting.popleft())
            await refill()
        if finished == jobs:
            done.set_result(None)

    def start(message: Msg) -> None:
        nonlocal running
        running += 1
        task = loop.create_task(run(message))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def on_message(message: Msg) -> None:
        nonlocal requested
        if not message.reply:
            return  # a pull has ended
        requested -= 1
        if running < SLOTS:
            start(message)
        else:
            waiting.append(message)
        await refill()

    subscription = await raw.subscribe(inbox, cb=on_message, pending_msgs_limit=-1, pending_bytes_limit=-1)
    await refill()
    await done
    await raw.flush()
    await subscription.unsubscribe()
