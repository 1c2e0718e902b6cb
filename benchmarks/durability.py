"""What safety costs: one server or three, synced every two minutes (the server's default) or at every write.

On each: enqueues awaited singly, by 64 and by 512 callers at once with the slowest of a hundred of their calls, many in
a window, and one worker's drain until the server has taken its last ack. Three servers share one machine and its disk.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Literal

from nats.js import JetStreamContext

import aiqueue
from aiqueue.topology import provision

from .chaos.servers import Cluster, NatsProcess
from .common import STREAM, empty, message, raw_client, raw_job
from .report import OURS, RAW, Row
from .stamped import HOW, drained, stored

DEFAULT, ALWAYS = "R1", "R1 sync always"
THREE, THREE_ALWAYS = "R3", "R3 sync always"
SETTINGS = (DEFAULT, ALWAYS, THREE, THREE_ALWAYS)
SYNC = "sync_interval: always"
CALLERS = (64, 512)
WINDOW = 1_000
WARM = 200
SINGLY = {OURS: "enqueue, each awaited", RAW: "js.publish, same headers, Msg-Id, codec"}
AT_ONCE = {OURS: "enqueue, by so many callers", RAW: "js.publish, by as many callers, same headers, Msg-Id, codec"}
MANY = {OURS: f"enqueue_many, window {WINDOW:,}", RAW: "js.publish_async, the same window, headers, Msg-Id, codec"}

Publish = Callable[[int], Awaitable[object]]


@asynccontextmanager
async def served(client: aiqueue.Client, setting: str) -> AsyncIterator[aiqueue.Client]:
    """A client of a server, or three, of a setting, the streams declared; `client` itself for DEFAULT. The servers end
    with this.
    """
    if setting == DEFAULT:
        yield client
        return
    storage = SYNC if setting in (ALWAYS, THREE_ALWAYS) else ""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="aiqueue-bench-"))
        servers: NatsProcess | Cluster
        if setting == ALWAYS:
            servers = NatsProcess(Path(directory) / "server", storage=storage)
            stack.callback(servers.kill)
        else:
            servers = Cluster(Path(directory) / "cluster", storage=storage)
            stack.callback(servers.end)
        servers.start()  # in this thread, with which they end; the loop waits
        account = servers.account
        profile: Literal["single", "cluster"] = "single" if setting == ALWAYS else "cluster"
        other = await stack.enter_async_context(
            aiqueue.connect(account.url, user=account.user, password=account.password, profile=profile)
        )
        await provision.apply(other.connection, other.topology)
        if isinstance(servers, Cluster):
            await asyncio.to_thread(servers.wait_ready, [STREAM], current=True)
        yield other


async def at_once(callers: int, jobs: int, one: Publish) -> tuple[float, float]:
    """Jobs a second of so many callers, and the 99th percentile of a call's milliseconds."""
    numbers = iter(range(jobs))
    took_ms: list[float] = []

    async def caller() -> None:
        for i in numbers:
            begun = time.perf_counter()
            await one(i)
            took_ms.append((time.perf_counter() - begun) * 1000)

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    return jobs / (time.perf_counter() - begun), statistics.quantiles(took_ms, n=100)[98]


async def many(client: aiqueue.Client, side: str, js: JetStreamContext, jobs: int) -> float:
    """Jobs a second through a window. Raises the error of a job that was not stored."""
    begun = time.perf_counter()
    if side == OURS:
        async for outcome in client.enqueue_many((message(i) for i in range(jobs)), tenant="bench", window=WINDOW):
            if isinstance(outcome, aiqueue.AIQueueError):
                raise outcome
    else:
        acks = []
        for i in range(jobs):
            subject, body, told = raw_job(i)
            acks.append(await js.publish_async(subject, body, headers=told))
        await js.publish_async_completed()
        for ack in acks:
            ack.result()
    return jobs / (time.perf_counter() - begun)


class Setting:
    """The rows of one setting, and a round of them."""

    def __init__(self, name: str) -> None:
        self.singly = Row("durability", f"enqueue, one awaited at a time, {name}", "/s", how=SINGLY)
        self.rates = {n: Row("durability", f"enqueue, {n} callers at once, {name}", "/s", how=AT_ONCE) for n in CALLERS}
        self.slow = {
            n: Row("durability", f"enqueue, {n} callers at once, {name}, p99", "ms", how=AT_ONCE) for n in CALLERS
        }
        self.many = Row("durability", f"enqueue, many at a time, {name}", "/s", how=MANY)
        self.drain = Row("durability", f"drain of one worker, {name}", "/s", how=HOW)

    @property
    def rows(self) -> list[Row]:
        each = [row for n in CALLERS for row in (self.rates[n], self.slow[n])]
        return [self.singly, *each, self.many, self.drain]

    async def round(self, client: aiqueue.Client, side: str, js: JetStreamContext, jobs: int) -> None:
        async def enqueue(i: int) -> None:
            await client.enqueue(message(i), tenant="bench")

        async def publish(i: int) -> None:
            subject, body, told = raw_job(i)
            await js.publish(subject, body, headers=told)

        one = enqueue if side == OURS else publish
        await empty(client)
        self.singly.add(side, (await at_once(1, max(100, jobs // 5), one))[0])
        for callers in CALLERS:
            await empty(client)
            rate, slow_ms = await at_once(callers, max(jobs, 2 * callers), one)
            self.rates[callers].add(side, rate)
            self.slow[callers].add(side, slow_ms)
        await empty(client)
        self.many.add(side, await many(client, side, js, jobs))
        if (count := await stored(client)) != jobs:
            raise RuntimeError(f"{count:,} of {jobs:,} jobs are stored")
        self.drain.add(side, await drained(client, side, jobs))  # of what this side has just stored


async def run(client: aiqueue.Client, *, rounds: int, jobs: int, settings: tuple[str, ...] = SETTINGS) -> list[Row]:
    """`jobs` of each kind, a fifth of them singly."""
    found: list[Row] = []
    for name in settings:
        setting = Setting(name)
        async with served(client, name) as other:
            raw = await raw_client(other)
            try:
                js = raw.jetstream(timeout=30, publish_async_max_pending=WINDOW)
                for side in (OURS, RAW):
                    await many(other, side, js, WARM)  # whose turn is first must not pay for what both find ready
                for _ in range(rounds):
                    for side in (OURS, RAW):
                        await setting.round(other, side, js, jobs)
                await empty(other)
            finally:
                await raw.close()
        found += setting.rows
    return found
