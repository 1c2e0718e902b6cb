"""Raw nats-py: what aiqueue stores, sent and taken by a bare loop. No retries, leases, results or limits."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import nats
import verbs
from nats.js import JetStreamContext

import aiqueue
from aiqueue.topology import provision
from aiqueue.topology.declared import lane_name
from benchmarks.common import STREAM, lane, raw_job
from benchmarks.raw import opened

WINDOW = 1_000
BATCH = 100
TENANT = "bench"


class Producer:
    def __init__(self, js: JetStreamContext) -> None:
        self._js = js

    async def one(self, i: int, t: float) -> None:
        subject, body, told = raw_job(i, t, TENANT)
        await self._js.publish(subject, body, headers=told)

    async def many(self, numbers: range) -> None:
        acks = []
        for i in numbers:
            subject, body, told = raw_job(i, time.monotonic(), TENANT)
            acks.append(await self._js.publish_async(subject, body, headers=told))
        await self._js.publish_async_completed()
        for each in acks:
            each.result()  # raises what the server said


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    client = await nats.connect(verbs.address())
    try:
        yield Producer(client.jetstream(publish_async_max_pending=WINDOW))
    finally:
        await client.close()


async def handle(i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


async def work() -> None:
    """Take, decode, call, acknowledge, until it is terminated."""
    client = await nats.connect(verbs.address())
    subscription = await client.jetstream().pull_subscribe_bind(lane_name(TENANT, "normal"), STREAM)
    while True:
        with contextlib.suppress(TimeoutError):
            for each in await subscription.fetch(BATCH, timeout=5):
                await handle(**opened(each))
                await each.ack()


async def prepare() -> None:
    """The stream as aiqueue declares it, and the consumer that it would make for the lane."""
    async with aiqueue.connect(verbs.address()) as client:
        await provision.apply(client.connection, client.topology)
        await lane(client, TENANT)


if __name__ == "__main__":
    verbs.main(connect, prepare=prepare, work=work)
