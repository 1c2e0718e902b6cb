"""What an operator waits for: the overview and a page of jobs with 1,000,000 waiting in 1,000 lanes, and acts on 10,000
jobs of a filter while a worker runs, or while two run and one is killed -9 every 2 s. With fewer `--jobs`, all of it is
smaller; 10,000 is the whole. `--only` asks one part: acts, kills or looks.

Each figure has its limit beside it. A figure above it fails the run, and so does a job that is missing, or ran twice.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiqueue
from aiqueue import headers, subjects
from aiqueue.inspect import stats

from . import operator_kills
from .common import STREAM, Noop, message

LANES = 1_000
LANE_FACTOR = 100  # as many times `jobs` wait in the lanes
LOOKS = 60
OVERVIEW_MS, PAGE_MS, WORKERS_MS = 50.0, 50.0, 50.0  # p95
WORKERS = 1_000
ACT_S = 15.0  # for 10,000 jobs
WITHIN_S = 120.0
ACTING = "acted"


async def fill_lanes(client: aiqueue.Client, jobs: int) -> None:
    """Store jobs in turn in LANES lanes, each of which has its consumer."""
    specs = (aiqueue.JobSpec(message(n), tenant=f"t{n % LANES}") for n in range(jobs))
    async for stored in client.enqueue_many(specs):
        if isinstance(stored, aiqueue.AIQueueError):
            raise stored
    family = client.topology.family(Noop.aiq_family)
    for number in range(LANES):
        config = family.lane_config(f"t{number}", "normal")
        subject = f"CONSUMER.CREATE.{STREAM}.{config['durable_name']}.{config['filter_subject']}"
        await client.connection.api(subject, {"stream_name": STREAM, "config": config})


async def write_workers(client: aiqueue.Client) -> None:
    """Write the records of WORKERS workers, which run two jobs each. They stay for a minute."""
    running = {"family": Noop.aiq_family, "tenant": "t1", "priority": "normal", "seq": 3, "job_id": "0" * 26}
    body = {
        "state": "ok", "time": time.time(), "pid": 4711, "slots": 100, "running": 2, "waiting": 0, "done": 12_345,
        "last_delivery": time.time(), "connected": True, "stalled_s": 0.0, "lanes": 40, "tenants": None,
        "answers": True, "heeds_pauses": True, "key_lanes": True, "in_line": {}, "version": "0.1.0",
        "host": "host-1.example", "started": time.time(), "rss_bytes": 80_000_000, "families": [Noop.aiq_family],
        "kinds": {Noop.aiq_family: [Noop.aiq_kind]},
        "jobs": [{**running, "kind": Noop.aiq_kind, "delivered_s": 1.5}] * 2,
    }  # fmt: skip
    for number in range(WORKERS):
        record = json.dumps({**body, "worker": f"w{number}"}).encode()
        fields = {headers.MSG_ID: subjects.new_id(), headers.TTL: "60s"}
        await client.connection.store(f"$KV.AI_PRESENCE.worker.w{number}", record, fields)


async def timed(look: Callable[[], Awaitable[Any]], looks: int = LOOKS) -> list[float]:
    """Milliseconds of each call, after two that warm up."""
    waits = []
    for number in range(looks + 2):
        at = time.perf_counter()
        await look()
        if number > 1:
            waits.append((time.perf_counter() - at) * 1000)
    return waits


async def look(client: aiqueue.Client, jobs: int) -> dict[str, tuple[list[float], float]]:
    """The waits of each view, and the limit of its p95."""
    drawn = random.Random(7)
    await write_workers(client)

    async def page(**which: Any) -> None:
        found = await client.jobs.page(**which)
        if len(found.jobs) != min(50, jobs // LANES if "tenant" in which else jobs):
            raise RuntimeError(f"a page of {len(found.jobs)} jobs for {which}")

    async def overview() -> None:
        found = await stats.overview(client.connection, client.topology, sample_s=0)
        if sum(each.pending for each in found) != jobs:
            raise RuntimeError("the overview has missed jobs")

    async def workers() -> None:
        if len(await client.workers()) != WORKERS:
            raise RuntimeError("the listing has missed workers")

    return {
        "overview": (await timed(overview), OVERVIEW_MS),
        f"records of {WORKERS:,} workers": (await timed(workers), WORKERS_MS),
        "page of 50, all lanes, first": (await timed(page), PAGE_MS),
        "page of 50, all lanes, anywhere": (
            await timed(lambda: page(cursor=f"{STREAM}.{drawn.randrange(1, max(2, jobs - 100))}")), PAGE_MS,
        ),
        "page of 50, one lane": (await timed(lambda: page(tenant=f"t{drawn.randrange(LANES)}")), PAGE_MS),
    }  # fmt: skip


@asynccontextmanager
async def working(client: aiqueue.Client, runs: Counter[int], *, fails: bool = False) -> AsyncIterator[None]:
    worker = aiqueue.Worker(concurrency=20, tenants=[ACTING])

    @worker.handle(Noop, retry=aiqueue.Backoff(attempts=1))
    async def noop(job: aiqueue.Job[Noop]) -> None:
        if fails:
            raise aiqueue.Reject("to be replayed")
        await asyncio.sleep(0.05)
        runs[job.message.i] += 1

    async with worker.running(client):
        yield


async def act(client: aiqueue.Client, name: Any, jobs: int) -> str:
    """Act on `jobs` jobs while a worker runs, and say how long it took. Raises RuntimeError where a sum is wrong."""
    options: dict[str, Any] = {"run_now": {"delay": "1h"}, "move": {"priority": "low"}}.get(name, {})
    specs = (aiqueue.JobSpec(message(n), tenant=ACTING, **options) for n in range(jobs))
    async for _ in client.enqueue_many(specs):
        pass
    if name == "replay":
        async with working(client, Counter(), fails=True):
            async with asyncio.timeout(WITHIN_S):
                while (await client.jobs.plan("replay", tenant=ACTING)).count < jobs:
                    await asyncio.sleep(0.5)
    runs: Counter[int] = Counter()
    async with working(client, runs):
        at = time.perf_counter()
        plan = await client.jobs.plan(name, tenant=ACTING, to="high" if name == "move" else "")
        outcome = await client.jobs.act(plan)
        took_s = time.perf_counter() - at
        if outcome.done + len(outcome.ended) != plan.count or outcome.failed:
            raise RuntimeError(f"{name}: {plan.count} matched, {outcome.done} done, {len(outcome.ended)} ended")
        left = jobs - (outcome.done if name == "cancel" else 0)
        async with asyncio.timeout(WITHIN_S):
            while sum(runs.values()) < left:
                await asyncio.sleep(0.1)
    stopped_late = outcome.done if name == "cancel" else 0  # handlers that ended as they were to be stopped
    if max(runs.values(), default=1) > 1 or not left <= len(runs) <= left + stopped_late:
        raise RuntimeError(f"{name}: {len(runs)} of {left} jobs ran, one of them {max(runs.values())} times")
    if took_s > ACT_S * max(1.0, jobs / 10_000):
        raise RuntimeError(f"{name}: {took_s:.1f} s for {jobs:,} jobs, above {ACT_S:g} s")
    return f"{name} {plan.count:,} jobs: {took_s:.1f} s, {outcome.done:,} done, {len(outcome.ended):,} ended meanwhile"


ACTS = ("cancel", "run_now", "move", "replay")


async def run(client: aiqueue.Client, *, jobs: int, only: str | None = None) -> str:
    """All figures, one a line. Raises RuntimeError where one is above its limit."""
    lines: list[str] = []
    if only in (None, "acts"):
        lines += [await act(client, name, jobs) for name in ACTS]
    if only in (None, "kills"):
        lines += [await operator_kills.act(name, jobs) for name in ACTS]
    if only in (None, "looks"):
        lines += await judged_looks(client, jobs * LANE_FACTOR)
    return "\n".join(lines)


async def judged_looks(client: aiqueue.Client, jobs: int) -> list[str]:
    await fill_lanes(client, jobs)
    lines, late = [], False
    for name, (waits, limit) in (await look(client, jobs)).items():
        p95 = statistics.quantiles(waits, n=20)[-1]
        lines.append(f"{name}: p50 {statistics.median(waits):.1f} ms  p95 {p95:.1f} ms  (limit {limit:g})")
        late = late or p95 > limit
    if late:
        raise RuntimeError("\n".join(["above its limit:", *lines]))
    return lines
