"""Formats and prints text, tables and JSON. Only a terminal gets colours and truncated lines, a pipe gets all text."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import sysconfig
import textwrap
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TextIO

from ..subjects import Lane
from ..units import short_duration

if TYPE_CHECKING:
    from logging import Logger

_notice_logger: Logger | None = None
_captured: Captured | None = None
# "\x80-\x9f" are control characters too; what follows changes the direction of text, or ends a line
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_STYLES = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "dim": "2"}
_VALUE_WIDTH_MIN = 20  # of a field's value that is wrapped
_INDENT_MAX = 12  # of a second line below a row
_SHRUNK_WIDTH_MIN = 8
DEPTH_MAX = 100  # of data that is printed as JSON
INT_BITS_MAX = 10_000


def escape_controls(text: str) -> str:
    """Return `text` with control characters escaped: foreign payloads and errors must not control the terminal."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def supports_colour(stream: TextIO) -> bool:
    """Return whether `stream` is a terminal on which colours are wanted."""
    if _captured is not None and stream is sys.stdout:
        return _captured.colour
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def apply_style(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return `text` in a colour if `stream` (default: stdout) supports colours, else unchanged."""
    if not style or not text or not supports_colour(stream or sys.stdout):
        return text
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def terminal_width() -> int | None:
    """Return the number of columns, None for a pipe or a file. COLUMNS overrides."""
    if _captured is not None:
        return _captured.width
    columns = os.environ.get("COLUMNS", "")
    if columns.isdecimal() and len(columns) < 10 and int(columns) > 0:
        return int(columns)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


class Captured(NamedTuple):
    """Where the output goes while it is captured: `lines`, of this width (None: unlimited)."""

    width: int | None
    colour: bool
    lines: list[str]


@contextlib.contextmanager
def capture(width: int | None, *, colour: bool) -> Iterator[list[str]]:
    """Have what the block prints to stdout by `print_line` and its like become lines of a screen of this width.

    The block must not await: what others print meanwhile would be captured, too.
    """
    global _captured  # noqa: PLW0603
    before, _captured = _captured, Captured(width, colour, [])
    try:
        yield _captured.lines
    finally:
        _captured = before


class OutputFailed(Exception):
    """Stdout takes no more output. `closed`: its reader has closed the pipe, as `head` does; otherwise a full disk."""

    def __init__(self, error: OSError) -> None:
        self.closed = isinstance(error, BrokenPipeError)
        super().__init__(
            "the output was closed by its reader" if self.closed else f"cannot write the output: {error.strerror}"
        )


def write(text: str | bytes) -> None:
    """Write to stdout, bytes as they are, and flush. Raises OutputFailed."""
    try:
        if isinstance(text, bytes):
            sys.stdout.buffer.write(text)
        else:
            sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise OutputFailed(error) from None


def print_line(text: str = "", *, err: bool = False) -> None:
    """Write a line to stdout, or stderr for `err`, and flush. Raises OutputFailed for stdout, never for stderr."""
    if not err and _captured is not None:
        _captured.lines.extend(text.split("\n"))
        return
    if not err:
        write(f"{text}\n")
        return
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def log_notices(logger: Logger) -> None:
    """Have notices logged: a program that reads JSON log lines finds nothing else among them."""
    global _notice_logger  # noqa: PLW0603
    _notice_logger = logger


def print_notice(text: str) -> None:
    """Write a line to stdout, for a command that goes on if stdout cannot be written: the line is then dropped.

    After `log_notices` the line is logged instead.
    """
    if _notice_logger is not None:
        _notice_logger.info("%s", text)
        return
    try:
        print_line(text)
    except OutputFailed:
        _drop_unwritten()


def _drop_unwritten() -> None:
    """Empty stdout's buffer: what is left there would fail the next line, and the command at its end."""
    with contextlib.suppress(OSError, ValueError):
        fd = sys.stdout.fileno()
        kept, null = os.dup(fd), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, fd)
            sys.stdout.flush()
        finally:
            os.dup2(kept, fd)
            os.close(kept)
            os.close(null)


def print_json(value: Any, *, lines: bool = False) -> None:
    """Print `value` as indented JSON, or on one line if `lines`.

    Bytes become base64. NaN and infinity, which JSON does not have, become null. Control characters are escaped as JSON
    does it, also those that JSON would allow.
    """
    text = _to_json(value, indent=None if lines else 2, inf_nan_mode="null")
    print_line(_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def format_json(value: Any, *, short: bool = False) -> str:
    """Return plain data as JSON for people: indented, or on one line if `short`. Control characters are escaped."""
    return escape_controls(_to_json(value, indent=None if short else 2, inf_nan_mode="constants"))


def _to_json(value: Any, *, indent: int | None, inf_nan_mode: Literal["null", "constants"]) -> str:
    import pydantic_core  # noqa: PLC0415

    try:
        text = pydantic_core.to_json(
            value, indent=indent, bytes_mode="base64", inf_nan_mode=inf_nan_mode, fallback=_unicode
        )
    except ValueError:  # a lone surrogate, too deep, or a key that is a container
        return _to_json(_representable(value, DEPTH_MAX), indent=indent, inf_nan_mode=inf_nan_mode)
    return text.decode("utf-8", "replace")


def _representable(value: Any, depth: int) -> Any:
    """Return `value` with strings for everything that JSON cannot represent, and below `depth` levels."""
    if isinstance(value, str):
        return _unicode(value)
    if value is None or isinstance(value, bool | float | bytes):
        return value
    if isinstance(value, int):
        return value if value.bit_length() < INT_BITS_MAX else hex(value)
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        if not depth:
            return "…"
        if isinstance(value, Mapping):
            return {_unicode(key): _representable(each, depth - 1) for key, each in value.items()}
        return [_representable(each, depth - 1) for each in value]
    return _unicode(value)


def _unicode(value: object) -> str:
    """Return the text of `value` with U+FFFD for lone surrogates, which UTF-8 cannot represent."""
    try:
        text = str(value)
    except Exception:  # noqa: BLE001  (an int of more than 4,300 digits)
        text = object.__repr__(value)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    `right`: align right, for numbers. `shrink`: the column is truncated if the line is too long: in the middle,
    because names differ at their ends, or at the end if it is `prose`.
    """

    title: str
    right: bool = False
    shrink: bool = False
    prose: bool = False
    style: str = ""


def print_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], *, below: Sequence[str] | None = None
) -> None:
    """Print a table to stdout.

    If a row has fewer cells than there are columns, its last cell extends to the edge of the terminal. `below` has a
    second line for each row, printed below its second cell or further left, so that it has space ("": none).
    """
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415

    full = [[escape_controls(cell).replace("\n", " ") for cell in row] for row in rows]
    widths = [
        max([cell_len(column.title), *(cell_len(row[at]) for row in full if at < len(row) - (len(row) < len(columns)))])
        for at, column in enumerate(columns)
    ]
    edge, gap = terminal_width(), 2
    if edge is not None and sum(widths) + gap * (len(widths) - 1) > edge:
        gap = 1
        _shrink_columns(columns, widths, edge - (len(widths) - 1))
    out = [_format_row([each.title for each in columns], columns, widths, gap, dim=True)]
    for number, row in enumerate(full):
        if len(row) == len(columns):
            out.append(_format_row(row, columns, widths, gap))
        else:
            out.append((" " * gap).join(set_cell_size(row[at], widths[at]) for at in range(len(row) - 1)))
            out[-1] += " " * gap + apply_style(row[-1], "red")
        if below and below[number]:
            indent = min(widths[0] + gap, _INDENT_MAX)
            out.append(
                " " * indent + apply_style(truncate(below[number], None if edge is None else edge - indent), "dim")
            )
    print_line("\n".join(out))


def _shrink_columns(columns: Sequence[Column], widths: list[int], available: int) -> None:
    while sum(widths) > available:
        shrinkable = [at for at, each in enumerate(columns) if each.shrink and widths[at] > _SHRUNK_WIDTH_MIN]
        if not shrinkable:
            return
        widest = max(shrinkable, key=lambda at: widths[at])
        widths[widest] -= 1


def _format_row(
    row: Sequence[str], columns: Sequence[Column], widths: Sequence[int], gap: int, *, dim: bool = False
) -> str:
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415

    cells = []
    for at, (cell, column) in enumerate(zip(row, columns, strict=True)):
        text = truncate(cell, widths[at], middle=not column.prose)
        if column.right:
            text = " " * (widths[at] - cell_len(text)) + text
        elif at < len(columns) - 1:
            text = set_cell_size(text, widths[at])
        cells.append(apply_style(text, "dim" if dim else column.style))
    return (" " * gap).join(cells).rstrip()


def truncate(text: str, limit: int | None, *, middle: bool = False) -> str:
    """Return `text` as one line of at most `limit` terminal cells, with an ellipsis for what is left out."""
    from rich.cells import cell_len, set_cell_size  # noqa: PLC0415

    text = " ".join(escape_controls(text).split())
    if limit is None or cell_len(text) <= limit:
        return text
    tail = ""
    if middle and len(text) == cell_len(text):  # with wide characters, cells cannot be counted from the end
        tail = text[len(text) - (limit - 1) // 2 :]
    return set_cell_size(text, max(0, limit - 1 - len(tail))).rstrip() + "…" + tail


def print_fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair per line. Empty values are left out. On a terminal, long values are wrapped
    between words. A value has no style: control characters are escaped.
    """
    shown = [(name, escape_controls(value)) for name, value in pairs if value]
    left = max((len(name) for name, _ in shown), default=0) + 2
    edge = terminal_width()
    for name, value in shown:
        lines = value.split("\n")
        if edge is not None:
            room = max(_VALUE_WIDTH_MIN, edge - 2 - left)
            wrapped = [textwrap.wrap(each, room, break_long_words=False, break_on_hyphens=False) for each in lines]
            lines = [line for each in wrapped for line in each]
        text = ("\n" + " " * (0 if edge is None else left + 2)).join(lines)
        print_line(f"  {apply_style(name.ljust(left), 'dim')}{text}")


def format_age(value_s: float | None) -> str:
    """Format an age in seconds: "3m10s", "-" for None."""
    return "-" if value_s is None else short_duration(max(0.0, value_s))


def format_ago(at: float | None) -> str:
    """Format a time as age and local time: "3m10s ago (2026-11-23 07:05:01)"."""
    if at is None:
        return ""
    return f"{format_age(time.time() - at)} ago ({format_time(at)})"


def format_time(at: float) -> str:
    """Format a time in local time: "2026-11-23 07:05:01". One that a plain publisher has made up may be of no year."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    except (OverflowError, OSError, ValueError):
        return f"{at:g} s after 1970"


def format_count(number: int, one: str, many: str = "") -> str:
    """Format a number with its noun: "1 job", "1,200 jobs"."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def format_lane(family: str, tenant: str, priority: str | None, key: str = "") -> str:
    """Format a lane: "agent.tasks acme/normal", with the start of a limited key's hash if it has one."""
    if key:
        return str(Lane(family, tenant, priority or "", key))
    return f"{family} {tenant}/{priority}" if priority else f"{family} {tenant}"


def describe_error(error: BaseException) -> str:
    """Return an error of the user's code as one line, with the file and line that raised it.

    Of a group of errors, the first one. The line is the last one outside of aiqueue and of installed packages; if there
    is none, the last one outside of aiqueue.
    """
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    line = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, SyntaxError) and error.filename:
        return f"{line} ({error.filename}, line {error.lineno})"
    own = ("<", str(Path(__file__).parent.parent) + os.sep)  # "<frozen …>", and "<string>" of a dataclass
    paths = sysconfig.get_paths()
    installed = tuple(paths[each] + os.sep for each in ("stdlib", "platstdlib", "purelib", "platlib"))
    outside = [each for each in traceback.extract_tb(error.__traceback__) if not each.filename.startswith(own)]
    frames = [each for each in outside if not each.filename.startswith(installed)] or outside
    return f"{line} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else line
