"""How things look: tables, ages, data. Colour and cutting are for terminals only; pipes get everything, plain."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from ..units import short_duration

# "\x80-\x9f" are control characters too; the others turn the direction of text
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_STYLES = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}
_SHRUNK_MIN = 8


def clean(text: str) -> str:
    """`text` without what could command a terminal: foreign payloads and errors are shown, not obeyed."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def coloured(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that is to have colours."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """`text` in a colour where `stream` (default: stdout) shows it."""
    if not style or not text or not coloured(stream or sys.stdout):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def width() -> int | None:
    """Columns to keep within; None (a pipe or a file): there is no edge. COLUMNS overrides."""
    told = os.environ.get("COLUMNS", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def say(text: str = "", *, err: bool = False) -> None:
    """A line, written at once."""
    stream = sys.stderr if err else sys.stdout
    stream.write(f"{text}\n")
    stream.flush()


def say_json(value: Any, *, lines: bool = False) -> None:
    """`value` as JSON: indented, or on one line of its own for `lines`. Bytes become base64."""
    import pydantic_core  # noqa: PLC0415

    text = pydantic_core.to_json(
        value, indent=None if lines else 2, bytes_mode="base64", inf_nan_mode="constants", fallback=str
    )
    say(text.decode("utf-8", "replace"))


def pretty(value: Any, *, short: bool = False) -> str:
    """Plain data for people: JSON, on one line if `short`."""
    import pydantic_core  # noqa: PLC0415

    try:
        text = pydantic_core.to_json(
            value, indent=None if short else 2, bytes_mode="base64", inf_nan_mode="constants", fallback=str
        )
    except ValueError as error:
        return f"(cannot be shown: {error})"
    return clean(text.decode("utf-8", "replace"))


@dataclass(frozen=True)
class Column:
    """A column of a table. Numbers stand to the right; one that may `shrink` is cut where the line is too long: in
    the middle, since names differ at their ends, or at the end if it is `prose`.
    """

    title: str
    right: bool = False
    shrink: bool = False
    prose: bool = False
    style: str = ""


def table(columns: Sequence[Column], rows: Sequence[Sequence[str]], *, below: Sequence[str] | None = None) -> None:
    """A table on stdout. A row that is shorter than the columns has its last cell run on to the edge; `below` gives
    each row a second line, below its second cell ("" for none).
    """
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415

    full = [[clean(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [
        max([cell_len(column.title), *(cell_len(row[at]) for row in full if at < len(row) - (len(row) < len(columns)))])
        for at, column in enumerate(columns)
    ]
    edge, gap = width(), 2
    if edge is not None and sum(widths) + gap * (len(widths) - 1) > edge:
        gap = 1
        _shrink(columns, widths, edge - (len(widths) - 1))
    out = [_line([each.title for each in columns], columns, widths, gap, dim=True)]
    for place, row in enumerate(full):
        if len(row) == len(columns):
            out.append(_line(row, columns, widths, gap))
        else:
            out.append((" " * gap).join(set_cell_size(row[at], widths[at]) for at in range(len(row) - 1)))
            out[-1] += " " * gap + styled(row[-1], "red")
        if below and below[place]:
            indent = widths[0] + gap
            out.append(" " * indent + styled(cut(below[place], None if edge is None else edge - indent), "dim"))
    say("\n".join(out))


def _shrink(columns: Sequence[Column], widths: list[int], room: int) -> None:
    while sum(widths) > room:
        can = [at for at, each in enumerate(columns) if each.shrink and widths[at] > _SHRUNK_MIN]
        if not can:
            return
        widest = max(can, key=lambda at: widths[at])
        widths[widest] -= 1


def _line(row: Sequence[str], columns: Sequence[Column], widths: Sequence[int], gap: int, *, dim: bool = False) -> str:
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415

    cells = []
    for at, (cell, column) in enumerate(zip(row, columns, strict=True)):
        text = cut(cell, widths[at], middle=not column.prose)
        if column.right:
            text = " " * (widths[at] - cell_len(text)) + text
        elif at < len(columns) - 1:
            text = set_cell_size(text, widths[at])
        cells.append(styled(text, "dim" if dim else column.style))
    return (" " * gap).join(cells).rstrip()


def cut(text: str, limit: int | None, *, middle: bool = False) -> str:
    """One line of at most `limit` cells, with an ellipsis where something is left out."""
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415

    text = " ".join(clean(text).split())
    if limit is None or cell_len(text) <= limit:
        return text
    tail = ""
    if middle and len(text) == cell_len(text):  # wide characters cannot be counted from the end
        tail = text[len(text) - (limit - 1) // 2 :]
    return set_cell_size(text, max(0, limit - 1 - len(tail))).rstrip() + "…" + tail


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, one pair a line; empty values are left out."""
    shown = [(name, clean(value)) for name, value in pairs if value]
    left = max((len(name) for name, _ in shown), default=0) + 2
    for name, value in shown:
        say(f"  {styled(name.ljust(left), 'dim')}{value}")


def age(value_s: float | None) -> str:
    """An age for people, "-" for none."""
    return "-" if value_s is None else short_duration(max(0.0, value_s))


def ago(at: float | None) -> str:
    """A time for people: "3m10s ago (2026-11-23 07:05:01)", in local time."""
    if at is None:
        return ""
    return f"{age(time.time() - at)} ago ({clock(at)})"


def clock(at: float) -> str:
    """A time for people, in local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def count(number: int, one: str, many: str = "") -> str:
    """How many of what: "1 job", "1,200 jobs"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def lane(family: str, tenant: str, priority: str | None) -> str:
    """A lane for people: "agent.tasks acme/normal"."""
    return f"{family} {tenant}/{priority}" if priority else f"{family} {tenant}"
