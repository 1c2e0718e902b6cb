"""All measurements, in rounds that alternate between the two sides.

``python -m benchmarks [--rounds N] [--jobs N] [--json]`` on an embedded server of its own in a temporary directory.
Absolute figures belong to the machine; the ratio of the medians is what travels.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import tempfile
from pathlib import Path

import aiqueue

from . import drain, enqueue, latency, many
from .report import Row, table


async def measure(rounds: int, jobs: int) -> list[Row]:
    """One row a measurement, each a list of both sides' figures over the rounds."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-") as directory:
        async with aiqueue.connect(directory=Path(directory)) as client:
            for module in (enqueue, many, drain, latency):
                rows += await module.run(client, rounds=rounds, jobs=jobs)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--jobs", type=int, default=10_000, help="jobs of a drain; enqueue one by one takes a third of it"
    )
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    rows = asyncio.run(measure(chosen.rounds, chosen.jobs))
    if chosen.json:
        print(json.dumps([row.plain() for row in rows], indent=1))
        return
    print(f"Python {platform.python_version()}, {chosen.rounds} rounds, {chosen.jobs:,} jobs, median [min-max]")
    print(table(rows))


if __name__ == "__main__":
    main()
