"""The output of a command as a view: read and printed again and again."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from .. import output
from .poller import Poller
from .run_view import run_view

if TYPE_CHECKING:
    from ...client import Client

T = TypeVar("T")

TITLE_LINES = 2


class WatchedOutput(Generic[T]):
    """What `show` prints of what `fetch` reads. `title`: the command. `as_json`: what it prints as JSON; None: text."""

    def __init__(
        self, client: Client, fetch: Callable[[Client], Awaitable[T]], show: Callable[[T], None], *, title: str,
        interval_s: float, as_json: Callable[[T], Mapping[str, Any]] | None,
    ) -> None:  # fmt: skip
        self._show, self._title, self._as_json = show, title, as_json
        self._colour = not os.environ.get("NO_COLOR")
        self._changed: Callable[[], None] | None = None
        self.done = False
        self.poller: Poller[T] = Poller(client.connection, lambda: fetch(client), interval_s, self._on_read)

    async def run(self) -> None:
        """Show it until the user leaves. Raises AIQueueError if the first reading fails."""
        await self.poller.read_once()
        if self.poller.error is not None:
            raise self.poller.error
        await run_view(self, plain=self._as_json is not None)

    def attach(self, changed: Callable[[], None]) -> None:
        """See `View`."""
        self._changed = changed

    def press(self, key: str) -> None:
        """See `View`."""
        self.done = self.done or key == "q"

    def draw(self, columns: int, rows: int) -> Sequence[str]:
        """See `View`."""
        right = f"{time.strftime('%H:%M:%S')}  every {output.format_age(self.poller.interval_s)}  q quits"
        left = output.truncate(self._title, max(10, columns - len(right) - 2))
        problem = output.truncate(f"!! {found}" if (found := self.poller.problem()) else "", columns)
        with output.capture(columns, colour=self._colour) as lines:
            output.print_line(output.apply_style(f"{left}  {right:>{max(0, columns - len(left) - 2)}}", "bold"))
            output.print_line(output.apply_style(problem, "red"))
            if self.poller.value is not None:
                self._show(self.poller.value)
        if len(lines) <= rows:
            return lines
        return [*lines[: rows - 1], f"… {len(lines) - rows + 1:,} more lines: the terminal is too low for them"]

    def lines(self) -> Sequence[str]:
        """See `View`."""
        problem, value = self.poller.problem(), self.poller.value
        clock = time.strftime("%H:%M:%S")
        with output.capture(output.terminal_width(), colour=False) as lines:
            if self._as_json is not None:
                found = {"error": problem} if problem or value is None else self._as_json(value)
                output.print_json({"at": round(time.time(), 3), **found}, lines=True)
            elif problem or value is None:
                output.print_line(output.escape_controls(f"{clock} {problem}"))
            else:
                output.print_line(f"{clock} {self._title}")
                self._show(value)
                output.print_line("")
        return lines

    def _on_read(self) -> None:
        if self._changed is not None:
            self._changed()
