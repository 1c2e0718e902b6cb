"""From the enqueue call to the handler at 200 jobs a second, the producer in a process of its own."""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time

import cbor2
import nats.errors

import aiqueue

from .common import STREAM, Noop, empty, lane, message, raw_client, raw_job
from .report import Row

RATE = 200
SECONDS = 4
DROP = RATE  # the first second warms up


async def _pace(client: aiqueue.Client, side: str) -> None:
    """The producer's process: an open loop of RATE a second; a late call counts from its schedule."""
    js = (await raw_client(client)).jetstream()
    begun = time.monotonic() + 0.1
    for i in range(RATE * SECONDS):
        due = begun + i / RATE
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        at = time.monotonic() if time.monotonic() - due < 0.005 else due
        if side == "ours":
            await client.enqueue(message(i, at), tenant="bench")
        else:
            subject, body, told = raw_job(i, at)
            await js.publish(subject, body, headers=told)


async def _producer(client: aiqueue.Client, side: str) -> asyncio.subprocess.Process:
    settings = client.connection.settings
    password = settings.password.get_secret_value() if settings.password else ""
    told = {
        **os.environ,
        "AIQUEUE_URL": settings.url or "",
        "AIQUEUE_USER": settings.user or "",
        "AIQUEUE_PASSWORD": password,
    }
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "benchmarks.latency", side, env=told)


async def ours(client: aiqueue.Client) -> list[float]:
    worker = aiqueue.Worker(concurrency=100)
    waits: list[float] = []

    @worker.handle(Noop, result=False)
    async def noop(job: aiqueue.Job[Noop]) -> None:
        waits.append((time.monotonic() - job.message.t) * 1000)

    async with worker.running(client):
        producer = await _producer(client, "ours")
        await producer.wait()
        while len(waits) < RATE * SECONDS:
            await asyncio.sleep(0.05)
    return waits[DROP:]


async def theirs(client: aiqueue.Client) -> list[float]:
    name = await lane(client)
    raw = await raw_client(client)
    subscription = await raw.jetstream().pull_subscribe_bind(name, STREAM)
    producer = await _producer(client, "raw")
    waits: list[float] = []
    while len(waits) < RATE * SECONDS:
        try:
            batch = await subscription.fetch(100, timeout=5)
        except nats.errors.TimeoutError:
            continue
        for each in batch:
            waits.append((time.monotonic() - cbor2.loads(each.data)["t"]) * 1000)
            await each.ack()
    await producer.wait()
    await raw.close()
    return waits[DROP:]


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    rows = [Row(f"enqueue to handler at {RATE}/s, p{p}", "ms", "js.publish, fetch(100) loop") for p in (50, 95)]
    for _ in range(max(1, rounds // 2 + 1)):
        for side, measure in (("ours", ours), ("raw", theirs)):
            await empty(client)
            cuts = statistics.quantiles(await measure(client), n=100)
            for row, cut in zip(rows, (cuts[49], cuts[94]), strict=True):
                (row.ours if side == "ours" else row.raw).append(cut)
    return rows


async def _main() -> None:
    async with aiqueue.connect() as client:
        await _pace(client, sys.argv[1])


if __name__ == "__main__":
    asyncio.run(_main())
