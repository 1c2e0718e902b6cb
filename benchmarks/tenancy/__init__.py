"""Many tenants that are all busy: ``python -m benchmarks tenancy``.

Each scenario has a server and worker processes of its own, and is judged by what the handlers wrote down and what the
stream holds. ``--former DIRECTORY`` names a checkout of a former version, compiled, whose workers run in turns with
those of this one. Exit code 1 if a figure is not what is demanded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..scenarios import Scenario, make_parser, parse, run_all, say
from . import draining, holding, killing, sharing
from .bench import Asked

SCENARIOS: dict[str, Scenario[Asked]] = {
    "drain": draining.drain,
    "backlog": sharing.backlog,
    "held-later": holding.held_later,
    "held-before": holding.held_before,
    "held-full": holding.held_full,
    "kills-two": killing.kills_two,
    "kills-four": killing.kills_four,
    "both": killing.both,
}


def _shape(text: str) -> tuple[int, int]:
    tenants, _, jobs = text.partition("x")
    if not (tenants.isdigit() and jobs.isdigit() and int(tenants) and int(jobs)):
        raise argparse.ArgumentTypeError(f"{text}: write TENANTSxJOBS, such as 1000x60")
    return int(tenants), int(jobs)


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("tenancy", __doc__, SCENARIOS)
    parser.add_argument("--former", type=Path, metavar="DIRECTORY", help="a checkout of a former version")
    parser.add_argument("--rounds", type=int, default=3, help="of drains, in turns")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=(), metavar="TENANTSxJOBS", help="of drains")
    parser.add_argument("--storages", nargs="+", choices=("file", "memory"), default=("file", "memory"))
    parser.add_argument("--tenants", type=int, default=1_000, help="of backlog, kills and both")
    parser.add_argument("--jobs", type=int, default=2_000, help="of each tenant's backlog, and at most in the others")
    parser.add_argument("--handlers-ms", type=float, nargs="+", default=(0.0, 5.0), metavar="MS", help="of backlog")
    parser.add_argument("--seconds", type=float, default=30.0, help="of backlog")
    parser.add_argument(
        "--stored", type=Path, metavar="DIRECTORY", help="keep backlogs there, and take them from there"
    )
    chosen = parse(parser, SCENARIOS, arguments)
    asked = Asked(
        former=chosen.former and chosen.former.resolve(), rounds=chosen.rounds, shapes=chosen.shapes,
        storages=chosen.storages, tenants=chosen.tenants, jobs=chosen.jobs, handlers_ms=chosen.handlers_ms,
        seconds=chosen.seconds, stored=chosen.stored, seed=chosen.seed, keep=chosen.keep, say=say,
    )  # fmt: skip
    return run_all(chosen, SCENARIOS, asked)
