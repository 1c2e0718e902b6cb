"""From the call of `cancel` to the CancelledError in a handler that runs, in ms; one job after the other.

Beside it what no way goes without: the journal's newest entry read, one stored that names it, and a message that
another connection hears.
"""

from __future__ import annotations

import asyncio
import statistics
import time

import aiqueue
from aiqueue import headers

from .common import Noop, empty, message, raw_client

JOURNAL = "ai.agent.results.bench.floor"


async def ours(client: aiqueue.Client, jobs: int) -> list[float]:
    waits: list[float] = []
    begun: asyncio.Queue[str] = asyncio.Queue()
    stopped: asyncio.Queue[float] = asyncio.Queue()
    worker = aiqueue.Worker()

    @worker.handle(Noop, timeout=None)
    async def wait(job: aiqueue.Job[Noop]) -> None:
        begun.put_nowait(job.id)
        try:
            await asyncio.Event().wait()
        finally:
            stopped.put_nowait(time.perf_counter())

    async with worker.running(client):
        for number in range(jobs):
            handle = await client.enqueue(message(number), tenant="bench")
            await begun.get()
            at = time.perf_counter()
            assert await handle.cancel()
            waits.append((await stopped.get() - at) * 1000)
    return waits


async def theirs(client: aiqueue.Client, jobs: int) -> list[float]:
    waits: list[float] = []
    raw = await raw_client(client)
    heard = await (other := await raw_client(client)).subscribe("bench.cancel")
    await other.flush()
    js = raw.jetstream()
    seq = (await js.publish(JOURNAL, b"")).seq
    for _ in range(jobs):
        at = time.perf_counter()
        assert (await js.get_last_msg("AI_RESULTS", JOURNAL, direct=True)).seq == seq
        seq = (await js.publish(JOURNAL, b"", headers={headers.EXPECTED: str(seq)})).seq
        await raw.publish("bench.cancel", b"")
        await heard.next_msg()
        waits.append((time.perf_counter() - at) * 1000)
    await raw.close()
    await other.close()
    return waits


async def run(client: aiqueue.Client, *, jobs: int) -> str:
    """The figures of both sides, in rounds of 50 that alternate."""
    sides: dict[str, list[float]] = {"cancel() to CancelledError": [], "read, fenced write, message": []}
    for _ in range(max(1, jobs // 50)):
        for waits, measure in zip(sides.values(), (ours, theirs), strict=True):
            waits.extend(await measure(client, 50))
        await empty(client)
    cuts = {what: statistics.quantiles(waits, n=100) for what, waits in sides.items()}
    lines = [f"{what}: p50 {cut[49]:.1f}  p95 {cut[94]:.1f}  max {max(sides[what]):.1f}" for what, cut in cuts.items()]
    mine, floor = cuts.values()
    return "\n".join([*lines, f"ratio: p50 {mine[49] / floor[49]:.2f}  p95 {mine[94] / floor[94]:.2f}"])
