"""Whether jobs that fail and wait for their next attempt slow down those behind them in the same lane.

A handler of 5 ms, 50 slots. In each round: good jobs alone, then the same number behind twice as many that fail and are
to be tried again after ten minutes, then once more while those wait.
"""

from __future__ import annotations

import asyncio
import statistics
import time

import aiqueue

GOOD, BAD = 1_000, 2_000
AGAIN_S = 600.0
HANDLER_S = 0.005
SLOTS = 50


class Step(aiqueue.Message, kind="bench.step"):
    good: bool


async def store(client: aiqueue.Client, good: bool, count: int) -> None:
    async for outcome in client.enqueue_many((Step(good=good) for _ in range(count)), tenant="bench"):
        if isinstance(outcome, aiqueue.AIQueueError):
            raise outcome


async def run(client: aiqueue.Client, *, rounds: int) -> str:
    times: list[float] = []
    failed = 0
    worker = aiqueue.Worker(concurrency=SLOTS)

    @worker.handle(Step, result=False)
    async def step(job: aiqueue.Job[Step]) -> None:
        nonlocal failed
        begun = time.monotonic()
        await asyncio.sleep(HANDLER_S)
        if not job.message.good:
            failed += 1
            raise aiqueue.Retry("not now", after=AGAIN_S)
        times.extend((begun, time.monotonic()))

    async def drained(bad_first: int) -> float:
        """Good jobs a second, from the first one's beginning to the last one's end."""
        times.clear()
        if bad_first:
            await store(client, False, bad_first)
        await store(client, True, GOOD)
        async with worker.running(client), asyncio.timeout(120):
            while len(times) < 2 * GOOD:
                await asyncio.sleep(0.005)
        return GOOD / (max(times) - min(times))

    alone, behind, beside = [], [], []
    for _ in range(rounds):
        await client.connection.api("STREAM.PURGE.AI_PARKED")
        alone.append(await drained(0))
        behind.append(await drained(BAD))
        beside.append(await drained(0))
    assert failed == rounds * BAD, f"{failed} failures: one was tried again too soon"
    lines = [f"{GOOD:,} good jobs of {HANDLER_S * 1000:g} ms on {SLOTS} slots, {rounds} rounds, a second (median)"]
    first = statistics.median(alone)
    for what, figures in (
        ("alone", alone),
        (f"behind {BAD:,} that fail, tried again in 10 min", behind),
        ("while those wait", beside),
    ):
        middle = statistics.median(figures)
        lines.append(f"{what:48} {middle:8,.0f} [{min(figures):,.0f}-{max(figures):,.0f}]  ratio {middle / first:.2f}")
    return "\n".join(lines)
