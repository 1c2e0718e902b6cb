"""Messages that are answered: one inbox for all answers, PubAcks among them; stores tried again while none comes."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from ..errors import AccessDenied, AIQueueError, Conflict, NotFound, Unavailable
from . import frames
from .dial import reconnect_delay_s
from .frames import Headers, Received

if TYPE_CHECKING:
    from .link import Connection

log = logging.getLogger("aiqueue.connection")

TRY_S = 5.0  # one try; the caller's own timeout spans the tries


class PubAck(NamedTuple):
    """The server's word that a message is stored; `duplicate`: it was already, under `seq`."""

    stream: str
    seq: int
    duplicate: bool

    @classmethod
    def read(cls, data: bytes, subject: str) -> PubAck:
        """What a stream answered to a publish. Raises what an error's code stands for."""
        told = frames.answer(data, subject)
        try:
            return cls(told["stream"], told["seq"], bool(told.get("duplicate")))
        except KeyError:
            raise Unavailable(f"{subject}: something else than a stream answered", maybe_stored=True) from None


class Answers:
    """The one inbox of a connection, and who waits for what comes in there."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: dict[str, tuple[asyncio.Future[Received], str]] = {}
        self._count = 0
        self.inbox = ""

    async def ask(self, subject: str, block: bytes, body: bytes, timeout_s: float) -> Received:
        """Send one message and return its one answer. `block` is of `frames.block`, and measured.

        Raises Unavailable when none comes, and AccessDenied.
        """
        loop = asyncio.get_running_loop()
        self._count += 1
        token = f"{self._count:x}"
        waiting: asyncio.Future[Received] = loop.create_future()
        self._waiting[token] = (waiting, subject)
        late = loop.call_later(timeout_s, _too_late, waiting, timeout_s)
        try:
            await self._connection.send(subject, self.inbox + token, block, body)
            return await waiting
        finally:
            late.cancel()
            self._waiting.pop(token, None)

    async def store(self, subject: str, body: bytes, headers: Headers, timeout_s: float) -> PubAck:
        """See Connection.store."""
        connection = self._connection
        block = frames.block(headers)
        frames.measure(block, body, connection.max_payload)
        end = time.monotonic() + timeout_s
        maybe_stored, tries = False, 0
        while True:
            left = end - time.monotonic()
            try:
                await connection.wait_up(left)
                answer = await self.ask(subject, block, body, min(TRY_S, max(left, 0.05)))
                if answer.status is not None and answer.status.code == 503:
                    await self._explain(subject)
                return PubAck.read(answer.data, subject)
            except Conflict as error:
                # without an expected sequence: the server is writing this very id at the moment (10158)
                if headers.get("Nats-Expected-Last-Subject-Sequence") is not None or time.monotonic() > end:
                    raise
                log.debug("%s", error)
                await asyncio.sleep(reconnect_delay_s(tries))
                tries += 1
            except Unavailable as error:
                maybe_stored = maybe_stored or error.maybe_stored
                left = end - time.monotonic()
                if left <= 0 or connection.closing:
                    raise Unavailable(f"{subject}: {error}", maybe_stored=maybe_stored) from None
                await asyncio.sleep(min(reconnect_delay_s(tries), left))
                tries += 1

    async def _explain(self, subject: str) -> NoReturn:
        """Nobody took a publish: NotFound where no stream wants the subject, Unavailable where one does."""
        try:
            names = await self._connection.api("STREAM.NAMES", {"subject": subject})
        except AccessDenied:
            names = {"streams": ["?"]}  # a user of one tenant may not ask; the stream may merely lack a leader now
        if not names.get("streams"):
            raise NotFound(f"no stream takes {subject}: has `aiqueue apply` been run on this server?")
        raise Unavailable("no stream takes it, or its leader is away")

    def on_answer(self, message: Received) -> None:
        """An answer on the inbox."""
        entry = self._waiting.get(message.subject[len(self.inbox) :])
        if entry is not None and not entry[0].done():
            entry[0].set_result(message)

    def fail(self, error: AIQueueError) -> None:
        """End all waiting with `error`."""
        for future, _ in list(self._waiting.values()):
            if not future.done():
                future.set_exception(error)

    def refuse(self, denied: str) -> None:
        """End those that wait on a subject which this user may not publish to; nats-py tells it in lower case."""
        for future, subject in list(self._waiting.values()):
            if subject.lower() == denied and not future.done():
                future.set_exception(AccessDenied(f"this user may not publish to {subject}"))


def _too_late(waiting: asyncio.Future[Received], after_s: float) -> None:
    if not waiting.done():
        waiting.set_exception(Unavailable(f"no answer within {after_s:g} s", maybe_stored=True))
