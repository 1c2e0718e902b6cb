"""What a part of a worker's telemetry costs a job, measured in slices of one drain of no-op jobs.

One worker drains one backlog in one run. After each slice of jobs the worker goes over to the next side: with counting
or without, with the runner that a traced client has or with a plain one. Each side is what a worker of that
configuration runs. A block has each side twice, in a random order and then in the reverse of it, so that whatever
changes slowly is the same for all. A figure is the difference to the side `OFF` of the same block; the median over the
blocks counts, with its confidence interval by bootstrap.

CPU is of this process with all its threads (the event loop's, which reads the connection too, and the span exporter's),
without the server's. The first jobs of a slice are left out: some of them began on the side before. Starting and
stopping the worker are outside. The garbage collector runs as in `aiqueue work`; a collection of old objects is in few
slices, so the median leaves it out, and the mean has it.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import aiqueue
from aiqueue.tracing import Tracing
from aiqueue.worker import Worker
from aiqueue.worker import session as sessions
from aiqueue.worker.runner import Runner
from aiqueue.worker.traced_runner import TracedRunner

from .backlog import cap_raised, pour
from .common import Noop, empty

WITHIN_S = 900.0
SLOTS = 100
GUARD = SLOTS + 50  # jobs at the begin of a slice that are not counted
WARM_UP = 1  # blocks
RESAMPLES = 2_000


@dataclass(frozen=True)
class Side:
    """What a worker does beside its jobs. `ratio`: of jobs that begin a trace; None: the client is not traced."""

    name: str
    metrics: bool = False
    ratio: float | None = None


OFF, OFF_AGAIN, METRICS = Side("off"), Side("off again"), Side("metrics", metrics=True)


class Switch:
    """Has one session go from side to side."""

    def __init__(self, client: aiqueue.Client, sides: Sequence[Side], provider: Any) -> None:
        self.session: Any = None
        self.tally: Any = None
        self._client = client
        self._tracings = {
            ratio: Tracing(provider, ratio, aiqueue.__version__)
            for ratio in {each.ratio for each in sides}
            if ratio is not None
        }
        self._runners: dict[float | None, Runner] = {}

    def make_runners(self, *arguments: Any, **options: Any) -> Runner:
        """Make the runners of all sides, in the place of `runner_class`. Returns the plain one."""
        for ratio, tracing in self._tracings.items():
            self._client.tracing = tracing
            self._runners[ratio] = TracedRunner(*arguments, **options)
        self._client.tracing = None
        self._runners[None] = Runner(*arguments, **options)
        return self._runners[None]

    def go_to(self, side: Side) -> None:
        """Have the jobs that begin from now on run on a side."""
        runner = self.session.runner = self._runners[side.ratio]
        runner._settlement._tally = runner._settlement.notes.tally if side.metrics else None


def slices_of(sides: Sequence[Side], blocks: int) -> list[Side]:
    """The sides in their order."""
    chosen = random.Random(26)
    found: list[Side] = []
    for _ in range(WARM_UP + blocks):
        order = chosen.sample(list(sides), len(sides))
        found += [*order, *reversed(order)]
    return found


async def measure(
    client: aiqueue.Client,
    sides: Sequence[Side],
    *,
    blocks: int,
    jobs: int,
    provider: Any = None,
    more_headers: Callable[[int], Mapping[str, str]] | None = None,
) -> Figures:
    """CPU of each side and block, of slices of `jobs` jobs, which are stored first. `more_headers`: see `pour`."""
    size = max(jobs, 2 * GUARD)
    order = slices_of(sides, blocks)
    await empty(client)
    async with cap_raised(client, len(order) * size):
        await pour(client, len(order) * size, more_headers)
        return await _drain(client, sides, order, size, provider)


async def _drain(
    client: aiqueue.Client, sides: Sequence[Side], order: Sequence[Side], size: int, provider: Any
) -> Figures:
    found: list[float] = []
    done, slice_at, next_at, begun = 0, 0, GUARD, 0.0
    finished = asyncio.Event()
    worker = aiqueue.Worker(concurrency=SLOTS)
    switch = Switch(client, sides, provider)

    @worker.handle(Noop, result=False)
    async def noop(job: aiqueue.Job[Noop]) -> None:
        nonlocal done, slice_at, next_at, begun
        done += 1
        if done != next_at:
            return
        now = time.process_time()
        if next_at == slice_at + GUARD:
            begun, next_at = now, slice_at + size
            return
        found.append((now - begun) / (size - GUARD) * 1e6)
        slice_at, next_at = next_at, next_at + GUARD
        if len(found) == len(order):
            finished.set()
        else:
            switch.go_to(order[len(found)])

    async with running(client, worker, switch, order[0]), asyncio.timeout(WITHIN_S):
        await finished.wait()
    return Figures(sides, order, found)


@asynccontextmanager
async def running(client: aiqueue.Client, worker: Worker[Any], switch: Switch, first: Side) -> AsyncIterator[None]:
    """Run the worker, from the first side on."""
    settings = client.settings
    client.settings = settings.with_arguments(metrics=True)
    started = sessions.Session.start

    async def start(session: sessions.Session) -> None:
        """Take the session, which has its runner before its first job."""
        switch.session = session
        await started(session)

    def make(*arguments: Any, **options: Any) -> Runner:
        runner = switch.make_runners(*arguments, **options)
        switch.session.runner = runner
        return runner

    try:
        with (
            mock.patch.object(sessions, "runner_class", return_value=make),
            mock.patch.object(sessions.Session, "start", start),
        ):
            async with worker.running(client):
                switch.go_to(first)
                yield
    finally:
        client.settings = settings


class Figures:
    """What was measured: CPU in µs a job, by side and block."""

    def __init__(self, sides: Sequence[Side], order: Sequence[Side], found: Sequence[float]) -> None:
        width = 2 * len(sides)
        self.by_side: dict[str, list[float]] = {each.name: [] for each in sides}
        for at in range(WARM_UP * width, len(found), width):
            block = list(zip(order[at : at + width], found[at : at + width], strict=True))
            for side in sides:
                self.by_side[side.name].append(statistics.fmean(us for each, us in block if each == side))

    def added(self, name: str, to: str = OFF.name) -> list[float]:
        """What a side adds to another one, by block."""
        return [more - less for more, less in zip(self.by_side[name], self.by_side[to], strict=True)]

    def share(self, name: str) -> float:
        """What a side adds, as a part of the first side: this changes less with the speed of the machine."""
        off = next(iter(self.by_side.values()))
        return statistics.median(more / less for more, less in zip(self.by_side[name], off, strict=True)) - 1

    def lines(self) -> list[str]:
        """The figures in words, the first side's absolute."""
        (first, off), *others = self.by_side.items()
        lines = [f"{first}: {statistics.median(off):.2f} µs of CPU a job, {min(off):.2f} at least"]
        return lines + [f"{name} adds {shown(self.added(name, first))}, {self.share(name):.1%}" for name, _ in others]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % confidence interval of the median, by bootstrap."""
    chosen = random.Random(26)
    medians = sorted(statistics.median(chosen.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-RESAMPLES // 40]


def shown(values: Sequence[float]) -> str:
    low, high = interval(values)
    return (
        f"{statistics.median(values):.2f} µs a job (95 %: {low:.2f} to {high:.2f}; mean {statistics.fmean(values):.2f};"
        f" {len(values)} blocks)"
    )
