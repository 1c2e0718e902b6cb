"""The figures of a run and how they are shown."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One measurement of both sides, a figure a round. `unit` is "/s" (more is better) or "ms" (less is)."""

    name: str
    unit: str
    raw_name: str
    ours: list[float] = field(default_factory=list)
    raw: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.ours) / statistics.median(self.raw)

    def plain(self) -> dict[str, Any]:
        return {**vars(self), "ratio": self.ratio}


def table(rows: list[Row]) -> str:
    """The rows as text, one line each."""
    lines = [f"{'measurement':44} {'aiqueue':>26} {'raw nats-py':>26} {'ratio':>6}"]
    lines += [
        f"{row.name:44} {_spread(row.ours, row.unit):>26} {_spread(row.raw, row.unit):>26} {row.ratio:6.2f}"
        for row in rows
    ]
    lines += ["", *sorted({f"raw, {row.name}: {row.raw_name}" for row in rows})]
    return "\n".join(lines)


def _spread(figures: list[float], unit: str) -> str:
    digits = ".2f" if unit == "ms" else ",.0f"
    low, middle, high = min(figures), statistics.median(figures), max(figures)
    return f"{middle:{digits}} [{low:{digits}}-{high:{digits}}] {unit}"
