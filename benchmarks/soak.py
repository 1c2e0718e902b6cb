"""Kills workers and servers while jobs run, and counts what became of the jobs: ``python -m benchmarks soak``.

Without ``--fault``: on one server a worker killed every 2 s and the server every 15 s; on three, the stream's leader
killed or stopped every 20 s. Exit code 1 when something was lost, overwritten, left behind or repeated for no reason
(with ``--broken``: when nothing was found lost).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from aiqueue.errors import BadInput

from .chaos import soak
from .chaos.nemesis import HOLD_S, KINDS, Plan
from .chaos.places import Impossible
from .chaos.show import show, svg

WIDTH = 120  # of what goes to a file


def _plan(text: str) -> Plan:
    try:
        return Plan.parse(text)
    except BadInput as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    kinds = ", ".join(f"{kind} ({HOLD_S[kind]:g} s)" if kind in HOLD_S else kind for kind in KINDS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--servers", type=int, choices=(1, 3), default=1)
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--rate", type=float, default=1_000, help="jobs a second, over all producers")
    parser.add_argument("--producers", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--concurrency", type=int, default=50, help="of each worker")
    parser.add_argument("--handler-ms", type=float, default=5)
    parser.add_argument("--ack-wait", type=float, default=5, metavar="SECONDS")
    parser.add_argument("--tenants", type=int, default=3)
    parser.add_argument(
        "--fault",
        type=_plan,
        action="append",
        metavar="KIND[|KIND...]:PERIOD[:HOLD]",
        help=f"may be repeated; kinds, and how long each holds: {kinds}",
    )
    parser.add_argument("--stream-bytes", default="1GiB", metavar="SIZE", help="what the stream holds, such as 64KiB")
    parser.add_argument("--no-faults", action="store_true")
    parser.add_argument("--seed", type=int, default=1, help="of the times and victims of the faults")
    parser.add_argument("--broken", action="store_true", help="a worker that acknowledges before it runs")
    parser.add_argument("--sync-always", action="store_true", help="servers that sync every write")
    parser.add_argument("--settle", type=float, default=soak.STUCK_S, metavar="SECONDS",
                        help="give up when no job ends for so long after the producers")  # fmt: skip
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the plot there too")
    parser.add_argument("--keep", type=Path, metavar="DIRECTORY", help="leave the logs there")
    return parser


def main(arguments: list[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    plans = chosen.fault or soak.ready_made("cluster" if chosen.servers == 3 else "single")
    options = soak.Options(
        servers=chosen.servers, jobs=chosen.jobs, rate=chosen.rate, producers=chosen.producers,
        workers=chosen.workers, concurrency=chosen.concurrency, handler_ms=chosen.handler_ms,
        ack_wait_s=chosen.ack_wait, tenants=chosen.tenants, plans=() if chosen.no_faults else tuple(plans),
        seed=chosen.seed, broken=chosen.broken, settle_s=chosen.settle, sync_always=chosen.sync_always,
        stream_bytes=chosen.stream_bytes, keep=chosen.keep,
    )  # fmt: skip
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    try:
        report = soak.run(options, say=lambda line: print(line, file=sys.stderr, flush=True))
    except Impossible as error:
        print(f"this machine cannot: {error}", file=sys.stderr)
        return 2
    if chosen.svg is not None:
        chosen.svg.write_text(svg(report))
    if chosen.json:
        print(json.dumps(report.plain(), indent=1))
    else:
        show(report, console)
    return int(not report.verdict.lost) if options.broken else int(not report.verdict.sound)


if __name__ == "__main__":
    sys.exit(main())
