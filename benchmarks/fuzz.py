"""Frames that no sound program sends, to the decoders and to a live worker: ``python -m benchmarks fuzz``.

The same seed makes the same frames. Exit code 1 when a reader raised what it must not, or when a frame was neither run
nor a dead letter with a reason, was left in the stream, or kept the worker from serving on.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from .chaos.servers import NatsProcess
from .fuzzing import live
from .fuzzing.readers import Escaped, read_many

PORTION = 10_000


def read(seed: int, count: int, processes: int, say: Callable[[str], None]) -> Counter[str]:
    """`count` frames through the readers, in several processes. Raises Escaped."""
    outcomes: Counter[str] = Counter()
    firsts = range(0, count, PORTION)
    sizes = [min(PORTION, count - first) for first in firsts]
    with ProcessPoolExecutor(processes) as pool:
        for done, part in enumerate(pool.map(partial(_portion, seed), firsts, sizes), 1):
            outcomes += part
            if done % 10 == 0:
                say(f"{outcomes.total():,} frames read")
    return outcomes


def _portion(seed: int, first: int, count: int) -> Counter[str]:
    return read_many(seed, count, first=first)


def through_a_worker(seed: int, count: int) -> live.Outcome:
    """`count` frames through a worker on a server of its own, of which nothing is left."""
    with tempfile.TemporaryDirectory(prefix="aiqueue-fuzz-") as directory:
        server = NatsProcess(Path(directory) / "server")
        try:
            server.start()
            return asyncio.run(live.run(server.account, seed=seed, count=count))
        finally:
            server.kill()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks fuzz", description=__doc__)
    parser.add_argument("--frames", type=int, default=1_000_000, help="through the decoders")
    parser.add_argument("--live", type=int, default=20_000, help="through a live worker")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    logging.getLogger("aiqueue").setLevel(logging.WARNING)
    logging.getLogger("aiqueue").propagate = False  # a line for each dead letter
    begun = time.monotonic()
    try:
        outcomes = read(chosen.seed, chosen.frames, chosen.processes, lambda line: print(line, file=sys.stderr))
    except Escaped as error:
        print(error, file=sys.stderr)
        return 1
    took_s = time.monotonic() - begun
    outcome = through_a_worker(chosen.seed, chosen.live) if chosen.live else None
    if chosen.json:
        worker = outcome.plain() if outcome else None
        print(json.dumps({"seed": chosen.seed, "took_s": took_s, "read": outcomes, "live": worker}, indent=1))
    else:
        print(f"{outcomes.total():,} frames of seed {chosen.seed} read in {took_s:.0f} s: {_counts(outcomes)}")
        if outcome is not None:
            print(_told(outcome))
    return int(outcome is not None and not outcome.sound)


def _told(outcome: live.Outcome) -> str:
    lines = [
        f"{outcome.sent:,} frames sent to a worker in {outcome.took_s:.0f} s: {_counts(outcome.said)}",
        f"{outcome.ran:,} run, {outcome.dead.total():,} dead letters ({_counts(outcome.dead)}), {outcome.left:,} left",
        f"{outcome.ended:,} of {outcome.claimed:,} that claimed to be runs of an earlier time had ended by its journal",
        f"the worker {'serves' if outcome.serves else 'DOES NOT SERVE'} afterwards",
        *(f"fault: {line}" for line in outcome.faults[:20]),
    ]
    return "\n".join(lines)


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count:,} {what}" for what, count in counter.most_common())


if __name__ == "__main__":
    sys.exit(main())
