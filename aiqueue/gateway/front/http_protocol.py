"""uvicorn's HTTP protocol with bounds on what comes before a request is known: time, size, and errors in one shape."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Final

from .errors import ApiError

HEAD_S: Final = 20.0  # for a request's head, from the connection on
HEAD_BYTES_MAX: Final = 64 * 1024


def protocol_class() -> type[asyncio.Protocol]:
    """Return the protocol for `uvicorn.Config(http=…)`: httptools' where that is installed, else h11's."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol as Base  # noqa: PLC0415
    except ImportError:
        from uvicorn.protocols.http.h11_impl import H11Protocol as Base  # type: ignore[assignment]  # noqa: PLC0415

    class BoundedProtocol(Base):
        """Closes connections whose next request has no end of its head, after an error in OpenAI's shape."""

        _head_bytes = 0
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._head_timer = self.loop.call_later(HEAD_S, self._refuse_head, 408, "the request's head is too slow")

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if not self._awaits_head:
                super().data_received(data)
                return
            if self._head_timer is None:
                self._head_timer = self.loop.call_later(
                    HEAD_S, self._refuse_head, 408, "the request's head is too slow"
                )
            former = self.cycle
            super().data_received(data)
            if self.cycle is not former:
                self._head_bytes = 0
                self._stop_timer()
                return
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._refuse_head(431, f"the request's head has more than {HEAD_BYTES_MAX:,} bytes")

        @property
        def _awaits_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _stop_timer(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _refuse_head(self, status: int, problem: str) -> None:
            self._head_timer = None
            if self._awaits_head:
                self._refuse(status, problem)

        def send_400_response(self, msg: str) -> None:
            """What is no HTTP, in uvicorn's words."""
            self._refuse(400, msg)

        def _refuse(self, status: int, problem: str) -> None:
            self._stop_timer()
            if self.transport.is_closing():
                return
            error = ApiError(status, problem, code="invalid_http")
            body = json.dumps(error.body()).encode()
            head = f"HTTP/1.1 {status} Refused\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            head += "".join(f"{name}: {value}\r\n" for name, value in error.headers().items())
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
            self.transport.close()

    return BoundedProtocol
