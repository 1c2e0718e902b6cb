"""Scenarios of what a limit costs where it does not bind."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable

from ..common import cpu_s
from ..scenarios import Finding
from . import app, judge
from .bench import PLAIN_STREAM, STREAM, Asked, Ground, Setting, ground

RATE, PACED_S = 200.0, 10.0
FREE = 'key = "m"\nrequests = 100_000\ncost = 100_000_000'
Drained = app.Noop | app.CostlyNoop | app.PlainNoop
FREE_REQUESTS = 'key = "r"\nrequests = 1_000_000'


async def paced(asked: Asked) -> list[Finding]:
    """200 calls a second over 4 processes where nothing binds, in turn with a key that has no rule."""
    async with ground(asked, Setting(tables=[FREE])) as here:
        limited: list[float] = []
        free: list[float] = []
        writes = count = 0
        for key in ("m", "free"):
            await here.called(await here.pace(RATE, 2, key=key), 30)
        for _ in range(asked.rounds):
            for key, found in (("m", limited), ("free", free)):
                before = await here.writes()
                numbers = await here.pace(RATE, PACED_S, key=key)
                await here.called(numbers, 30)
                if key == "m":
                    writes += await here.writes() - before
                    count += len(numbers)
                found.extend(judge.waits(each for each in here.log().of(key=key) if each.number in numbers))
        return [
            Finding("writes a call", writes / count, at_most=0.3),
            Finding("p95 from enqueue to call with the limit, ms", judge.p95(limited)),
            Finding("p95 without, ms", judge.p95(free)),
            Finding("difference, ms", judge.p95(limited) - judge.p95(free), at_most=3.0),
            Finding("p50 with the limit, ms", statistics.median(limited)),
            Finding("p50 without, ms", statistics.median(free)),
        ]


async def drain(asked: Asked) -> list[Finding]:
    """A backlog on one worker process: with a limit that does not bind, without one, and in a family without a key."""
    kinds: dict[str, tuple[str, Callable[[int], Drained]]] = {
        "a limit of requests": (STREAM, lambda n: app.Noop(number=n, model="r")),
        "no rule": (STREAM, lambda n: app.Noop(number=n, model="free")),
        "a limit of requests and cost": (STREAM, lambda n: app.CostlyNoop(number=n, model="m")),
        "a family without a key": (PLAIN_STREAM, lambda n: app.PlainNoop(number=n, model="m")),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    cpu: dict[str, list[float]] = {name: [] for name in kinds}
    one = Asked(workers=1, limits=asked.limits, keep=asked.keep, seed=asked.seed)
    async with ground(one, Setting(tables=[FREE, FREE_REQUESTS], slots=100), working=False) as here:
        for number in range(asked.rounds + 1):
            names = [*kinds]
            for name in names[number % 4 :] + names[: number % 4]:
                found = await _drained(here, *kinds[name], asked.jobs * (2 if number else 1))
                if number:  # the first round warms up
                    rates[name].append(found[0])
                    cpu[name].append(found[1])
    medians = {name: statistics.median(each) for name, each in rates.items()}
    costs = {name: statistics.median(each) for name, each in cpu.items()}
    free, limited, costly = "no rule", "a limit of requests", "a limit of requests and cost"
    return [
        *(Finding(f"jobs a second, {name}", each) for name, each in medians.items()),
        *(Finding(f"the worker's CPU a job, us, {name}", each) for name, each in costs.items()),
        Finding("requests limited: rate, of that without a rule", medians[limited] / medians[free], at_least=0.85),
        Finding("requests and cost limited, of it", medians[costly] / medians[free], at_least=0.85),
        Finding("no rule, of a family without a key", medians[free] / medians["a family without a key"]),
    ]


async def _drained(here: Ground, stream: str, make: Callable[[int], Drained], jobs: int) -> tuple[float, float]:
    """Jobs a second from the first handler to the last, and microseconds of the worker's CPU for each."""
    here.drain_log.unlink(missing_ok=True)
    async for outcome in here.client.enqueue_many(map(make, range(jobs)), tenant="a"):
        if isinstance(outcome, Exception):
            raise outcome
    here.workers.start()
    (worker,) = here.workers.alive
    end = time.monotonic() + 60 + jobs / 100
    while not _size(here) and time.monotonic() < end:
        await asyncio.sleep(0.005)
    before, first = cpu_s(worker.pid), _size(here) // app.RECORD.size
    while _size(here) < jobs * app.RECORD.size:
        if time.monotonic() > end:
            raise RuntimeError(f"{_size(here) // app.RECORD.size:,} of {jobs:,} jobs were drained")
        await asyncio.sleep(0.05)
    used_s = cpu_s(worker.pid) - before
    while sum((await here.stored(stream)).values()):
        await asyncio.sleep(0.05)
    await asyncio.to_thread(here.workers.end)
    found: list[tuple[float, int]] = [*app.RECORD.iter_unpack(here.drain_log.read_bytes())]
    if len(found) != jobs or len({number for _, number in found}) != jobs:
        raise RuntimeError(f"{len(found):,} runs of {jobs:,} jobs")
    rate = (jobs - 1) / (max(at for at, _ in found) - min(at for at, _ in found))
    return rate, used_s / (jobs - first) * 1e6


def _size(here: Ground) -> int:
    return here.drain_log.stat().st_size if here.drain_log.exists() else 0
