"""Whether tenants can starve each other: 10 ms handlers, concurrency 10, one process.

50,000 jobs of tenant A wait; 20 seconds' worth in, B and C enqueue 20 jobs each in lanes not seen before. Then weights
3:1 over 4,000 jobs, and a low-priority job behind an endless high stream. Beside each, one shared lane (first come,
first served), which is what a plain consumer gives.
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


def declared(client: aiqueue.Client, **changes: Any) -> None:
    """Change the family under test, for this client only."""
    topology = client.topology
    family = dataclasses.replace(topology.families[FAMILY], **changes)
    client.topology = dataclasses.replace(topology, families={**topology.families, FAMILY: family})


async def forget_lanes(client: aiqueue.Client) -> None:
    listed = await client.connection.api(f"CONSUMER.NAMES.{STREAM}")
    for name in listed.get("consumers") or []:
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


async def quiet(client: aiqueue.Client, *, jobs: int = 50_000) -> tuple[float, int]:
    """Seconds until all 40 jobs of B and C have started (at most 20), and how many started by then."""
    await fill(client, jobs, tenant="a")
    starts = Starts(0.01, 10)
    async with starts.worker.running(client):
        while len(starts.at) < 500:
            await asyncio.sleep(0.01)
        asked = time.monotonic()
        for n in range(20):
            await client.enqueue(message(n), tenant="b")
            await client.enqueue(message(n), tenant="c")
        while len(starts.of("b")) + len(starts.of("c")) < 40 and time.monotonic() - asked < 20:
            await asyncio.sleep(0.01)
        begun = starts.of("b") + starts.of("c")
    await empty(client)
    return (max(begun) - asked if len(begun) == 40 else 20.0), len(begun)


async def weights(client: aiqueue.Client) -> float:
    """The heavy tenant's share of 4,000 starts, declared 3:1 (0.75 is exact)."""
    await fill(client, 5_000, tenant="heavy")
    await fill(client, 5_000, tenant="light", first=False)
    starts = Starts(0.01, 10)
    async with starts.worker.running(client):
        while len(starts.at) < 4_100:
            await asyncio.sleep(0.01)
    await empty(client)
    counts = Counter(tenant for _, tenant, _ in starts.at[100:4_100])  # both lanes are known by then
    return counts["heavy"] / 4_000


async def low(client: aiqueue.Client) -> float:
    """Seconds that a low-priority job waits behind a stream of high ones that never ends."""
    starts = Starts(0.01, 10)
    await fill(client, 20_000, tenant="a", priority="high")
    async with starts.worker.running(client):
        while len(starts.at) < 300:
            await asyncio.sleep(0.01)
        asked = time.monotonic()
        await client.enqueue(message(0), tenant="b", priority="low")
        while not starts.of("b") and time.monotonic() - asked < 20:
            await asyncio.sleep(0.01)
    await empty(client)
    return min(starts.of("b"), default=asked + 20) - asked


async def run(client: aiqueue.Client, *, rounds: int) -> str:
    """The figures as text, a line each."""
    lines = []
    plain = client.topology
    for _ in range(rounds):
        for mode in ("tenant", "shared"):
            client.topology = plain
            await forget_lanes(client)
            declared(client, lanes=mode)
            took, begun = await quiet(client)
            lines.append(f"lanes={mode}: {begun} of 40 jobs of B and C started, the last after {took:.2f} s")
    client.topology = plain
    await forget_lanes(client)
    declared(client, tenants={"heavy": {"weight": 3.0}})
    lines.append(f"weights 3:1: the heavy tenant had {await weights(client):.3f} of 4,000 starts")
    client.topology = plain
    lines.append(f"a low job behind an endless high stream started after {await low(client):.2f} s")
    return "\n".join(lines)
