"""A backlog of no-op jobs on one worker, beside fetch(100) + ack. Results off, concurrency 100."""

from __future__ import annotations

import asyncio
import time

import aiqueue

from .common import STREAM, Noop, empty, lane, raw_client, raw_job
from .report import Row


async def fill(
    client: aiqueue.Client,
    jobs: int,
    *,
    tenant: str = "bench",
    tenants: int = 0,
    priority: str = "normal",
    first: bool = True,
) -> None:
    """Store a backlog, of one tenant or in turn of `tenants` many; `first` empties the stream before."""
    if first:
        await empty(client)
    raw = await raw_client(client)
    js = raw.jetstream(publish_async_max_pending=1_000)
    for i in range(jobs):
        subject, body, told = raw_job(i, tenant=f"t{i % tenants}" if tenants else tenant, priority=priority)
        await js.publish_async(subject, body, headers=told)
    await js.publish_async_completed()
    await raw.close()


async def ours(client: aiqueue.Client, jobs: int) -> float:
    """Jobs a second, from the first handler to the last."""
    worker = aiqueue.Worker(concurrency=100)
    seen: list[float] = []
    finished = asyncio.Event()

    @worker.handle(Noop, result=False)
    async def noop(job: aiqueue.Job[Noop]) -> None:
        seen.append(time.perf_counter())
        if len(seen) >= jobs:
            finished.set()

    async with worker.running(client):
        await finished.wait()
    return (jobs - 1) / (seen[-1] - seen[0])


async def theirs(client: aiqueue.Client, jobs: int) -> float:
    name = await lane(client)
    raw = await raw_client(client)
    subscription = await raw.jetstream().pull_subscribe_bind(name, STREAM)
    first, done = 0.0, 0
    while done < jobs:
        for each in await subscription.fetch(100, timeout=5):
            first = first or time.perf_counter()
            await each.ack()
            done += 1
    rate = (jobs - 1) / (time.perf_counter() - first)
    await raw.flush()
    await raw.close()
    return rate


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    row = Row("drain of no-op typed jobs, one worker", "/s", "fetch(100) + ack, nothing decoded")
    for _ in range(rounds):
        await fill(client, jobs)
        row.ours.append(await ours(client, jobs))
        await fill(client, jobs)
        row.raw.append(await theirs(client, jobs))
    await empty(client)
    return [row]
