"""Lines with colours: cut and folded to a width in terminal cells, which their colours do not count for."""

from __future__ import annotations

import re

_STYLE = re.compile(r"\x1b\[[0-9;]*m")
RESET = "\x1b[0m"


def crop(line: str, width: int) -> str:
    """Return the part of a line that fits into a width. Colours end with it."""
    if len(line) <= width and line.isascii() and "\t" not in line:
        return line
    return fold(line, width)[0]


def fold(line: str, width: int) -> list[str]:
    """Return a line as several of at most this width. A colour goes on over the folds, and a tab is a space."""
    from rich.cells import cell_len  # noqa: PLC0415

    width, line = max(2, width), line.replace("\t", " ")  # a wide character needs two
    plain = _STYLE.sub("", line)
    if len(plain) <= width and cell_len(plain) <= width:
        return [line]
    found: list[str] = []
    part, cells, style, at = "", 0, "", 0
    while at < len(line):
        if (match := _STYLE.match(line, at)) is not None:
            style = "" if match[0] == RESET else match[0]
            part, at = part + match[0], match.end()
            continue
        wide = cell_len(line[at])
        if cells + wide > width:
            found.append(part + (RESET if style else ""))
            part, cells = style, 0
        part, cells, at = part + line[at], cells + wide, at + 1
    return [*found, part]


def reverse(line: str, width: int) -> str:
    """Return a line in reverse video, filled up to a width, without its own colours."""
    from rich.cells import set_cell_size  # noqa: PLC0415

    return f"\x1b[7m{set_cell_size(_STYLE.sub('', line), width)}{RESET}"
