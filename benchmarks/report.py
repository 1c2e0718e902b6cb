"""The figures of a run: the one form that every measurement has, as text and as JSON."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

OURS, RAW = "aiqueue", "raw nats-py"
DIGITS = {"/s": 0, "ms": 2, "s": 2, "CPU s": 2, "MiB": 0, "jobs": 0}
MORE_IS_BETTER = frozenset({"/s"})


@dataclass
class Row:
    """One measurement: for each side a figure a round, in `unit` (a key of DIGITS).

    `question` is the module that measured it, `x` its place where the question is about growth (jobs waiting, tenants,
    bytes), `how` what each side does in a few words.
    """

    question: str
    name: str
    unit: str
    sides: dict[str, list[float]] = field(default_factory=dict)
    x: float | None = None
    how: dict[str, str] = field(default_factory=dict)

    def add(self, side: str, figure: float) -> None:
        self.sides.setdefault(side, []).append(figure)

    def median(self, side: str) -> float:
        return statistics.median(self.sides[side])

    def ratio(self, to: str, side: str = OURS) -> float:
        """The median of `side` over that of `to`."""
        return self.median(side) / self.median(to)

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Row:
        return cls(**plain)


def plain(rows: Iterable[Row]) -> dict[str, Any]:
    """All that a report needs, for JSON: the machine, and the rows."""
    machine = {"cpus": os.cpu_count(), "system": platform.system(), "machine": platform.machine(),
               "python": platform.python_version()}  # fmt: skip
    return {"machine": machine, "rows": [asdict(row) for row in rows]}


def spread(figures: list[float], unit: str) -> str:
    """Median and range: ``5,200 [4,900-5,400] /s``."""
    digits = f",.{DIGITS[unit]}f"
    return f"{statistics.median(figures):{digits}} [{min(figures):{digits}}-{max(figures):{digits}}] {unit}"


def table(rows: list[Row]) -> str:
    """The rows as text: a line for each, ours first; the ratio is ours to the side beside it."""
    lines: list[str] = []
    for row in rows:
        lines.append(f"{row.question}: {row.name}")
        sides = sorted(row.sides, key=lambda side: side != OURS)
        for side in sides:
            ratio = f"{row.ratio(side):8.2f}" if OURS in row.sides and side != OURS else ""
            lines.append(f"  {side:28} {spread(row.sides[side], row.unit):>40} {ratio:>8}  {row.how.get(side, '')}".rstrip())
    return "\n".join(lines)
