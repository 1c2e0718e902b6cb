"""nats-py's parser with a short way for messages: of what it costs to receive one, its patterns, its copies of the
buffer and a coroutine for each are most (docs/decisions/short-way.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

LINE_MAX = 4_096  # bytes of a control line, the server's own limit
SHORT_MAX = 128 * 1024  # a larger message comes in many parts, which nats-py's own way gathers better

Take = Callable[[int, bytes, bytes, bytes, bytes | None], Awaitable[None] | None]


class Reader(Parser):
    """Takes whole messages from what was read; everything else goes to nats-py's own parser: other lines, and messages
    that are large, with what came in the same reads.

    `take` is called with each message: subscription, subject, reply, body, header block (None: it has none). What it
    returns, if anything, is awaited before the next message.
    """

    def __init__(self, client: Any, take: Take) -> None:
        super().__init__(client)
        self._take = take

    def reset(self) -> None:
        super().reset()
        self._rest = b""

    async def parse(self, data: bytes = b"") -> None:
        """What was read from the socket. Raises ProtocolError."""
        if self.buf or self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)
            if self.state != AWAITING_CONTROL_LINE:
                return
            data, self.buf = bytes(self.buf), bytearray()
        elif self._rest:
            data = self._rest + data
        while True:
            data, waits = self._messages(data)
            self._rest = data  # a reconnect meanwhile resets it
            if waits is None:
                return
            await waits
            data = self._rest

    def _messages(self, data: bytes) -> tuple[bytes, Awaitable[None] | None]:
        """Hand on whole messages. Returns what is left, and what is to be awaited before that is looked at."""
        take = self._take
        at, size = 0, len(data)
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > LINE_MAX:
                    return b"", super().parse(data[at:])
                break
            words = data[at:end].split(b" ")
            count = len(words)
            try:
                if words[0] == b"HMSG" and 5 <= count <= 6:
                    body_at = end + 2 + int(words[-2])
                elif words[0] == b"MSG" and 4 <= count <= 5:
                    body_at, count = end + 2, count + 1
                else:
                    return data[end + 2 :], super().parse(data[at : end + 2])
                after, sid = end + 4 + int(words[-1]), int(words[2])
            except ValueError:
                raise ProtocolError from None
            if not end < body_at <= after - 2:
                raise ProtocolError
            if after > size:
                if after - at > SHORT_MAX:
                    return b"", super().parse(data[at:])
                break
            reply = words[3] if count == 6 else b""
            waits = take(sid, words[1], reply, data[body_at : after - 2], data[end + 2 : body_at] or None)
            at = after
            if waits is not None:
                return data[at:], waits
        return data[at:], None
