"""A terminal for tests: a pty with a process in it, and a screen that knows only what aiqueue writes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import select
import signal
import struct
import termios
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from .. import forks
from ..support import ROOT, eventually

_SEQUENCE = re.compile("\x1b\\[([?0-9;]*)([A-Za-z])")
_MODES = {"?1049": "alternate", "?25": "cursor", "?7": "wrap"}


def cells_of(text: str) -> int:
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in text)
    return len(text) + wide - sum(unicodedata.combining(each) > 0 for each in text)


class Emulated:
    """A screen. Anything that it does not know, or that is written beyond its edge, is an error."""

    def __init__(self, columns: int, rows: int) -> None:
        self.modes = {"alternate": False, "cursor": True, "wrap": True}
        self.styles = 0
        self._rest = ""
        self.resize(columns, rows)

    def resize(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.lines = [""] * rows
        self._row = 0

    def feed(self, text: str) -> None:
        text, self._rest = self._rest + text, ""
        at = 0
        while at < len(text):
            if text[at] == "\x1b":
                match = _SEQUENCE.match(text, at)
                if match is None:
                    assert re.fullmatch("\x1b(\\[[?0-9;]*)?", text[at:]), f"unknown sequence {text[at : at + 20]!r}"
                    self._rest = text[at:]
                    return
                self._control(match[1], match[2])
                at = match.end()
                continue
            end = text.find("\x1b", at)
            part = text[at : end if end >= 0 else len(text)]
            self._write(part)
            at += len(part)

    def _control(self, numbers: str, name: str) -> None:
        if name in "hl" and numbers in _MODES:
            self.modes[_MODES[numbers]] = name == "h"
        elif (name, numbers) == ("J", "2"):
            self.lines = [""] * self.rows
        elif (name, numbers) == ("K", "2"):
            self.lines[self._row] = ""
        elif name == "H":
            row, column = (numbers or "1;1").split(";")
            assert column == "1"
            self._row = int(row) - 1
        elif name == "m":
            self.styles += 1
        else:
            raise AssertionError(f"unknown sequence {numbers}{name}")

    def _write(self, text: str) -> None:
        if not self.modes["alternate"]:
            return  # of a shell, or after the end
        assert not [each for each in text if unicodedata.category(each) == "Cc"], repr(text)
        self.lines[self._row] += text
        assert cells_of(self.lines[self._row]) <= self.columns, self.lines[self._row]


class Terminal:
    """A process in a terminal of its own. Its keys are written with `press`."""

    def __init__(
        self, *arguments: str, env: Mapping[str, str], cwd: Path, size: tuple[int, int] = (80, 24), term: str = "xterm"
    ) -> None:
        self.screen = Emulated(*size)
        self.raw = ""
        self._ours, self._theirs = pty.openpty()
        self._set_size(*size)
        self.modes_before = termios.tcgetattr(self._theirs)
        self.process = forks.start(
            "aiqueue", *arguments, terminal=self._theirs, stdout=self._theirs, stderr=self._theirs, cwd=cwd,
            env={**env, "TERM": term, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    def read(self) -> str:
        """What was written since the last call, if anything."""
        found = b""
        while select.select([self._ours], [], [], 0)[0]:
            found += os.read(self._ours, 65_536)
        text = found.decode("utf-8", "replace")
        self.raw += text
        if self.screen.modes["alternate"] or "\x1b[?1049h" in text:
            self.screen.feed(text)
        return text

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def shows(self, *texts: str) -> bool:
        """Whether all of these are on the screen now."""
        self.read()
        return all(each in self.text for each in texts)

    async def wait(self, *texts: str, without: str = "") -> str:
        """Wait until these are on the screen, and something else is not. Return the screen."""
        try:
            await eventually(lambda: self.shows(*texts) and (not without or without not in self.text), 40)
        except AssertionError:
            shown = f"{self.text}\n{self.raw[-500:]!r}"
            raise AssertionError(f"the screen never had {texts}, or always {without!r}:\n{shown}") from None
        return self.text

    async def wait_raw(self, text: str, times: int = 1) -> str:
        """Wait until this was written so many times. Return all that was written."""
        await eventually(lambda: self.read() is not None and self.raw.count(text) >= times)
        return self.raw

    async def until(self, fn: Callable[[], object]) -> None:
        """Wait until something is true of the screen."""
        await eventually(lambda: self.read() is not None and fn())

    @property
    def text(self) -> str:
        return "\n".join(self.screen.lines)

    def line(self, text: str) -> str:
        """The line of the screen that has this."""
        return next(each for each in self.screen.lines if text in each)

    def resize(self, columns: int, rows: int) -> None:
        self.read()
        self.screen.resize(columns, rows)
        self._set_size(columns, rows)

    async def end(self) -> int:
        """Wait for the end of the process. Return its exit code; the terminal must be as it was."""
        await eventually(lambda: self.read() is not None and self.process.poll() is not None)
        self.read()
        assert self.screen.modes == {"alternate": False, "cursor": True, "wrap": True}
        assert self.terminal_modes() == self.modes_before
        return self.process.wait()

    def terminal_modes(self) -> list[Any]:
        return termios.tcgetattr(self._theirs)

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


Open = Callable[..., Terminal]
