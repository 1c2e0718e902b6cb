"""aiqueue: its worker, and its producer."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import verbs

import aiqueue
from aiqueue.topology import provision
from benchmarks.common import Noop, message

WINDOW = 1_000
worker = aiqueue.Worker(concurrency=100)


@worker.handle(Noop, result=False)
async def noop(job: aiqueue.Job[Noop]) -> None:
    verbs.ran(job.message.i, job.message.t)


class Producer:
    def __init__(self, client: aiqueue.Client) -> None:
        self._client = client

    async def one(self, i: int, t: float) -> None:
        await self._client.enqueue(message(i, t), tenant="bench")

    async def many(self, numbers: range) -> None:
        items = (message(i, time.monotonic()) for i in numbers)
        async for outcome in self._client.enqueue_many(items, tenant="bench", window=WINDOW):
            if isinstance(outcome, aiqueue.AIQueueError):
                raise outcome


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    async with aiqueue.connect(verbs.address()) as client:
        yield Producer(client)


async def prepare() -> None:
    async with aiqueue.connect(verbs.address()) as client:
        await provision.apply(client.connection, client.topology)


if __name__ == "__main__":
    verbs.main(connect, prepare=prepare)
