"""The same no-op job on aiqueue, raw nats-py and other queues, each with its own server and packages.

Servers are started on loopback with data in a temporary directory; each peer's packages are installed below .bench of
the project, once. A peer whose server or packages cannot be had here is skipped, with the reason.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from aiqueue.errors import AIQueueError

from ..report import table
from .catalogue import PEERS
from .comparison import compare
from .trial import Plan


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    keys = [peer.key for peer in PEERS]
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=10_000, help="a bulk backlog; a slow peer gets a part of it")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=keys, help=f"some of {', '.join(keys)}")
    parser.add_argument("--pace-seconds", type=float, default=Plan.pace_s, help="of each rate; the first is dropped")
    parser.add_argument("--quiet-seconds", type=float, default=Plan.quiet_s, help="to wait for other programs to pause")
    parser.add_argument("--scratch", type=Path, help="where the servers' data is to be while it runs")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.rounds < 1 or asked.jobs < 10:
        parser.error("there must be at least 1 round and 10 jobs")
    if asked.pace_seconds < 1.5 or asked.quiet_seconds < 0:
        parser.error("the pace must last at least 1.5 s, and no time be below 0")
    if asked.scratch is not None and not asked.scratch.is_dir():
        parser.error(f"{asked.scratch} is no directory")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all that was started is ended first
    plan = Plan(rounds=asked.rounds, jobs=asked.jobs, pace_s=asked.pace_seconds, quiet_s=asked.quiet_seconds)
    with tempfile.TemporaryDirectory(prefix="aiqueue-peers-", dir=asked.scratch, ignore_cleanup_errors=True) as place:
        Path(place).chmod(0o711)
        try:
            compared = compare(
                plan, only=asked.only, scratch=Path(place), say=lambda line: print(line, file=sys.stderr, flush=True)
            )
        except AIQueueError as error:
            sys.exit(f"benchmarks.peers: {error}")
        except KeyboardInterrupt:
            sys.exit("benchmarks.peers: interrupted; all servers and workers have ended")
    if asked.json:
        print(json.dumps(compared.plain(), indent=1))
        sys.exit(1 if compared.failed else 0)
    print(table([replace(row, how={}) for row in compared.rows if row.sides]))
    for name, how in compared.rows[0].how.items():
        print(f"{name}: {how}")
    for name, reason in compared.skipped.items():
        print(f"skipped: {name}: {reason}")
    for note in compared.notes:
        print(f"note: {note}")
    for each in compared.failed:
        print(f"FAILED: {each}")
    sys.exit(1 if compared.failed else 0)


if __name__ == "__main__":
    main()
