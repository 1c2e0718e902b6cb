"""Scenarios of calls in flight: how many are open at the provider, and who holds them."""

from __future__ import annotations

import time

from ..scenarios import Finding, spans
from . import judge
from .bench import Asked, Setting, ground
from .rates import loaded

OPEN = 10
MAJORITY_S = 2.0
TAKES_S = 0.0, 0.8


async def _in_flight(asked: Asked, *faults: str) -> list[Finding]:
    async with ground(asked, Setting(tables=[f"in_flight = {OPEN}"], has_cost=False)) as here:
        await here.fill(int(40 * asked.seconds), takes_s=TAKES_S)
        here.harm(*faults)
        calls, begun, end = await loaded(here, asked.seconds)
        log = here.log()
        stopped = [
            (each.victim, each.at, each.until or time.monotonic()) for each in here.faults if each.kind == "worker-stop"
        ]
        met = [c for c in calls if any(c.pid == pid and c.at < b and (c.end or end) > a for pid, a, b in stopped)]
        names = {each.number for each in met}
        rest = [each for each in calls if each.number not in names]
        findings = [
            Finding("calls open at once", judge.most_open(rest, end), at_most=OPEN),
            Finding("seconds in which one held over half", judge.longest_majority(log, OPEN), at_most=MAJORITY_S),
            Finding("calls a second", judge.rate(calls, begun, end)),
            Finding("faults", len(here.faults), at_least=1 if faults else 0),
        ]  # fmt: skip
        if stopped:
            findings.append(Finding("calls open at once, with those of stopped workers", judge.most_open(calls, end)))
            findings.append(Finding("seconds stopped", sum(b - a for a, b in spans(here.faults, "worker-stop"))))
        return findings


async def in_flight(asked: Asked) -> list[Finding]:
    """At most 10 calls at once over 4 processes."""
    return await _in_flight(asked)


async def in_flight_killed(asked: Asked) -> list[Finding]:
    """The same with a worker killed every 2 s."""
    return await _in_flight(asked, "worker-kill:2")


async def in_flight_stopped(asked: Asked) -> list[Finding]:
    """The same with a worker stopped for 12 s, longer than its lease, every 15 s."""
    return await _in_flight(asked, "worker-stop:15:12")
