"""Whether tenants whose jobs run long, or whose lanes may have no more of them in flight, hold up another one."""

from __future__ import annotations

import asyncio
import time

from ..scenarios import Finding
from . import app
from .bench import Asked, Ground, ground

HELD, NEW = 64, 20
LONG_S = 60.0
START_S = 1.5
BLOCKED_JOBS = 20
WAIT_S = 10.0
STEP_S = 0.02
FIRST = 1_000_000  # the number of a new tenant's first job


async def _newcomers(here: Ground) -> Finding:
    """Jobs of tenants that were not there before, one after the other."""
    waits: list[float] = []
    for number in range(FIRST, FIRST + NEW):
        task = app.Task(number=number, sent=time.monotonic())
        await here.client.enqueue(task, tenant=f"new{number}")
        waits.append(await _wait_s(here, task))
        if waits[-1] > WAIT_S:
            break
    return Finding(f"a new tenant's job starts after, the longest of {NEW}, s", max(waits), at_most=START_S)


async def _wait_s(here: Ground, task: app.Task) -> float:
    """How long a job waited for its start; more than WAIT_S where it has not begun by then."""
    while time.monotonic() - task.sent <= WAIT_S:
        for each in here.read():
            if each.number == task.number:
                return each.at - task.sent
        await asyncio.sleep(STEP_S)
    return time.monotonic() - task.sent


async def held_later(asked: Asked) -> list[Finding]:
    """64 tenants have a job of 60 s, 36 slots are free, and a job of a 65th comes."""
    async with ground(asked) as here:
        await here.fill(HELD, 1, takes_s=LONG_S)
        here.workers.start()
        await here.begun(HELD)
        return [await _newcomers(here)]


async def held_before(asked: Asked) -> list[Finding]:
    """64 tenants have a job of 60 s, and the jobs of 20 others are there before the worker."""
    async with ground(asked) as here:
        await here.fill(HELD + NEW, 1, takes_s=LONG_S)
        here.workers.start()
        await here.begun(HELD + NEW, within_s=WAIT_S)
        times = [each.at for each in here.read()]
        return [Finding("the last of 84 starts after the first, s", max(times) - min(times), at_most=START_S)]


async def held_full(asked: Asked) -> list[Finding]:
    """64 tenants have 20 jobs of 60 s each, of which one may be in flight, and a job of a 65th comes."""
    async with ground(asked, at_once=(HELD, 1)) as here:
        await here.fill(HELD, BLOCKED_JOBS, takes_s=LONG_S)
        here.workers.start()
        await here.begun(HELD)
        held = time.monotonic() - min(each.at for each in here.read())
        return [Finding("the last of their first jobs starts after the first, s", held), await _newcomers(here)]
