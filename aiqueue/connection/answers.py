"""Messages that are answered: one inbox for all answers, PubAcks among them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from ..errors import AccessDenied, AIQueueError, Unavailable
from .frames import PubAck, Received
from .window import Publish, Window
from .wire import Message

if TYPE_CHECKING:
    from .link import Connection


class Answers:
    """The one inbox of a connection, and who waits for what comes in there."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: dict[bytes, tuple[asyncio.Future[Received], str]] = {}
        self._count = 0
        self.window = Window(connection)
        self.inbox = ""
        self.inbox_bytes = b""

    async def ask(self, subject: str, block: bytes, body: bytes, timeout_s: float) -> Received:
        """Send one message and return its one answer. `block` is of `frames.block`, and measured.

        Raises Unavailable when none comes, and AccessDenied.
        """
        loop = asyncio.get_running_loop()
        self._count += 1
        token = f"r{self._count:x}"  # the window's tokens have no letter in front
        waiting: asyncio.Future[Received] = loop.create_future()
        self._waiting[token.encode()] = (waiting, subject)
        late = loop.call_later(timeout_s, _too_late, waiting, timeout_s)
        try:
            await self._connection.send(subject, self.inbox + token, block, body)
            return await waiting
        finally:
            late.cancel()
            self._waiting.pop(token.encode(), None)

    async def store(self, publish: Awaited, timeout_s: float) -> PubAck:
        """Put one message through the window. Raises what came of it instead of a PubAck."""
        try:
            self.window.add(publish, timeout_s)
            if self._connection.behind:
                await self._connection.relieve()
            if publish.outcome is None:
                await publish.future
        except BaseException:
            self.window.abandon([publish])
            raise
        if isinstance(publish.outcome, AIQueueError):
            raise publish.outcome
        assert publish.outcome is not None
        return publish.outcome

    def on_answer(self, subject: bytes, data: bytes, block: bytes | None) -> None:
        """An answer on the inbox."""
        token = subject[subject.rfind(b".") + 1 :]
        if self.window.answered(token, data, block):
            return
        entry = self._waiting.get(token)
        if entry is not None and not entry[0].done():
            entry[0].set_result(Message(subject.decode(), "", data, block))

    def fail(self, error: AIQueueError) -> None:
        """End all requests with `error`."""
        for future, _ in list(self._waiting.values()):
            if not future.done():
                future.set_exception(error)

    def refuse(self, denied: str) -> None:
        """End those that wait on a subject which this user may not publish to; nats-py tells it in lower case."""
        self.window.refuse(denied)
        for future, subject in list(self._waiting.values()):
            if subject.lower() == denied and not future.done():
                future.set_exception(AccessDenied(f"this user may not publish to {subject}"))


class Awaited(Publish):
    """A publish whose caller waits for it alone."""

    __slots__ = ("future",)

    def __init__(
        self, subject: str, block: bytes, body: bytes, future: asyncio.Future[None], *, fenced: bool, stream: str
    ) -> None:
        super().__init__(subject, block, body, fenced=fenced, stream=stream)
        self.future = future

    def settled(self) -> None:
        if not self.future.done():
            self.future.set_result(None)


def _too_late(waiting: asyncio.Future[Received], after_s: float) -> None:
    if not waiting.done():
        waiting.set_exception(Unavailable(f"no answer within {after_s:g} s", maybe_stored=True))
