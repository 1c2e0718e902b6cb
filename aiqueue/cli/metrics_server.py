"""Serves metrics over HTTP: GET /metrics and /healthz, and nothing else. Imported when it serves."""

from __future__ import annotations

import asyncio
import contextlib

from ..errors import BadInput
from ..inspect import MetricsExporter
from ..metrics import CONTENT_TYPE

HEAD_MAX = 16 * 1024  # bytes of a request
REQUEST_S = 5.0  # to send a request, and to take its answer
CONNECTIONS_MAX = 64  # above it a request is refused, above twice that without an answer
LINGER_S, LINGER_MAX = 1.0, 64  # how long, and how many pieces, of what a refused client still sends is read
_PLAIN = "text/plain; charset=utf-8"
_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found", 405: "Method Not Allowed", 408: "Request Timeout",
    431: "Request Header Fields Too Large", 503: "Service Unavailable",
}  # fmt: skip


class MetricsServer:
    """Answers one request on each connection, from `start` until `stop`."""

    def __init__(self, exporter: MetricsExporter) -> None:
        self._exporter = exporter
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self, host: str, port: int) -> int:
        """Listen, and return the port: the server has chosen it if `port` is 0. Raises BadInput."""
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=HEAD_MAX)
        except OSError as error:
            raise BadInput(
                f"cannot listen on {host}, port {port}: {error.strerror or error}: give another --host or --port"
            ) from None
        found: int = self._server.sockets[0].getsockname()[1]
        return found

    async def stop(self) -> None:
        """Stop listening, and end the requests that are open. Safe twice, and before `start`."""
        server, self._server = self._server, None
        if server is not None:
            server.close()
        for task in list(self._connections):
            task.cancel()
        if self._connections:
            await asyncio.wait(list(self._connections))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        busy = len(self._connections) >= CONNECTIONS_MAX
        if len(self._connections) >= 2 * CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._connections.add(task)
        writer.transport.set_write_buffer_limits(0)  # `drain` waits for all: what is left at `close` has no time limit
        try:
            status, body, content_type = (503, "too many connections\n", _PLAIN) if busy else await self._answer(reader)
            head = (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {content_type}\r\n"
                f"Content-Length: {len(body.encode())}\r\nCache-Control: no-store\r\nConnection: close\r\n"
                f"{'Allow: GET' + chr(13) + chr(10) if status == 405 else ''}\r\n"
            )
            writer.write(head.encode() + body.encode())
            async with asyncio.timeout(REQUEST_S):
                await writer.drain()
            if status != 200:
                await _discard_rest(reader, writer)
        except (OSError, TimeoutError, asyncio.CancelledError):  # the client has left, or the server stops
            writer.transport.abort()
        finally:
            self._connections.discard(task)
            with contextlib.suppress(OSError):
                writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, str, str]:
        """Return status, body and content type of the answer to what the client sends."""
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except TimeoutError:
            return 408, "no request came in time\n", _PLAIN
        except asyncio.LimitOverrunError:
            return 431, "the request is too long\n", _PLAIN
        except asyncio.IncompleteReadError:
            return 400, "the request is incomplete\n", _PLAIN
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return 400, "this is no request of HTTP/1\n", _PLAIN
        path = words[1].partition(b"?")[0]
        if path not in (b"/metrics", b"/healthz"):
            return 404, "there are /metrics and /healthz\n", _PLAIN
        if words[0] != b"GET":
            return 405, "only GET\n", _PLAIN
        if path == b"/healthz":
            return 200, "ok\n", _PLAIN
        return 200, (await self._exporter.scrape()).text, CONTENT_TYPE


async def _discard_rest(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Read what else the client sends, within limits: a socket that is closed before would take the answer back."""
    if writer.can_write_eof():
        writer.write_eof()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            for _ in range(LINGER_MAX):
                if not await reader.read(HEAD_MAX):
                    break
