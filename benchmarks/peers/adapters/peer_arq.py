"""arq: 100 jobs at once, no results; the pause between its looks at Redis by POLL_ENV."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvloop
import verbs
from arq import create_pool
from arq.connections import ArqRedis, RedisSettings

POLL_ENV = "BENCH_ARQ_POLL_S"
QUIET = {"version": 1, "loggers": {"arq": {"level": "WARNING"}}}  # it would write two lines a job
redis = RedisSettings.from_dsn(verbs.address())


async def noop(ctx: dict[str, Any], i: int, t: float, text: str) -> None:
    verbs.ran(i, t)


class Settings:
    """What ``arq`` runs."""

    functions = (noop,)
    redis_settings = redis
    max_jobs = 100
    keep_result = 0
    poll_delay = float(os.environ.get(POLL_ENV, "0.5"))


class Producer:
    def __init__(self, pool: ArqRedis) -> None:
        self._pool = pool

    async def one(self, i: int, t: float) -> None:
        await self._pool.enqueue_job("noop", i, t, verbs.TEXT)

    async def many(self, numbers: range) -> None:
        await verbs.gathered(numbers, self.one)


@asynccontextmanager
async def connect() -> AsyncIterator[Producer]:
    pool = await create_pool(redis)
    try:
        yield Producer(pool)
    finally:
        await pool.aclose()


if __name__ == "__main__":
    verbs.main(connect)
else:
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())  # before arq's program makes its loop
