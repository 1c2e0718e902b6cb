"""One awaited enqueue after another, beside js.publish with the same headers."""

from __future__ import annotations

import time

import aiqueue

from .common import STREAM, empty, message, raw_client, raw_job
from .raw import body
from .report import OURS, RAW, TUNED, Row
from .tuned import Publisher

HOW = {
    OURS: "client.enqueue",
    RAW: "js.publish, same headers, Msg-Id and codec",
    TUNED: "a publish with a reply inbox, no headers",
}


async def stored(client: aiqueue.Client, jobs: int) -> None:
    """Look that the stream holds them all. Raises RuntimeError."""
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    if (found := info["state"]["messages"]) != jobs:
        raise RuntimeError(f"{found:,} of {jobs:,} jobs were stored")


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    row = Row("enqueue", "enqueue, one awaited at a time", "/s", how=HOW)
    raw = await raw_client(client)
    js = raw.jetstream()
    publisher = Publisher(raw)
    await publisher.start()
    count, subject = max(1, jobs // 3), raw_job(0)[0]
    try:
        for _ in range(rounds):
            await empty(client)
            begun = time.perf_counter()
            for i in range(count):
                await client.enqueue(message(i), tenant="bench")
            row.add(OURS, count / (time.perf_counter() - begun))
            await stored(client, count)
            await empty(client)
            begun = time.perf_counter()
            for i in range(count):
                subject, data, told = raw_job(i)
                await js.publish(subject, data, headers=told)
            row.add(RAW, count / (time.perf_counter() - begun))
            await stored(client, count)
            await empty(client)
            begun = time.perf_counter()
            for i in range(count):
                await publisher.publish(subject, body(i))
            row.add(TUNED, count / (time.perf_counter() - begun))
            await stored(client, count)
        await empty(client)
    finally:
        await raw.close()
    return [row]
