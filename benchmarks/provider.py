"""Limits by key on real workers, judged by the log of a stand-in provider: ``python -m benchmarks provider``.

Each scenario has servers, a provider and worker processes of its own. Without names, all are run at their full length,
which takes more than an hour; ``--window 6 --seconds 30`` shortens them. Exit code 1 if a figure is not what is
demanded. ``--broken`` leaves all rules out: then it is 1 for a scenario in which no violation was found.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiqueue

from .limiting import flights, many, price, rates, waiting
from .limiting.bench import Asked, Finding

Scenario = Callable[[Asked], Awaitable[list[Finding]]]
SCENARIOS: dict[str, Scenario] = {
    "requests": rates.requests,
    "costs": rates.costs,
    "requests-killed": rates.requests_killed,
    "costs-killed": rates.costs_killed,
    "leader-killed": rates.leader_killed,
    "tenants-even": rates.tenants_even,
    "tenants-uneven": rates.tenants_uneven,
    "small": rates.small,
    "large": rates.large,
    "costs-large": rates.costs_large,
    "changed": rates.changed,
    "in-flight": flights.in_flight,
    "in-flight-killed": flights.in_flight_killed,
    "in-flight-stopped": flights.in_flight_stopped,
    "waiting": waiting.waiting,
    "refused": waiting.refused,
    "paused-long": waiting.paused_long,
    "paced": price.paced,
    "drain": price.drain,
    "rule-changed": many.rule_changed,
    "thousand-keys": many.thousand_keys,
    "ten-thousand-keys": many.ten_thousand_keys,
}


def _parser() -> argparse.ArgumentParser:
    told = [f"  {name:20} {(each.__doc__ or '').splitlines()[0]}" for name, each in SCENARIOS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks provider", description=__doc__, epilog="\n".join(["scenarios:", *told]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO")
    parser.add_argument("--window", type=float, default=60.0, metavar="SECONDS", help="of the limits")
    parser.add_argument("--seconds", type=float, default=300.0, help="of a run under load")
    parser.add_argument("--workers", type=int, default=4, help="worker processes")
    parser.add_argument("--jobs", type=int, default=10_000, help="that wait, where many wait")
    parser.add_argument("--pause", type=float, default=720.0, metavar="SECONDS", help="of a long pause")
    parser.add_argument("--rounds", type=int, default=3, help="of pairs, where two ways are compared")
    parser.add_argument("--estimate", type=float, default=1.0, metavar="TIMES",
                        help="reservations are so many times what a call uses")  # fmt: skip
    parser.add_argument("--former", type=Path, metavar="DIRECTORY", help="a checkout of a former version")
    parser.add_argument("--seed", type=int, default=1, help="of costs, times and victims")
    parser.add_argument("--broken", action="store_true", help="no rules at all")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="leave the logs there")
    return parser


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def run(scenario: str, asked: Asked) -> list[Finding]:
    """Run one in this thread, with which its servers end."""
    return asyncio.run(_run(scenario, asked))


async def _run(scenario: str, asked: Asked) -> list[Finding]:
    return await SCENARIOS[scenario](asked)


def show(scenario: str, findings: list[Finding], took_s: float) -> None:
    print(f"{scenario} ({took_s:.0f} s)")
    for each in findings:
        mark = "" if not each.demand else "ok" if each.holds else "VIOLATED"
        print(f"  {each.name:58} {each.figure:14,.6g}   {each.demand:34} {mark}".rstrip(), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    chosen = parser.parse_args(arguments)
    unknown = [each for each in chosen.scenarios if each not in SCENARIOS]
    if unknown:
        parser.error(f"there is no scenario {unknown[0]!r}: choose from {', '.join(SCENARIOS)}")
    asked = Asked(
        window_s=chosen.window, seconds=chosen.seconds, workers=chosen.workers, seed=chosen.seed,
        limits=not chosen.broken, estimate=chosen.estimate, jobs=chosen.jobs, pause_s=chosen.pause,
        rounds=chosen.rounds, former=chosen.former, keep=chosen.keep, say=say,
    )  # fmt: skip
    told, wrong = {}, False
    for name in chosen.scenarios or SCENARIOS:
        begun = time.monotonic()
        say(f"{name}: {(SCENARIOS[name].__doc__ or '').splitlines()[0]}")
        try:
            findings = run(name, asked)
        except (RuntimeError, TimeoutError, aiqueue.AIQueueError) as error:
            say(f"  {name} failed: {error!r}")
            findings = [Finding(f"it ended: {type(error).__name__}", 1, at_most=0)]
        holds = all(each.holds for each in findings)
        wrong |= holds if chosen.broken else not holds
        told[name] = [dataclasses.asdict(each) | {"holds": each.holds} for each in findings]
        if not chosen.json:
            show(name, findings, time.monotonic() - begun)
    if chosen.json:
        print(json.dumps(told, indent=1))
    return int(wrong)
