"""A stand-in provider, whose own log judges the limits."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.connection import Connection
from aiqueue.limits import Credit, Limiter, Rules, parse_rules
from aiqueue.topology import Topology
from benchmarks.limiting.judge import worst_window

from ..support import Account

FAMILY = """
[family]
name = "llm.calls"
default_kind = "llm.call"
limit_key = "model"
tenants = { heavy = { weight = 2 } }
[stream]
name = "LLM_CALLS"
"""
NAME = "llm.calls"


def limited_topology() -> Topology:
    bundled = Topology.load()
    files = [(each.file, Path(each.file).read_text(encoding="utf-8")) for each in bundled.streams.values()]
    return Topology.build([*files, ("llm.toml", FAMILY)])


TOPOLOGY = limited_topology()


def rules(*tables: str) -> Rules:
    """The rules of tables in limits.toml, of the family of these tests: ``rules('requests = 5')``."""
    return parse_rules(TOPOLOGY, ("limits.toml", "".join(f'[[limit]]\nfamily = "{NAME}"\n{each}\n' for each in tables)))


class Provider:
    """What the provider sees: when each call arrived, of which tenant, at what cost; how many are open."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, str, float]] = []
        self.open = 0
        self.most_open = 0

    async def call(self, tenant: str, cost: float, latency_s: float = 0.0) -> None:
        self.calls.append((time.monotonic(), tenant, cost))
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        try:
            await asyncio.sleep(latency_s)
        finally:
            self.open -= 1

    def worst(self, window_s: float, tenant: str | None = None) -> tuple[int, float]:
        """The most calls, and the most cost, in any window."""
        return worst(sorted(each for each in self.calls if tenant in (None, each[1])), window_s)

    def used(self, since_s: float, tenant: str | None = None) -> tuple[float, float]:
        """Calls and cost a second, from `since_s` seconds after the first call to the last one."""
        first, last = self.calls[0][0] + since_s, self.calls[-1][0]
        chosen = [each for each in self.calls if each[0] >= first and tenant in (None, each[1])]
        return len(chosen) / (last - first), sum(each[2] for each in chosen) / (last - first)


def worst(calls: list[tuple[float, str, float]], window_s: float) -> tuple[int, float]:
    return worst_window([(at, cost) for at, _, cost in calls], window_s)


@asynccontextmanager
async def limiters(account: Account, count: int, make_rules: Callable[[], Rules]) -> AsyncIterator[list[Limiter]]:
    """Limiters that share nothing but the server, each with a connection of its own."""
    made: list[Limiter] = []
    connections: list[Connection] = []
    try:
        for _ in range(count):
            settings = aiqueue.Settings.load(url=account.url, user=account.user, password=account.password)
            connections.append(Connection(settings))
            await connections[-1].open()
            made.append(Limiter(connections[-1], TOPOLOGY, make_rules()))
            await made[-1].open()
        yield made
    finally:
        await asyncio.gather(*(each.close() for each in made))
        await asyncio.gather(*(each.close() for each in connections))


async def call(limiter: Limiter, provider: Provider, tenant: str = "a", key: str = "m", **options: Any) -> Credit:
    """One call, as a worker makes it: again if it may not start any more."""
    latency_s, actual = options.pop("latency_s", 0.0), options.pop("actual", None)
    while True:
        credit = await limiter.acquire(NAME, key, tenant, **options)
        if credit.begin():
            break
    try:
        await provider.call(tenant, credit.cost, latency_s)
    finally:
        credit.settle(actual)
    return credit


async def load(
    limiter: Limiter, provider: Provider, seconds: float, tenant: str = "a", *, slots: int = 10,
    cost: tuple[int, int] = (1, 1), latency_s: float = 0.0, **options: Any,
) -> None:  # fmt: skip
    """Calls without a pause in so many slots, for so long."""
    end = time.monotonic() + seconds
    rnd = random.Random(id(limiter))

    async def slot() -> None:
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    each = float(rnd.randint(*cost))
                    await call(limiter, provider, tenant, cost=each, latency_s=rnd.uniform(0, latency_s), **options)
            except TimeoutError:
                return

    await asyncio.gather(*(slot() for _ in range(slots)))
