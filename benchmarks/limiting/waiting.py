"""Scenarios of jobs that wait: behind an exhausted key, and behind one that the provider refuses."""

from __future__ import annotations

import asyncio
import time

from aiqueue import subjects

from ..scenarios import Finding, told
from . import app, judge
from .bench import Asked, Ground, Setting, ground

OTHER_RATE, OTHER_S = 20.0, 15.0
QUIET_S = 10.0
RETRY_AFTER_S = 20.0
FREE = 'key = "{key}"\nrequests = 1_000_000'


async def waiting(asked: Asked) -> list[Finding]:
    """10,000 wait on an exhausted key while another key of their tenant is called."""
    tables = ['key = "full"\nrequests = 3\nwindow = "1h"', FREE.format(key="other")]
    async with ground(asked, Setting(tables=tables, has_cost=False)) as here:
        await here.called(await here.pace(OTHER_RATE, 3, key="other"), 30)  # lanes are made, code is warm
        idle = await here.pace(OTHER_RATE, OTHER_S, key="other")
        await here.called(idle, 30)
        unused = await _cpu(here)
        with told(asked.say, f"{asked.jobs:,} enqueued"):
            full = await here.fill(asked.jobs, key="full")
        with told(asked.say, "all wait in their lane"):
            await _settled(here, asked.jobs)
        before = await _deliveries(here, "full")
        cpu = await _cpu(here)
        busy = await here.pace(OTHER_RATE, OTHER_S, key="other")
        await here.called(busy, 30)
        after = await _deliveries(here, "full")
        calls = here.log().of(key="other")
        first, last = (judge.p95(judge.waits(each for each in calls if each.number in span)) for span in (idle, busy))
        ran = len(here.log().of(key="full"))
        findings = [
            Finding("p95 of the other key when idle, ms", first),
            Finding("p95 of the other key beside those that wait, ms", last),
            Finding("ratio of the two", last / first, at_most=1.5),
            Finding("calls of the exhausted key", ran, at_most=3),
            Finding("deliveries of those that wait, until all waited", before - ran, at_most=asked.workers),
            Finding("deliveries of those that wait, from then on", after - before, at_most=0),
            Finding("CPU of the busiest worker meanwhile, % of a core", _most(cpu, "worker"), at_most=2.0),
            Finding("CPU of the server meanwhile, % of a core", _most(cpu, "server"), at_most=2.0),
            Finding("CPU of the busiest worker before", _most(unused, "worker")),
            Finding("CPU of the server before", _most(unused, "server")),
        ]
        with told(asked.say, "the limit is lifted, and all run"):
            await here.client.set_limit(app.FAMILY, "full", requests=1_000_000)
            await here.called(full, 60 + asked.jobs / 100)
        missing, doubled = judge.accounts([c for c in here.log().of(key="full") if c.number in full], 0)
        return [*findings, Finding("jobs that ran twice when the limit was lifted", missing + doubled, at_most=0)]


async def _settled(here: Ground, jobs: int) -> None:
    """Wait until nothing moves any more: the jobs wait in their lane, or, without limits, have all run."""
    former, since = -1, time.monotonic()
    while time.monotonic() - since < 2.0:
        found = await here.in_key_lanes("full") + len(here.log().of(key="full"))
        if found != former:
            former, since = found, time.monotonic()
        await asyncio.sleep(0.2)
    if former != jobs:
        here.asked.say(f"  of {jobs:,} jobs {former:,} have run or wait in the lane of their key")


async def _deliveries(here: Ground, key: str) -> int:
    """How many deliveries the lanes of a key have had."""
    ending = f"={subjects.hashed(key)}"
    return sum(count for name, (count, _) in (await here.deliveries()).items() if name.endswith(ending))


async def _cpu(here: Ground) -> dict[str, float]:
    """Percent of a core that each process has used, over QUIET_S in which nobody calls."""
    before = here.cpu()
    await asyncio.sleep(QUIET_S)
    return {name: (used - before[name]) / QUIET_S * 100 for name, used in here.cpu().items() if name in before}


def _most(cpu: dict[str, float], what: str) -> float:
    return max(used for name, used in cpu.items() if name.startswith(what))


async def refused(asked: Asked) -> list[Finding]:
    """A 429 with Retry-After 20 on one key, under 4 times 50 slots."""
    tables = [FREE.format(key="busy"), FREE.format(key="other")]
    async with ground(asked, Setting(tables=tables, has_cost=False, slots=50)) as here:
        await here.called(await here.pace(OTHER_RATE, 3, key="other"), 30)
        idle = await here.pace(OTHER_RATE, OTHER_S, key="other")
        await here.called(idle, 30)
        busy = await here.fill(6_000, key="busy", takes_s=(0.0, 0.8))
        await asyncio.sleep(3)
        await here.refuse("busy", RETRY_AFTER_S)
        other = await here.pace(OTHER_RATE, RETRY_AFTER_S, key="other")
        await here.called(other, 30)
        await here.called(busy, 90)
        log = here.log()
        calls = [each for each in log.calls if each.key == "busy"]
        found = judge.pause(calls, RETRY_AFTER_S)
        begun = next(each.at for each in calls if each.status == 429)
        first = judge.p95(judge.waits(c for c in log.of(key="other") if c.number in idle))
        last = judge.p95(judge.waits(log.of(key="other"), begun, begun + RETRY_AFTER_S))
        missing, doubled = judge.accounts((c for c in log.of() if c.number in busy), 0)
        return [
            Finding("calls that were refused", found.refused),
            Finding("last call after the first 429, ms", found.late_ms, at_most=50),
            Finding("first call after the end of the pause, s", found.resumed_s, at_most=1.0),
            Finding("p95 of the other key when idle, ms", first),
            Finding("p95 of the other key in the pause, ms", last),
            Finding("ratio of the two", last / first, at_most=1.2),
            Finding("jobs that ran twice", missing + doubled, at_most=0),
        ]


async def paused_long(asked: Asked) -> list[Finding]:
    """A pause of 12 minutes, in which consumers expire: the counts of attempts are kept."""
    setting = Setting(tables=[FREE.format(key="m")], has_cost=False, inactive_s=max(1.0, asked.pause_s / 2.4))
    async with ground(asked, setting) as here:
        await here.refuse("m", asked.pause_s)
        ends_after = time.monotonic() + asked.pause_s  # the pause begins with the first call
        numbers = await here.fill(asked.jobs, takes_s=(0.0, 0.2))
        await asyncio.sleep(5)
        before = await _deliveries(here, "m")
        await asyncio.sleep(ends_after - 1 - time.monotonic())
        after = await _deliveries(here, "m")
        await here.called(numbers, 60 + asked.jobs / 20)
        log = here.log()
        refused_ = {each.number for each in log.calls if each.status == 429}
        wrong = [c for c in log.of() if c.attempt != 1 + (c.number in refused_)]
        missing, doubled = judge.accounts(log.of(), len(numbers))
        pause = judge.pause(log.calls, asked.pause_s)
        return [
            Finding("jobs that were refused", len(refused_), at_least=1),
            Finding("deliveries in the pause", max(0, after - before), at_most=0),
            Finding("jobs with a wrong count of attempts", len(wrong), at_most=0),
            Finding("first call after the end of the pause, s", pause.resumed_s, at_most=1.0),
            Finding("jobs lost or doubled", missing + doubled, at_most=0),
            Finding("jobs left", await here.left(), at_most=0),
        ]
