"""The reply inbox: one subscription receives the replies to all requests and publishes of a connection."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

from ..errors import AIQueueError, Unavailable
from . import faults
from .frames import PubAck, Received
from .nats_client import WireMessage
from .publish_types import AwaitedPublish
from .publish_window import Window, WindowConnection

# A cluster drops requests without a reply while their group has no leader. These may be carried out twice.
_VERBS = ("INFO", "STREAM.INFO.", "STREAM.NAMES", "STREAM.MSG.GET.", "CONSUMER.INFO.", "CONSUMER.CREATE.")
REPEATABLE = tuple(f"$JS.API.{verb}" for verb in _VERBS)
REPEAT_S = 1.0
REPEATABLE_MAX = 256  # such requests of one connection that await their replies; further ones wait, and are not late


class RequestConnection(WindowConnection, Protocol):
    """What the reply inbox needs of its connection."""

    @property
    def behind(self) -> bool: ...
    async def relieve(self) -> None: ...
    def push(self) -> None: ...
    async def send(self, subject: str, reply: str, block: bytes, body: bytes) -> None: ...


class ReplyInbox:
    """Matches replies with the requests and publishes that wait for them."""

    def __init__(self, connection: RequestConnection) -> None:
        self._connection = connection
        self._requests: dict[bytes, tuple[asyncio.Future[Received], str]] = {}  # by token: the waiter, its subject
        self._reads: dict[bytes, tuple[asyncio.Queue[Received | AIQueueError], str]] = {}  # the same, of many replies
        self._room = asyncio.Semaphore(REPEATABLE_MAX)
        self._count = 0
        self.window = Window(connection)
        self.inbox = ""
        self.inbox_bytes = b""

    async def request(self, subject: str, block: bytes, body: bytes, timeout_s: float) -> Received:
        """Send one request and return its reply. `block` is encoded by `frames.block`; the caller has checked the size.

        While no server replies, a request in REPEATABLE is sent again every REPEAT_S. Of thousands at once, which the
        server answers one by one, most would be: so they are sent REPEATABLE_MAX at a time, and each has `timeout_s`.
        Raises Unavailable (no reply in time, or the connection was lost) and AccessDenied.
        """
        if not subject.startswith(REPEATABLE):
            return await self._request(subject, block, body, timeout_s, repeats=False)
        async with self._room:
            return await self._request(subject, block, body, timeout_s, repeats=True)

    async def _request(self, subject: str, block: bytes, body: bytes, timeout_s: float, *, repeats: bool) -> Received:
        loop = asyncio.get_running_loop()
        self._count += 1
        token = f"r{self._count:x}"  # tokens of the window start with a hex digit or with "g"
        future: asyncio.Future[Received] = loop.create_future()
        self._requests[token.encode()] = (future, subject)
        timer = loop.call_later(timeout_s, _time_out_request, future, subject, timeout_s)
        try:
            await self._connection.send(subject, self.inbox + token, block, body)
            while repeats and not (await asyncio.wait([future], timeout=REPEAT_S))[0]:
                await self._connection.send(subject, self.inbox + token, block, body)
            return await future
        finally:
            timer.cancel()
            self._requests.pop(token.encode(), None)
            if future.done() and not future.cancelled():
                future.exception()  # else asyncio logs that nobody has retrieved it, of a caller that was cancelled

    @contextlib.asynccontextmanager
    async def request_many(self, subject: str, body: bytes) -> AsyncIterator[asyncio.Queue[Received | AIQueueError]]:
        """Send one request. Its replies come into the queue, and an error if no further reply can come: AccessDenied,
        or Unavailable because the connection was lost.
        """
        self._count += 1
        token = f"r{self._count:x}"
        replies: asyncio.Queue[Received | AIQueueError] = asyncio.Queue()
        self._reads[token.encode()] = replies, subject
        try:
            await self._connection.send(subject, self.inbox + token, b"", body)
            yield replies
        finally:
            self._reads.pop(token.encode(), None)

    async def store(self, publish: AwaitedPublish, timeout_s: float) -> PubAck:
        """Send one message through the window and return its PubAck. Raises the error that the publish ended with."""
        try:
            self.window.add(publish, timeout_s)
            if self.window.in_flight == 1 and not self.window.patient:  # there is nothing to send it together with
                self._connection.push()
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

    def on_reply(self, subject: bytes, data: bytes, block: bytes | None) -> None:
        """Handle one message on the inbox."""
        token = subject[subject.rfind(b".") + 1 :]
        if self.window.on_reply(token, data, block):
            return
        entry = self._requests.get(token)
        if entry is None:
            if read := self._reads.get(token):
                read[0].put_nowait(WireMessage(subject, b"", data, block))
        elif not entry[0].done():
            entry[0].set_result(WireMessage(subject, b"", data, block))

    def fail_requests(self, error: AIQueueError) -> None:
        """End all pending requests with `error`."""
        for future, _ in list(self._requests.values()):
            if not future.done():
                future.set_exception(error)
        for replies, _ in self._reads.values():
            replies.put_nowait(error)

    def deny_subject(self, denied: str) -> None:
        """End all requests and publishes on `denied`, a subject that this user may not publish to. `denied` is in lower
        case, as nats-py reports it.
        """
        self.window.deny_subject(denied)
        for future, subject in list(self._requests.values()):
            if subject.lower() == denied and not future.done():
                future.set_exception(faults.denied("publish", subject))
        for replies, subject in self._reads.values():
            if subject.lower() == denied:
                replies.put_nowait(faults.denied("publish", subject))


def _time_out_request(future: asyncio.Future[Received], subject: str, timeout_s: float) -> None:
    if not future.done():
        future.set_exception(Unavailable(f"{subject}: no reply within {timeout_s:g} s", maybe_stored=True))
