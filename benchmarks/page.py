"""The page of a run, in Markdown: how it was measured, a table for each question, and where aiqueue is not ahead."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from . import machine
from .questions import ALL, ROWS, Question
from .report import OURS, RAW, STOCK, TUNED, TUNED_LEAST, Row, faults, kin, ordered, spread
from .results import Asked, Results

EQUAL = 1.25  # on a shared machine a smaller difference is none
# What a peer does less than the others: a job that its worker had when it died is gone.
EARLY = {
    "huey": "takes a job off its list and never acknowledges it",
    "celery": "acknowledges a job before it runs it",
}
PICTURES = {
    "throughput": "peers", "latency": "peers", "cost": "peers", "raw": "drain", "backlog": "backlog",
    "tenants": "tenants", "payload": "payload", "durability": "durability",
}  # fmt: skip
HEAD = """# Measurements

How fast aiqueue is, beside a plain loop on the client library that it is built on (raw nats-py), and other queues.
This page is written by `make bench`, from what is kept in [results.json](results.json).
What retrieval finds is measured on [a page of its own](retrieval.md).

All figures are medians over the rounds, with the least and the most in brackets. Compare within a table only: its sides
ran in turns on one machine, and the same side reads differently an hour later. What travels is the ratio. *Ahead by* is
that ratio, turned so that above 1.00 aiqueue is the better side; on a shared machine, less than 25 % is no difference.
"""
METHOD = f"""## How it is measured

- Every question has a fresh server in a temporary directory, and a process of its own. Its sides alternate in each
  round (A B A B), so that a machine that changes its speed does so for all of them.
- The job is a no-op with a number, a time and 160 characters: 183 bytes as CBOR. The raw side has the same headers,
  message id and codec, and decodes each body. It keeps no results, retries nothing, and has no leases: it is the
  floor, not a rival.
- The {TUNED} is what nats-py can do for one program with its own calls, without headers and without all that makes a
  job: the ceiling. {STOCK.capitalize()} does the same with the calls of its manual. A run in which the {TUNED} is not
  {TUNED_LEAST["drain"]} times as fast in draining, or {TUNED_LEAST["many"]} times in bulk, is not valid, and says so.
- Every job is looked for: a run that misses one, or has run one twice where that is counted, is an error and no figure.
- Clients, workers and servers share the cores of the machine. A rate is that of the whole system.
- All sides use uvloop where it is installed, which the machine's line below says, and rare garbage collections, as
  `aiqueue work` sets them.
- A latency is from the call to the handler's first line, in an open loop: who calls late counts from his schedule.

## Durability is not the same everywhere

| server | as measured here | a crash of the machine loses at most |
|---|---|---|
| NATS, aiqueue's default | file storage, one server, synced every 2 minutes | the last 2 minutes |
| Redis | append-only file, `everysec` | about the last second |
| RabbitMQ | durable queue, persistent messages | what was not confirmed |
| PostgreSQL | `fsync` on, each commit | nothing |

A server of NATS that syncs every write, and a cluster of three, are under *Durability*. What each queue is set to
stands below the tables.
"""
AGAIN = """## Run it again

```sh
make bench                         # all of it; it says first about how long that takes
make bench ARGS="all --quick"      # a few minutes, to see that it works, into build/benchmarks
make bench ARGS="all --only drain" # one question again, into this page
make bench ARGS="drain"            # one question, on the terminal only
make bench ARGS="report"           # this page and its pictures, of the results that are kept
```

## What these figures are not

- A no-op job shows what a queue costs. Where a job takes 5 ms, most differences are gone but for latency and CPU.
- All is on one machine, over loopback: a network adds its round trip to each figure that has one.
- The machine may be shared. A range that is wide says so; a single round says nothing about the range at all.
- No power was cut. What a server syncs is what it says that it does.
"""


def ahead(row: Row, side: str) -> float | None:
    """By how much ours is better than a side: above 1 it is. None where one of them has no figures."""
    ratio = row.ratio(side)
    if not ratio:
        return None
    return ratio if row.more_is_better else 1 / ratio


def early(side: str) -> bool:
    """Whether a peer lets go of a job before it has run."""
    return any(side.lower().startswith(name) for name in EARLY)


def rival(row: Row) -> str | None:
    """The best peer that acknowledges its jobs when they have run."""
    sides = [side for side, figures in row.sides.items() if figures and side not in (OURS, RAW) and not early(side)]
    if row.question != "peers" or not sides:
        return None
    best = max if row.more_is_better else min
    return best(sides, key=row.median)


def markdown(results: Results, drawn: dict[str, str], left: Iterable[str] = ()) -> str:
    """The whole page. `drawn` has the pictures that there are beside it, with what they show."""
    parts = [HEAD, *(f"**{each}.**" for each in faults(results.rows)), behind(results.rows)]
    parts += [part for name in ("targets", "peers") if (part := section(name, results, drawn))]
    parts.append(METHOD)
    parts += [part for name in ROWS if name != "targets" and (part := section(name, results, drawn))]
    parts += [machines(results), omitted(results, left), AGAIN]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def behind(rows: list[Row]) -> str:
    """Where aiqueue is not ahead: of the best peer, of raw nats-py, and of what was promised."""
    worse = [(row, side, found) for row in rows for side in (rival(row), RAW if RAW in row.sides else None)
             if side and (found := ahead(row, side)) is not None and found < 1]  # fmt: skip
    clear = [each for each in worse if each[2] <= 1 / EQUAL]
    lines = ["## Where aiqueue is not ahead", ""]
    if not rows:
        return "\n".join([*lines, "Nothing has been measured yet."])
    lines.append("The figures are *ahead by*: below 1.00 the other side is the better one.")
    lines += ["", "Clearly behind:", "", *(_by_question(clear) or ["- nowhere"])]
    if equal := [each for each in worse if each not in clear]:
        lines += ["", "Behind by less than 25 %, which is no difference here:", "", *_by_question(equal)]
    unmet = [f"- {row.name}: {cell(row, OURS)}, where {row.demand} is demanded" for row in rows if row.met is False]
    if unmet:
        lines += ["", "Targets that are not met:", "", *unmet]
    return "\n".join(lines)


def _by_question(worse: list[tuple[Row, str, float]]) -> list[str]:
    """A line a question, the worst first."""
    told: dict[str, list[str]] = {}
    for row, side, found in sorted(worse, key=lambda each: each[2]):
        title = ALL[row.question].title if row.question in ALL else row.question
        told.setdefault(title, []).append(f"{row.name}, {side} ({found:.2f})")
    return [f"- {title}: {'; '.join(each)}" for title, each in told.items()]


def section(name: str, results: Results, drawn: dict[str, str]) -> str:
    """A question's part of the page, empty where it has no rows."""
    rows = results.of(name)
    if not rows:
        return ""
    question = ALL.get(name) or Question(name, "", 0, 0)
    lines = [f"## {question.title}", "", question.about, _asked(results.asked.get(name)), ""]
    lines += [f"**{each}.**\n" for each in faults(rows)]
    for picture, of in PICTURES.items():
        if of == name and picture in drawn:
            lines += [f"![{drawn[picture]}]({picture}.png)", ""]
    tables = {"targets": targets, "peers": peers}
    lines += tables.get(name, plain)(rows)
    lines += ["", *settings(rows)]
    if name in results.asked:
        lines += [f"- {note}" for note in results.asked[name].notes]
        lines += [f"- {side} was skipped: {reason}" for side, reason in results.asked[name].skipped.items()]
    return "\n".join(lines)


def _asked(asked: Asked | None) -> str:
    if asked is None:
        return ""
    rounds = "1 round" if asked.rounds == 1 else f"{asked.rounds} rounds"
    return f"Asked on {asked.day} with {rounds} of {asked.jobs:,} jobs; it took {asked.seconds:,.0f} s."


def line(cells: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(each.replace("|", "\\|") for each in cells) + " |"


def head(cells: list[str]) -> list[str]:
    return [line(cells), "|" + "---|" * len(cells)]


def cell(row: Row, side: str, *, unit: bool = True) -> str:
    """A side's figures, or a dash."""
    if not (figures := row.sides.get(side)):
        return "-"
    return spread(figures, row.unit) + (f" {row.unit}" if unit else "")


def factor(row: Row, side: str | None) -> str:
    """By how much ours is ahead of a side, as a cell."""
    found = None if side is None else ahead(row, side)
    return "-" if found is None else f"{found:.2f}"


def plain(rows: list[Row]) -> list[str]:
    """A line a measurement, those of one curve together, and a column a side."""
    curves = list(dict.fromkeys(map(kin, rows)))
    rows = sorted(rows, key=lambda row: curves.index(kin(row)))
    sides = ordered(side for row in rows for side in row.sides)
    pairs = any({OURS, RAW} <= {*row.sides} for row in rows)
    limits = any(row.limit is not None for row in rows)
    lines = head(["", *sides, *(["ahead of raw by"] if pairs else []), *(["demanded"] if limits else [])])
    for row in rows:
        last = [*([factor(row, RAW)] if pairs else []), *([_demand(row)] if limits else [])]
        lines.append(line([row.name, *(cell(row, side) for side in sides), *last]))
    return lines


def _demand(row: Row) -> str:
    """What is demanded of a row, and whether it is met."""
    verdict = {True: "met", False: "**not met**", None: "not measured"}[row.met]
    return f"{row.demand}: {verdict}" if row.demand else "-"


def targets(rows: list[Row]) -> list[str]:
    lines = head(["", "demanded", "measured", ""])
    for row in rows:
        verdict = {True: "met", False: "**not met**", None: row.how.get(OURS, "not measured")}[row.met]
        lines.append(line([row.name, row.demand, cell(row, OURS), verdict]))
    return lines


def peers(rows: list[Row]) -> list[str]:
    """A table for each unit, a line a queue; then how far ahead we are."""
    lines: list[str] = []
    for unit in dict.fromkeys(row.unit for row in rows):
        some = [row for row in rows if row.unit == unit]
        sides = ordered(side for row in some for side in row.sides)
        lines += head([unit, *(row.name for row in some)])
        lines += [line([side, *(cell(row, side, unit=False) for row in some)]) for side in sides]
        lines.append("")
    lines += [
        "How far aiqueue is ahead of the best queue that acknowledges a job when it has run, and of raw nats-py:",
        "",
    ]
    lines += head(["", "best other", "ahead of it by", "ahead of raw nats-py by"])
    for row in rows:
        best = rival(row)
        lines.append(line([row.name, best or "-", factor(row, best), factor(row, RAW)]))
    found = {side for row in rows for side in row.sides if early(side)}
    lines += [""] if found else []
    for side in sorted(found):
        why = next(why for name, why in EARLY.items() if side.lower().startswith(name))
        lines.append(f"- {side} {why}: a worker that dies loses what it has, so it is not counted as the best other")
    return lines


def settings(rows: list[Row]) -> list[str]:
    """What each side does, once for each way that there is."""
    told = dict.fromkeys((side, how) for row in rows if row.question != "targets" for side, how in row.how.items())
    sides = ordered(side for side, _ in told)
    return [f"- {side}: {'; or '.join(how for each, how in told if each == side)}" for side in sides]


def machines(results: Results) -> str:
    """Where it was measured, each machine once."""
    lines = ["## The machine", ""]
    known: dict[str, tuple[dict[str, Any], list[str]]] = {}
    for question, asked in results.asked.items():
        known.setdefault(json.dumps(asked.machine, sort_keys=True), (asked.machine, []))[1].append(question)
    lines += [f"- {', '.join(questions)}: {machine.line(told)}" for told, questions in known.values()]
    return "\n".join(lines if known else [*lines, "Nothing has been measured yet."])


def omitted(results: Results, left: Iterable[str]) -> str:
    """What this page has not, and why."""
    lines = [f"- {name}: {reason}" + (" (the figures above are older)" if results.of(name) else "")
             for name, reason in results.failed.items()]  # fmt: skip
    lines += [f"- {name}: not measured" for name in ALL if not results.of(name) and name not in results.failed]
    lines += [f"- {each}" for each in left]
    return "\n".join(["## What was left out", "", *(lines or ["Nothing."])])
