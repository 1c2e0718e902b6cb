"""What must not grow: a worker's memory over half a million jobs, its open pulls over a hundred reconnects."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiqueue

from .common import STREAM, Noop, empty, message
from .drain import fill

PORTION = 50_000
RECONNECTS = 100


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


class Counted:
    """A worker, and how many jobs its handler has had."""

    def __init__(self) -> None:
        self.done = 0
        self.worker = aiqueue.Worker(concurrency=100)

        @self.worker.handle(Noop, result=False)
        async def noop(job: aiqueue.Job[Noop]) -> None:
            self.done += 1


async def memory(client: aiqueue.Client, jobs: int) -> str:
    """Resident memory after each portion, the first one left to warm up."""
    counted = Counted()
    sizes = []
    async with counted.worker.running(client) as session:
        for portion in range(1, jobs // PORTION + 1):
            await fill(client, PORTION, first=False)
            while counted.done < portion * PORTION or session.running:
                await asyncio.sleep(0.05)
            sizes.append(resident_mib())
    grown = max(sizes[1:]) - sizes[0] if len(sizes) > 1 else 0.0
    first = f"{sizes[0]:.1f} MiB after the first {PORTION:,}"
    return f"memory over {counted.done:,} jobs: {first}, at most {grown:+.1f} MiB later"


async def reconnects(client: aiqueue.Client) -> str:
    """The pulls that the server holds for each lane, after the worker's link was broken again and again."""
    counted = Counted()
    sent = 0
    async with counted.worker.running(client):
        for _ in range(RECONNECTS):
            await client.connection._open_client.force_reconnect()
            await client.connection.wait_up(10)
            for tenant in ("a", "b", "c"):
                await client.enqueue(message(sent), tenant=tenant)
                sent += 1
            while counted.done < sent:
                await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        listed = await client.connection.api(f"CONSUMER.LIST.{STREAM}")
        waiting = {each["name"]: each["num_waiting"] for each in listed["consumers"]}
        pending = {each["name"]: each["num_ack_pending"] for each in listed["consumers"]}
    told = f"after {RECONNECTS} reconnects and {counted.done} jobs"
    return f"{told}: open pulls {waiting}, unsettled {sum(pending.values())}"


async def run(client: aiqueue.Client, *, jobs: int) -> str:
    lines = [await reconnects(client)]
    await empty(client)
    lines.append(await memory(client, jobs))
    return "\n".join(lines)
