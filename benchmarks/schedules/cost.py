"""Scenarios of what schedules cost: how late they are, and what many of them cost a worker."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from aiqueue.schedules import Every

from ..common import cpu_s
from ..scenarios import Finding, told
from .app import DONE
from .bench import Asked, Ground, ground, judge, percentiles

PHASES = [round(0.0371 + n * 0.1093, 4) for n in range(9)]
LATENESS_S = 30.0
IDLE_S = 60.0
SETTLE_S = 45.0  # after the start of a worker: it has read all documents by then
AT_ONCE = 64


async def lateness(asked: Asked) -> list[Finding]:
    """Ticks at odd phases, beside APScheduler alone in the same time."""
    async with ground(asked, workers=1) as here:
        start = int(time.time()) + 4
        end = start + min(asked.seconds, LATENESS_S)
        for n, phase in enumerate(PHASES):
            await here.add(f"s{n}", Every("1s", starting=start + phase, end=end + phase), tenant=DONE)
        alone = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.schedules.alone",
            str(end),
            *map(str, PHASES),
            stdout=asyncio.subprocess.PIPE,
        )
        said, _ = await alone.communicate()
        await here.ended(end + 1)
        fired = await here.fired()
        theirs = sorted(1000 * each for each in json.loads(said))
        handlers = sorted(1000 * (each.started_at - each.tick) for each in fired if each.started_at)
        return [
            *judge(here, fired),
            *percentiles("", sorted(1000 * each.late_s for each in fired), p99=10),
            *percentiles(" at the handler", handlers),
            *percentiles(" with APScheduler alone", theirs),
        ]


async def _worker_start(here: Ground) -> float:
    here.workers.kill_all()
    begun = time.monotonic()
    await here.start_workers()
    return time.monotonic() - begun


async def _idle(here: Ground) -> tuple[float, float]:
    """Return the use of a core by a worker and by the server, in %."""
    await asyncio.sleep(SETTLE_S)
    pids = [here.workers.alive[0].pid, here.servers[0].pid or 0]
    before, begun = [cpu_s(each) for each in pids], time.monotonic()
    await asyncio.sleep(IDLE_S)
    took_s = time.monotonic() - begun
    worker, server = (100 * (cpu_s(pid) - used) / took_s for pid, used in zip(pids, before, strict=True))
    return worker, server


async def ten_thousand(asked: Asked) -> list[Finding]:
    """10,000 schedules are stored: a worker's start, and an idle worker, beside the same without."""
    async with ground(asked, workers=1) as here:
        plain_s = min([await _worker_start(here) for _ in range(3)])
        plain = await _idle(here)
        far = time.time() + 40 * 86_400
        with told(asked.say, f"{asked.stored:,} schedules added"):
            for at in range(0, asked.stored, AT_ONCE):
                numbers = range(at, min(at + AT_ONCE, asked.stored))
                await asyncio.gather(*(here.add(f"s{n}", Every("24h", starting=far)) for n in numbers))
        many_s = min([await _worker_start(here) for _ in range(3)])
        many = await _idle(here)
        return [
            Finding("schedules", len(await here.schedules.list()), at_least=asked.stored),
            Finding("start of a worker without schedules, s", plain_s),
            Finding("start with them, s", many_s, at_most=plain_s + 1),
            Finding("idle worker without, % of a core", plain[0]),
            Finding("idle worker with them", many[0], at_most=plain[0] + 1),
            Finding("idle server without", plain[1]),
            Finding("idle server with them", many[1]),
        ]
