"""The LLM gateway by real workers and a stand-in provider over HTTP: ``python -m benchmarks gateway``.

Each scenario has a server, a provider and workers (`aiqueue work aiqueue.gateway:worker`) of its own, and is judged by
the provider's own log. Without names, all are run at their full length, which takes about half an hour;
``--window 6 --seconds 18 --requests 300 --lines 1000`` shortens them. Exit code 1 if a figure is not what is demanded.
"""

from __future__ import annotations

from ..scenarios import Scenario, make_parser, parse, run_all, say
from . import batches, fronts, money, strangers, traffic
from .bench import Asked

SCENARIOS: dict[str, Scenario[Asked]] = {
    "kills": money.kills,
    "budget": money.budget,
    "limits": traffic.limits,
    "priority": traffic.priority,
    "refused": traffic.refused,
    "refused-unlimited": traffic.refused_unlimited,
    "called": traffic.called,
    "node": strangers.node,
    "hostile": strangers.hostile,
    "front-streams": fronts.streams,
    "front-calls": fronts.calls,
    "front-cut": fronts.cut,
    "batch-kills": batches.kills,
    "batch-large": batches.large,
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("gateway", __doc__, SCENARIOS)
    parser.add_argument("--window", type=float, default=60.0, metavar="SECONDS", help="of the limits")
    parser.add_argument("--seconds", type=float, default=180.0, help="of a run under limits")
    parser.add_argument("--workers", type=int, default=4, help="worker processes")
    parser.add_argument("--requests", type=int, default=2_000, help="of a run with kills")
    parser.add_argument("--waiting", type=int, default=10_000, help="requests of low priority")
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second, where calls are timed")
    parser.add_argument("--lines", type=int, default=50_000, help="of a large batch")
    chosen = parse(parser, SCENARIOS, arguments)
    asked = Asked(
        window_s=chosen.window, seconds=chosen.seconds, workers=chosen.workers, seed=chosen.seed,
        requests=chosen.requests, waiting=chosen.waiting, rate=chosen.rate, lines=chosen.lines, keep=chosen.keep,
        say=say,
    )  # fmt: skip
    return run_all(chosen, SCENARIOS, asked)
