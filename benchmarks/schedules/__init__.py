"""Schedules by real workers on real servers: ``python -m benchmarks schedules``.

Each scenario has servers and worker processes of its own, and is judged by the jobs that the streams and the journal
hold, not by what workers say. Without names, all are run at their full length, which takes about half an hour;
``--seconds 30`` shortens them. Exit code 1 if a figure is not what is demanded.
"""

from __future__ import annotations

from ..scenarios import Scenario, make_parser, parse, run_all, say
from . import cost, deploy, faults
from .bench import Asked

SCENARIOS: dict[str, Scenario[Asked]] = {
    "kills": faults.kills,
    "kills-aimed": faults.kills_aimed,
    "server": faults.server,
    "cluster": faults.cluster,
    "down": faults.down,
    "skew": faults.skew,
    "deploy": deploy.deploy,
    "lateness": cost.lateness,
    "ten-thousand": cost.ten_thousand,
}


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("schedules", __doc__, SCENARIOS)
    parser.add_argument("--seconds", type=float, default=180.0, help="of a run with faults")
    parser.add_argument("--away", type=float, default=120.0, metavar="SECONDS", help="in which no worker runs")
    parser.add_argument("--workers", type=int, default=3, help="worker processes")
    parser.add_argument("--schedules", type=int, default=20, help="that tick each second")
    parser.add_argument("--stored", type=int, default=10_000, help="schedules, where many are stored")
    chosen = parse(parser, SCENARIOS, arguments)
    asked = Asked(
        seconds=chosen.seconds, away_s=chosen.away, workers=chosen.workers, schedules=chosen.schedules,
        stored=chosen.stored, seed=chosen.seed, keep=chosen.keep, say=say,
    )  # fmt: skip
    return run_all(chosen, SCENARIOS, asked)
