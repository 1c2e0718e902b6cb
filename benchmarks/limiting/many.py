"""Scenarios of many jobs under a rule that comes and goes, and of many keys."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from ..scenarios import Finding, told
from . import app, judge
from .bench import Asked, Ground, Setting, ground
from .rates import SETTLED_S

KEYS, BUSY, OF_A_KEY, MANY = 1_000, 100, 5, 10_000
OTHER_RATE, OTHER_S = 20.0, 15.0
CYCLES = 3
FREE_JOBS = 6_000  # more than 40 slots run in OTHER_S
TAKES_S = 0.1, 0.1


async def rule_changed(asked: Asked) -> list[Finding]:
    """A rule added and removed three times over 10,000 waiting jobs, one worker of a former version if there is one."""
    setting = Setting(slots=10, has_cost=False, former=1)
    limit = 20
    async with ground(asked, setting, working=False) as here:
        numbers = await here.fill(asked.jobs, takes_s=(0.0, 0.2))
        await here.start_workers()
        await asyncio.sleep(1)
        most, fewest, count = 0, asked.jobs, len(numbers)
        for _ in range(CYCLES):
            if asked.limits:
                await here.client.set_limit(app.FAMILY, "m", requests=limit, window=asked.window_s)
            since = time.monotonic() + SETTLED_S
            count += len(await here.fill(100, takes_s=(0.0, 0.2)))
            await asyncio.sleep(2 * asked.window_s)
            # the rule knows nothing of the calls that came before it
            under = [each for each in here.log().of() if each.at > since]
            most, fewest = max(most, judge.worst(under, asked.window_s)[0]), min(fewest, len(under))
            await here.client.unset_limit(app.FAMILY, "m")
            await asyncio.sleep(1)
        with told(asked.say, "without the rule all run"):
            await here.called(range(count), 60 + count / 20)
        left = await here.left()
        missing, doubled = judge.accounts(here.log().of(), count)
        findings = [
            Finding("jobs lost", missing, at_most=0),
            Finding("jobs doubled", doubled, at_most=0),
            Finding("jobs left in the stream", left, at_most=0),
            Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
        ]
        if asked.former is None:
            findings.append(Finding("requests in the worst window under the rule", most, at_most=limit))
            findings.append(Finding("calls under the rule, of the time with fewest", fewest, at_least=1))
        return findings


async def _beside(asked: Asked, here: Ground, keys: Sequence[str], within_s: float) -> list[Finding]:
    """Another tenant's calls when idle, beside jobs of one key without a rule, and beside jobs of these keys, all of
    tenant a.
    """
    await here.called(await here.pace(OTHER_RATE, 3, key="other", tenant="b"), 30)
    found: dict[str, range] = {}
    numbers = range(0)
    phases: list[tuple[str, Sequence[str], int]] = [
        ("when idle", ["free"], 0),
        ("beside a key without a rule", ["free"], FREE_JOBS),
        ("beside many keys", keys, len(keys)),
    ]
    for beside, key, count in phases:
        numbers = await here.fill(count, key=key, takes_s=TAKES_S)
        begun = time.monotonic()
        found[beside] = await here.pace(OTHER_RATE, OTHER_S, key="other", tenant="b")
        await here.called(found[beside], 60)
        with told(asked.say, f"{count:,} jobs, {beside}"):
            await here.called(numbers, within_s)
    log = here.log()
    p95 = {
        name: judge.p95(judge.waits(c for c in log.of(tenant="b") if c.number in span)) for name, span in found.items()
    }
    done = max(each.at for each in log.of(tenant="a"))
    above = judge.above((c for c in log.of(tenant="a") if c.key != "free"), asked.window_s, OF_A_KEY)
    return [
        *(Finding(f"p95 of the other tenant {name}, ms", each) for name, each in p95.items()),
        Finding("ratio of the last two", p95["beside many keys"] / p95["beside a key without a rule"], at_most=1.5),
        Finding("keys above their limit", len(above), at_most=0),
        Finding("seconds until all keys had run", done - begun),
        Finding("lanes", len(await here.deliveries())),
        Finding("jobs doubled", judge.accounts(log.of(), 0)[1], at_most=0),
        Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
    ]


async def thousand_keys(asked: Asked) -> list[Finding]:
    """1,000 keys with rules of their own, 100 of them with four times what a window allows."""
    tables = [f'key = "k{n}"\nrequests = {OF_A_KEY}\nwindow = "{asked.window_s:g}s"' for n in range(KEYS)]
    async with ground(asked, Setting(tables=tables, has_cost=False)) as here:
        keys = [f"k{n}" for n in range(KEYS)] + [f"k{n}" for n in range(BUSY)] * (4 * OF_A_KEY - 1)
        return await _beside(asked, here, keys, 60 + 8 * asked.window_s)


async def ten_thousand_keys(asked: Asked) -> list[Finding]:
    """A tenant sends 10,000 different keys, each with a limit of its own by one pattern."""
    tables = [f'key = "k*"\nrequests = {OF_A_KEY}\nwindow = "{asked.window_s:g}s"']
    async with ground(asked, Setting(tables=tables, has_cost=False)) as here:
        return await _beside(asked, here, [f"k{n}" for n in range(MANY)], 120)
