"""All measurements, in rounds that alternate between the sides. Start with ``make bench``.

``python -m benchmarks QUESTION [--rounds N] [--jobs N] [--json]`` asks one, on an embedded server of its own in a
temporary directory. ``python -m benchmarks all`` asks all of them and the peers, and writes the page; ``report`` draws
it again. ``soak``, ``fuzz``, ``resume``, ``requests``, ``provider``, ``gateway``, ``rag``, ``schedules``, ``tenancy``
and ``peers`` have options of their own (``soak --help``).
Absolute figures belong to the machine; the ratio of the medians is what travels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiqueue

from . import whole
from .common import run_loop
from .machine import interpreter, machine
from .questions import ALL, OWN, ROWS, TEXTS
from .report import Row, plain, table

Text = Callable[[Any, aiqueue.Client, Path, argparse.Namespace], Awaitable[str]]
HOW: dict[str, Text] = {  # what each of TEXTS takes
    "around": lambda module, client, _, chosen: module.run(client, rounds=chosen.rounds, jobs=chosen.jobs),
    "cancel": lambda module, client, _, chosen: module.run(client, jobs=max(50, chosen.jobs // 50)),
    "delayed": lambda module, client, _, chosen: module.run(client, jobs=chosen.jobs),
    "documents": lambda module, client, directory, chosen: module.run(
        client, directory, rounds=chosen.rounds, megabytes=chosen.megabytes
    ),
    "endurance": lambda module, client, _, chosen: module.run(client, jobs=chosen.jobs),
    "failing": lambda module, client, _, chosen: module.run(client, rounds=chosen.rounds),
    "metrics": lambda module, client, _, chosen: module.run(client, rounds=chosen.rounds, jobs=chosen.jobs),
    "operator": lambda module, client, _, chosen: module.run(client, jobs=chosen.jobs, only=chosen.only),
    "tracing": lambda module, client, _, chosen: module.run(client, rounds=chosen.rounds, jobs=chosen.jobs),
}


async def ask(question: str, chosen: argparse.Namespace) -> list[Row] | str:
    """The rows of a question, or its text."""
    module = importlib.import_module(f"benchmarks.{question}")
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-", ignore_cleanup_errors=True) as directory:
        async with aiqueue.connect(directory=Path(directory)) as client:
            if question in TEXTS:
                return await HOW[question](module, client, Path(directory), chosen)
            rows: list[Row] = await module.run(client, rounds=chosen.rounds, jobs=chosen.jobs)
            return rows


def one(question: str, arguments: list[str]) -> int:
    """Ask a question and print its answer."""
    parser = whole.Parser(question, ROWS[question].about if question in ROWS else None)
    parser.add_argument("--rounds", type=whole.at_least_1, default=5)
    parser.add_argument("--jobs", type=whole.at_least_1, default=10_000, help="some rows take a part of it, or more")
    if question in ROWS:
        parser.add_argument("--json", action="store_true")
    if question == "documents":
        parser.add_argument("--megabytes", type=whole.at_least_1, default=300, help="size of the document")
    if question == "operator":
        parser.add_argument("--only", choices=("acts", "kills", "looks"), help="one part of it")
    chosen = parser.parse_args(arguments)
    try:
        answer = run_loop(ask(question, chosen))
    except (RuntimeError, TimeoutError, aiqueue.AIQueueError, ModuleNotFoundError) as error:
        parser.error(str(error) or "it took too long")
    if isinstance(answer, str):
        print(answer)
    elif chosen.json:
        print(json.dumps(plain(answer), indent=1))
    else:
        print(f"{interpreter(machine())}, {chosen.rounds} rounds, {chosen.jobs:,} jobs, median [min-max]")
        print(table(answer))
    return 0


def usage() -> str:
    lines = [(__doc__ or "").strip(), "", "questions:"]
    lines += [f"  {name:12} {question.about}" for name, question in ALL.items()]
    return "\n".join([*lines, "", f"answered in text: {', '.join(TEXTS)}"])


def main() -> int:
    match sys.argv[1:]:
        case [] | ["-h" | "--help" | "help", *_]:
            print(usage())
            return 0
        case ["all", *arguments]:
            return whole.whole(arguments)
        case ["report", *arguments]:
            return whole.report(arguments)
        case ["peers", *arguments]:
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.peers", *arguments])  # its own words and codes
        case [verb, *arguments] if verb in OWN:
            code: int = importlib.import_module(f"benchmarks.{verb}").main(arguments)
            return code
        case [verb, *arguments] if verb in ROWS or verb in TEXTS:
            return one(verb, arguments)
        case [verb, *_]:
            known = ", ".join([*ALL, *TEXTS, *(each for each in OWN if each != "peers"), "all", "report"])
            print(f"python -m benchmarks: there is no question {verb!r}: ask one of {known}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
