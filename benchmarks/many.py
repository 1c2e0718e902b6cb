"""Many jobs through a window, and many callers at once, beside publish_async and js.publish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from nats.js import JetStreamContext

import aiqueue

from .common import empty, message, raw_client, raw_job
from .report import Row

WINDOW = 1_000
CALLERS = 64


async def ours(client: aiqueue.Client, jobs: int) -> None:
    items = (message(i) for i in range(jobs))
    async for outcome in client.enqueue_many(items, tenant="bench", window=WINDOW):
        assert isinstance(outcome, aiqueue.Handle)


async def theirs(js: JetStreamContext, jobs: int) -> None:
    acks = []
    for i in range(jobs):
        subject, body, told = raw_job(i)
        acks.append(await js.publish_async(subject, body, headers=told))
    await js.publish_async_completed()
    assert all(each.result().seq for each in acks)


async def callers(jobs: int, one: Callable[[int], Awaitable[object]]) -> None:
    numbers = iter(range(jobs))

    async def caller() -> None:
        for i in numbers:
            await one(i)

    await asyncio.gather(*(caller() for _ in range(CALLERS)))


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    many = Row(f"enqueue_many, window {WINDOW:,}", "/s", "js.publish_async, same window, headers, Msg-Id, codec")
    at_once = Row(f"enqueue, {CALLERS} callers at once", "/s", "js.publish, as many callers, headers and Msg-Id")
    raw = await raw_client(client)
    js = raw.jetstream(publish_async_max_pending=WINDOW)

    async def enqueue(i: int) -> None:
        await client.enqueue(message(i), tenant="bench")

    async def publish(i: int) -> None:
        subject, body, told = raw_job(i)
        await js.publish(subject, body, headers=told)

    async def measured(figures: list[float], work: Callable[[], Awaitable[None]]) -> None:
        await empty(client)
        begun = time.perf_counter()
        await work()
        figures.append(jobs / (time.perf_counter() - begun))

    for _ in range(rounds):
        await measured(many.ours, lambda: ours(client, jobs))
        await measured(many.raw, lambda: theirs(js, jobs))
        await measured(at_once.ours, lambda: callers(jobs, enqueue))
        await measured(at_once.raw, lambda: callers(jobs, publish))
    await empty(client)
    await raw.close()
    return [many, at_once]
