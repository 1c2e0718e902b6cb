"""All measurements, in rounds that alternate between the two sides.

``python -m benchmarks [speed|agents|cancel|...] [--rounds N] [--jobs N] [--json]`` (``--help`` names them all), each on
an embedded server of its own in a temporary directory. Absolute figures belong to the machine; the ratio of the medians
is what travels. ``soak``, ``fuzz``, ``resume`` and ``requests`` have options of their own (``soak --help``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiqueue

from . import (
    agents,
    cancel,
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
    requests,
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


Other = Callable[[aiqueue.Client, Path, argparse.Namespace], Awaitable[str]]
OTHERS: dict[str, Other] = {  # measurements whose figures are no plain ratio: they tell theirs as text
    "agents": lambda client, _, chosen: agents.run(client, rounds=chosen.rounds),
    "cancel": lambda client, _, chosen: cancel.run(client, jobs=chosen.jobs // 50),
    "delayed": lambda client, _, chosen: delayed.run(client, jobs=chosen.jobs),
    "documents": lambda client, directory, chosen: documents.run(
        client, directory, rounds=chosen.rounds, megabytes=chosen.megabytes
    ),
    "endurance": lambda client, _, chosen: endurance.run(client, jobs=chosen.jobs),
    "failing": lambda client, _, chosen: failing.run(client, rounds=chosen.rounds),
    "fairness": lambda client, _, chosen: fairness.run(client, rounds=chosen.rounds),
    "streaming": lambda client, _, chosen: streaming.run(client, rounds=chosen.rounds),
    "tenants": lambda client, _, chosen: tenants.run(client, jobs=chosen.jobs),
}


async def other(chosen: argparse.Namespace) -> str:
    """One of OTHERS."""
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-", ignore_cleanup_errors=True) as directory:
        async with aiqueue.connect(directory=Path(directory)) as client:
            return await OTHERS[chosen.what](client, Path(directory), chosen)


def main() -> None:
    for name, module in (("soak", soak), ("fuzz", fuzz), ("resume", resume), ("requests", requests)):
        if sys.argv[1:2] == [name]:
            sys.exit(module.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("speed", *OTHERS),
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
        print(asyncio.run(other(chosen)))
        return
    rows = asyncio.run(measure(chosen.rounds, chosen.jobs))
    if chosen.json:
        print(json.dumps([row.plain() for row in rows], indent=1))
        return
    print(f"Python {platform.python_version()}, {chosen.rounds} rounds, {chosen.jobs:,} jobs, median [min-max]")
    print(table(rows))


if __name__ == "__main__":
    main()
