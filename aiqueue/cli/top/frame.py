"""The lines of `top`: from figures and state, for a size. No colour carries what the text does not say."""

from __future__ import annotations

import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import output
from ..inspect import print_job
from ..live import crop, fold, reverse
from ..workers import print_worker
from .figures import Figures
from .panes import number, rate, table_of
from .place import Place
from .state import Shown, TopState, settle
from .table import MARK, PLAIN, Table

if TYPE_CHECKING:
    from ...inspect import WorkerStats

_SUMS = {"pending": "pending", "in flight": "in_flight", "parked": "parked", "dead": "dead"}
PLAIN_WIDTH = 240  # of lines in a pipe or a file
HEAD = 5  # lines above the list's header
HINTS = "Enter in  Esc back  / filter  s sort  p pause  R replay  ? help  q quit"
HELP = """\
Up Down j k       select                      Enter l   into a family, tenant, job
PgUp PgDn Space   a screen up, down           Esc Left  back; a filter ends first
Home End g G      the first, the last         1-6 Tab   the other views of this
s  S              sort by the next column, turn the order
/                 filter rows: type, Enter keeps the filter, Esc ends it
p                 pause what is selected, or resume it; asks first
R                 replay the dead letters of what is selected; asks first
Ctrl-L  Ctrl-Z    draw all anew, suspend
q  Ctrl-C         quit

pending    in their lanes; no worker holds them
in flight  a worker holds them
parked     they wait for a time: delayed, retried, paused
oldest     how long the oldest pending one has waited
in/s       stored since the last reading
done/s     attempts that ended well, over the last 15 s; fail/s: that failed
last hour  attempts that ended; _ none, a dot: no worker has reported
? and +    at most and at least so many: the cluster has not reported all"""


class Frame(NamedTuple):
    """The lines of a screen, and what keys act on."""

    lines: list[str]
    shown: Shown


def draw_frame(
    state: TopState, figures: Figures | None, problem: str, columns: int, rows: int, *, interval_s: float, colour: bool
) -> Frame:
    """Return a screen of `columns` and `rows`. `problem`: why the figures are not current; "" if they are."""
    height = max(1, rows - HEAD - 2)  # the list's header, and the line at the bottom
    if figures is not None and figures.place != state.place:
        figures = None
    with output.capture(columns, colour=colour):
        head = _head(state.place, figures, problem, columns, interval_s)
        body, shown = _body(state, figures, columns, height, current=not problem)
        bottom = _bottom(state, figures, shown, columns)
        if state.helping:
            head, body = head[:1], ["", *HELP.split("\n"), "", "any key goes on"]
    lines = [*head, *body]
    lines += [""] * (rows - len(lines))
    return Frame([crop(each, columns) for each in (*lines[: rows - len(bottom)], *bottom)], shown)


def draw_plain(place: Place, figures: Figures | None, problem: str, columns: int | None) -> list[str]:
    """Return the same as lines without a cursor: all rows, or why they are not known. For pipes and plain terminals.

    `columns` None: as wide as need be, up to PLAIN_WIDTH.
    """
    width = columns or PLAIN_WIDTH
    clock = time.strftime("%H:%M:%S")
    if problem or figures is None:
        return [f"{clock} {output.escape_controls(problem or 'reading …')}"]
    with output.capture(columns, colour=False):
        lines = [f"{clock} {place.scope}: {_depth_line(figures)}", f"{clock} {_activity_line(figures)}"]
        lines += [f"{name}: {text}" for name, text in figures.notes.items()]
        if figures.missing:
            lines.append(figures.missing)
        else:
            table = table_of(figures)
            header, rows = table.render(table.rows, width)
            lines += [header, *rows] if rows else [table.empty]
    return [crop(output.escape_controls(each).replace("\n", " "), width) for each in lines]


def _head(place: Place, figures: Figures | None, problem: str, columns: int, interval_s: float) -> list[str]:
    server = figures.server if figures is not None else ""
    left = f"aiqueue top: {place.scope}{f' {place.item}' if place.item else ''}"
    right = f"{server}  {time.strftime('%H:%M:%S')}  every {output.format_age(interval_s)}"
    title = _spread(output.truncate(left, max(10, columns - len(right) - 2)), right, columns)
    tabs = [
        f"[{number_} {name}]" if name == place.pane else f" {number_} {name} "
        for number_, name in enumerate(place.tabs, 1)
    ]
    notes = "  ".join(f"{name}: {text}" for name, text in (figures.notes if figures is not None else {}).items())
    warning = problem or notes
    return [
        output.apply_style(title, "bold"),
        "" if figures is None else _depth_line(figures),
        "" if figures is None else _activity_line(figures),
        output.apply_style(crop("".join(tabs).rstrip(), columns), "cyan"),
        output.apply_style(output.truncate(f"!! {warning}" if warning else "", columns), "red"),
    ]


def _spread(left: str, right: str, columns: int) -> str:
    from rich.cells import cell_len  # noqa: PLC0415

    return f"{left}{' ' * max(2, columns - cell_len(left) - len(right))}{right}"


def _depth_line(figures: Figures) -> str:
    """Return the sums over the families of the place; "" where it has none."""
    stats = [each.stats for each in figures.families if not each.is_inbox]
    if not stats:
        return ""
    sums = {name: sum(getattr(each, name) or 0 for each in stats) for name in _SUMS.values()}
    counts = [f"{title} {number(sums[name])}" for title, name in _SUMS.items()]
    counts[-1] = output.apply_style(counts[-1], "red" if sums["dead"] else "")
    oldest = max((each.oldest_age_s for each in stats if each.oldest_age_s is not None), default=None)
    return "  ".join(
        [*counts, f"lanes {number(sum(each.lanes for each in stats))}", f"oldest {output.format_age(oldest)}"]
    )


def _activity_line(figures: Figures) -> str:
    """Return rates and workers."""
    rows = [each for each in figures.families if not each.is_inbox]
    parts = []
    if rows:
        came = _sum_known([each.stats.rate_in for each in rows])
        ended, failed = (_sum_known([getattr(each.rates, name) for each in rows]) for name in ("done", "failed"))
        parts = [f"in {rate(came)}/s", f"done {rate(ended)}/s", f"failed {rate(failed)}/s"]
    if figures.workers is None:
        return "  ".join([*parts, "workers not known"])
    workers: Sequence[WorkerStats] = [each for each in figures.workers if figures.place.family in ("", *each.families)]
    others = Counter(each.state for each in workers if each.state != "running")
    listed = "".join(f", {output.apply_style(f'{count:,} {name}', 'yellow')}" for name, count in others.items())
    alive = [each for each in workers if each.state != "silent"]
    taken, slots = sum(each.running for each in alive), sum(each.slots for each in alive)
    parts.append(f"workers {len(workers):,}{listed}")
    return "  ".join([*parts, *([f"slots {taken:,} of {slots:,} in use"] if alive else [])])


def _sum_known(values: Sequence[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return sum(known) if known else None


def _body(
    state: TopState, figures: Figures | None, columns: int, height: int, *, current: bool
) -> tuple[list[str], Shown]:
    """Return the list or the text of a place, with its header, and what keys act on."""
    if figures is None:
        return ["", "reading …"], Shown(None, current=False)
    if figures.missing:
        return ["", *fold(output.truncate(figures.missing, None), columns)], Shown(None)
    if figures.place.pane in ("job", "worker"):
        return _details(state, figures, columns, height, current=current)
    table = table_of(figures)
    look = state.look
    rows = table.arrange(look.sort, look.reverse, look.wanted)
    shown = Shown(table, rows, height=height, current=current)
    look = settle(look, shown)
    if not rows:
        return ["", f"no rows contain {look.wanted!r}: Esc shows all" if look.wanted else table.empty], shown
    visible = rows[look.offset : look.offset + height]
    header, lines = table.render(visible, columns - len(MARK), look.sort, look.reverse)
    return [PLAIN + header, *_mark(lines, visible, table, look.selected, columns)], shown


def _mark(lines: Sequence[str], visible: Sequence[Any], table: Table, selected: str, columns: int) -> list[str]:
    """Put a mark before each line; the selected one is also in reverse video where there are colours."""
    import sys  # noqa: PLC0415

    marked = []
    for line, row in zip(lines, visible, strict=True):
        if table.key(row) != selected:
            marked.append(PLAIN + line)
        else:
            marked.append(reverse(MARK + line, columns) if output.supports_colour(sys.stdout) else MARK + line)
    return marked


def _details(state: TopState, figures: Figures, columns: int, height: int, *, current: bool) -> tuple[list[str], Shown]:
    """Return the job or the worker, as `aiqueue inspect` and `aiqueue workers` print it."""
    place = figures.place
    with output.capture(columns, colour=_has_colour()) as printed:
        if place.pane == "worker":
            print_worker(figures.details)
        else:
            job, why = figures.details
            print_job(job, why, json=False)
            if place.listed is not None:
                listed = place.listed
                text = f"({listed.payload_problem})" if listed.payload_problem else output.format_json(listed.payload)
                output.print_line(f"\nmessage\n{text}")
    lines = [part for line in printed for part in fold(line, columns)]
    dead_seq = (figures.details[0].dead_seq or 0) if place.pane == "job" else 0
    shown = Shown(None, text_lines=len(lines), height=height + 1, dead_seq=dead_seq, current=current)
    offset = settle(state.look, shown).offset
    return lines[offset : offset + height + 1], shown


def _has_colour() -> bool:
    import sys  # noqa: PLC0415

    return output.supports_colour(sys.stdout)


def _bottom(state: TopState, figures: Figures | None, shown: Shown, columns: int) -> list[str]:
    """Return the line at the bottom; of a question more, so that it is read whole."""
    if state.asked is not None:
        question = textwrap.wrap(state.asked.question, columns)
        return [output.apply_style(each, "bold") for each in (*question, "y: yes   any other key: no")]
    if state.typing:
        return [f"filter: {output.escape_controls(state.look.wanted)}_   Enter keeps it, Esc ends it"]
    if state.said:
        return [output.apply_style(output.truncate(state.said, columns), "red" if state.is_bad else "green")]
    if state.helping:
        return [""]
    where = _where(state, figures, shown)
    hints = output.truncate(HINTS, max(10, columns - len(where) - 2))
    return [output.apply_style(_spread(hints, where, columns), "dim")]


def _where(state: TopState, figures: Figures | None, shown: Shown) -> str:
    """Return which part of the list is visible."""
    wanted = f"filter {state.look.wanted!r:.20} " if state.look.wanted else ""
    if shown.table is None:
        more = shown.text_lines - shown.height - state.look.offset
        return f"{more:,} lines below" if more > 0 else ""
    count = len(shown.rows)
    of_all = "+" if figures is not None and figures.more_jobs else ""
    at = min(shown.position(state.look.selected) + 1, count)
    return f"{wanted}{at:,}/{count:,}{of_all}"
