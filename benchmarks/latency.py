"""From the enqueue call to the handler at 200 and at 1,000 jobs a second, the producer in a process of its own."""

from __future__ import annotations

import sys
import time

import nats.errors

import aiqueue

from .common import (
    STREAM,
    Noop,
    add_percentiles,
    beside,
    empty,
    lane,
    message,
    paced,
    percentile_rows,
    raw_client,
    raw_job,
    run_loop,
    until,
)
from .raw import opened
from .report import OURS, RAW, Row

RATES = (200, 1_000)
SECONDS_MIN, SECONDS_MAX = 2, 5  # the first second warms up
HOW = {
    OURS: "client.enqueue; a typed handler, results off, 100 slots",
    RAW: "js.publish, same headers, Msg-Id and codec; fetch(100), decoded, ack",
}


def lasting(rate: int, jobs: int) -> int:
    """For how many seconds to go on at a rate, with so many jobs to spend."""
    return min(SECONDS_MAX, max(SECONDS_MIN, jobs // rate))


async def _pace(client: aiqueue.Client, side: str, rate: int, count: int) -> None:
    """The producer's process."""
    raw = await raw_client(client)
    js = raw.jetstream()

    async def enqueue(i: int, at: float) -> None:
        await client.enqueue(message(i, at), tenant="bench")

    async def publish(i: int, at: float) -> None:
        subject, body, told = raw_job(i, at)
        await js.publish(subject, body, headers=told)

    try:
        await paced(rate, count, enqueue if side == OURS else publish)
    finally:
        await raw.close()


def _producer(side: str, rate: int, count: int) -> list[str]:
    return ["-m", "benchmarks.latency", side, str(rate), str(count)]


async def ours(client: aiqueue.Client, rate: int, count: int) -> list[float]:
    """How long each job took to its handler, in ms."""
    worker = aiqueue.Worker(concurrency=100)
    waits: dict[int, float] = {}

    @worker.handle(Noop, result=False)
    async def noop(job: aiqueue.Job[Noop]) -> None:
        waits[job.message.i] = (time.monotonic() - job.message.t) * 1000

    async with worker.running(client), beside(client, _producer(OURS, rate, count)) as (producer,):
        await producer.ended()
        await until(lambda: len(waits) == count, lambda: f"{len(waits):,} of {count:,} jobs had come")
    return [waits[i] for i in range(rate, count)]


async def theirs(client: aiqueue.Client, rate: int, count: int) -> list[float]:
    name = await lane(client)
    raw = await raw_client(client)
    waits: dict[int, float] = {}
    try:
        subscription = await raw.jetstream().pull_subscribe_bind(name, STREAM)
        async with beside(client, _producer(RAW, rate, count)) as (producer,):
            end = time.monotonic() + 60
            while len(waits) < count:
                if time.monotonic() > end:
                    raise RuntimeError(f"{len(waits):,} of {count:,} messages had come after 60 s")
                try:
                    batch = await subscription.fetch(100, timeout=1)
                except nats.errors.TimeoutError:
                    producer.check()
                    continue
                for each in batch:
                    told = opened(each)
                    waits[told["i"]] = (time.monotonic() - told["t"]) * 1000
                    await each.ack()
            await producer.ended()
    finally:
        await raw.close()
    return [waits[i] for i in range(rate, count)]


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    rows = {rate: percentile_rows("latency", f"enqueue to handler at {rate:,}/s", HOW) for rate in RATES}
    for _ in range(rounds):
        for rate, each in rows.items():
            for side, measure in ((OURS, ours), (RAW, theirs)):
                await empty(client)
                add_percentiles(each, side, await measure(client, rate, rate * lasting(rate, jobs)))
    await empty(client)
    return [row for each in rows.values() for row in each]


async def _main() -> None:
    async with aiqueue.connect() as client:
        await _pace(client, sys.argv[1], *map(int, sys.argv[2:4]))


if __name__ == "__main__":
    run_loop(_main())
