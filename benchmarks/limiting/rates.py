"""Scenarios of requests and cost in a window: what binds, who is killed, who shares, what is changed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ..scenarios import Finding, spans
from . import app, judge
from .bench import Asked, Ground, Setting, ground
from .judge import Call

REQUESTS, COST = 100, 10_000
LOW, HIGH = (20.0, 180.0), (50.0, 1_500.0)
TAKES_S = 0.0, 0.8
NARROW = 10
SETTLED_S = 1.0  # after which a changed rule holds everywhere
SPARE = 2.0  # times the jobs that the limit lets through are enqueued


def table(asked: Asked, more: str = "", *, requests: int | None = REQUESTS, cost: float | None = COST) -> str:
    """A table of limits.toml."""
    lines = [f"requests = {requests}"] if requests else []
    lines += [f"cost = {cost}"] if cost else []
    return "\n".join([*lines, f'window = "{asked.window_s:g}s"', more])


def enough(asked: Asked, cost: tuple[float, float]) -> int:
    """How many jobs the limit does not let through in the time."""
    a_window = min(REQUESTS, COST / (sum(cost) / 2))
    return int(SPARE * a_window * (asked.seconds / asked.window_s + 1)) + 20


async def loaded(here: Ground, seconds: float) -> tuple[list[Call], float, float]:
    """The calls of so many seconds from the first one on, and when these began and ended."""
    while not (calls := here.log().of()):
        await asyncio.sleep(0.05)
    begun = calls[0].at
    await asyncio.sleep(max(0.0, begun + seconds - time.monotonic()))
    return here.log().of(), begun, begun + seconds


def never_above(asked: Asked, calls: Sequence[Call], name: str = "") -> list[Finding]:
    most, highest = judge.worst(calls, asked.window_s)
    return [
        Finding(f"{name}requests in the worst window", most, at_most=REQUESTS),
        Finding(f"{name}cost in the worst window", highest, at_most=COST + 1e-6),
    ]


async def _binds(
    asked: Asked, cost: tuple[float, float], use: float, *faults: str, servers: int = 1
) -> list[Finding]:  # fmt: skip
    async with ground(asked, Setting(tables=[table(asked)], servers=servers)) as here:
        await here.fill(enough(asked, cost), cost=cost, takes_s=TAKES_S)
        while not here.log().of():
            await asyncio.sleep(0.05)
        here.harm(*faults)
        calls, begun, end = await loaded(here, asked.seconds)
        elections = spans(here.faults, "leader-kill")
        since = begun + asked.window_s
        use_ = judge.used(calls, asked.window_s, since, end, requests=REQUESTS, cost=COST, without=elections)
        return [
            *never_above(asked, calls),
            Finding("use of what binds", use_, at_least=use),
            Finding("faults", len(here.faults), at_least=1 if faults else 0),
            Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
            Finding("calls", len(calls)),
        ]


async def requests(asked: Asked) -> list[Finding]:
    """Costs of 20 to 180: requests bind."""
    return await _binds(asked, LOW, 0.95)


async def costs(asked: Asked) -> list[Finding]:
    """Costs of 50 to 1,500: cost binds."""
    return await _binds(asked, HIGH, 0.90)


async def requests_killed(asked: Asked) -> list[Finding]:
    """Requests bind, and a worker is killed every 2 s."""
    return await _binds(asked, LOW, 0.85, "worker-kill:2")


async def costs_killed(asked: Asked) -> list[Finding]:
    """Cost binds, and a worker is killed every 2 s."""
    return await _binds(asked, HIGH, 0.85, "worker-kill:2")


async def leader_killed(asked: Asked) -> list[Finding]:
    """Three servers, the leader of jobs or of limits killed once a minute: use outside of these times."""
    period_s = min(60.0, asked.seconds / 3)
    return await _binds(asked, LOW, 0.8, f"leader-kill:{period_s:g}", servers=3)


async def _tenants(asked: Asked, tenants: Sequence[str]) -> list[Finding]:
    tables = [table(asked), table(asked, 'tenant = "narrow"', requests=NARROW, cost=None)]
    skews_s = (1.0, -1.0, 1.0, -1.0)
    weights = {"heavy": 2, "light": 1}
    setting = Setting(tables=tables, weights=weights, tenants=tenants, skews_s=skews_s, slots=50)
    async with ground(asked, setting) as here:
        count = enough(asked, LOW)
        for tenant in ("heavy", "light", "narrow"):
            await here.fill(count, tenant=tenant, cost=LOW, takes_s=TAKES_S)
        calls, begun, end = await loaded(here, asked.seconds)
        since = begun + asked.window_s
        use = judge.used(calls, asked.window_s, since, end, requests=REQUESTS, cost=COST)
        both = [each for each in calls if each.tenant != "narrow"]
        narrow = [each for each in calls if each.tenant == "narrow"]
        narrow_use = judge.used(narrow, asked.window_s, since, end, requests=NARROW)
        by_requests = judge.shares(both, since, end, by_cost=False).get("heavy", 0.0)
        by_cost = judge.shares(both, since, end, by_cost=True).get("heavy", 0.0)
        return [
            *never_above(asked, calls),
            Finding("requests of the narrow tenant", judge.worst(narrow, asked.window_s)[0], at_most=NARROW),
            Finding("use of what binds", use, at_least=0.9),
            Finding("use of the narrow limit", narrow_use, at_least=0.9),
            Finding("share of the heavy one, by requests", by_requests, at_least=0.6, at_most=0.7334),
            Finding("share of the heavy one, by cost", by_cost),
            Finding("calls", len(calls)),
        ]  # fmt: skip


async def tenants_even(asked: Asked) -> list[Finding]:
    """Two tenants 2:1 on all workers, one with a narrow limit beside them; workers' clocks 2 s apart."""
    return await _tenants(asked, ("",))


async def tenants_uneven(asked: Asked) -> list[Finding]:
    """The same, but the heavy tenant is served by one worker, the light one by three."""
    return await _tenants(asked, ("heavy,narrow", "light", "light", "light,narrow"))


async def small(asked: Asked) -> list[Finding]:
    """A limit of 3 requests."""
    setting = Setting(tables=[table(asked, requests=3, cost=None)])
    async with ground(asked, setting) as here:
        await here.fill(int(30 * (asked.seconds / asked.window_s + 1)), takes_s=TAKES_S)
        calls, begun, end = await loaded(here, asked.seconds)
        use = judge.used(calls, asked.window_s, begun + asked.window_s, end, requests=3)
        return [
            Finding("requests in the worst window", judge.worst(calls, asked.window_s)[0], at_most=3),
            Finding("use of the limit", use, at_least=0.7),
        ]


async def costs_large(asked: Asked) -> list[Finding]:
    """A limit of cost that 1,000 calls a second use, which are reserved many at once."""
    limit = 100_000.0 * asked.window_s
    seconds = min(asked.seconds, 30.0)
    async with ground(asked, Setting(tables=[table(asked, requests=None, cost=limit)], slots=50)) as here:
        await here.fill(int(SPARE * 1_000 * (seconds + asked.window_s)), cost=LOW, takes_s=(0.0, 0.05))
        calls, begun, end = await loaded(here, seconds)
        since = begun + asked.window_s
        return [
            Finding("cost in the worst window", judge.worst(calls, asked.window_s)[1], at_most=limit + 1e-6),
            Finding("use of the limit", judge.used(calls, asked.window_s, since, end, cost=limit), at_least=0.9),
            Finding("calls a second", judge.rate(calls, begun, end)),
        ]


async def large(asked: Asked) -> list[Finding]:
    """A limit of 100,000 requests a minute, and as many calls as the workers make."""
    limit = int(100_000 * asked.window_s / 60)
    seconds = min(asked.seconds, 20.0)
    async with ground(asked, Setting(tables=[table(asked, requests=limit, cost=None)], slots=50)) as here:
        await here.fill(min(90_000, int(2_000 * seconds)))
        calls, begun, end = await loaded(here, seconds)
        most, _ = judge.worst(calls, asked.window_s)
        return [
            Finding("requests in the worst window", most, at_most=limit),
            Finding("calls a second", judge.rate(calls, begun, end)),
        ]


async def changed(asked: Asked) -> list[Finding]:
    """A limit of 100 is lowered to 20, raised to 150 and lowered to 50, under load: the provider never sees more than
    the rule that holds since a second ago.
    """
    async with ground(asked, Setting(tables=[table(asked, cost=None)])) as here:
        await here.fill(enough(asked, LOW) * 2, takes_s=TAKES_S)
        await loaded(here, asked.window_s)
        findings, rules = [], [(REQUESTS, -float("inf"), 0.0)]
        for limit in (20, 150, 50):
            before = time.monotonic()
            await here.client.set_limit(app.FAMILY, requests=limit, window=asked.window_s)
            rules.append((limit, before, time.monotonic()))
            await asyncio.sleep(2 * asked.window_s)
        ends = [*(returned + SETTLED_S for _, _, returned in rules[1:]), time.monotonic()]
        calls = here.log().of()
        for (limit, before, returned), end, following in zip(rules, ends, [*rules[1:], None], strict=True):
            since = before if returned and limit > REQUESTS else returned + SETTLED_S
            until = min(end, following[1]) if following and following[0] > limit else end
            most, _ = judge.worst(calls, asked.window_s, since if returned else -float("inf"), until)
            findings.append(Finding(f"requests in the worst window, limit {limit}", most, at_most=limit))
        ended = time.monotonic()
        last = judge.used(calls, asked.window_s, ended - asked.window_s / 2, ended, requests=50)
        return [*findings, Finding("use in the last windows", last, at_least=0.7)]
