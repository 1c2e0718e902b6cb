"""All questions in one run, each in a process of its own: the results kept, then the page and the pictures."""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NoReturn

from aiqueue.server import supervisor

from . import page
from .chaos.children import ROOT
from .machine import machine
from .questions import ALL, expected_s
from .report import Row, table
from .results import Asked, Results

PAGES = Path("docs/benchmarks")
QUICK = Path("build/benchmarks")  # what is made in a hurry does not take the place of the real figures
RESULTS = "results.json"
QUICK_JOBS = 1_000
END_S = 40.0


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def whole(arguments: Sequence[str]) -> int:
    """``python -m benchmarks all``: exit code 1 where a question failed."""
    parser = Parser("all", __doc__)
    parser.add_argument("--rounds", type=at_least_1, default=5)
    parser.add_argument("--jobs", type=at_least_1, default=10_000)
    parser.add_argument("--quick", action="store_true", help=f"one round of {QUICK_JOBS:,} jobs, without peers")
    parser.add_argument("--only", nargs="+", choices=ALL, metavar="QUESTION", help=f"some of {', '.join(ALL)}")
    parser.add_argument("--without", nargs="+", choices=ALL, metavar="QUESTION", default=[])
    parser.add_argument("--out", type=Path, help=f"where the page goes: {PAGES}, with --quick {QUICK}")
    chosen = parser.parse_args(arguments)
    rounds, jobs = (1, QUICK_JOBS) if chosen.quick else (chosen.rounds, chosen.jobs)
    out: Path = chosen.out or (QUICK if chosen.quick else PAGES)
    without = {*chosen.without, *(["peers"] if chosen.quick and not chosen.only else [])}
    questions = [each for each in chosen.only or ALL if each not in without]
    try:
        results = Results.read(out / RESULTS) if (out / RESULTS).exists() else Results()
    except ValueError as error:
        parser.error(str(error))
    took = sum(expected_s(each, rounds=rounds, jobs=jobs) for each in questions)
    say(f"{len(questions)} questions, {rounds} rounds, {jobs:,} jobs: about {minutes(took)}")
    asked = []
    for number, each in enumerate(questions, 1):
        asked.append(ask(results, each, rounds, jobs, f"[{number}/{len(questions)}]"))
        results.write(out / RESULTS)  # each time, so that an end half-way loses nothing
    print(table(row for row in results.rows if row.question in questions))
    show(results, out)
    for question in (each for each in questions if each in results.failed):
        say(f"FAILED: {question}: {results.failed[question]}")
    return 0 if all(asked) else 1


def ask(results: Results, question: str, rounds: int, jobs: int, place: str) -> bool:
    """Ask one question in a process of its own, and put its answer, or why there is none, into the results."""
    likely_s = expected_s(question, rounds=rounds, jobs=jobs)
    say(f"{place} {question}: about {minutes(likely_s)}")
    words = ["-m", "benchmarks", question, "--rounds", str(rounds), "--jobs", str(jobs), "--json"]
    begun = time.monotonic()
    try:
        plain = json.loads(_output(words, within_s=300 + 5 * likely_s))
        rows = [Row.read(each) for each in plain["rows"]]
        lacks = [*plain.get("failed", [])]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        results.failed[question] = str(error)
        say(f"{place} {question} FAILED: {error}")
        return False
    took_s = time.monotonic() - begun
    today = dt.datetime.now(dt.UTC).date().isoformat()
    notes = [*(f"failed: {each}" for each in lacks), *plain.get("notes", []), *plain.get("method", [])]
    results.put(question, rows, Asked(rounds, jobs, today, round(took_s, 1), plain.get("machine") or machine(),
                                      dict(plain.get("skipped", {})), notes))  # fmt: skip
    say(f"{place} {question}: {len(rows)} rows in {minutes(took_s)}" + "".join(f"; failed: {each}" for each in lacks))
    return not lacks


def _output(words: Sequence[str], *, within_s: float) -> str:
    """What a Python program prints; what it says on its way is passed on. Raises RuntimeError, in one line, where it
    prints nothing.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    last: list[str] = []
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(
            [sys.executable, *words],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=told,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=supervisor.die_with(os.getpid()),  # noqa: PLW1509 - one system call
        )
        relay = threading.Thread(target=_relay, args=(process.stderr, last), daemon=True)
        relay.start()
        try:
            code: int | None = process.wait(within_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
        relay.join(END_S)
        told.seek(0)
        output = told.read()
    if code is None:
        raise RuntimeError(f"not done after {within_s:.0f} s")
    if not output.strip():
        raise RuntimeError(last[0] if last else f"it ended with {code} and said nothing")
    return output


def _relay(errors: IO[str], last: list[str]) -> None:
    for line in errors:
        say(f"    {line.rstrip()}")
        last[:] = [line.strip()]


def _end(process: subprocess.Popen[str]) -> None:
    """SIGINT first, at which it ends what it has started."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_S)
    process.kill()
    process.wait()


def show(results: Results, out: Path) -> None:
    """Draw the pictures and write the page that has them. Without matplotlib the page is without pictures."""
    out.mkdir(parents=True, exist_ok=True)
    try:
        from . import plots  # noqa: PLC0415
    except ImportError as error:
        say(f"no pictures: {error} (`make bench` installs it)")
        drawn: dict[str, str] = {}
        left = ["all pictures: matplotlib was not installed"]
    else:
        drawn, left = plots.draw(results.rows, out)
    for line in left:
        say(f"left out: {line}")
    (out / "README.md").write_text(page.markdown(results, drawn, left))
    say(f"wrote README.md and {len(drawn)} pictures to {out}")


def report(arguments: Sequence[str]) -> int:
    """``python -m benchmarks report``: the page and pictures of results that were kept."""
    parser = Parser("report", report.__doc__)
    parser.add_argument("--from", dest="source", type=Path, default=PAGES / RESULTS, metavar="FILE")
    parser.add_argument("--out", type=Path, default=PAGES)
    chosen = parser.parse_args(arguments)
    try:
        results = Results.read(chosen.source)
    except ValueError as error:
        parser.error(str(error))
    show(results, chosen.out)
    return 0


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def __init__(self, verb: str, told: str | None) -> None:
        super().__init__(prog=f"python -m benchmarks {verb}".strip(), description=told)

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}", file=sys.stderr)
        sys.exit(2)


def at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number
