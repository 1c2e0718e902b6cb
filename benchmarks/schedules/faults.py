"""Scenarios in which workers and servers die, are away, or have wrong clocks."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from aiqueue.schedules import Every
from aiqueue.schedules.ticker import ACK_WAIT_S
from aiqueue.schedules.ticks import EARLY_S

from ..common import until
from ..scenarios import Finding
from .app import KEPT, POINTS
from .bench import Asked, Fired, Ground, ground, judge, judge_lateness, percentiles

LATE_MS = 1000 * (ACK_WAIT_S + 1)
AIM_S = 2.0
SPARE = 3  # workers that start while others die
ELECTION_S = 12.0  # a leader's death, the election, and what waited for it
OFTEN_S = 10.0  # between ticks where workers are away
BOUND = 5
EVERYTHING: dict[str, Any] = {"misfire": "all", "bound": 10_000}


async def _with_faults(asked: Asked, *plans: str, servers: int = 1) -> list[Finding]:
    async with ground(asked, servers=servers) as here:
        end = await here.add_many(asked.seconds, **EVERYTHING)
        here.harm(*plans)
        await asyncio.sleep(max(0.0, end - time.time()))
        await here.calm()
        await here.start_workers()
        await here.ended(end)
        fired = await here.fired()
        away = [each for each in here.faults if each.kind != "worker-kill"]
        kinds = {each.kind for each in away}
        return [
            *judge(here, fired),
            Finding("worker kills", len(here.faults) - len(away), at_least=1),
            *([Finding("server kills", len(away), at_least=2)] if servers > 1 or len(plans) > 1 else []),
            *judge_lateness(fired, here.faults, at_most_ms=LATE_MS, margin_s=ELECTION_S, kinds=sorted(kinds)),
        ]


async def kills(asked: Asked) -> list[Finding]:
    """Policy all, and a worker is killed -9 every 10 s."""
    return await _with_faults(asked, "worker-kill:10")


async def server(asked: Asked) -> list[Finding]:
    """The same, and the only server is killed -9 four times."""
    return await _with_faults(asked, "worker-kill:10", f"server-kill:{asked.seconds / 4.6:g}")


async def cluster(asked: Asked) -> list[Finding]:
    """The same on three servers, where the leader of ticks, documents or jobs is killed -9 three times."""
    return await _with_faults(asked, "worker-kill:10", f"leader-kill:{asked.seconds / 3.6:g}", servers=3)


async def kills_aimed(asked: Asked) -> list[Finding]:
    """The worker that holds a tick is killed -9 every 2 s, between two of its reads and writes."""
    async with ground(asked, workers=asked.workers + SPARE) as here:
        end = await here.add_many(asked.seconds, **EVERYTHING)
        chance, killed = random.Random(asked.seed), list[float]()
        await asyncio.sleep(3)
        while time.time() < end - AIM_S:
            aimed = here.aims / chance.choice(list(POINTS))
            aimed.touch()
            killed += await _hit(here, AIM_S)
            aimed.unlink(missing_ok=True)
            await until(
                lambda: here.ready - len(killed) >= asked.workers,  # noqa: B023  (called before the next turn)
                lambda: "the workers did not start",
            )  # fmt: skip
            await asyncio.sleep(max(0.0, killed[-1] + AIM_S - time.time()) if killed else AIM_S)
        await here.ended(end)
        fired = await here.fired()
        return [
            *judge(here, fired),
            Finding("kills amid a tick", len(killed), at_least=asked.seconds / 10),
            *percentiles("", sorted(1000 * each.late_s for each in fired)),
            Finding("latest, less the ack_wait for a second kill, ms", _latest_ms(fired, killed), at_most=LATE_MS),
        ]


def _latest_ms(fired: Sequence[Fired], killed: Sequence[float]) -> float:
    """Return how late a tick was at most, without what a second kill costs: a tick of two victims waits twice."""

    def again(each: Fired) -> int:
        return max(0, sum(each.tick - EARLY_S < at < each.stored_at for at in killed) - 1)

    return max(1000 * (each.late_s - ACK_WAIT_S * again(each)) for each in fired)


async def _hit(here: Ground, within_s: float) -> list[float]:
    """Wait for a worker to die, and start another one. Return when some have died."""
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        dead = [each for each in here.workers.alive if each.code is not None]
        if dead:
            died = [time.time()] * len(dead)
            for each in dead:
                here.workers.alive.remove(each)
            here.workers.start()
            return died
        await asyncio.sleep(0.02)
    return []


async def down(asked: Asked) -> list[Finding]:
    """All workers are away for 2 minutes: what each policy does then."""
    async with ground(asked) as here:
        start = int(time.time()) + 3.0
        policies: dict[str, dict[str, Any]] = {
            "skip": {"misfire": "skip"}, "once": {"misfire": "once"}, "all": {"misfire": "all", "bound": BOUND},
        }  # fmt: skip
        for name, policy in policies.items():
            await here.add(name, Every(OFTEN_S, starting=start), **policy)
        await asyncio.sleep(start + 2 * OFTEN_S + 2 - time.time())
        here.workers.kill_all()
        away_at = time.time()
        await asyncio.sleep(asked.away_s)
        await here.start_workers()
        await asyncio.sleep(3 * OFTEN_S)
        fired, found = await here.fired(), []
        for name in policies:
            missed = (await here.schedules.get(KEPT, name)).missed
            since, last = (missed.from_ms / 1000, missed.to_ms / 1000) if missed else (0.0, 0.0)
            ticks = [each.tick for each in fired if each.schedule == name]
            late = [each for each in ticks if since <= each <= last]
            wanted = {"skip": 0, "once": 1, "all": BOUND}[name]
            found += [
                Finding(f"{name}: first missed tick, s after the workers' end", since - away_at, at_most=OFTEN_S),
                Finding(f"{name}: missed ticks, as it says", missed.ticks if missed else 0,
                        at_least=asked.away_s // OFTEN_S),
                Finding(f"{name}: jobs of these", len(late), at_least=wanted, at_most=wanted),
                Finding(f"{name}: jobs before and after", len(ticks) - len(late), at_least=5),
                Finding(f"{name}: jobs beside the first of a tick", len(ticks) - len(set(ticks)), at_most=0),
            ]  # fmt: skip
        return found


async def skew(asked: Asked) -> list[Finding]:
    """A worker's clock is an hour ahead, and another one's an hour behind."""
    async with ground(asked, skews_s=(3_600.0, -3_600.0), workers=2) as here:
        end = await here.add_many(min(asked.seconds, 60.0), **EVERYTHING)
        await here.ended(end)
        fired = await here.fired()
        return [*judge(here, fired), *judge_lateness(fired, (), at_most_ms=LATE_MS)]
