"""uvicorn's HTTP protocol with bounds on the heads of requests, and with errors in one shape."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .errors import ApiError

HEAD_S: Final = 20.0  # for a request's head, from its first byte or the connection on
HEAD_BYTES_MAX: Final = 64 * 1024
_UPGRADE = re.compile(rb"\r\nupgrade:", re.IGNORECASE)


class BoundedProtocol(HttpToolsProtocol):
    """Closes connections whose next request has no end of its head, after an error in OpenAI's shape."""

    _is_in_head = _has_just_begun = False
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_S, self._on_slow_head)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = self._has_just_begun = True
        self._head_bytes = 0
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._on_slow_head)

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        self._has_just_begun = False
        if self.cycle is None or self.cycle.response_complete:
            data = _without_upgrade(data)
        super().data_received(data)
        # bytes in which a further head begins are of the body before it, too
        if self._is_in_head and (self.cycle is None or not self._has_just_begun):
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse(431, f"the request's head has more than {HEAD_BYTES_MAX:,} bytes")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_slow_head(self) -> None:
        self._timer = None
        self._refuse(408, f"the request's head has not arrived within {HEAD_S:g} s")

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP, in uvicorn's words."""
        self._refuse(400, msg)

    def _unsupported_upgrade_warning(self) -> None:
        """A header Upgrade that came in two pieces, or behind an unanswered request: there is no body to be had."""
        self._refuse(400, "the header Upgrade is not supported: leave it out")

    def _refuse(self, status: int, problem: str) -> None:
        self._stop_timer()
        if self.transport.is_closing():
            return
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:  # else it is written into a response
            error = ApiError(status, problem, code="invalid_http")
            body = json.dumps(error.body()).encode()
            told = {"content-type": "application/json", "content-length": str(len(body)), **error.headers()}
            head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
            self.transport.write(f"HTTP/1.1 {status} Refused\r\n{head}connection: close\r\n\r\n".encode() + body)
        if cycle is not None:
            cycle.disconnected = True  # it writes nothing more
        self.transport.close()


def _without_upgrade(data: bytes) -> bytes:
    """Hide from the parser that a client offers another protocol, which a server may pass over: it would take no body.
    Java's client offers HTTP/2 with each request.
    """
    end = data.find(b"\r\n\r\n")
    head = data[:end] if end >= 0 else data
    return _UPGRADE.sub(b"\r\nx-upgrade:", head) + data[len(head) :] if b"upgrade:" in head.lower() else data
