"""SAQ on Redis: 100 jobs at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
import verbs
from saq import Queue

queue = Queue.from_url(verbs.address())


async def noop(ctx: dict[str, Any], *, i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


settings = {"queue": queue, "functions": [noop], "concurrency": 100}


class Producer:
    async def one(self, i: int, t: float) -> None:
        await queue.enqueue("noop", i=i, t=t, text=verbs.TEXT)

    async def many(self, numbers: range) -> None:
        await verbs.gathered(numbers, self.one)


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    await queue.connect()
    try:
        yield Producer()
    finally:
        await queue.disconnect()


if __name__ == "__main__":
    verbs.main(connect)
else:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # before saq's program makes its loop
