"""One message on its way into a stream, and what becomes of it. The window and the batches both build on this."""

from __future__ import annotations

import asyncio
from typing import Protocol

from ..errors import AIQueueError
from .frames import PubAck


class Batcher(Protocol):
    """What the window calls on the batcher of a publish; `batches.StreamBatcher` is the implementation."""

    def gather(self, publish: Publish) -> bool: ...
    def count_sent(self, now: float, count: int) -> None: ...
    def count_reply(self) -> None: ...
    def forget(self, publish: Publish) -> None: ...


class Publish:
    """One message for a stream. The window sets `outcome` and then calls `settled`, once.

    - `block`: the encoded headers (`frames.block`), with Nats-Msg-Id. The caller has checked the size.
    - `fenced`: the message carries an expected last sequence or Msg-Id. A conflict is then its outcome; without it, a
      conflict is a reason to retry.
    - `stream`: the target stream, if that stream takes atomic batches and this message may be part of one; else empty.
    """

    # What few publishes need stands here and not in __init__, which runs for each.
    batcher: Batcher | None = None
    batch_token = b""  # of the batch in flight that holds this message
    unbatched = False  # its batch failed, so it must be sent as a single message
    outcome: PubAck | AIQueueError | None = None
    maybe_stored = False
    problem = ""  # why the last try failed; empty before the first failure
    tries = 0
    token = b""  # the server's reply comes on the reply inbox plus this token
    check_at = deadline = 0.0  # event loop time: of the next look at this try, and the end of all tries

    def __init__(self, subject: str, block: bytes, body: bytes, *, fenced: bool = False, stream: str = "") -> None:
        self.subject = subject
        self.block = block
        self.body = body
        self.fenced = fenced
        self.stream = stream

    def settled(self) -> None:
        """The outcome is set. The window calls this from the socket reader or from a timer, so it must not block."""


class AwaitedPublish(Publish):
    """A publish that one caller awaits."""

    def __init__(
        self, subject: str, block: bytes, body: bytes, future: asyncio.Future[None], *, fenced: bool, stream: str
    ) -> None:
        super().__init__(subject, block, body, fenced=fenced, stream=stream)
        self.future = future

    def settled(self) -> None:
        if not self.future.done():
            self.future.set_result(None)
