"""The figures of a run: the one form that every measurement has, as text and as JSON."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .machine import machine

OURS, RAW, TUNED, STOCK = "aiqueue", "raw nats-py", "bare loop", "stock nats-py"
DIGITS = {"/s": 0, "ms": 2, "s": 2, "CPU s": 2, "MiB": 0, "KiB": 0, "jobs": 0, "consumers": 0, "writes": 2, "%": 1}
MORE_IS_BETTER = frozenset({"/s"})
TUNED_LEAST = {"drain": 2.5, "many": 2.2}  # by question: how many times as fast as STOCK the bare loop is, at least


@dataclass
class Row:
    """One measurement: for each side a figure a round, in `unit` (a key of DIGITS).

    `question` is the module that measured it, `x` its place where the question is about growth (jobs waiting, tenants,
    bytes), `how` what each side does in a few words, `limit` what ours must not be above (below, for a unit of
    MORE_IS_BETTER) where that was promised. A side without figures says in `how` why there are none.
    """

    question: str
    name: str
    unit: str
    sides: dict[str, list[float]] = field(default_factory=dict)
    x: float | None = None
    how: dict[str, str] = field(default_factory=dict)
    limit: float | None = None

    def add(self, side: str, figure: float) -> None:
        self.sides.setdefault(side, []).append(figure)

    def median(self, side: str) -> float:
        return statistics.median(self.sides[side])

    def ratio(self, to: str, side: str = OURS) -> float | None:
        """The median of `side` over that of `to`; None where one of them has no figures, or `to` has 0."""
        if not self.sides.get(side) or not self.sides.get(to) or not self.median(to):
            return None
        return self.median(side) / self.median(to)

    @property
    def more_is_better(self) -> bool:
        return self.unit in MORE_IS_BETTER

    @property
    def met(self) -> bool | None:
        """Whether ours keeps the limit; None without a limit, and without figures."""
        if self.limit is None or not self.sides.get(OURS):
            return None
        ours = self.median(OURS)
        return ours >= self.limit if self.more_is_better else ours <= self.limit

    @property
    def demand(self) -> str:
        """The limit in words, empty without one: ``at most 5 ms``."""
        if self.limit is None:
            return ""
        return f"at {'least' if self.more_is_better else 'most'} {self.limit:,g} {self.unit}"

    @classmethod
    def read(cls, plain: dict[str, Any]) -> Row:
        """The row that `asdict` had made. Raises ValueError for what is none."""
        try:
            row = cls(**plain)
            sides = {side: [float(each) for each in figures] for side, figures in row.sides.items()}
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a row of a measurement: {error}") from None
        row.sides = sides
        return row


def plain(rows: Iterable[Row]) -> dict[str, Any]:
    """All that a report needs, for JSON: the machine, and the rows."""
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}


def figure(value: float, unit: str) -> str:
    """One figure with the digits that its unit has, and two more where little is left of it by them."""
    digits = DIGITS.get(unit, 2)
    if value and abs(value) < 10.0 ** (1 - digits):
        digits += 1 if abs(value) >= 10.0**-digits else 3
    return f"{value:,.{digits}f}"


def spread(figures: list[float], unit: str) -> str:
    """Median and range, the unit left out: ``5,200 [4,900-5,400]``; the figure alone where there is one."""
    middle = figure(statistics.median(figures), unit)
    if len(figures) == 1:
        return middle
    return f"{middle} [{figure(min(figures), unit)}-{figure(max(figures), unit)}]"


def title(row: Row) -> str:
    """What a row measured, with its limit."""
    return f"{row.question}: {row.name}" + (f" ({row.demand})" if row.demand else "")


def faults(rows: Iterable[Row]) -> list[str]:
    """A line for each row whose figures are not valid: its bare loop is too slow to be a ceiling."""
    return [
        f"the run of {row.question} is not valid: in {row.name!r} the {TUNED} is only {ratio:.2f} times as fast "
        f"as {STOCK}, where {least} times is the least: the machine was disturbed, or the loop has a fault"
        for row in rows
        if (least := TUNED_LEAST.get(row.question)) and (ratio := row.ratio(STOCK, TUNED)) and ratio < least
    ]


def table(rows: Iterable[Row]) -> str:
    """The rows as text: a line for each side, ours first; the ratio is ours to the side beside it. Last, the faults."""
    rows = [*rows]
    lines: list[str] = []
    for row in rows:
        verdict = {True: "  met", False: "  NOT met", None: ""}[row.met]
        lines.append(f"{title(row)}{verdict}")
        for side in ordered([*row.sides, *row.how]):
            figures = row.sides.get(side)
            told = f"{spread(figures, row.unit)} {row.unit}" if figures else "-"
            ratio = None if side == OURS else row.ratio(side)
            beside = "" if ratio is None else f"{ratio:.2f}"
            lines.append(f"  {side:24} {told:>36} {beside:>7}  {row.how.get(side, '')}".rstrip())
    return "\n".join([*lines, *faults(rows)])


def kin(row: Row) -> str:
    """The name that all rows of one curve have: N in the place of `x`."""
    if row.x is None:
        return row.name
    return re.sub(rf"(?<![\w,]){row.x:,.0f}(?![\w,])", "N", row.name)


def ordered(sides: Iterable[str]) -> list[str]:
    """Ours first, then raw nats-py, then the others as they come."""
    return sorted(dict.fromkeys(sides), key=lambda side: (side != OURS, side != RAW))
