"""Scenarios of order and time: who is called when, under limits, refusals and a backlog."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence

from aiqueue.gateway.standin import Fault

from ..limiting import judge
from ..scenarios import Finding, told
from .bench import Asked, Setting, ground

REQUESTS, TOKENS = 100, 10_000
USE = 0.9
HIGH, HIGH_EVERY_S = 10, 1.3
OTHER_RATE, OTHER_S = 20.0, 15.0
RETRY_AFTER_S = 20.0
BUSY = 6_000
PACED_S = 15.0


async def limits(asked: Asked) -> list[Finding]:
    """100 requests and 10,000 tokens a minute over 4 processes for 3 minutes, by the provider's log."""
    table = f'key = "m"\nrequests = {REQUESTS}\ncost = {TOKENS}\nwindow = "{asked.window_s:g}s"'
    async with ground(asked, Setting(tables=[table], token_s=0.005)) as here:
        count = int(2 * REQUESTS * (asked.seconds / asked.window_s + 1)) + 20
        await here.fill([here.request(tokens=(6, 166)) for _ in range(count)])
        while not await here.calls():
            await asyncio.sleep(0.05)
        await asyncio.sleep(asked.seconds)
        calls = await here.judged()
        begun, end = calls[0].at, calls[0].at + asked.seconds
        most, highest = judge.worst(calls, asked.window_s)
        use = judge.used(calls, asked.window_s, begun + asked.window_s, end, requests=REQUESTS, cost=TOKENS)
        return [
            Finding("requests in the worst window", most, at_most=REQUESTS),
            Finding("tokens in the worst window", highest, at_most=TOKENS),
            Finding("use of what binds", use, at_least=USE),
            Finding("calls", len(calls)),
            Finding("calls that the provider refused", sum(each.status != 200 for each in calls), at_most=0),
            Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
        ]


async def priority(asked: Asked) -> list[Finding]:
    """A tenant's requests of high priority beside 10,000 of low priority of another one, with all slots taken."""
    async with ground(asked, Setting(slots=4, first_token_s=0.3, token_s=0.01)) as here:
        with told(asked.say, f"{asked.waiting:,} enqueued"):
            await here.fill([here.request(tokens=(10, 50)) for _ in range(asked.waiting)], priority="low")
        await asyncio.sleep(2)
        handles = []
        for _ in range(HIGH):
            await asyncio.sleep(HIGH_EVERY_S)
            handles.append(await here.enqueue(here.request(tokens=1, tenant="b"), tenant="b", priority="high"))
        await here.answers(handles)
        calls = await here.judged()
        waits = judge.waits(each for each in calls if each.tenant == "b")
        longest = max((each.end - each.at for each in calls if each.end is not None), default=0.0) * 1000
        return [
            Finding("requests of low priority that waited", asked.waiting - len(calls) + HIGH, at_least=1),
            Finding("calls of high priority", len(waits), at_least=HIGH, at_most=HIGH),
            Finding("longest call, ms", longest),
            Finding("longest wait of high priority, ms", max(waits, default=0.0), at_most=longest + 100),
            Finding("median wait of high priority, ms", statistics.median(waits)),
        ]


async def refused(asked: Asked) -> list[Finding]:
    """A 429 with Retry-After 20 for one model, under 4 times 50 slots, beside another model of the tenant."""
    return await _refused(asked, [f'key = "{each}"\nrequests = 1_000_000' for each in "xy"])


async def refused_unlimited(asked: Asked) -> list[Finding]:
    """The same without a rule for the models: what waits for the first one has to be moved out of the other's way."""
    return await _refused(asked, [])


async def _refused(asked: Asked, tables: Sequence[str]) -> list[Finding]:
    setting = Setting(models=("x", "y"), tables=tables, slots=50, token_s=0.008)
    async with ground(asked, setting) as here:
        await here.answers(await here.pace(OTHER_RATE, 3, model="y"))  # lanes are made, code is warm
        idle = {each.id for each in await here.pace(OTHER_RATE, OTHER_S, model="y")}
        busy = await here.fill([here.request(model="x", tokens=(1, 100)) for _ in range(BUSY)])
        await asyncio.sleep(3)
        await here.order(Fault(429, retry_after_s=RETRY_AFTER_S, model="x"))
        other = await here.pace(OTHER_RATE, RETRY_AFTER_S, model="y")
        await here.answers(other, 30)
        answers = await here.answers(busy, 180)
        calls = await here.judged()
        of_x = [each for each in calls if each.key == "x"]
        found = judge.pause(of_x, RETRY_AFTER_S)
        begun = next(each.at for each in of_x if each.status == 429)
        ids = {f"r-{each.number}": each for each in calls if each.key == "y"}
        first = judge.p95(judge.waits(each for name, each in ids.items() if name in idle))
        last = judge.p95(judge.waits(ids.values(), begun, begun + RETRY_AFTER_S))
        late = judge.p95(judge.waits(ids.values(), begun + 5, begun + RETRY_AFTER_S))
        served = [each for each in of_x if each.status == 200]
        return [
            Finding("calls that were refused", found.refused, at_least=1),
            Finding("last call after the first 429, ms", found.late_ms, at_most=50),
            Finding("first call after the end of the pause, s", found.resumed_s, at_most=1.5),
            Finding("p95 of the other model when idle, ms", first),
            Finding("p95 of the other model in the pause, ms", last),
            Finding("ratio of the two", last / first, at_most=1.2 if tables else None),
            Finding("p95 of the other model in the last 15 s of it, ms", late),
            Finding("requests without an answer", sum(isinstance(each, Exception) for each in answers), at_most=0),
            Finding("calls beyond one a request", len(served) - len({each.number for each in served}), at_most=0),
        ]


async def called(asked: Asked) -> list[Finding]:
    """From enqueue to the provider's call, at 200 requests a second."""
    async with ground(asked, Setting(first_token_s=0.02)) as here:
        await here.answers(await here.pace(asked.rate, 3))
        begun, before = time.time(), here.cpu()
        handles = await here.pace(asked.rate, PACED_S)
        answers = await here.answers(handles)
        used = [(name, (each - before[name]) * 1000 / len(handles)) for name, each in here.cpu().items()]
        waits = judge.waits(await here.judged(), since=begun)
        return [
            Finding("calls", len(waits), at_least=len(handles), at_most=len(handles)),
            Finding("requests without an answer", sum(isinstance(each, Exception) for each in answers), at_most=0),
            Finding("p50 from enqueue to call, ms", statistics.median(waits)),
            Finding("p95, ms", judge.p95(waits), at_most=8.0),
            Finding("CPU of the workers a request, ms", sum(each for name, each in used if name.startswith("worker"))),
            Finding("CPU of the server a request, ms", sum(each for name, each in used if name.startswith("server"))),
        ]
