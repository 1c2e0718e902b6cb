"""A worker that is wrong on purpose: it acknowledges a job before it runs it. The checker must find what it loses.

``python -m benchmarks.chaos.broken``, in the environment of the worker under test.
"""

from __future__ import annotations

import asyncio
import os

import cbor2
import nats
from nats.aio.msg import Msg
from nats.js.api import ConsumerConfig

from .app import HANDLER_MS, LOG, STREAM, work
from .records import Pen

AT_ONCE = 50
CONSUMER = "broken"
ACK_WAIT_S = 2.0  # for a batch that was fetched by a worker that died before its acks


async def main() -> None:
    pen = Pen(os.environ[LOG])
    handler_s = float(os.environ[HANDLER_MS]) / 1000
    servers = os.environ["AIQUEUE_URL"].split(",")
    raw = await nats.connect(
        servers,
        user=os.environ["AIQUEUE_USER"],
        password=os.environ["AIQUEUE_PASSWORD"],
        max_reconnect_attempts=-1,
        reconnect_time_wait=0.2,
    )
    jetstream = raw.jetstream()
    pull = await jetstream.pull_subscribe(
        "", durable=CONSUMER, stream=STREAM, config=ConsumerConfig(ack_wait=ACK_WAIT_S)
    )
    slots = asyncio.Semaphore(AT_ONCE)

    async def run(message: Msg) -> None:
        await work(pen, cbor2.loads(message.data)["number"], handler_s)
        slots.release()

    async with asyncio.TaskGroup() as group:
        while True:
            try:
                batch = await pull.fetch(AT_ONCE, timeout=5)
            except (TimeoutError, nats.errors.Error):
                continue
            for message in batch:
                await message.ack()  # here is the fault
            for message in batch:
                await slots.acquire()
                group.create_task(run(message))


if __name__ == "__main__":
    asyncio.run(main())
