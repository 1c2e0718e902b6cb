"""Whether delayed jobs begin at their times: all due within one minute, spread evenly, handlers that do nothing.

Lateness is from the time that the caller asked for to the first line of the handler, by the same clock. Then as many
jobs, all due at one moment.
"""

from __future__ import annotations

import asyncio
import time

import aiqueue

from .common import Noop, empty, message

SPREAD_S = 60.0
AHEAD_S = 10.0  # time to store them all before the first is due


async def lateness(client: aiqueue.Client, jobs: int, spread_s: float) -> tuple[float, list[float], int]:
    """How many were stored in a second; how late each began, sorted; how many began that are not distinct."""
    late: list[float] = []
    seen: set[int] = set()
    worker = aiqueue.Worker(concurrency=100)

    @worker.handle(Noop)
    async def noop(job: aiqueue.Job[Noop]) -> None:
        late.append(time.time() - job.message.t)
        seen.add(job.message.i)

    ahead_s = AHEAD_S + jobs / 2_000
    first = time.time() + ahead_s
    dues = [first + spread_s * n / jobs for n in range(jobs)]
    specs = (aiqueue.JobSpec(message(n, due), at=due) for n, due in enumerate(dues))
    begun = time.monotonic()
    async for outcome in client.enqueue_many(specs, tenant="bench"):
        if isinstance(outcome, aiqueue.AIQueueError):
            raise outcome
    rate = jobs / (time.monotonic() - begun)
    end = time.monotonic() + ahead_s + spread_s + 60
    async with worker.running(client):
        while len(seen) < jobs and time.monotonic() < end:
            await asyncio.sleep(0.05)
    await empty(client)
    return rate, sorted(late), len(late) - len(seen)


async def run(client: aiqueue.Client, *, jobs: int) -> str:
    lines = [f"{jobs:,} delayed jobs, one worker, concurrency 100; late in ms"]
    for what, spread_s in ((f"due over {SPREAD_S:g} s", SPREAD_S), ("all due at once", 0.0)):
        rate, late, again = await lateness(client, jobs, spread_s)
        at = {part: late[min(len(late) - 1, int(len(late) * part))] * 1000 for part in (0.5, 0.95, 0.99)}
        early = sum(each < 0 for each in late)
        figures = "  ".join(f"p{part * 100:g} {value:,.0f}" for part, value in at.items())
        lines.append(
            f"{what}: begun {len(late) - again:,}, twice {again}, early {early}, {figures}  max {late[-1] * 1000:,.0f}"
            f"; stored {rate:,.0f}/s"
        )
    return "\n".join(lines)
