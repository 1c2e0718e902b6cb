"""The demo's output: timestamped lines, a live table below them, and the tables at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ...enqueue import DeadLetter
from ...inspect import FamilyStats
from ...units import short_duration, short_size
from .ledger import FAMILIES, Count, Ledger

EVENTS_MAX = 8  # per stage, so that a hundred broken files do not scroll the other lines away
PROGRESS_EVERY_S = 2.0
RATE_OVER_S = 2.0
PATH_WIDTH = 44


class Board(Protocol):
    """What a demo shows of its progress."""

    def draw(self) -> RenderableType:
        """Return the live table."""

    def describe(self) -> str:
        """Return the same in one line, for an output that is no terminal."""


class Screen:
    """Prints to a terminal, a file or a pipe; with `quiet`, prints nothing.

    If the reader has closed the pipe, any method raises SystemExit(1) (rich does).
    """

    def __init__(self, *, quiet: bool) -> None:
        self.console = Console(quiet=quiet, highlight=False, emoji=False)
        self._started_at = time.monotonic()
        self._events = 0
        self._live: Live | None = None
        self._next_progress_at = 0.0

    def say(self, text: str, style: str = "") -> None:
        """Print a line with the seconds since the start."""
        at = f"{time.monotonic() - self._started_at:6.1f}s "
        lines = Text(text, style=style).wrap(self.console, max(20, self.console.width - len(at)), overflow="fold")
        for number, line in enumerate(lines):
            line.rstrip()
            self.console.print(Text(at if number == 0 else " " * len(at), style="dim"), line, sep="", soft_wrap=True)

    def command(self, text: str) -> None:
        """Print a command to copy, never wrapped."""
        self.console.print(Text(f"         {text}"), soft_wrap=True)

    def event(self, text: str) -> None:
        """Print an event of a job, for the first EVENTS_MAX events of a stage."""
        self._events += 1
        if self._events <= EVENTS_MAX:
            self.say(text, "green" if "succeeded" in text else "yellow")
        elif self._events == EVENTS_MAX + 1:
            self.say("further events are not listed, only counted below", "dim")

    def show(self, *tables: RenderableType) -> None:
        """Print tables, with blank lines around them."""
        for table in tables:
            self.console.print()
            self.console.print(Padding(table, (0, 0, 0, 1), expand=False))
        self.console.print()

    @contextmanager
    def watching(self, board: Board) -> Iterator[None]:
        """Keep the live table below the lines while the block runs; `tick` refreshes it."""
        self._events = 0
        if self.console.quiet or not self.console.is_terminal or self.console.is_dumb_terminal:
            self._next_progress_at = time.monotonic() + PROGRESS_EVERY_S
            yield
            return
        with Live(board.draw(), console=self.console, auto_refresh=False, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def tick(self, board: Board) -> None:
        """Refresh the live table, or print the progress if the output is no terminal."""
        if self._live is not None:
            self._live.update(board.draw(), refresh=True)
        elif time.monotonic() >= self._next_progress_at:
            self._next_progress_at = time.monotonic() + PROGRESS_EVERY_S
            self.say(board.describe())


class JobBoard:
    """The progress of jobs by tenant and family."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._finished: deque[tuple[float, int]] = deque()

    def describe(self) -> str:
        """See `Board`."""
        count = self._ledger.count()
        return f"{count.done} of {count.enqueued} jobs done, {count.retries} retries, {count.dead} dead letters"

    def draw(self) -> RenderableType:
        """See `Board`."""
        ledger = self._ledger
        total = ledger.count()
        table = plain_table("")
        table.add_column("tenant", no_wrap=True)
        table.add_column("family", no_wrap=True)
        for name in ("enqueued", "running", "retries", "done", "dead"):
            table.add_column(name, justify="right", min_width=8)
        for tenant in ledger.tenants:
            for family in FAMILIES:
                table.add_row(tenant, family, *_cells(ledger.count(tenant, family)))
        table.add_row()
        table.add_row("all", "", *_cells(total), style="bold")
        return Padding(Group(table, Text(self._caption(total), style="dim")), (1, 0, 0, 1))

    def _caption(self, total: Count) -> str:
        now = time.monotonic()
        self._finished.append((now, total.done))
        while len(self._finished) > 2 and self._finished[0][0] < now - RATE_OVER_S:
            self._finished.popleft()
        since, done = self._finished[0]
        rate = (total.done - done) / (now - since) if now > since else 0.0
        return f"{rate:.1f} jobs/s over the last {RATE_OVER_S:.0f} s, {now - self._ledger.started_at:.1f} s in total"


def plain_table(title: str, *, header: bool = True) -> Table:
    """Return a table without borders, as in the other commands."""
    return Table(
        title=Text(title, style="bold") if title else None, title_justify="left", box=None, show_header=header,
        header_style="dim", pad_edge=False, padding=(0, 2, 0, 0),
    )  # fmt: skip


def _cells(count: Count) -> list[Text]:
    styles = ("", "cyan", "yellow", "green", "red")
    return [Text(f"{n:,}", style=style if n else "dim") for n, style in zip(count, styles, strict=True)]


def short_name(name: str) -> str:
    """Return a document's name, or the end of a long name, so that it fits on a line."""
    return name if len(name) <= PATH_WIDTH else "…" + name[1 - PATH_WIDTH :]


def dead_letter(letter: DeadLetter, name: str) -> Table:
    """Return a table of one dead letter, similar to `aiqueue dead show`."""
    table = plain_table(f"Dead letter {letter.seq}", header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("document", Text(name))
    table.add_row("job", f"{letter.job_id} in {letter.lane}")
    table.add_row("reason", Text(f"{letter.reason}: {letter.error}", style="red"))
    for each in letter.history:
        at = time.strftime("%H:%M:%S", time.localtime(float(each["at"])))
        table.add_row(
            "attempts" if each is letter.history[0] else "", Text(f"{each['attempt']} at {at}: {each['error']}")
        )
    table.add_row("payload", f"{short_size(len(letter.body))}, stored unchanged")
    return table


def jobs(rows: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> Table:
    """Return a table of all jobs, by tenant and family."""
    table = plain_table("Jobs (the times are medians)")
    table.add_column("tenant", no_wrap=True)
    table.add_column("family", no_wrap=True)
    for name in ("jobs", "done", "dead", "retry", "replay", "wait ms", "run ms", "jobs/s"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(row["tenant"], row["family"], *_measures(row))
    table.add_row()
    table.add_row("all", "", *_measures(total), style="bold")
    return table


def _measures(row: Mapping[str, Any]) -> list[Text]:
    names = ("enqueued", "succeeded", "dead", "retries", "replays", "wait_ms", "run_ms", "per_s")
    return [Text("-", style="dim") if row[name] is None else Text(f"{row[name]:,}") for name in names]


def findings(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the analysis results, by tenant."""
    table = plain_table("Results of the jobs")
    table.add_column("tenant", no_wrap=True)
    table.add_column("texts", justify="right")
    table.add_column("words", justify="right")
    table.add_column("languages")
    table.add_column("distinctive words", ratio=1)
    for row in rows:
        languages = " ".join(f"{name}:{count}" for name, count in row["languages"].items())
        lines = [Text(", ".join(row["terms"]))]
        if row["hardest"]:
            hardest = f"hardest to read: {short_name(row['hardest']['path'])} ({row['hardest']['reading_ease']:g})"
            lines.append(Text(hardest, style="dim"))
        table.add_row(row["tenant"], f"{row['documents']:,}", f"{row['words']:,}", languages, Group(*lines))
    return table


def overview(families: Sequence[FamilyStats]) -> Table:
    """Return a table of the families and their streams, similar to `aiqueue inspect`."""
    table = plain_table("Queues")
    table.add_column("family", no_wrap=True)
    table.add_column("stream", no_wrap=True)
    for name in ("pending", "in flight", "dead", "lanes", "size"):
        table.add_column(name, justify="right")
    for each in families:
        dead = "-" if each.dead is None else f"{each.dead:,}"
        counts = (f"{each.pending:,}", f"{each.in_flight:,}", dead, f"{each.lanes:,}", short_size(each.size_bytes))
        table.add_row(each.family, each.stream, *counts)
    return table


def verdict(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the final lines and their styles."""
    total = report["total"]
    sums = f"{total['enqueued']} jobs enqueued = {total['succeeded']} succeeded + {total['dead']} dead letters"
    sums += ": every job is accounted for" if report["ok"] else ""
    lines = [(sums, "bold green" if report["ok"] else "bold red")]
    lines += [(f"missing: {line}", "red") for line in report["missing"][:10]]
    if len(report["missing"]) > 10:
        lines.append((f"and {len(report['missing']) - 10} more are missing", "red"))
    if report["fed_per_s"]:
        why = " (slowed down for you to watch)" if report["paced"] else ""
        ran = short_duration(total["run_s"])
        lines.append(
            (
                f"{report['fed_per_s']:g} documents per second enqueued{why}; the handlers ran for {ran} in total.",
                "",
            )
        )
    return lines
