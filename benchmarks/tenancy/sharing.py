"""How the starts of busy tenants are shared out, and how soon single jobs start beside them."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import math
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from ..scenarios import Finding, told
from . import app
from .bench import HEAVY, Asked, Entry, Ground, ground

SINGLE = "single"
SETTLE_S = 3.0  # from the first start to the first single job: at first lanes are opened
TAIL_S = 2.0  # in which the last single job may start
GAP_S = 5.0
START_MS = 1_500.0
WITHIN = 0.1


@asynccontextmanager
async def _backlog(asked: Asked) -> AsyncIterator[Path]:
    """A server's directory with the backlog of all tenants, kept where that was asked."""
    with tempfile.TemporaryDirectory(prefix="aiqueue-scenario-") as directory:
        stored = (asked.stored or Path(directory)) / f"{asked.tenants}x{asked.jobs}"
        if not stored.exists():
            async with ground(asked) as here:
                with told(asked.say, f"{asked.tenants * asked.jobs:,} jobs enqueued"):
                    await here.fill(asked.tenants, asked.jobs)
                here.keep_store(stored)
        yield stored


async def _singles(here: Ground, first: int, count: int) -> None:
    """Each second a job of another tenant, numbered from `first` in steps of two, and a high one of a busy tenant."""
    begun = time.monotonic()
    for number in range(count):
        await asyncio.sleep(max(0.0, begun + number - time.monotonic()))
        place = first + 2 * number
        await here.client.enqueue(app.Task(number=place, sent=time.monotonic()), tenant=SINGLE)
        busy = f"t{here.asked.tenants - 1}"
        await here.client.enqueue(app.Task(number=place + 1, sent=time.monotonic()), tenant=busy, priority="high")


def longest_gap(times: Iterable[float], since: float, until: float) -> float:
    """The longest time without any of the sorted times, between two bounds."""
    within = [each for each in times if since <= each <= until]
    return max(later - earlier for earlier, later in itertools.pairwise([since, *within, until]))


def p99(values: Iterable[float]) -> float:
    """By nearest rank: of less than a hundred, the largest."""
    ranked = sorted(values)
    return ranked[math.ceil(0.99 * len(ranked)) - 1]


def judge(begun: Sequence[Entry], tenants: int, jobs: int, seconds: float, *, demanding: bool = True) -> list[Finding]:
    """What the first `seconds` from the first start look like. The first half of the tenants is heavy; so many jobs of
    each were sent before.
    """
    since = min(each.at for each in begun)
    until = since + seconds
    starts: dict[int, list[float]] = defaultdict(list)
    for each in sorted(begun, key=lambda each: each.at):
        if each.sent < since and each.at <= until:
            starts[each.number % tenants].append(each.at)
    counts = [len(starts[n]) for n in range(tenants)]
    share = sum(counts[: tenants // 2]) / sum(counts)
    gaps = [longest_gap(starts[n], since, until) for n in range(tenants)]
    bounds = {"at_least": 1 - WITHIN, "at_most": 1 + WITHIN} if demanding else {}
    return [
        Finding("starts a second", sum(counts) / seconds),
        Finding("heavy tenants' share of starts, of their due", share / HEAVY * (HEAVY + 1), **bounds),
        Finding("light tenants' share of starts, of their due", (1 - share) * (HEAVY + 1), **bounds),
        Finding("starts of a heavy tenant, fewest", min(counts[: tenants // 2])),
        Finding("starts of a heavy tenant, most", max(counts[: tenants // 2]), at_most=jobs - 1),
        Finding("starts of a light tenant, fewest", min(counts[tenants // 2 :])),
        Finding("starts of a light tenant, most", max(counts[tenants // 2 :])),
        Finding("longest without a start, the median tenant's, s", sorted(gaps)[tenants // 2]),
        Finding("longest without a start, s", max(gaps), at_most=GAP_S if demanding else None),
        Finding("tenants that were longer than that without one", sum(each > GAP_S for each in gaps)),
    ]


async def _shared(asked: Asked, stored: Path, handler_ms: float, *, former: bool) -> list[Finding]:
    tenants = asked.tenants
    async with ground(
        asked, stored=stored, heavy=tenants // 2, handler_s=handler_ms / 1000, former=(former,)
    ) as here:  # fmt: skip
        first, count = tenants * asked.jobs, int(asked.seconds - SETTLE_S - TAIL_S)
        here.workers.start()
        await here.begun(1)
        begun = time.monotonic()
        await asyncio.sleep(SETTLE_S)
        await _singles(here, first, count)
        await asyncio.sleep(max(0.0, begun + asked.seconds - time.monotonic()))
        entries = list(here.read())
        end = time.monotonic()
    waits: list[list[float]] = [[], []]  # of another tenant's, and of the high ones
    for each in entries:
        if each.number >= first:
            waits[(each.number - first) % 2].append(1000 * (each.at - each.sent))
    found = judge(entries, tenants, asked.jobs, asked.seconds, demanding=not former)
    for name, waited in zip(("a job a second", "a high job a second of a busy tenant"), waits, strict=True):
        missing = [1000 * (end - begun - SETTLE_S - n) for n in range(len(waited), count)]  # not begun at the end
        found += [
            Finding(f"{name}, jobs", count),
            Finding(f"{name}, start p50, ms", sorted([*waited, *missing])[count // 2]),
            Finding(f"{name}, start p99, ms", p99([*waited, *missing]), at_most=None if former else START_MS),
        ]
    return found


async def backlog(asked: Asked) -> list[Finding]:
    """1,000 tenants with 2,000 jobs each, weights 3:1: shares and pauses over 30 s, and single jobs beside them."""
    found = []
    async with _backlog(asked) as stored:
        for handler_ms in asked.handlers_ms:
            for former in [False] if asked.former is None else [False, True]:
                side = f"{handler_ms:g} ms{', former' if former else ''}: "
                told_of = await _shared(asked, stored, handler_ms, former=former)
                found += [dataclasses.replace(each, name=side + each.name) for each in told_of]
    return found
