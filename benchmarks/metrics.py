"""What counting costs a job: CPU time of a worker that drains no-op jobs, with the setting `metrics` on and off.

The sides alternate within each round, and begin in turn. The CPU time is of this process, from the first handler to the
end of the worker, with its last flush. The median of the differences within the rounds counts. Beside it the call
alone, in µs.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import aiqueue
from aiqueue.lanes.delivery import Delivery, LanePull
from aiqueue.subjects import Lane
from aiqueue.worker.counting import Tally
from aiqueue.worker.opening import OpenedJob

from .common import FAMILY, Noop, empty
from .drain import fill

CALLS = 50_000
WITHIN_S = 900.0
PROMISED_US = 1.0


def worker_of(client: aiqueue.Client, *, on: bool, handler: Callable[[aiqueue.Job[Noop]], Any]) -> Any:
    """A worker, and what counts its jobs or does not."""
    client.settings = client.settings.with_arguments(metrics=on)
    worker = aiqueue.Worker(concurrency=100)
    worker.handle(Noop, result=False)(handler)
    return worker


async def drain_us(client: aiqueue.Client, jobs: int, *, on: bool) -> float:
    """CPU time of a job in µs."""
    await fill(client, jobs)
    left, finished, begun = jobs, asyncio.Event(), 0.0

    async def noop(job: aiqueue.Job[Noop]) -> None:
        nonlocal left, begun
        left -= 1
        if left == jobs - 1:
            begun = time.process_time()
        elif left == 0:
            finished.set()

    async with worker_of(client, on=on, handler=noop).running(client), asyncio.timeout(WITHIN_S):
        await finished.wait()
    return (time.process_time() - begun) / jobs * 1e6


def call_us(client: aiqueue.Client) -> float:
    """µs of one call, as settlement makes it."""
    tally = Tally(client.connection.clock, [(FAMILY, "noop")])
    delivery = Delivery.__new__(Delivery)
    delivery.lane = LanePull(key=Lane(FAMILY, "bench", "normal"), stream="", consumer="", ack_wait_s=30.0)
    delivery.tenant, delivery.delivery_count, delivery.stored_at = "bench", 1, time.time() - 0.5
    delivery.run_started_at, delivery.run_ended_at = time.monotonic(), 0.0
    opened = OpenedJob.__new__(OpenedJob)
    opened.kind = "noop"
    begun = time.process_time()
    for _ in range(CALLS):
        tally.count_done(delivery, opened)
    return (time.process_time() - begun) / CALLS * 1e6


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> str:
    """The figures of both sides."""
    settings = client.settings
    calls = [call_us(client) for _ in range(5)]
    found: dict[bool, list[float]] = {True: [], False: []}
    try:
        for number in range(max(rounds, 3)):
            for on in (number % 2 == 0, number % 2 == 1):
                found[on].append(await drain_us(client, jobs, on=on))
    finally:
        client.settings = settings
    await empty(client)
    added = statistics.median(a - b for a, b in zip(found[True], found[False], strict=True))
    return "\n".join([
        f"call alone: {min(calls):.2f} µs",
        f"metrics off: {statistics.median(found[False]):.2f} µs of CPU a job",
        f"metrics on: {statistics.median(found[True]):.2f} µs of CPU a job",
        f"on adds {added:.2f} µs a job (at most {PROMISED_US} is promised)",
    ])  # fmt: skip
