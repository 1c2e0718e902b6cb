"""How fast backlogs of many tenants are drained by one worker, beside a former version, in turns."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

from ..common import cpu_s
from ..scenarios import Finding
from .bench import SLOWEST, Asked, accounts, ground

SHAPES = (1_000, 60), (1_000, 20), (100, 600), (10_000, 10)
DEMANDED = {
    ((1_000, 60), "file"): 1.7, ((1_000, 60), "memory"): 1.7,
    ((1_000, 20), "file"): 1.05, ((1_000, 20), "memory"): 1.2,
    ((100, 600), "file"): 1.0, ((100, 600), "memory"): 1.0,
}  # fmt: skip


async def _once(asked: Asked, shape: tuple[int, int], storage: str, *, former: bool) -> tuple[float, float]:
    """Jobs a second from the first start until none is stored, and the server's µs of CPU a job until the last start,
    its start included. Not until the last start: acks that the server has not worked off are not done. Raises
    RuntimeError where a job was lost or ran twice.
    """
    tenants, jobs = shape
    async with ground(asked, storage=storage, former=(former,)) as here:
        await here.fill(tenants, jobs)
        count, pid = tenants * jobs, here.servers[0].pid or 0
        used = cpu_s(pid)
        here.workers.start()
        await here.begun(count, within_s=120 + count / SLOWEST)
        used = cpu_s(pid) - used
        left = await here.gone()
        gone_at, begun = time.monotonic(), list(here.read())
        wrong = [each.name for each in accounts(begun, count) if not each.holds]
        if wrong or left:
            raise RuntimeError(f"{', '.join(wrong)}; {left:,} of {count:,} jobs are left")
        first = min(each.at for each in begun)
        rate = count / (gone_at - first)
    name = "former" if former else "this"
    asked.say(f"  {tenants:,} x {jobs:,}, {storage}, {name}: {rate:,.0f}/s, server {1e6 * used / count:,.0f} µs a job")
    return rate, 1e6 * used / count


async def drain(asked: Asked) -> list[Finding]:
    """One worker drains 1,000 tenants, 100 and 10,000, their lanes in files and in memory, in turns with the former."""
    found: list[Finding] = []
    for shape in asked.shapes or SHAPES:
        rates = defaultdict[tuple[str, bool], list[tuple[float, float]]](list)
        sides = [False] if asked.former is None else [False, True]
        rounds = 1 if not asked.shapes and (shape, "file") not in DEMANDED else asked.rounds
        for number in range(rounds):
            for storage in asked.storages:
                for former in sides[:: 1 if number % 2 else -1]:
                    rates[storage, former].append(await _once(asked, shape, storage, former=former))
        for storage in asked.storages:
            name = f"{shape[0]:,} tenants, {shape[1]:,} jobs each, {storage}"
            for former in sides:
                rate, cpu_us = map(statistics.median, zip(*rates[storage, former], strict=True))
                side = ", former" if former else ""
                found += [Finding(f"{name}{side}, /s", rate), Finding(f"{name}{side}, server µs a job", cpu_us)]
            if len(sides) > 1:
                pairs = zip(rates[storage, False], rates[storage, True], strict=True)
                ratio = statistics.median(ours[0] / theirs[0] for ours, theirs in pairs)
                found.append(Finding(f"{name}, ratio", ratio, at_least=DEMANDED.get((shape, storage))))
    return found
