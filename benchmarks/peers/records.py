"""What the handlers wrote down, and whether every job is there."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .adapters.verbs import RECORD


class Run(NamedTuple):
    """One run of a handler, in seconds of CLOCK_MONOTONIC."""

    enqueued: float
    begun: float
    number: int


@dataclass(frozen=True)
class Tally:
    """The runs of a range of jobs."""

    runs: list[Run]
    expected: int
    missing: int
    repeated: int

    @classmethod
    def of(cls, runs: Iterable[Run], numbers: range) -> Tally:
        ours = [run for run in runs if run.number in numbers]
        distinct = len({run.number for run in ours})
        return cls(ours, len(numbers), len(numbers) - distinct, len(ours) - distinct)

    @property
    def lacking(self) -> str:
        """What is missing, in words; empty where every job ran."""
        return f"{self.missing:,} of {self.expected:,} jobs did not run" if self.missing else ""

    @property
    def surplus(self) -> str:
        """What ran more than once, in words; empty where nothing did."""
        return f"{self.repeated:,} runs beside those of {self.expected:,} jobs" if self.repeated else ""

    def rate(self) -> float:
        """Jobs a second, from the first handler to the last."""
        times = [run.begun for run in self.runs]
        return (len(times) - 1) / max(max(times) - min(times), 1e-6)

    def waits_ms(self, beyond: int) -> list[float]:
        """From the enqueue call to the handler, of the jobs from that number on."""
        return [(run.begun - run.enqueued) * 1000 for run in self.runs if run.number >= beyond]


class Ledger:
    """The file that the handlers append to."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        """How many runs have begun."""
        return self.path.stat().st_size // RECORD.size if self.path.exists() else 0

    def runs(self) -> list[Run]:
        """Raises ValueError for a file that is no ledger: handlers that wrote into each other's records."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) % RECORD.size:
            raise ValueError(f"{self.path.name}: {len(content)} bytes are no whole records of {RECORD.size}")
        return [Run(*fields) for fields in RECORD.iter_unpack(content)]


def percentiles(figures: list[float], *wanted: int) -> list[float]:
    cuts = statistics.quantiles(figures, n=100, method="inclusive")
    return [cuts[each - 1] for each in wanted]
