"""Many jobs through a window, and many callers at once, beside publish_async and js.publish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from nats.js import JetStreamContext

import aiqueue

from .common import empty, message, raw_client, raw_job
from .enqueue import stored
from .raw import body
from .report import OURS, RAW, STOCK, TUNED, Row
from .tuned import publish_many

WINDOW = 1_000
CALLERS = 64


async def ours(client: aiqueue.Client, jobs: int) -> None:
    items = (message(i) for i in range(jobs))
    async for outcome in client.enqueue_many(items, tenant="bench", window=WINDOW):
        assert isinstance(outcome, aiqueue.Handle)


async def theirs(js: JetStreamContext, items: Iterable[tuple[str, bytes, dict[str, str] | None]]) -> None:
    acks = []
    for subject, data, told in items:
        acks.append(await js.publish_async(subject, data, headers=told))
    await js.publish_async_completed()
    assert all(each.result().seq for each in acks)


async def callers(jobs: int, one: Callable[[int], Awaitable[object]]) -> None:
    numbers = iter(range(jobs))

    async def caller() -> None:
        for i in numbers:
            await one(i)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    same = "same headers, Msg-Id and codec"
    many = Row("many", f"enqueue_many, window {WINDOW:,}", "/s",
               how={OURS: "client.enqueue_many", RAW: f"js.publish_async, same window, {same}",
                    STOCK: "js.publish_async, same window, no headers",
                    TUNED: "publishes with a reply inbox, no headers"})  # fmt: skip
    at_once = Row("many", f"enqueue, {CALLERS} callers at once", "/s",
                  how={OURS: "client.enqueue", RAW: f"js.publish, as many callers, {same}"})  # fmt: skip
    raw = await raw_client(client)
    js = raw.jetstream(publish_async_max_pending=WINDOW)
    subject = raw_job(0)[0]

    async def enqueue(i: int) -> None:
        await client.enqueue(message(i), tenant="bench")

    async def publish(i: int) -> None:
        subject, data, told = raw_job(i)
        await js.publish(subject, data, headers=told)

    async def measured(row: Row, side: str, work: Callable[[], Awaitable[None]]) -> None:
        await empty(client)
        begun = time.perf_counter()
        await work()
        row.add(side, jobs / (time.perf_counter() - begun))
        await stored(client, jobs)

    try:
        for _ in range(rounds):
            await measured(many, OURS, lambda: ours(client, jobs))
            await measured(many, RAW, lambda: theirs(js, map(raw_job, range(jobs))))
            await measured(many, STOCK, lambda: theirs(js, ((subject, body(i), None) for i in range(jobs))))
            await measured(many, TUNED, lambda: publish_many(raw, subject, map(body, range(jobs))))
            await measured(at_once, OURS, lambda: callers(jobs, enqueue))
            await measured(at_once, RAW, lambda: callers(jobs, publish))
        await empty(client)
    finally:
        await raw.close()
    return [many, at_once]
