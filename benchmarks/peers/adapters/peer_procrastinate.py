"""Procrastinate on PostgreSQL: 100 jobs at once, and done jobs deleted."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import verbs
from procrastinate import App, PsycopgConnector

CHUNK = 1_000
app = App(connector=PsycopgConnector(conninfo=verbs.address()))


@app.task(name="noop")
async def noop(i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


class Producer:
    async def one(self, i: int, t: float) -> None:
        await noop.defer_async(i=i, t=t, text=verbs.TEXT)

    async def many(self, numbers: range) -> None:
        for first in range(numbers.start, numbers.stop, CHUNK):
            chunk = range(first, min(first + CHUNK, numbers.stop))
            await noop.batch_defer_async(*({"i": i, "t": time.monotonic(), "text": verbs.TEXT} for i in chunk))


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    async with app.open_async():
        yield Producer()


async def prepare() -> None:
    async with app.open_async():
        await app.schema_manager.apply_schema_async()


async def work() -> None:
    """As ``procrastinate worker`` does, which cannot be told to use uvloop."""
    async with app.open_async():
        await app.run_worker_async(concurrency=100, delete_jobs="always")


if __name__ == "__main__":
    verbs.main(connect, prepare=prepare, work=work)
