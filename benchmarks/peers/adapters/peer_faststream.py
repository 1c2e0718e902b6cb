"""FastStream on NATS: a work queue stream, batches of 100 pulled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import verbs
from faststream import FastStream
from faststream.nats import JStream, NatsBroker, PullSub
from nats.js.api import RetentionPolicy, StorageType
from pydantic import BaseModel

SUBJECT = "bench.jobs"
broker = NatsBroker(verbs.address(), logger=None)  # it would write two lines a job
stream = JStream("BENCH", subjects=[SUBJECT], retention=RetentionPolicy.WORK_QUEUE, storage=StorageType.FILE)
app = FastStream(broker)


class Noop(BaseModel):
    i: int
    t: float
    text: str


@broker.subscriber(SUBJECT, stream=stream, durable="workers", pull_sub=PullSub(batch_size=100))
async def noop(job: Noop) -> None:
    verbs.ran(job.i, job.t)


class Producer:
    async def one(self, i: int, t: float) -> None:
        # with `stream` the call waits for the server's PubAck
        await broker.publish(Noop(i=i, t=t, text=verbs.TEXT), SUBJECT, stream="BENCH")

    async def many(self, numbers: range) -> None:
        await verbs.gathered(numbers, self.one)


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    await broker.connect()
    try:
        yield Producer()
    finally:
        await broker.stop()


async def prepare() -> None:
    """The stream and the consumer, as a worker's start declares them."""
    await broker.start()
    await broker.stop()


if __name__ == "__main__":
    verbs.main(connect, prepare=prepare)
