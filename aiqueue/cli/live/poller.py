"""Reads again and again, over outages of the server, and says how old what was read is."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Generic, Protocol, TypeVar

from ...errors import AIQueueError
from .. import output

T = TypeVar("T")

LATE_S = 3.0  # beyond two intervals: then figures are not current
RETRY_S = 0.5  # between looks whether the connection is back


class Link(Protocol):
    """What a poller needs of a connection."""

    @property
    def connected(self) -> bool:
        """Whether it is open now."""


class Poller(Generic[T]):
    """Calls `read` every `interval_s` seconds, and `on_change` after each call and when the connection is lost or back.

    - `value`: what was read last; None: nothing yet. `read_at`: when that reading began, in seconds since the epoch.
    - `error`: why the last reading failed; None: it has not.
    """

    def __init__(
        self, link: Link, read: Callable[[], Awaitable[T]], interval_s: float, on_change: Callable[[], None]
    ) -> None:
        self._link, self._read, self._interval_s, self._on_change = link, read, interval_s, on_change
        self._hurry = asyncio.Event()
        self._reading: asyncio.Task[T] | None = None
        self._lost_at: float | None = None
        self.value: T | None = None
        self.read_at = 0.0
        self.started_at = time.time()
        self.error: AIQueueError | None = None

    @property
    def interval_s(self) -> float:
        """How often it reads."""
        return self._interval_s

    def restart(self) -> None:
        """Something else is to be read: drop what is known and what is being read, and read at once."""
        self.value, self.error = None, None
        self.started_at = time.time()
        if self._reading is not None:
            self._reading.cancel()
        self._hurry.set()

    def hurry(self) -> None:
        """Read at once, if it does not."""
        self._hurry.set()

    def look(self) -> bool:
        """Note whether the connection is there. Return whether what `problem` says has to be drawn again."""
        if self._link.connected:
            self._lost_at = None
        elif self._lost_at is None:
            self._lost_at = time.time()
        return self.problem() != ""

    def problem(self) -> str:
        """Return why the value is not current, and of when it is; "" if it is current."""
        now = time.time()
        if self._lost_at is not None:
            why = f"no connection since {_clock(self._lost_at)}, {_age(now - self._lost_at)} ago"
        elif self.error is not None:
            why = f"cannot be read: {self.error}"
        elif now - max(self.read_at, self.started_at) > 2 * self._interval_s + LATE_S:
            why = "the server does not answer"
        else:
            return ""
        if self.value is None:
            return why
        return f"{why}; what is shown is of {_clock(self.read_at)}"

    async def run(self) -> None:
        """Read until cancelled. Errors other than AIQueueError are raised."""
        while True:
            began = time.monotonic()
            self._hurry.clear()
            await self.read_once()
            left = self._interval_s - (time.monotonic() - began)
            while not self._link.connected:
                self.look()
                await asyncio.sleep(RETRY_S)
                left = 0.0
            self.look()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), max(0.0, left))

    async def read_once(self) -> None:
        """Read now, and keep what came of it."""
        at = time.time()
        self._reading = asyncio.ensure_future(self._read())
        try:
            await asyncio.wait([self._reading])
        except asyncio.CancelledError:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            raise
        if self._reading.cancelled():  # by `restart`
            return
        error = self._reading.exception()
        if error is None:
            self.value, self.read_at, self.error = self._reading.result(), at, None
        elif isinstance(error, AIQueueError):
            self.error = error
        else:
            raise error
        self._on_change()


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _age(seconds: float) -> str:
    return output.format_age(float(int(max(0.0, seconds))))
