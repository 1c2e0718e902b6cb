"""What context managers around handlers cost a job: the call alone, in µs, and the rate at which a worker drains.

The sides alternate in every round. The calls are of an async handler that does nothing; the least of the rounds counts,
because whatever else the machine does only adds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiqueue

from .common import Noop, empty, message
from .drain import fill, timed_drain

CALLS = 20_000


@asynccontextmanager
async def asynchronous(job: aiqueue.Job) -> AsyncIterator[None]:
    yield


@contextmanager
def plain(job: aiqueue.Job) -> Iterator[None]:
    yield


Around = Callable[[aiqueue.Job], Any]
SIDES: dict[str, tuple[Around, ...]] = {
    "none": (), "one, async": (asynchronous,), "one, plain": (plain,), "three, async": (asynchronous,) * 3,
}  # fmt: skip


def worker_with(arounds: tuple[Around, ...], handler: Callable[[aiqueue.Job[Noop]], Any]) -> aiqueue.Worker[Any]:
    worker = aiqueue.Worker(concurrency=100)
    for each in arounds:
        worker.around(each)
    worker.handle(Noop, result=False)(handler)
    return worker


async def noop(job: aiqueue.Job[Noop]) -> None:
    pass


async def call_us(arounds: tuple[Around, ...]) -> float:
    """Microseconds of a call, as the runner makes it."""
    (handler,) = worker_with(arounds, noop).handlers
    job: Any = message(0)
    begun = time.perf_counter()
    for _ in range(CALLS):
        await handler.call(job)
    return (time.perf_counter() - begun) / CALLS * 1e6


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> str:
    """The figures of all sides."""
    calls: dict[str, list[float]] = {name: [] for name in SIDES}
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(max(rounds, 3)):
        for name, arounds in SIDES.items():
            calls[name].append(await call_us(arounds))
    for _ in range(rounds):
        for name, arounds in SIDES.items():
            await fill(client, jobs)

            def make(handler: Callable[[aiqueue.Job[Noop]], Any], arounds: tuple[Around, ...] = arounds) -> Any:
                return worker_with(arounds, handler)

            rates[name].append(await timed_drain(client, jobs, make))
            await empty(client)
    lines = [
        f"{name}: {min(calls[name]):.2f} µs a call, {statistics.median(rates[name]):,.0f} jobs/s drained"
        for name in SIDES
    ]
    added = min(calls["one, async"]) - min(calls["none"])
    return "\n".join([*lines, f"one adds {added:.2f} µs a job (at most 3.2 are promised)"])
