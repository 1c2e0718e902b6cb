"""One awaited enqueue after another, beside js.publish with the same headers."""

from __future__ import annotations

import time

import aiqueue

from .common import empty, message, raw_client, raw_job
from .report import Row


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    row = Row("enqueue, one awaited at a time", "/s", "js.publish, same headers and Msg-Id")
    raw = await raw_client(client)
    js = raw.jetstream()
    count = max(1, jobs // 3)
    for _ in range(rounds):
        await empty(client)
        begun = time.perf_counter()
        for i in range(count):
            await client.enqueue(message(i), tenant="bench")
        row.ours.append(count / (time.perf_counter() - begun))
        await empty(client)
        begun = time.perf_counter()
        for i in range(count):
            subject, body, told = raw_job(i)
            await js.publish(subject, body, headers=told)
        row.raw.append(count / (time.perf_counter() - begun))
    await empty(client)
    await raw.close()
    return [row]
