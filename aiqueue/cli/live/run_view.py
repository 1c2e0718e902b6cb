"""Shows a view until its user leaves: as a screen, or as lines where there is none."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from .. import output
from .poller import Poller
from .screen import TerminalScreen, has_screen

ESCAPE_S = 0.1  # after which ESC is a key of its own; over ssh a sequence may come in two parts
LOOK_S = 1.0  # how often a screen looks at the clock and the connection


class View(Protocol):
    """What is shown. Its methods are called on the event loop and do not wait."""

    poller: Poller[Any]

    @property
    def done(self) -> bool:
        """Whether the user has left."""

    def draw(self, columns: int, rows: int) -> Sequence[str]:
        """Return the lines of a screen."""

    def press(self, key: str) -> None:
        """Do what a key means."""

    def lines(self) -> Sequence[str]:
        """Return what is printed at each interval where there is no screen."""

    def attach(self, changed: Callable[[], None]) -> None:
        """Call `changed` when there is something new to draw."""


async def run_view(view: View, *, plain: bool = False) -> None:
    """Show a view until it is done, or a signal ends it. `plain`: as lines, in any case.

    Raises OutputFailed, and what reading raises that is no AIQueueError.
    """
    if plain or not has_screen():
        await _print_lines(view)
    else:
        with _silent_logs(), TerminalScreen() as screen:
            await _Showing(view, screen).run()


async def _print_lines(view: View) -> None:
    changed = asyncio.Event()
    view.attach(changed.set)
    with _polling(view) as polling:
        while not view.done:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), view.poller.interval_s)
            if polling.done():
                await polling
            if view.poller.look() or changed.is_set():
                changed.clear()
                for line in view.lines():
                    output.print_line(line)


class _Showing:
    """A view on a screen, with its keys and signals."""

    def __init__(self, view: View, screen: TerminalScreen) -> None:
        self._view, self._screen = view, screen
        self._wake = asyncio.Event()
        self._ended = False
        self._loop = asyncio.get_running_loop()
        view.attach(self._wake.set)

    async def run(self) -> None:
        fd = sys.stdin.fileno()
        self._loop.add_reader(fd, self._read_keys)
        handlers = {
            signal.SIGWINCH: self._wake.set, signal.SIGTSTP: self._suspend, signal.SIGCONT: self._resume,
            signal.SIGTERM: self._end, signal.SIGHUP: self._end, signal.SIGQUIT: self._end,
        }  # fmt: skip
        for number, handler in handlers.items():
            self._loop.add_signal_handler(number, handler)
        try:
            with _polling(self._view) as polling:
                while not (self._view.done or self._ended):
                    self._screen.draw(self._view.draw(*self._screen.size))
                    await self._wait(polling)
        finally:
            self._loop.remove_reader(fd)
            for number in handlers:
                self._loop.remove_signal_handler(number)

    async def _wait(self, polling: asyncio.Task[None]) -> None:
        """Wait until something has changed."""
        while not self._wake.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), LOOK_S)
            if polling.done():
                await polling
            if self._view.poller.look():
                break
        self._wake.clear()

    def _read_keys(self) -> None:
        keys = self._screen.read_keys(self._flush_keys_soon)
        if keys is None:
            self._end()
        else:
            self._press(keys)

    def _flush_keys_soon(self) -> None:
        self._loop.call_later(ESCAPE_S, self._flush_keys)

    def _flush_keys(self) -> None:
        self._press(self._screen.flush_keys())

    def _press(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key == "redraw":
                self._screen.forget()
            elif not self._view.done:
                self._view.press(key)
        self._wake.set()

    def _end(self) -> None:
        self._ended = True
        self._wake.set()

    def _suspend(self) -> None:
        """Ctrl-Z: give the terminal back, and stop. This goes on when the shell continues the process."""
        self._screen.leave()
        os.kill(os.getpid(), signal.SIGSTOP)  # SIGCONT ends it

    def _resume(self) -> None:
        self._screen.enter()
        self._view.poller.hurry()
        self._wake.set()


@contextlib.contextmanager
def _polling(view: View) -> Iterator[asyncio.Task[None]]:
    polling = asyncio.create_task(view.poller.run())
    try:
        yield polling
    finally:
        polling.cancel()


@contextlib.contextmanager
def _silent_logs() -> Iterator[None]:
    """Keep log records off the screen: without a handler Python writes warnings to stderr. The view says the same."""
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
