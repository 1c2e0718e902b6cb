"""The pictures of a report, as PNG and SVG; the same rows give the same bytes. Needs matplotlib.

Figures are medians over the rounds, whiskers go from the least to the most. Colours are Okabe and Ito's, and no side is
told by its colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # before pyplot: there may be no screen

import matplotlib.pyplot as plt
from matplotlib.patches import Patch

from .report import OURS, RAW, Row, figure, kin, ordered

BLUE, ORANGE, GREEN, PURPLE, SKY, AMBER, GREY, LIGHT = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555", "#B8B8B8",
)  # fmt: skip
MORE = ((ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"), (SKY, "v"))
STYLE = {
    "figure.dpi": 120, "savefig.dpi": 120, "font.size": 9, "axes.titlesize": 10, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "grid.color": "#DDDDDD", "svg.hashsalt": "aiqueue",
    "figure.constrained_layout.use": True,
}  # fmt: skip
UNITS = {"/s": "jobs a second", "ms": "ms", "s": "seconds", "CPU s": "CPU seconds", "MiB": "MiB"}
SCALES = {"backlog": "jobs waiting", "tenants": "tenants", "payload": "bytes of a body"}
LOG_ABOVE = 50  # where the most is so many times the least, an axis is logarithmic
PARTS = (("producer", SKY), ("worker", AMBER), ("server", "#8A8A8A"))
PERCENTS = (("50", "o"), ("95", "D"), ("99", "^"))
LATENCY = re.compile(r"latency at ([\d,]+)/s, p(\d+)")
SERVERS = re.compile(r", (R\d(?: sync always)?)\b")

Picture = tuple[Any, str]  # a figure, and what it shows in words


def draw(rows: list[Row], out: Path) -> tuple[dict[str, str], list[str]]:
    """Write all pictures that the rows are enough for: their names with what they show, and what is left out."""
    makers: dict[str, Callable[[list[Row]], Picture | None]] = {
        "throughput": throughput, "latency": latency, "cost": cost, "raw": beside_raw,
        **{name: partial(growth, name) for name in SCALES},
        "durability": durability,
    }  # fmt: skip
    drawn: dict[str, str] = {}
    left: list[str] = []
    for name, make in makers.items():
        with mpl.rc_context(STYLE):
            made = make([row for row in rows if any(row.sides.values())])
            if made is None:
                left.append(f"the picture {name!r}: there are no rows for it")
                for kind in ("png", "svg"):
                    (out / f"{name}.{kind}").unlink(missing_ok=True)  # of an earlier run: it would be a lie by now
                continue
            sheet, drawn[name] = made
            sheet.savefig(out / f"{name}.png", metadata={"Software": None})
            sheet.savefig(out / f"{name}.svg", metadata={"Date": None, "Creator": None})
            plt.close(sheet)
    return drawn, left


def _named(rows: Iterable[Row], question: str, *names: str) -> list[Row]:
    """The rows of a question by their names, in that order, without those that are missing."""
    found = {row.name: row for row in rows if row.question == question}
    return [found[name] for name in names if name in found]


def _colour(side: str) -> str:
    return {OURS: BLUE, RAW: GREY}.get(side, LIGHT)


def _mark_names(axes: Any) -> None:
    """Ours in bold on the left."""
    for label in axes.get_yticklabels():
        if label.get_text() == OURS:
            label.set_fontweight("bold")
            label.set_color(BLUE)


def _whiskers(figures: list[float], middle: float) -> list[list[float]]:
    return [[middle - min(figures)], [max(figures) - middle]]


def _ranking(rows: list[Row]) -> list[str]:
    """The sides, best of the first row first, those that it lacks last."""
    first = rows[0]
    sides = dict.fromkeys(side for row in rows for side, figures in row.sides.items() if figures)
    sign = -1 if first.more_is_better else 1
    return sorted(sides, key=lambda side: sign * first.median(side) if first.sides.get(side) else float("inf"))


def _bars(axes: Any, row: Row, sides: list[str]) -> None:
    """One measurement: a bar for each side, its median written behind it."""
    most = max(max(figures) for figures in row.sides.values() if figures)
    for place, side in enumerate(sides):
        figures = row.sides.get(side)
        if not figures:
            axes.text(0, place, " no figure", va="center", color=GREY, fontsize=8)
            continue
        middle = row.median(side)
        axes.barh(place, middle, color=_colour(side), height=0.7)
        if len(figures) > 1:
            axes.errorbar(middle, place, xerr=_whiskers(figures, middle), color="black", capsize=2, linewidth=0.8)
        axes.text(max(figures) + most * 0.015, place, figure(middle, row.unit), va="center", fontsize=8)
    axes.set(yticks=range(len(sides)), yticklabels=sides, title=row.name, xlabel=UNITS.get(row.unit, row.unit))
    axes.set_xlim(0, most * 1.2)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,g}"))
    axes.grid(axis="x")


def throughput(rows: list[Row]) -> Picture | None:
    """Enqueueing and draining beside other queues, all in the order of the drain of one worker."""
    drains = _named(rows, "peers", "drain, one worker", "drain, two workers")
    found = [*_named(rows, "peers", "enqueue, one awaited at a time", "enqueue, bulk"), *drains]
    if not found:
        return None
    sides = _ranking(drains or found)
    across = min(2, len(found))
    down = -(-len(found) // across)
    sheet, grid = plt.subplots(down, across, figsize=(5.2 * across, (0.9 + 0.27 * len(sides)) * down), sharey=True,
                               squeeze=False)  # fmt: skip
    for axes, row in zip(grid.flat, found, strict=False):
        _bars(axes, row, sides)
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    grid.flat[0].invert_yaxis()
    for axes in grid[:, 0]:
        _mark_names(axes)
    return sheet, "Jobs a second of aiqueue and other queues: enqueued one by one and in bulk, drained by workers"


def latency(rows: list[Row]) -> Picture | None:
    """p50, p95 and p99 of each queue, on a logarithmic scale: they are far apart."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.question == "peers" and (match := LATENCY.fullmatch(row.name)):
            found.setdefault(match[1], {})[match[2]] = row
    if not found:
        return None
    sides = _ranking([row for percents in found.values() for row in percents.values()])
    sheet, grid = plt.subplots(1, len(found), figsize=(5.2 * len(found), 1.4 + 0.27 * len(sides)), sharey=True,
                               squeeze=False)  # fmt: skip
    for axes, (rate, percents) in zip(grid.flat, found.items(), strict=True):
        for percent, marker in PERCENTS:
            if (shown := percents.get(percent)) is None:
                continue
            known = [(place, side) for place, side in enumerate(sides) if shown.sides.get(side)]
            for place, side in known:
                figures, middle = shown.sides[side], shown.median(side)
                colour = _colour(side) if side in (OURS, RAW) else "#888888"
                axes.errorbar(middle, place, xerr=_whiskers(figures, middle), color=colour, marker=marker,
                              markersize=6 if side == OURS else 5, linewidth=0.8, capsize=2)  # fmt: skip
            axes.plot([], [], color="black", marker=marker, linestyle="", label=f"p{percent}")
        axes.set(xscale="log", yticks=range(len(sides)), yticklabels=sides, xlabel="ms from the call to the handler",
                 title=f"{int(rate.replace(',', '')):,} jobs a second")  # fmt: skip
        axes.xaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,g}"))
        axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="both")
    sheet.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    grid[0, 0].set_ylim(len(sides) - 0.5, -0.5)
    _mark_names(grid[0, 0])
    return sheet, "Time from the enqueue call to the handler, aiqueue and other queues, p50, p95 and p99"


def cost(rows: list[Row]) -> Picture | None:
    """CPU of 10,000 jobs by process, and a worker's memory."""
    parts = {part: each for part, _ in PARTS for each in _named(rows, "peers", f"CPU of 10,000 jobs, {part}")}
    whole = _named(rows, "peers", "CPU of 10,000 jobs, all")
    memory = _named(rows, "peers", "memory of one worker")
    if not whole and not memory:
        return None
    sides = _ranking([*whole, *memory])
    sheet, grid = plt.subplots(1, len(whole) + len(memory), figsize=(10.4, 1.2 + 0.27 * len(sides)), sharey=True,
                               squeeze=False)  # fmt: skip
    panels = iter(grid.flat)
    for row in whole:
        axes = next(panels)
        _bars(axes, row, sides)
        axes.set_title("CPU of 10,000 jobs, enqueued in bulk and run")
        for bar in list(axes.patches):
            bar.remove()
        for place, side in enumerate(sides):
            at = 0.0
            for part, colour in PARTS:
                if part in parts and parts[part].sides.get(side):
                    middle = parts[part].median(side)
                    axes.barh(place, middle, left=at, color=colour, height=0.7)
                    at += middle
        sheet.legend(handles=[Patch(color=colour, label=part) for part, colour in PARTS], loc="outside lower left",
                     ncols=3, frameon=False)  # fmt: skip
    for row in memory:
        _bars(next(panels), row, sides)
    grid[0, 0].invert_yaxis()
    _mark_names(grid[0, 0])
    return sheet, "CPU seconds of 10,000 jobs by process, and the memory of a worker, aiqueue and other queues"


def beside_raw(rows: list[Row]) -> Picture | None:
    """Rates of aiqueue and of a bare loop on its client library."""
    found = [row for row in rows if row.question in ("enqueue", "many", "drain") and {OURS, RAW} <= {*row.sides}]
    if not found:
        return None
    sheet, axes = plt.subplots(figsize=(8.5, 0.9 + 0.62 * len(found)))
    _pairs(axes, {row.name: row for row in found}, "jobs a second")
    _legend_of_pairs(sheet)
    return sheet, "Jobs a second of aiqueue and of a plain loop on raw nats-py"


def _pairs(axes: Any, rows: dict[str, Row], unit: str) -> None:
    """For each row a bar of ours above one of raw nats-py."""
    most = max(max(figures) for row in rows.values() for figures in row.sides.values() if figures)
    for place, row in enumerate(rows.values()):
        for shift, side in ((-0.19, OURS), (0.19, RAW)):
            if not (figures := row.sides.get(side)):
                continue
            middle = row.median(side)
            axes.barh(place + shift, middle, height=0.36, color=_colour(side), hatch="" if side == OURS else "//",
                      edgecolor="white", linewidth=0)  # fmt: skip
            if len(figures) > 1:
                axes.errorbar(middle, place + shift, xerr=_whiskers(figures, middle), color="black", capsize=2,
                              linewidth=0.8)  # fmt: skip
            axes.text(max(figures) + most * 0.01, place + shift, figure(middle, row.unit), va="center", fontsize=8)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows), xlabel=unit)
    axes.set_xlim(0, most * 1.18)
    axes.xaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,g}"))
    axes.grid(axis="x")
    axes.invert_yaxis()


def _legend_of_pairs(sheet: Any) -> None:
    handles = [Patch(facecolor=_colour(side), edgecolor="white", linewidth=0, hatch="" if side == OURS else "//",
                     label=side) for side in (OURS, RAW)]  # fmt: skip
    sheet.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)


def growth(question: str, rows: list[Row]) -> Picture | None:
    """Curves over what grows: a panel a measurement, a curve a side."""
    curves: dict[str, list[Row]] = {}
    for row in rows:
        if row.question == question and row.x is not None:
            curves.setdefault(kin(row), []).append(row)
    curves = {name: each for name, each in curves.items() if len(each) > 1}
    if not curves:
        return None
    across = min(3, len(curves)) if len(curves) != 4 else 2
    down = -(-len(curves) // across)
    sheet, grid = plt.subplots(down, across, figsize=(3.9 * across, 3.1 * down + 0.4), squeeze=False)
    sides = ordered(side for row in rows if row.question == question and row.x is not None for side in row.sides)
    looks = {OURS: (BLUE, "o"), RAW: (GREY, "x")}
    looks |= dict(zip([side for side in sides if side not in looks], MORE * len(sides), strict=False))
    for axes, (name, points) in zip(grid.flat, curves.items(), strict=False):
        _curve(axes, sorted(points, key=lambda row: row.x or 0), {side: looks[side] for side in sides})
        axes.set(title=name, xlabel=SCALES[question], ylabel=UNITS.get(points[0].unit, points[0].unit))
    for axes in grid.flat[len(curves) :]:
        axes.set_visible(False)
    for side in sides:
        colour, marker = looks[side]
        grid[0, 0].plot([], [], color=colour, marker=marker, linestyle="--" if side == RAW else "-", label=side)
    sheet.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sides), frameon=False)
    return sheet, f"Figures of aiqueue over the number of {SCALES[question]}"


def _curve(axes: Any, points: list[Row], looks: dict[str, tuple[str, str]]) -> None:
    middles: list[float] = []
    most = 0.0
    for side, (colour, marker) in looks.items():
        mine = [row for row in points if row.sides.get(side)]
        if not mine:
            continue
        x, y = [row.x for row in mine], [row.median(side) for row in mine]
        low = [each - min(row.sides[side]) for row, each in zip(mine, y, strict=True)]
        high = [max(row.sides[side]) - each for row, each in zip(mine, y, strict=True)]
        axes.errorbar(x, y, yerr=[low, high], color=colour, marker=marker, markersize=5, capsize=2,
                      linestyle="--" if side == RAW else "-", linewidth=1.8 if side == OURS else 1.3)  # fmt: skip
        middles += y
        most = max(most, *(max(row.sides[side]) for row in mine))
    if all(row.x for row in points):
        axes.set_xscale("log")
    if min(middles) > 0 and max(middles) / min(middles) > LOG_ABOVE:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, most * 1.1 or 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(mpl.ticker.FuncFormatter(short))
    axes.grid(axis="both")


def short(value: float, _: object = None) -> str:
    """A round number as an axis has room for it: 500, 2,500, 20k, 1M."""
    for size, letter in ((1e6, "M"), (1e4, "k")):
        if value >= size:
            return f"{value / (1e6 if letter == 'M' else 1e3):,g}{letter}"
    return f"{value:,g}"


def durability(rows: list[Row]) -> Picture | None:
    """What safety costs: a panel a measurement, a pair of bars for each kind of server."""
    panels: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.question == "durability" and (match := SERVERS.search(row.name)):
            panels.setdefault(SERVERS.sub("", row.name), {})[match[1]] = row
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    deep = max(map(len, panels.values()))
    sheet, grid = plt.subplots(down, across, figsize=(5.2 * across, (0.9 + 0.4 * deep) * down + 0.4), squeeze=False)
    for axes, (name, each) in zip(grid.flat, panels.items(), strict=False):
        _pairs(axes, each, UNITS.get(next(iter(each.values())).unit, ""))
        axes.set_title(name)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _legend_of_pairs(sheet)
    return sheet, "Rates and latencies on one server and on a cluster of three, synced now and then or at every write"
