"""A rolling deploy of five workers with a changed schedule, an old worker's restart amid it, and a rollback."""

from __future__ import annotations

import asyncio
import time

from aiqueue.schedules import Every, ScheduleDocument
from aiqueue.schedules.declarations import ALIVE_S
from aiqueue.schedules.declarer import EVERY_S, REFRESH_S

from ..scenarios import Finding
from .app import KEPT, VERSION, VERSIONS
from .bench import Asked, Fired, Ground, ground, judge_lateness

WORKERS = 5

OLD, NEW = VERSIONS
LATE_MS = 1_000.0
PLACE_S = 1.0  # between the end of a worker and its successor's start, and between successors
TAKEOVER_S = ALIVE_S + EVERY_S + REFRESH_S + 5  # for a rollback
WATCH_S = 0.1


class Watch:
    """Follows the schedule's document, and how many of its ticks are parked or due."""

    def __init__(self, here: Ground) -> None:
        self._here = here
        self.changes: list[tuple[float, float]] = []  # when, and to which interval
        self.chains_s = 0.0  # the longest time with more than one parked tick

    async def run(self) -> None:
        several_since: float | None = None
        while True:
            document = await self.document()
            if document is not None:
                interval = float(document.recurrence_document["interval"])
                if not self.changes or self.changes[-1][1] != interval:
                    self.changes.append((time.time(), interval))
                parked = [each for each in await self._here.schedules.ticks.list_subjects() if ".at." in each]
                if len(parked) < 2:
                    several_since = None
                else:
                    several_since = several_since or time.monotonic()
                    self.chains_s = max(self.chains_s, time.monotonic() - several_since)
            await asyncio.sleep(WATCH_S)

    async def document(self) -> ScheduleDocument | None:
        return next(iter(await self._here.schedules.list(tenant=KEPT)), None)

    async def wait_for(self, interval: float, within_s: float) -> float:
        """Return after how many seconds the schedule is of this interval."""
        begun = time.monotonic()
        while not self.changes or self.changes[-1][1] != interval:
            if time.monotonic() - begun > within_s:
                return within_s * 2
            await asyncio.sleep(WATCH_S)
        return time.monotonic() - begun


async def deploy(asked: Asked) -> list[Finding]:
    """Five workers get a new version one by one, an old one restarts amid it, and then all go back."""
    async with ground(asked, workers=WORKERS, env={VERSION: str(OLD)}) as here:
        watch = Watch(here)
        watching = asyncio.create_task(watch.run())
        try:
            found = [Finding("stored, s after the workers' start", await watch.wait_for(OLD, 10), at_most=10)]
            await asyncio.sleep(5)
            await _replace(here, 0, NEW)
            found.append(Finding("new, s after the first new worker's start", await watch.wait_for(NEW, 5), at_most=5))
            for place in (1, 2):
                await _replace(here, place, NEW)
            await _replace(here, 4, OLD)
            await asyncio.sleep(EVERY_S * 2)
            for place in (3, 4):
                await _replace(here, place, NEW)
            await asyncio.sleep(EVERY_S)
            deployed = [interval for _, interval in watch.changes]
            for place in range(WORKERS):
                await _replace(here, place, OLD)
            took_s = await watch.wait_for(OLD, TAKEOVER_S)
            found.append(Finding("old again, s after the last new worker's end", took_s, at_most=TAKEOVER_S))
            await asyncio.sleep(5)
        finally:
            watching.cancel()
            await asyncio.wait([watching])
        fired = await here.fired()
        changes = [interval for _, interval in watch.changes]
        return [
            *found,
            Finding("changes until all are new", len(deployed) - 1, at_least=1, at_most=1),
            Finding("changes with the rollback", len(changes) - 1, at_least=2, at_most=2),
            Finding("seconds with more than one parked tick", watch.chains_s, at_most=1.0),
            *judge_ticks(fired, watch.changes),
            *judge_lateness(fired, (), at_most_ms=LATE_MS),
            Finding("workers that ended by themselves", len(here.workers.surprises), at_most=0),
        ]


async def _replace(here: Ground, place: int, version: int) -> None:
    """End the worker of a place, and start one of this version there."""
    await here.replace(place, {VERSION: str(version)})
    await asyncio.sleep(PLACE_S)


def judge_ticks(fired: list[Fired], changes: list[tuple[float, float]]) -> list[Finding]:
    """Each tick of what was declared at its time has one job. Those within a second of a change may be of either."""
    ticks = [each.tick for each in fired]
    expected: set[float] = set()
    unsure: list[tuple[float, float]] = []
    ends = [at for at, _ in changes[1:]] + [max(ticks, default=0.0)]
    for (since, interval), until in zip(changes, ends, strict=True):
        unsure.append((since - 1, since + 1))
        at = Every(interval).next_after(since)
        while at is not None and at <= until:
            expected.add(at)
            at = Every(interval).next_after(at)

    def is_sure(tick: float) -> bool:
        return not any(since <= tick <= until for since, until in unsure)

    sure = {each for each in expected if is_sure(each)}
    strange = {each for each in ticks if is_sure(each)} - sure
    return [
        Finding("ticks", len(set(ticks)), at_least=10),
        Finding("ticks without a job", len(sure - set(ticks)), at_most=0),
        Finding("jobs of ticks that were not declared", len(strange), at_most=0),
        Finding("jobs beside the first of a tick", len(ticks) - len(set(ticks)), at_most=0),
    ]
