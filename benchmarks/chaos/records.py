"""What producers and workers write down while they may be killed: a line for each thing, appended in one write.

A line survives kill -9 of its writer once `write` has returned, for the kernel has it then. Times are monotonic
seconds, which all processes of a machine share.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

START, EFFECT, END = "start", "effect", "end"  # of a run
ACKED, DUPLICATE, REFUSED, UNKNOWN = "acked", "duplicate", "refused", "unknown"  # what became of an enqueue


class Line(NamedTuple):
    """`mark` tells a run (by `Pen.mark`) or, of a producer, how many seconds the enqueue took."""

    what: str
    number: int
    mark: str
    at: float


class Pen:
    """Appends to a file that other processes append to as well."""

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._count = itertools.count(1)

    def mark(self) -> str:
        """A name for a run that no other run has."""
        return f"{os.getpid()}-{next(self._count)}"

    def write(self, what: str, number: int, mark: str) -> None:
        os.write(self._file, f"{what} {number} {mark} {time.monotonic():.6f}\n".encode())

    def close(self) -> None:
        os.close(self._file)


def read(path: Path) -> Iterator[Line]:
    """The lines of a file, none where it is not there."""
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            what, number, mark, at = line.split()
            yield Line(what, int(number), mark, float(at))


@dataclass(slots=True)
class Run:
    """One call of the handler: when it began, when its effect was made and when it ended (None: never)."""

    number: int
    mark: str
    start: float
    effect: float | None = None
    end: float | None = None

    @property
    def pid(self) -> int:
        return int(self.mark.partition("-")[0])


def runs(path: Path) -> list[Run]:
    """The runs in a workers' file, in the order of their starts."""
    found: dict[str, Run] = {}
    for line in read(path):
        if line.what == START:
            found[line.mark] = Run(line.number, line.mark, line.at)
        elif line.what == EFFECT:
            found[line.mark].effect = line.at
        else:
            found[line.mark].end = line.at
    return sorted(found.values(), key=lambda run: run.start)
