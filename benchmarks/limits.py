"""What a limit costs a call: four processes with 50 calls a second each under a limit that does not bind, and four that
ask without a pause under one that does.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import sys
import time

import aiqueue
from aiqueue.limits import Limiter, Rules, parse_rules
from aiqueue.topology import Topology

from .common import FAMILY, add_percentiles, beside, paced, percentile_rows
from .limiting.judge import worst_window
from .report import OURS, Row

PROCESSES = 4
RATE = 50.0  # calls a second of a process
FREE = "requests = 100_000\ncost = 100_000_000\n"
BINDING = 'requests = 100\ncost = 10_000\nwindow = "6s"\n'
WINDOW_S, REQUESTS, COST = 6.0, 100, 10_000
BINDING_S = 24.0
HOW = {OURS: "4 processes, 50 calls a second each, cost 20 to 180; 100,000 requests and cost 100,000,000 a minute"}
HOW_BINDING = {OURS: "4 processes of 8 slots that never pause, cost 20 to 180; 100 requests and cost 10,000 in 6 s"}


def limited(topology: Topology, table: str) -> tuple[Topology, Rules]:
    """The topology with a limit key for the family under test, and a rule for its jobs."""
    family = dataclasses.replace(topology.families[FAMILY], limit_key="model")
    changed = dataclasses.replace(topology, families={**topology.families, FAMILY: family})
    return changed, parse_rules(changed, ("limits.toml", f'[[limit]]\nfamily = "{FAMILY}"\n{table}'))


async def measure(client: aiqueue.Client, table: str, arguments: tuple[str, ...]) -> list[dict[str, list[float]]]:
    """What each of the processes has written down. Raises RuntimeError where a window was above the limit."""
    key = f"m{time.time_ns()}"
    programs = [("-m", "benchmarks.limits", key, table, *arguments) for _ in range(PROCESSES)]
    async with beside(client, *programs) as children:
        await asyncio.gather(*(each.ended(within_s=BINDING_S + 60) for each in children))
        return [json.loads(each.log.read_text().splitlines()[-1]) for each in children]


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """`jobs` calls over all processes under the limit that does not bind, at most 4,000: 20 seconds."""
    calls = min(jobs, 4_000) // PROCESSES
    waits = percentile_rows("limits", "acquire where nothing binds", HOW)
    waits[1].limit = 3.0
    writes = Row("limits", "writes a call where nothing binds", "writes", how=HOW, limit=0.3)
    used = Row("limits", "use of the requests that bind", "%", how=HOW_BINDING)
    bound = Row("limits", "writes a call where requests bind", "writes", how=HOW_BINDING)
    for _ in range(rounds):
        free = await measure(client, FREE, ("paced", str(calls)))
        add_percentiles(waits, OURS, [each for one in free for each in one["waits"]])
        writes.add(OURS, sum(each["writes"][0] for each in free) / (calls * PROCESSES))
        binding = await measure(client, BINDING, ("busy", str(BINDING_S)))
        starts = sorted((at, cost) for one in binding for at, cost in zip(one["starts"], one["costs"], strict=True))
        most, highest = worst_window(starts, WINDOW_S)
        if most > REQUESTS or highest > COST:
            raise RuntimeError(f"{most} requests and cost {highest:g} in a window of {REQUESTS} and {COST:,}")
        begun = starts[0][0] + WINDOW_S
        late = [each for each in starts if each[0] > begun]
        used.add(OURS, 100 * len(late) / ((BINDING_S - WINDOW_S) / WINDOW_S * REQUESTS))
        bound.add(OURS, sum(each["writes"][0] for each in binding) / len(starts))
    return [*waits, writes, used, bound]


async def _work(key: str, table: str, how: str, amount: str) -> None:
    async with aiqueue.connect() as client:
        topology, rules = limited(client.topology, table)
        limiter = Limiter(client.connection, topology, rules)
        await limiter.open()
        told: dict[str, list[float]] = {"waits": [], "starts": [], "costs": []}

        async def call(_number: int = 0, _at: float = 0.0) -> None:
            asked_at, cost = time.perf_counter(), float(random.randint(20, 180))
            credit = await limiter.acquire(FAMILY, key, "bench", cost=cost)
            told["waits"].append((time.perf_counter() - asked_at) * 1000)
            if credit.begin():
                told["starts"].append(time.monotonic())
                told["costs"].append(cost)
                await asyncio.sleep(random.uniform(0, 0.2))
            credit.settle()

        async def slot(end: float) -> None:
            while time.monotonic() < end:
                await call()

        if how == "paced":
            await paced(RATE, int(amount), call)
        else:
            try:
                async with asyncio.timeout(float(amount)):
                    await asyncio.gather(*(slot(time.monotonic() + float(amount)) for _ in range(8)))
            except TimeoutError:
                pass
        told["writes"] = [float(sum(each.written for each in limiter.key_limiters()))]
        await limiter.close()
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    asyncio.run(_work(*sys.argv[1:]))
