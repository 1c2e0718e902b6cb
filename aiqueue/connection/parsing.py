"""nats-py's parser with a fast path for whole messages. To receive a message, nats-py runs four regular expressions,
copies its buffer, wakes a task and awaits a coroutine; the fast path does none of these (docs/decisions/short-way.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

LINE_MAX = 4_096  # bytes of a control line: the server's limit
NOTHING = b"+OK\r\n"  # a line that has no effect

Dispatch = Callable[[int, bytes, bytes, bytes, bytes | None], Awaitable[None] | None]


class FastParser(Parser):
    """Cuts whole messages out of what the socket delivered. nats-py's parser gets the other protocol lines.

    The parser calls `dispatch` with each message: subscription id, subject, reply, body, header block (None if there
    is none). If `dispatch` returns an awaitable, it is awaited before the next message.

    What the socket delivers comes to `feed`, or, by way of nats-py's read loop, to `parse`: `feed` returns what must go
    that way. Until `parse` has had all of that, everything goes that way, so nothing is overtaken.
    """

    def __init__(self, client: Any, dispatch: Dispatch) -> None:
        super().__init__(client)
        self._dispatch = dispatch
        self.refusal = ""  # the server's last -ERR line as it came: nats-py reports it in lower case

    def reset(self) -> None:
        super().reset()
        self._socket = object()  # stands for the socket that is read now
        self._parts: list[bytes] = []  # of a message that has not come as a whole
        self._have = self._need = 0  # bytes of it that have come, and of which it consists; 0: not known yet
        self._owed = 0  # bytes that will come to `parse`
        self._pending: Awaitable[None] | None = None  # what `parse` must await first

    def start(self, buffered: int) -> None:
        """Take what a new socket delivers. `buffered` bytes of it are on their way to `parse` already."""
        self._owed = buffered

    def feed(self, data: bytes) -> bytes:
        """Dispatch the messages in what the socket delivered. Returns what must go to `parse`. Raises nothing."""
        if self._owed or self.buf or self.state != AWAITING_CONTROL_LINE:
            left = data
        else:
            left, self._pending = self._take(data)
            if self._pending is not None:
                left = left or NOTHING
        self._owed += len(left)
        return left

    async def parse(self, data: bytes = b"") -> None:
        """Parse what nats-py's read loop has read. Raises ProtocolError."""
        socket, size = self._socket, len(data)
        pending, self._pending = self._pending, None
        if self.buf or self.state != AWAITING_CONTROL_LINE:  # nats-py's parser has the start of a long line
            pending, data = super().parse(data), b""
        while pending is not None or data:
            if pending is None:
                data, pending = self._take(data)
            if pending is None and data:
                line, data = _cut_line(data)
                if line.startswith(b"-ERR"):
                    self.refusal = line.decode("utf-8", "replace").strip()
                pending = super().parse(line)
            if pending is not None:
                await pending
                pending = None
                if self._socket is not socket:
                    return  # a reconnect during the await: the rest is worth nothing
        self._owed = max(0, self._owed - size)

    def _take(self, data: bytes) -> tuple[bytes, Awaitable[None] | None]:
        """Dispatch whole messages, and keep the start of one that has not come as a whole.

        Returns what is left: from the first line that is no message, or behind a message that must be awaited, with
        what must be awaited.
        """
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return b"", None
            data, self._parts = b"".join(self._parts), []
        dispatch = self._dispatch
        at, size, need = 0, len(data), 0
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > LINE_MAX:
                    return data[at:], None
                break
            fields = data[at:end].split(b" ")
            count = len(fields)
            try:
                if fields[0] == b"HMSG" and 5 <= count <= 6:
                    body_at = end + 2 + int(fields[-2])
                elif fields[0] == b"MSG" and 4 <= count <= 5:
                    body_at, count = end + 2, count + 1
                else:
                    return data[at:], None
                after, sid = end + 4 + int(fields[-1]), int(fields[2])
            except ValueError:
                return data[at:], None
            if not end < body_at <= after - 2:
                return data[at:], None
            if after > size:
                need = after - at
                break
            reply = fields[3] if count == 6 else b""
            pending = dispatch(sid, fields[1], reply, data[body_at : after - 2], data[end + 2 : body_at] or None)
            at = after
            if pending is not None:
                return data[at:], pending
        if at < size:
            self._parts, self._have, self._need = [data[at:]], size - at, need
        return b"", None


def _cut_line(data: bytes) -> tuple[bytes, bytes]:
    """Return the first line of `data`, which is no message, and the rest. Raises ProtocolError for a malformed message.

    A line above LINE_MAX that has not ended yet is returned with all that has come of it.
    """
    if data.startswith((b"MSG ", b"HMSG ")):
        raise ProtocolError
    end = data.find(b"\r\n") + 2
    return (data[:end], data[end:]) if end > 1 else (data, b"")
