"""The whole terminal as a screen of lines: only those that have changed are written, and it is restored at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

from .. import output
from .keys import KeyDecoder
from .styled import crop

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[H\x1b[2J"  # alternate screen, no cursor, no wrapping, cleared
LEAVE = "\x1b[?7h\x1b[?25h\x1b[?1049l"
READ_BYTES = 1_024
LINES_MIN, COLUMNS_MIN = 5, 20


def has_screen() -> bool:
    """Return whether stdout is a terminal whose cursor can be moved, and keys can be read."""
    controlled = termios is not None and os.environ.get("TERM") not in (None, "", "dumb", "unknown")
    return controlled and sys.stdin.isatty() and sys.stdout.isatty()


class TerminalScreen:
    """The terminal while the context is open. Keys come one by one, without an echo; Ctrl-C and Ctrl-Z are signals."""

    def __init__(self) -> None:
        self._keys = KeyDecoder()
        self._shown: list[str] = []
        self._size = (0, 0)
        self._saved: list[Any] | None = None

    def __enter__(self) -> Self:
        self.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(output.OutputFailed):
            self.leave()

    def enter(self) -> None:
        """Take the terminal, also again after a shell has had it. A process in the background is stopped here."""
        fd = sys.stdin.fileno()
        changed = termios.tcgetattr(fd)
        if self._saved is None:
            self._saved = termios.tcgetattr(fd)
        changed[3] &= ~(termios.ICANON | termios.ECHO)
        changed[6][termios.VMIN], changed[6][termios.VTIME] = 1, 0
        termios.tcsetattr(fd, termios.TCSADRAIN, changed)
        self.forget()
        output.write(ENTER)

    def leave(self) -> None:
        """Give the terminal back as it was. Safe twice."""
        saved, self._saved = self._saved, None
        if saved is not None:
            try:
                output.write(LEAVE)
            finally:
                with contextlib.suppress(termios.error):  # it is gone, as after the end of ssh
                    termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, saved)

    def forget(self) -> None:
        """Draw all lines the next time."""
        self._size = (0, 0)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines. The environment's COLUMNS and LINES do not count: they do not follow the window."""
        try:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            columns, lines = shutil.get_terminal_size()
        return max(COLUMNS_MIN, columns or 80), max(LINES_MIN, lines or 24)

    def draw(self, lines: Sequence[str]) -> None:
        """Show lines from the top; what is too long or too many is cut. Raises OutputFailed."""
        columns, rows = size = self.size
        parts = []
        if size != self._size:
            self._size, self._shown = size, [""] * rows
            parts.append("\x1b[H\x1b[2J")
        wanted = [crop(each, columns) for each in lines[:rows]]
        wanted += [""] * (rows - len(wanted))
        parts += [
            f"\x1b[{row};1H\x1b[2K{new}"
            for row, (old, new) in enumerate(zip(self._shown, wanted, strict=True), start=1)
            if old != new
        ]
        self._shown = wanted
        if parts:
            output.write("".join(parts))

    def read_keys(self, when_more: Callable[[], None]) -> list[str] | None:
        """Return the keys that can be read now, None at the end of the input. `when_more`: a sequence has begun, so
        `flush_keys` is due soon.
        """
        try:
            data = os.read(sys.stdin.fileno(), READ_BYTES)
        except OSError:  # the terminal is gone
            return None
        if not data:
            return None
        keys = self._keys.feed(data)
        if self._keys.waits:
            when_more()
        return keys

    def flush_keys(self) -> list[str]:
        """Return ESC if it was pressed and nothing has followed."""
        return self._keys.flush()
