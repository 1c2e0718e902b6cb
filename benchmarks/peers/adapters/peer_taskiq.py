"""taskiq on NATS: the pull based JetStream broker, as it comes or with larger pulls (BATCH_ENV)."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import verbs
from taskiq_nats import PullBasedJetStreamBroker

BATCH_ENV, TIMEOUT_ENV = "BENCH_TASKIQ_BATCH", "BENCH_TASKIQ_TIMEOUT_S"
pulls: dict[str, Any] = {}
if BATCH_ENV in os.environ:
    pulls = {
        "pull_consume_batch": int(os.environ[BATCH_ENV]),
        "pull_consume_timeout": float(os.environ[TIMEOUT_ENV]),
    }
broker = PullBasedJetStreamBroker([verbs.address()], queue="bench", stream_name="BENCH", durable="bench", **pulls)


@broker.task("noop")  # by itself it would be called after its module, which is another one in a producer
async def noop(i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


class Producer:
    async def one(self, i: int, t: float) -> None:
        await noop.kiq(i, t, verbs.TEXT)

    async def many(self, numbers: range) -> None:
        await verbs.gathered(numbers, self.one)


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    await broker.startup()
    try:
        yield Producer()
    finally:
        await broker.shutdown()


async def prepare() -> None:
    """The stream and the consumer, as any start of the broker declares them."""
    async with connect():
        pass


if __name__ == "__main__":
    verbs.main(connect, prepare=prepare)
