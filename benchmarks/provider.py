"""Limits by key on real workers, judged by the log of a stand-in provider: ``python -m benchmarks provider``.

Each scenario has servers, a provider and worker processes of its own. Without names, all are run at their full length,
which takes more than an hour; ``--window 6 --seconds 30`` shortens them. Exit code 1 if a figure is not what is
demanded. ``--broken`` leaves all rules out: then it is 1 for a scenario in which no violation was found.
"""

from __future__ import annotations

from pathlib import Path

from .limiting import flights, many, price, rates, waiting
from .limiting.bench import Asked
from .scenarios import Scenario, make_parser, parse, run_all, say

SCENARIOS: dict[str, Scenario[Asked]] = {
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


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("provider", __doc__, SCENARIOS)
    parser.add_argument("--window", type=float, default=60.0, metavar="SECONDS", help="of the limits")
    parser.add_argument("--seconds", type=float, default=300.0, help="of a run under load")
    parser.add_argument("--workers", type=int, default=4, help="worker processes")
    parser.add_argument("--jobs", type=int, default=10_000, help="that wait, where many wait")
    parser.add_argument("--pause", type=float, default=720.0, metavar="SECONDS", help="of a long pause")
    parser.add_argument("--rounds", type=int, default=3, help="of pairs, where two ways are compared")
    parser.add_argument("--estimate", type=float, default=1.0, metavar="TIMES",
                        help="reservations are so many times what a call uses")  # fmt: skip
    parser.add_argument("--former", type=Path, metavar="DIRECTORY", help="a checkout of a former version")
    parser.add_argument("--broken", action="store_true", help="no rules at all")
    chosen = parse(parser, SCENARIOS, arguments)
    asked = Asked(
        window_s=chosen.window, seconds=chosen.seconds, workers=chosen.workers, seed=chosen.seed,
        limits=not chosen.broken, estimate=chosen.estimate, jobs=chosen.jobs, pause_s=chosen.pause,
        rounds=chosen.rounds, former=chosen.former, keep=chosen.keep, say=say,
    )  # fmt: skip
    return run_all(chosen, SCENARIOS, asked, broken=chosen.broken)
