"""All measurements, in rounds that alternate between the two sides.

``python -m benchmarks [speed|fairness|tenants|endurance|documents|delayed|failing|streaming]``, with ``--rounds N``,
``--jobs N`` and ``--json``, each on an embedded server of its own in a temporary directory. Absolute figures belong to
the machine; the ratio of the medians is what travels. ``soak``, ``fuzz`` and ``resume`` have options of their own
(``soak --help``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from pathlib import Path

import aiqueue

from . import (
    delayed,
    documents,
    drain,
    endurance,
    enqueue,
    failing,
    fairness,
    fuzz,
    latency,
    many,
    resume,
    soak,
    streaming,
    tenants,
)
from .report import Row, table


async def measure(rounds: int, jobs: int) -> list[Row]:
    """One row a measurement, each a list of both sides' figures over the rounds."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-", ignore_cleanup_errors=True) as directory:
        async with aiqueue.connect(directory=Path(directory)) as client:
            for module in (enqueue, many, drain, latency):
                rows += await module.run(client, rounds=rounds, jobs=jobs)
    return rows


async def other(what: str, rounds: int, jobs: int, megabytes: int) -> str:
    """A measurement whose figures are no ratio, as text."""
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-", ignore_cleanup_errors=True) as directory:
        async with aiqueue.connect(directory=Path(directory)) as client:
            if what == "fairness":
                return await fairness.run(client, rounds=rounds)
            if what == "documents":
                return await documents.run(client, Path(directory), rounds=rounds, megabytes=megabytes)
            if what == "endurance":
                return await endurance.run(client, jobs=jobs)
            if what == "failing":
                return await failing.run(client, rounds=rounds)
            if what == "streaming":
                return await streaming.run(client, rounds=rounds)
            if what == "delayed":
                return await delayed.run(client, jobs=jobs)
            return await tenants.run(client, jobs=jobs)


def main() -> None:
    for name, module in (("soak", soak), ("fuzz", fuzz), ("resume", resume)):
        if sys.argv[1:2] == [name]:
            sys.exit(module.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("speed", "fairness", "tenants", "endurance", "documents", "delayed", "failing", "streaming"),
        default="speed",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--jobs", type=int, default=10_000, help="jobs of a drain; enqueue one by one takes a third of it"
    )
    parser.add_argument("--megabytes", type=int, default=300, help="size of the document")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    if chosen.what != "speed":
        print(asyncio.run(other(chosen.what, chosen.rounds, chosen.jobs, chosen.megabytes)))
        return
    rows = asyncio.run(measure(chosen.rounds, chosen.jobs))
    if chosen.json:
        print(json.dumps([row.plain() for row in rows], indent=1))
        return
    print(f"Python {platform.python_version()}, {chosen.rounds} rounds, {chosen.jobs:,} jobs, median [min-max]")
    print(table(rows))


if __name__ == "__main__":
    main()
