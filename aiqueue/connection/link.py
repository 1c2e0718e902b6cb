"""One supervised connection: it comes back for ever, and says in one line when it goes and when it returns."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any

from ..config import Settings
from ..errors import AccessDenied, AIQueueError, Unavailable
from . import frames, reading
from .answers import Answers, Awaited
from .dial import dial, reconnect_delay_s
from .faults import denied_subject, text, translate
from .frames import Headers, PubAck, Received, Stored
from .subscription import Callback, Subscription
from .window import Publish, Window
from .wire import Link

log = logging.getLogger("aiqueue.connection")

API_S = 5.0
SAID_MAX = 100
FORSAKE_S = 1.0


class Connection:
    """A connection to one NATS server or cluster.

    After `open` it stays until `close`: lost links are sought again with exponential backoff and jitter, without
    end, and a client that closes itself (nats-py does so on any unexpected -ERR) is built anew with its
    subscriptions. Calls made meanwhile wait for the link within their own timeouts.
    """

    def __init__(self, settings: Settings, *, revive: Callable[[], Awaitable[str]] | None = None) -> None:
        """`revive` is called when the link is lost: it brings the server back and says where it is now."""
        self.settings = settings
        self._revive = revive
        self._link: Link | None = None
        self._up = asyncio.Event()
        self._closing = False
        self._rebuilding: asyncio.Task[None] | None = None
        self._lost_at = 0.0
        self._subscriptions: set[Subscription] = set()
        self._regained: list[Callable[[], None]] = []
        self._answers = Answers(self)
        self._nudging: asyncio.Task[None] | None = None
        self._deaf: str | None = None  # the inbox of answers, when this user may not listen there
        self._said: set[str] = set()  # refusals told since the link was last regained

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def closing(self) -> bool:
        """Whether `close` was called: a lost link will not come back."""
        return self._closing

    @property
    def max_payload(self) -> int:
        """Bytes that the server takes in one frame, headers counted."""
        if self._link is None:
            raise Unavailable("the connection is not open")
        return self._link._max_payload  # not by its property: every publish asks

    @property
    def server(self) -> str:
        """The connected server's address, without credentials."""
        url = self._client.connected_url
        return f"{url.scheme}://{url.hostname}:{url.port}" if url else "(not connected)"

    @property
    def server_version(self) -> str:
        return str(self._client._server_info.get("version", "unknown"))

    @property
    def cluster(self) -> str:
        """The name of the connected server's cluster, empty where it is alone."""
        return str(self._client._server_info.get("cluster") or "")

    @property
    def _client(self) -> Link:
        if self._link is None:
            raise Unavailable("the connection is not open")
        return self._link

    async def open(self) -> None:
        """Connect. Raises Unavailable, AccessDenied, SettingsError."""
        if self._link is None:
            self._closing = False
            await self._build()

    async def close(self) -> None:
        """Flush what was published and leave. Safe twice and unopened."""
        self._closing = True
        self._up.clear()
        for task in (self._rebuilding, self._nudging):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(Exception):
                if link.is_connected:
                    await link.flush(timeout=2)
            # gathered: nats-py's close awaits what its reconnection awaited, and is cancelled where that was
            await asyncio.gather(link.close(), return_exceptions=True)
        self._answers.fail(Unavailable("the connection was closed", maybe_stored=True))
        if left := self._answers.window.close():
            await asyncio.wait(left)
        self._subscriptions.clear()
        self._up.set()  # wake those who wait for the link: it will not come any more
        self._up.clear()

    def on_regained(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` whenever a lost link is back (what the server knew of it is gone: pulls, inboxes in
        flight). Returns what takes it off again.
        """
        self._regained.append(callback)
        return lambda: self._regained.remove(callback) if callback in self._regained else None

    async def wait_up(self, timeout_s: float) -> None:
        """Return when the link stands. Raises Unavailable after `timeout_s` seconds."""
        if self._up.is_set():
            return
        if self._link is None and self._rebuilding is None:
            raise Unavailable("the connection is not open")
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable(f"no connection to {self.settings.addresses}") from None
        if self._closing:
            raise Unavailable("the connection was closed")

    # -- plain messages

    def new_inbox(self) -> str:
        return self._client.new_inbox()

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Have `callback` called with each message on `subject`, one at a time."""
        subscription = Subscription(self._subscriptions.discard, subject, callback, queue)
        if self._client.is_closed:  # and being built anew
            await self.wait_up(API_S)
        await self._attach(self._client, subscription)
        self._subscriptions.add(subscription)
        return subscription

    async def publish(
        self, subject: str, body: bytes = b"", *, headers: Headers | None = None, reply: str = ""
    ) -> None:
        """Send without waiting for anybody's word: hints, acks, requests. Raises TooLarge, BadInput, Unavailable
        (the link is down: nothing is queued for later).
        """
        block = frames.block(headers) if headers else b""
        frames.measure(block, body, self.max_payload)
        await self.send(subject, reply, block, body)

    async def send(self, subject: str, reply: str, block: bytes, body: bytes) -> None:
        """Publish what `frames.block` has made and `frames.measure` has passed. Raises Unavailable."""
        self.tell(subject, body, reply=reply, block=block)
        await self._client.relieve()

    def tell(self, subject: str, body: bytes, *, reply: str = "", block: bytes = b"") -> None:
        """The same without ever waiting, for words that are few and short: acks. Raises Unavailable."""
        link = self._link
        if link is None or not self._up.is_set():
            raise Unavailable("no connection")
        link.send(frames.frame(subject, reply, block, body))

    def push(self) -> None:
        """Have what was told go to the socket at once, if that keeps up, and not with all else of this turn of the
        event loop: it is waited for.
        """
        if self._link is not None:
            self._link.push()

    async def flush(self) -> None:
        """Return when the server has read all that was published. Raises Unavailable."""
        try:
            await self._client.flush()
        except Exception as error:  # noqa: BLE001
            raise translate(error, "flush") from None

    async def request(
        self, subject: str, body: bytes = b"", *, headers: Headers | None = None, timeout_s: float = API_S
    ) -> Received:
        """One request and its answer. Raises Unavailable, AccessDenied, TooLarge, BadInput."""
        await self.wait_up(timeout_s)
        block = frames.block(headers) if headers else b""
        frames.measure(block, body, self.max_payload)
        answer = await self._answers.ask(subject, block, body, timeout_s)
        if answer.status is not None and answer.status.code == 503:
            raise Unavailable(f"{subject}: no responders")
        return answer

    # -- JetStream

    async def api(
        self, subject: str, request: dict[str, Any] | None = None, *, timeout: float = API_S
    ) -> dict[str, Any]:
        """One call of the JetStream API; `subject` without ``$JS.API.``.

        Raises what the answer's err_code stands for (NotFound, ConfigMismatch, QueueFull …, else ServerError) and
        Unavailable when JetStream does not answer within `timeout` seconds, or at once where nobody takes the call: a
        cluster that elects a leader, a server without JetStream.
        """
        body = json.dumps(request).encode() if request else b""
        try:
            answer = await self.request(f"$JS.API.{subject}", body, timeout_s=timeout)
        except Unavailable as error:
            if "no responders" in str(error):
                raise Unavailable(f"{subject}: JetStream does not answer: is it enabled on this server?") from None
            raise
        return frames.answer(answer.data, subject)

    async def store(self, subject: str, body: bytes, headers: Headers, *, timeout_s: float = 30.0) -> PubAck:
        """Publish to a stream and await its PubAck, trying again within `timeout_s` seconds while no server answers.

        The headers must carry Nats-Msg-Id, which makes a second try harmless. Raises TooLarge, BadInput, QueueFull,
        Conflict, NotFound (no stream takes the subject), AccessDenied, and Unavailable, whose `maybe_stored` says
        whether a try may have been stored all the same.
        """
        self._demand_open()
        block = frames.block(headers)
        return await self.store_block(
            subject, block, body, fenced="Nats-Expected-Last-Subject-Sequence" in headers, timeout_s=timeout_s
        )

    def store_block(
        self,
        subject: str,
        block: bytes,
        body: bytes,
        *,
        fenced: bool = False,
        stream: str = "",
        timeout_s: float = 30.0,
    ) -> Awaitable[PubAck]:
        """The same with headers that `frames.block` has made. `stream`: see `Publish`."""
        self._demand_open()
        frames.measure(block, body, self.max_payload)
        answers = self._answers
        publish = Awaited(subject, block, body, answers.window.loop.create_future(), fenced=fenced, stream=stream)
        return answers.store(publish, timeout_s)

    @property
    def window(self) -> Window:
        """The publishes under way, all of this connection's callers together."""
        return self._answers.window

    def add(self, publish: Publish, timeout_s: float) -> None:
        """Put a publish through the window, whoever awaits it. Raises TooLarge, Unavailable (not open)."""
        self._demand_open()
        frames.measure(publish.block, publish.body, self.max_payload)
        self._answers.window.add(publish, timeout_s)

    def put(self, subject: str, token: bytes, block: bytes, body: bytes) -> None:
        """Send a publish that is answered under `token`; for the window, which knows that the link stands."""
        assert self._link is not None
        self._link.send(frames.put(subject, self._answers.inbox_bytes, token, block, body))

    def put_batch(self, name: str, token: bytes, messages: Sequence[Publish], first: int, *, last: bool) -> None:
        """The same for messages of an atomic batch, of which the first has the number `first`. With the `last` of them
        it is complete. They go out at once: the server works while callers run.
        """
        reply = self._answers.inbox_bytes + token  # in each frame's first line: Link.take_back goes by that
        link = self._client
        link.send(frames.batch(name.encode(), messages, first, reply, last=last))
        link.push()

    @property
    def behind(self) -> bool:
        """Whether a lot is queued for the socket: one who sends more is to `relieve` it."""
        return self._link is not None and self._link.behind

    async def relieve(self) -> None:
        """Wait for the socket when a lot is queued already."""
        if self._link is not None and self._up.is_set():
            await self._link.relieve()

    def _demand_open(self) -> None:
        if self._link is None and self._rebuilding is None:
            raise Unavailable("the connection is not open")

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The newest message of `subject`, read from the stream's leader (a direct get could be behind)."""
        return await reading.get(self, stream, {"last_by_subj": subject})

    async def get(self, stream: str, seq: int) -> Stored | None:
        """The message with this sequence, None where there is none."""
        return await reading.get(self, stream, {"seq": seq})

    async def first(self, stream: str, subject: str) -> Stored | None:
        """The oldest message whose subject matches, read from the stream's leader."""
        return await reading.get(self, stream, {"seq": 1, "next_by_subj": subject})

    async def delete(self, stream: str, seq: int) -> bool:
        """Delete the message with this sequence, False where there is none."""
        return await reading.delete(self, stream, seq)

    def read(
        self, stream: str, subject: str, *, seq: int = 1, batch: int = reading.BATCH, ahead: bool = False
    ) -> AsyncGenerator[Stored, None]:
        """The messages of a stream whose subject matches, in order from `seq`, without a consumer. `batch` of them,
        or 4 MiB, are asked for at a time; `ahead` asks for the next ones while these are used.

        Needs the stream's allow_direct. Raises Unavailable when an answer stays away for 5 seconds.
        """
        return reading.read(self, stream, subject, seq, batch=batch, ahead=ahead)

    # -- keeping it alive

    async def _build(self) -> None:
        link = await dial(
            self.settings, lost=self._on_lost, regained=self._on_regained, closed=self._on_closed, noted=self._on_error
        )
        former, self._link = self._link, link
        self._answers.inbox = link.new_inbox() + "."
        self._answers.inbox_bytes = self._answers.inbox.encode()
        self._deaf = None
        try:
            await self._listen(link)
        except BaseException:
            self._link = former
            await link.forsake()
            raise
        self._up.set()

    async def _listen(self, link: Link) -> None:
        try:
            await link.listen_answers(self._answers.inbox + "*", self._answers.on_answer)
            for subscription in list(self._subscriptions):
                await self._attach(link, subscription)
            await link.flush(timeout=round(API_S))  # a refusal of the inbox comes before the answer to this
        except Exception as error:  # noqa: BLE001
            raise translate(error, "subscribing") from None
        if link.is_closed:
            raise Unavailable("the server closed the connection")
        if self._deaf:
            raise AccessDenied(f"this user may not subscribe to {self._deaf}: set inbox_prefix to what he may")

    async def _attach(self, link: Link, subscription: Subscription) -> None:
        try:
            await subscription.attach(link)
        except Exception as error:  # noqa: BLE001
            raise translate(error, subscription.subject) from None

    async def _on_lost(self) -> None:
        if not self._closing and self._up.is_set():
            self._up.clear()
            self._lost_at = time.monotonic()
            log.warning("lost the connection to %s, reconnecting", self.settings.addresses)
            self._answers.fail(Unavailable("the connection was lost before the answer", maybe_stored=True))
            if self._link is not None:
                self._link.take_back(self._answers.inbox_bytes)
            self._answers.window.lost()
            if self._revive is not None:
                self._nudging = asyncio.create_task(self._nudge(self._revive))

    async def _nudge(self, revive: Callable[[], Awaitable[str]]) -> None:
        """An embedded server may be gone for good: have it brought back while nats-py keeps dialling."""
        try:
            url = await revive()
        except AIQueueError as error:
            log.warning("the embedded server does not come back: %s", error)
            return
        if url != self.settings.url and not self._closing:
            log.warning("the embedded server is at %s now", url)
            self.settings = self.settings.model_copy(update={"url": url})
            self.renew()

    def renew(self) -> None:
        """Give this client up for another one, with all subscriptions: the link stands but brings nothing, or the
        server is elsewhere now. Does not wait: what is under way is tried again, as after any lost link.
        """
        if not self._closing and self._rebuilding is None and self._link is not None:
            self._rebuilding = asyncio.create_task(self._replace(self._link))

    async def _replace(self, former: Link) -> None:
        await self._on_lost()
        with contextlib.suppress(TimeoutError):  # what it had to say may not go out: a dark link
            async with asyncio.timeout(FORSAKE_S):
                await former.forsake()
        await self._rebuild()

    async def _on_regained(self) -> None:
        if self._closing or self._up.is_set():
            return
        self._up.set()
        self._said.clear()
        self._answers.window.regained()
        log.warning("regained the connection to %s after %.1f s", self.server, time.monotonic() - self._lost_at)
        for callback in list(self._regained):
            callback()

    async def _on_closed(self) -> None:
        if self._closing or self._rebuilding is not None:  # it is being replaced already
            return
        await self._on_lost()
        self._rebuilding = asyncio.create_task(self._rebuild())

    async def _rebuild(self) -> None:
        """nats-py gave the client up: make another one, for as long as it takes."""
        tries = 0
        try:
            while not self._closing:
                try:
                    await self._build()
                except AIQueueError as error:
                    (log.debug if isinstance(error, Unavailable) else self._say_once)(str(error))
                    await asyncio.sleep(reconnect_delay_s(tries))
                    tries += 1
                else:
                    self._up.clear()  # so that _on_regained announces it, in its one line
                    await self._on_regained()
                    return
        finally:
            self._rebuilding = None

    def _on_error(self, error: Exception) -> None:
        """Errors without a caller: a refused publish ends the call that waits for it; the rest is for debugging."""
        ours = translate(error, "NATS")
        if isinstance(ours, AccessDenied):
            if subject := denied_subject(error):
                self._answers.refuse(subject)
            elif self._answers.inbox.lower() in str(error).lower():
                self._deaf = self._answers.inbox + "*"
            self._say_once(text(error))
        elif type(error).__module__.startswith("nats.") or isinstance(error, OSError | TimeoutError):
            level = logging.WARNING if "slow consumer" in str(error) else logging.DEBUG  # messages were dropped
            log.log(level, "%s", text(error))
        else:  # a callback of ours raised it
            log.error("%s", text(error), exc_info=error)

    def _say_once(self, what: str) -> None:
        if what not in self._said and len(self._said) < SAID_MAX:
            self._said.add(what)
            log.error("%s", what)
