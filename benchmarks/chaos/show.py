"""A report for people: a table, a plot of the throughput with the faults marked, and the plot as SVG."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .checker import Recovery
from .nemesis import LETTERS
from .soak import Report

HEIGHT = 8  # lines of the plot
BLOCKS = " ▁▂▃▄▅▆▇█"
COLOURS = {"w": "yellow", "s": "yellow", "z": "red", "p": "red", "L": "magenta", "P": "magenta", "d": "cyan",
           "f": "red", "c": "blue"}  # fmt: skip


def throughput(report: Report, columns: int) -> list[float]:
    """Ends of runs a second, over so many equal parts of the run's time."""
    width_s = max(report.took_s, 1e-9) / columns
    counts = [0] * columns
    for run in report.runs:
        if run.end is not None:
            counts[min(columns - 1, max(0, int((run.end - report.begun) / width_s)))] += 1
    return [count / width_s for count in counts]


def plot(report: Report, columns: int = 100) -> list[str]:
    """Bars of HEIGHT lines, the faults' letters below them, and an axis of time. Plain text."""
    rates = throughput(report, columns)
    top = max([*rates, 1.0])
    lines = []
    for level in range(HEIGHT - 1, -1, -1):
        eighths = [min(8, max(0, round(rate / top * HEIGHT * 8) - level * 8)) for rate in rates]
        label = f"{top:8,.0f}/s " if level == HEIGHT - 1 else " " * 11
        lines.append(label + "".join(BLOCKS[each] for each in eighths))
    marks = [" "] * (columns + len(report.faults))
    for fault in report.faults:
        place = min(columns - 1, int((fault.at - report.begun) / max(report.took_s, 1e-9) * columns))
        marks[marks.index(" ", place)] = LETTERS[fault.kind]  # two at once stand side by side
    axis = f"0 s{report.took_s:>{columns - 5}.0f} s"
    return [*lines, " " * 11 + "".join(marks), " " * 11 + axis]


def show(report: Report, console: Console) -> None:
    """Print the table, the recoveries and the plot."""
    console.print(_results(report))
    if report.recoveries:
        console.print(_recovered(report.recoveries))
    for line in plot(report, max(20, min(160, console.width - 12))):
        text = Text(line)
        if not any(block in line for block in BLOCKS[1:]):
            for letter, colour in COLOURS.items():
                text.highlight_words([letter], colour)
        console.print(text)
    seen = dict.fromkeys(fault.kind for fault in report.faults)
    console.print("   ".join(f"{LETTERS[kind]} {kind}" for kind in seen), style="dim", highlight=False)
    for line in report.surprises:
        console.print(f"surprise: {line}", style="red", highlight=False)


def _results(report: Report) -> Table:
    verdict = report.verdict
    table = Table(title=f"seed {report.options.seed}, {report.took_s:.1f} s, {len(report.faults)} faults")
    table.add_column("what")
    table.add_column("jobs", justify="right")
    table.add_column("")
    rows: list[tuple[str, int, str]] = [
        ("acknowledged", verdict.acknowledged, f"{verdict.refused:,} refused, {verdict.unknown:,} unknown"),
        ("completed", verdict.completed, "of those acknowledged: the handler ended, the result is kept"),
        ("dead letters", verdict.dead, "of those acknowledged"),
        ("lost", len(verdict.lost), "acknowledged, neither completed nor a dead letter"),
        ("overwritten", len(verdict.overwritten), "results with a second final entry, or of no run that ended"),
        ("repeated", verdict.repeats, f"runs beyond the first; {verdict.in_flight:,} runs were in flight at faults"),
        ("unexplained", len(verdict.unexplained), "repeated though no fault met an earlier run"),
        ("double effects", verdict.double_effects, "at least once, not exactly once: at most as many as repeated"),
        ("left", verdict.left, "stored still at the end"),
    ]
    for what, count, told in rows:
        bad = what in ("lost", "overwritten", "unexplained", "left") and count
        table.add_row(what, f"{count:,}", told, style="red" if bad else None)
    return table


def _recovered(recoveries: Sequence[Recovery]) -> Table:
    table = Table(title="recovery in seconds: median / longest")
    for name in ("fault", "times", "longest silence", "first job after it was back", "its jobs begun elsewhere"):
        table.add_column(name, justify="left" if name == "fault" else "right")
    for each in recoveries:
        cells = [_spread(waits) for waits in (each.silence, each.after_back, each.elsewhere)]
        table.add_row(each.kind, str(each.times), *cells)
    return table


def _spread(waits: Sequence[float]) -> str:
    return f"{statistics.median(waits):.2f} / {max(waits):.2f}" if waits else ""


def svg(report: Report, width: int = 960, height: int = 240) -> str:
    """The plot as a picture: a line of the throughput, and a line down for each fault."""
    rates = throughput(report, max(20, min(480, int(report.took_s * 4))))
    top = max([*rates, 1.0])

    def across(seconds: float) -> float:
        return 50 + seconds / max(report.took_s, 1e-9) * (width - 60)

    def up(rate: float) -> float:
        return height - 30 - rate / top * (height - 50)

    step = report.took_s / len(rates)
    points = " ".join(f"{across((place + 0.5) * step):.1f},{up(rate):.1f}" for place, rate in enumerate(rates))
    size = f'width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *(_stroke(across(fault.at - report.begun), fault, height) for fault in report.faults),
        f'<polyline points="{points}" fill="none" stroke="black" stroke-width="1.2"/>',
        f'<text x="4" y="{up(top):.0f}">{top:,.0f}/s</text><text x="4" y="{up(0):.0f}">0</text>',
        f'<text x="{width - 40}" y="{height - 2}">{report.took_s:.0f} s</text>',
        "</svg>",
    ]
    return "\n".join(parts)


def _stroke(x: float, fault: Any, height: int) -> str:
    letter = LETTERS[fault.kind]
    colour = COLOURS[letter].replace("yellow", "orange")
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{height - 26}" stroke="{colour}" stroke-width="0.6">'
        f"<title>{escape(fault.kind)}: {escape(fault.what)}</title></line>"
        f'<text x="{x:.1f}" y="{height - 14}" fill="{colour}" text-anchor="middle">{letter}</text>'
    )
