"""Workers in processes of their own, whose records expire soon, and whose event loops their handlers block."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiqueue
from aiqueue.topology import provision

from .. import forks
from ..support import Account, eventually
from ..worker.test_kill import WorkerPool

APP = """
    import time
    import aiqueue
    from aiqueue.lanes import worker_records
    from aiqueue.worker import announcer, blocked_report

    worker_records.TTL_S = 1.0
    announcer.EVERY_S = blocked_report.EVERY_S = 0.25
    blocked_report.AFTER_S = 0.2
    from aiqueue.worker import watchdog
    watchdog.TICK_S = 0.1

    class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
        n: int

    worker = aiqueue.Worker(name="one", concurrency=2)

    @worker.handle(Sleep)
    async def sleep(job):
        time.sleep(job.message.n)
    """


class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
    n: int


@contextlib.asynccontextmanager
async def client_of(pool: WorkerPool, account: Account) -> AsyncIterator[aiqueue.Client]:
    streams = pool.directory / "streams"
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await provision.apply(client.connection, client.topology)
        yield client


async def start(client: aiqueue.Client, pool: WorkerPool) -> forks.Program:
    """Start a worker, and wait until it is listed."""
    process = await asyncio.to_thread(pool.start)
    await eventually(client.workers)
    return process
