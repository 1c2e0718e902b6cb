"""nats-py's parser with a fast path for whole messages. To receive a message, nats-py runs four regular expressions,
copies its buffer, wakes a task and awaits a coroutine; the fast path does none of these (docs/decisions/short-way.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

LINE_MAX = 4_096  # bytes of a control line: the server's limit

Dispatch = Callable[[int, bytes, bytes, bytes, bytes | None], None]


class FastParser(Parser):
    """Cuts whole messages out of what the socket delivered. nats-py's parser gets the other protocol lines.

    The parser calls `dispatch` with each message: subscription id, subject, reply, body, header block (None if there
    is none).

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

    def start(self, buffered: int) -> None:
        """Take what a new socket delivers. `buffered` bytes of it are on their way to `parse` already."""
        self._owed = buffered

    def feed(self, data: bytes) -> bytes:
        """Dispatch the messages in what the socket delivered. Returns what must go to `parse`. Raises nothing."""
        is_behind = self._owed or self.buf or self.state != AWAITING_CONTROL_LINE
        left = data if is_behind else self._take(data)
        self._owed += len(left)
        return left

    async def parse(self, data: bytes = b"") -> None:
        """Parse what nats-py's read loop has read. Raises ProtocolError."""
        socket, size = self._socket, len(data)
        if self.buf or self.state != AWAITING_CONTROL_LINE:  # nats-py's parser has the start of a long line
            await super().parse(data)
            data = b""
        while data and self._socket is socket and (data := self._take(data)):
            line, data = _cut_line(data)
            if line.startswith(b"-ERR"):
                self.refusal = line.decode("utf-8", "replace").strip()
            await super().parse(line)
        if self._socket is socket:  # else a reconnect came meanwhile: the rest is worth nothing
            self._owed = max(0, self._owed - size)

    def _take(self, data: bytes) -> bytes:
        """Dispatch whole messages, and keep the start of one that has not come as a whole.

        Returns what is left, from the first line that is no message.
        """
        if self._parts:
            self._parts.append(data)
            self._have += len(data)
            if self._have < self._need:
                return b""
            data, self._parts = b"".join(self._parts), []
        dispatch = self._dispatch
        at, size, need = 0, len(data), 0
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > LINE_MAX:
                    return data[at:]
                break
            fields = data[at:end].split(b" ")
            count = len(fields)
            try:
                if fields[0] == b"HMSG" and 5 <= count <= 6:
                    body_at = end + 2 + int(fields[-2])
                elif fields[0] == b"MSG" and 4 <= count <= 5:
                    body_at, count = end + 2, count + 1
                else:
                    return data[at:]
                after, sid = end + 4 + int(fields[-1]), int(fields[2])
            except ValueError:
                return data[at:]
            if not end < body_at <= after - 2:
                return data[at:]
            if after > size:
                need = after - at
                break
            reply = fields[3] if count == 6 else b""
            dispatch(sid, fields[1], reply, data[body_at : after - 2], data[end + 2 : body_at] or None)
            at = after
        if at < size:
            self._parts, self._have, self._need = [data[at:]], size - at, need
        return b""


def _cut_line(data: bytes) -> tuple[bytes, bytes]:
    """Return the first line of `data`, which is no message, and the rest. Raises ProtocolError for a malformed message.

    A line above LINE_MAX that has not ended yet is returned with all that has come of it.
    """
    if data.startswith((b"MSG ", b"HMSG ")):
        raise ProtocolError
    end = data.find(b"\r\n") + 2
    return (data[:end], data[end:]) if end > 1 else (data, b"")
