"""nats-py's parser with a fast path for whole messages. To receive a message, nats-py runs four regular expressions,
copies its buffer and awaits a coroutine; the fast path does none of these (docs/decisions/short-way.md).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from nats.errors import ProtocolError
from nats.protocol.parser import AWAITING_CONTROL_LINE, Parser

LINE_MAX = 4_096  # bytes of a control line: the server's limit
FAST_MAX = 128 * 1024  # bytes; a larger message arrives in many reads, which nats-py's parser joins better

Dispatch = Callable[[int, bytes, bytes, bytes, bytes | None], Awaitable[None] | None]


class FastParser(Parser):
    """Cuts whole messages out of what the socket delivered. nats-py's parser gets the rest: other protocol lines, and
    large messages with what came in the same reads.

    The parser calls `dispatch` with each message: subscription id, subject, reply, body, header block (None if there
    is none). If `dispatch` returns an awaitable, the parser awaits it before the next message.
    """

    def __init__(self, client: Any, dispatch: Dispatch) -> None:
        super().__init__(client)
        self._dispatch = dispatch
        self.refusal = ""  # the server's last -ERR line as it came: nats-py reports it in lower case

    def reset(self) -> None:
        super().reset()
        self._rest = b""

    async def parse(self, data: bytes = b"") -> None:
        """Parse what was read from the socket. Raises ProtocolError."""
        if self.buf or self.state != AWAITING_CONTROL_LINE:
            await super().parse(data)
            if self.state != AWAITING_CONTROL_LINE:
                return
            data, self.buf = bytes(self.buf), bytearray()
        elif self._rest:
            data = self._rest + data
        while True:
            data, pending = self._dispatch_messages(data)
            self._rest = data  # a reconnect during the await resets it
            if pending is None:
                return
            await pending
            data = self._rest

    def _dispatch_messages(self, data: bytes) -> tuple[bytes, Awaitable[None] | None]:
        """Dispatch whole messages. Returns the rest of `data`, and what must be awaited before the rest is parsed."""
        dispatch = self._dispatch
        at, size = 0, len(data)
        while at < size:
            end = data.find(b"\r\n", at)
            if end < 0:
                if size - at > LINE_MAX:
                    return b"", super().parse(data[at:])
                break
            fields = data[at:end].split(b" ")
            count = len(fields)
            try:
                if fields[0] == b"HMSG" and 5 <= count <= 6:
                    body_at = end + 2 + int(fields[-2])
                elif fields[0] == b"MSG" and 4 <= count <= 5:
                    body_at, count = end + 2, count + 1
                else:
                    if fields[0] == b"-ERR":
                        self.refusal = data[at:end].decode("utf-8", "replace")
                    return data[end + 2 :], super().parse(data[at : end + 2])
                after, sid = end + 4 + int(fields[-1]), int(fields[2])
            except ValueError:
                raise ProtocolError from None
            if not end < body_at <= after - 2:
                raise ProtocolError
            if after > size:
                if after - at > FAST_MAX:
                    return b"", super().parse(data[at:])
                break
            reply = fields[3] if count == 6 else b""
            pending = dispatch(sid, fields[1], reply, data[body_at : after - 2], data[end + 2 : body_at] or None)
            at = after
            if pending is not None:
                return data[at:], pending
        return data[at:], None
