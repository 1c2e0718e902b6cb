"""The server's clock, as measured from its answers: times on the wire are told by it, whatever the local clock shows.

Several answers of the JetStream API state the server's time (`ts`). An answer was written between the request and its
arrival, so the middle of the two is right to half a round trip (Cristian's algorithm, 1989).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import Any

from ..errors import AIQueueError
from .frames import timestamp

SYNCHRONISED_S = 0.1  # a local clock that is this near to the server's, and the error, is used as it is
KEEP_S = 60.0  # a measurement this old gives way to any newer one, until then to a better one only
FRESH_S = 600.0  # `ensure` measures again after this time
PROBE_S = 2.0
RETRY_S = 60.0  # how long `ensure` does nothing after an unsuccessful try


class ServerClock:
    """The time by the server's clock. Until the first measurement, the local clock is taken for the server's.

    A measurement is kept as the difference to the monotonic clock, so that a step of the local clock changes nothing.
    `offset_ms`: the server's clock less the local one, as last measured; 0 if they are synchronised or unknown.
    `probing`: whether `ensure` waits for an answer now.
    """

    def __init__(
        self,
        ask: Callable[..., Awaitable[object]],
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` calls the JetStream API, and passes the answer to `note_reply`."""
        self._ask = ask
        self._wall = wall
        self._monotonic = monotonic
        self._ahead_s = 0.0  # the server's clock less the monotonic one
        self._error_s = 0.0
        self._measured_at: float | None = None  # monotonic seconds
        self._is_expired = False
        self._next_try_at = 0.0
        self._lock = asyncio.Lock()
        self.offset_ms = 0
        self.probing = False

    def now(self) -> float:
        """Return the server's time, in seconds since the epoch."""
        wall = self._wall()
        if self._measured_at is None:
            return wall
        server = self._monotonic() + self._ahead_s
        return wall if abs(server - wall) <= self._error_s + SYNCHRONISED_S else server

    def precise(self) -> float | None:
        """Return the server's time to within the error of the measurement, however near the local clock is; None until
        the first one.
        """
        return None if self._measured_at is None else self._monotonic() + self._ahead_s

    def note(self, sent_at: float, received_at: float, server_time: float) -> None:
        """Measure the clock by something that the server did at `server_time`, between two times of the monotonic
        clock here: a request was sent, and its reply received. Keeps a measurement if it is better than the last one,
        or contradicts it, or the last one is old.
        """
        error_s = (received_at - sent_at) / 2
        ahead_s = server_time - (sent_at + received_at) / 2
        if (
            self._measured_at is None
            or self._is_expired
            or error_s <= self._error_s
            or received_at - self._measured_at > KEEP_S
            or abs(ahead_s - self._ahead_s) > error_s + self._error_s + SYNCHRONISED_S
        ):
            self._ahead_s, self._error_s, self._measured_at, self._is_expired = ahead_s, error_s, received_at, False
            self._next_try_at = 0.0
            self.offset_ms = round((self.now() - self._wall()) * 1000)

    async def catch_up(self, stream: str, received_at: float, past: float) -> None:
        """Measure the clock as `ensure` does, if it is behind `past`: a time of the server's clock that was over when
        something was received, at a time of the monotonic clock here. As after a pause of this host. Never raises.

        The server decides, as `past` may be of before its clock was set back. Without an answer `past` is believed,
        until the next measurement.
        """
        if self._is_behind(received_at, past):
            if self._is_expired or self._measured_at is None or self._measured_at < received_at:
                self._is_expired = True
                await self.ensure(stream)
            if self._is_expired and self._is_behind(received_at, past):
                self._ahead_s, self._error_s, self._measured_at = past - received_at, 0.0, received_at
                self.offset_ms = round((self.now() - self._wall()) * 1000)

    def _is_behind(self, received_at: float, past: float) -> bool:
        behind_s = past - (self.now() - (self._monotonic() - received_at))
        return behind_s > 2 * self._error_s + SYNCHRONISED_S

    def note_reply(self, sent_at: float, reply: dict[str, Any]) -> dict[str, Any]:
        """Measure the clock by an answer, if the answer states a time. `sent_at`: of the request, monotonic seconds.

        Returns the answer.
        """
        text = reply.get("ts")
        if isinstance(text, str):
            with contextlib.suppress(ValueError):
                self.note(sent_at, self._monotonic(), timestamp(text))
        return reply

    def expire(self) -> None:
        """Let the next measurement replace this one: the connection may lead to another server now."""
        self._is_expired, self._next_try_at = True, 0.0

    async def ensure(self, stream: str) -> None:
        """Measure the clock unless that was done within FRESH_S, by asking for the state of `stream`. Never raises.

        A user who may not ask (`$JS.API.STREAM.INFO.{stream}`) keeps the local clock.
        """
        if not self._is_due():
            return
        async with self._lock:
            if not self._is_due():
                return
            self._next_try_at = self._monotonic() + RETRY_S
            self.probing = True
            try:
                await self._ask(f"STREAM.INFO.{stream}", timeout=PROBE_S)
            except AIQueueError:
                pass
            finally:
                self.probing = False

    def _is_due(self) -> bool:
        now = self._monotonic()
        is_fresh = self._measured_at is not None and not self._is_expired and now - self._measured_at < FRESH_S
        return not is_fresh and now >= self._next_try_at
