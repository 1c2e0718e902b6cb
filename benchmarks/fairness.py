"""Whether tenants can starve each other: 10 ms handlers, concurrency 10, one process. Figures for `jobs` of 10,000.

50,000 jobs of tenant A wait; 500 jobs in, B and C enqueue 20 jobs each in lanes not seen before. Beside it, one shared
lane (first come, first served), which is what a plain consumer gives. Then weights 3:1 over 4,000 jobs, and a
low-priority job behind 20,000 high ones.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections import Counter
from typing import Any

import aiqueue

from .common import FAMILY, STREAM, Noop, empty, message
from .drain import fill
from .report import OURS, Row

SHARED = "one shared lane"
GIVE_UP_S = 20.0
STEP_S = 0.01
HOW = {OURS: "a lane for each tenant and priority", SHARED: "first come, first served, as a plain consumer"}


def declared(client: aiqueue.Client, **changes: Any) -> None:
    """Change the family under test, for this client only."""
    topology = client.topology
    family = dataclasses.replace(topology.families[FAMILY], **changes)
    client.topology = dataclasses.replace(topology, families={**topology.families, FAMILY: family})


async def forget_lanes(client: aiqueue.Client) -> None:
    """Delete the consumers of all lanes."""
    while names := (await client.connection.api(f"CONSUMER.NAMES.{STREAM}")).get("consumers"):
        for name in names:
            await client.connection.api(f"CONSUMER.DELETE.{STREAM}.{name}")
    await asyncio.sleep(0.3)


class Starts:
    """When the handler began each job, by tenant."""

    def __init__(self, handler_s: float, concurrency: int) -> None:
        self.at: list[tuple[float, str, str]] = []
        self.worker = aiqueue.Worker(concurrency=concurrency)

        @self.worker.handle(Noop, result=False)
        async def noop(job: aiqueue.Job[Noop]) -> None:
            self.at.append((time.monotonic(), job.tenant, job.priority))
            await asyncio.sleep(handler_s)

    def of(self, tenant: str) -> list[float]:
        return [at for at, each, _ in self.at if each == tenant]

    async def wait(self, count: int) -> None:
        """Until so many have begun. Raises TimeoutError where that takes far longer than it should."""
        async with asyncio.timeout(60 + 10 * count * 0.01 / self.worker.concurrency):
            while len(self.at) < count:
                await asyncio.sleep(STEP_S)


async def quiet(client: aiqueue.Client, *, jobs: int) -> tuple[float, int]:
    """Seconds until all 40 jobs of B and C have started (at most GIVE_UP_S), and how many started by then; `jobs` of
    tenant A wait.
    """
    await fill(client, jobs, tenant="a")
    starts = Starts(0.01, 10)
    async with starts.worker.running(client):
        await starts.wait(min(500, jobs // 10))
        asked = time.monotonic()
        for n in range(20):
            await client.enqueue(message(n), tenant="b")
            await client.enqueue(message(n), tenant="c")
        while len(starts.of("b")) + len(starts.of("c")) < 40 and time.monotonic() - asked < GIVE_UP_S:
            await asyncio.sleep(STEP_S)
        begun = starts.of("b") + starts.of("c")
    await empty(client)
    return (max(begun) - asked if len(begun) == 40 else GIVE_UP_S), len(begun)


async def weights(client: aiqueue.Client, starts_counted: int) -> int:
    """How many of so many starts are the heavy tenant's, declared 3:1; a hundred before them are not counted."""
    await fill(client, starts_counted + 100, tenant="heavy")
    await fill(client, starts_counted + 100, tenant="light", first=False)
    starts = Starts(0.01, 10)
    async with starts.worker.running(client):
        await starts.wait(100 + starts_counted)
    await empty(client)
    counts = Counter(tenant for _, tenant, _ in starts.at[100 : 100 + starts_counted])  # both lanes are known by then
    return counts["heavy"]


async def low(client: aiqueue.Client, *, jobs: int) -> float:
    """Seconds that a low-priority job waits behind so many high ones, which outlast it; at most GIVE_UP_S."""
    starts = Starts(0.01, 10)
    await fill(client, jobs, tenant="a", priority="high")
    async with starts.worker.running(client):
        await starts.wait(min(300, jobs // 10))
        asked = time.monotonic()
        await client.enqueue(message(0), tenant="b", priority="low")
        while not starts.of("b") and time.monotonic() - asked < GIVE_UP_S:
            await asyncio.sleep(STEP_S)
    await empty(client)
    return min(starts.of("b"), default=asked + GIVE_UP_S) - asked


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """Backlogs in proportion to `jobs`, at least 100."""
    counted = max(100, jobs * 2 // 5)
    last = Row("fairness", "the last of 40 jobs of two quiet tenants starts after", "s", how=HOW)
    begun = Row("fairness", f"of these, started within {GIVE_UP_S:g} s", "jobs", how=HOW)
    heavy = Row("fairness", f"weights 3:1, the heavy tenant's of {counted:,} starts", "jobs", how=HOW)
    behind = Row("fairness", "a low job behind high ones starts after", "s", how=HOW)
    declared_so = client.topology
    try:
        for _ in range(rounds):
            for side, lanes in ((OURS, "tenant"), (SHARED, "shared")):
                client.topology = declared_so
                await forget_lanes(client)
                declared(client, lanes=lanes)
                took_s, started = await quiet(client, jobs=5 * jobs)
                last.add(side, took_s)
                begun.add(side, started)
            client.topology = declared_so
            await forget_lanes(client)
            declared(client, tenants={"heavy": {"weight": 3.0}})
            heavy.add(OURS, await weights(client, counted))
            client.topology = declared_so
            behind.add(OURS, await low(client, jobs=2 * jobs))
    finally:
        client.topology = declared_so
        await forget_lanes(client)
    return [last, begun, heavy, behind]
