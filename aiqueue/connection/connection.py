"""One supervised connection: it reconnects for ever, and logs one line when it is lost and one when it is back."""

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
from .clock import ServerClock
from .dial import Revive, dial, reconnect_delay_s, restart_server
from .faults import translate
from .frames import Headers, PubAck, Received, Stored
from .listeners import Listeners
from .nats_client import NatsClient, to_its_end
from .permissions import DeniedCallback, Permissions
from .publish_types import AwaitedPublish, Publish
from .publish_window import Window
from .reply_inbox import ReplyInbox
from .subscription import Callback, Subscription

log = logging.getLogger(__name__)

API_S = 5.0
ABORT_S = 1.0
REVIVED_S = 5.0
NOT_OPEN = "the connection is not open"


class Connection:
    """A connection to one NATS server or cluster.

    - It stays open from `open` to `close`. If the server is lost, it reconnects with exponential backoff and jitter,
      without end.
    - A client that closes itself, as nats-py does on an unexpected -ERR, is replaced with all its subscriptions.
    - Calls during an outage wait for the connection within their own timeouts.
    """

    def __init__(self, settings: Settings, *, revive: Revive | None = None) -> None:
        """`revive` is called when the connection is lost: it restarts an embedded server and returns the settings."""
        self.settings = settings
        self._revive = revive
        self._client: NatsClient | None = None
        self._up = asyncio.Event()
        self._closing = False
        self._replacing: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._lost_at = 0.0
        self._subscriptions: set[Subscription] = set()
        self._regained: Listeners[Callable[[], None]] = Listeners()
        self.optional = 0  # who asks for what need not be permitted: meanwhile denials are not logged
        self._replies = ReplyInbox(self)
        self.clock = ServerClock(self.api)
        self._permissions = Permissions(
            self._replies, self._subscriptions, lambda: self.clock.probing or self.optional > 0
        )

    @property
    def connected(self) -> bool:
        return self._up.is_set()

    @property
    def closing(self) -> bool:
        """Whether `close` was called, so that a lost connection will not come back."""
        return self._closing

    @property
    def max_payload(self) -> int:
        """The server's limit for one message, in bytes, headers included."""
        if self._client is None:
            raise Unavailable(NOT_OPEN)
        return self._client._max_payload  # not nats-py's property of this name: every publish reads it

    @property
    def server(self) -> str:
        """The address of the connected server, without credentials."""
        url = self._open_client.connected_url
        return f"{url.scheme}://{url.hostname}:{url.port}" if url else "(not connected)"

    @property
    def server_version(self) -> str:
        return str(self._open_client._server_info.get("version", "unknown"))

    @property
    def cluster(self) -> str:
        """The name of the connected server's cluster; empty for a single server that has JetStream itself."""
        info = self._open_client._server_info
        return str(info.get("cluster") or ("" if info.get("jetstream") else "(JetStream is elsewhere)"))

    @property
    def _open_client(self) -> NatsClient:
        if self._client is None:
            raise Unavailable(NOT_OPEN)
        return self._client

    async def open(self) -> None:
        """Connect. Raises Unavailable, AccessDenied, SettingsError."""
        if self._client is None:
            self._closing = False
            await self._connect_client()

    async def close(self) -> None:
        """Flush what was published, and disconnect. Safe to call twice, and before `open`."""
        self._closing = True
        self._up.clear()
        for task in (self._replacing, self._reviving):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        client, self._client = self._client, None
        try:
            if client is not None:
                await to_its_end(client.disconnect())
        finally:
            self._replies.fail_requests(Unavailable("the connection was closed", maybe_stored=True))
            tasks = self._replies.window.close()
            self._subscriptions.clear()
            self._up.set()  # wake the callers of `wait_up`: they see that the connection is closed
            self._up.clear()
        if tasks:
            await asyncio.wait(tasks)

    def abandon(self) -> NatsClient | None:
        """In a forked child process: be closed without touching the socket, and return the client that has it."""
        self._up.clear()
        client, self._client, self._closing = self._client, None, True
        return client

    def on_regained(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` after each reconnect: pulls and messages are lost. Returns a function that removes it."""
        return self._regained.add(callback)

    def on_denied(self, callback: DeniedCallback) -> Callable[[], None]:
        """Call `callback` with subject and error of each denied publish. Returns a function that removes it."""
        return self._permissions.listen(callback)

    async def wait_up(self, timeout_s: float) -> None:
        """Wait until connected. Raises Unavailable after `timeout_s` seconds."""
        if self._up.is_set():
            return
        if self._client is None and self._replacing is None:
            raise Unavailable(NOT_OPEN)
        try:
            async with asyncio.timeout(timeout_s):
                await self._up.wait()
        except TimeoutError:
            raise Unavailable(f"no connection to {self.settings.addresses}") from None
        if self._closing:
            raise Unavailable("the connection was closed")

    def new_inbox(self) -> str:
        return self._open_client.new_inbox()

    async def subscribe(self, subject: str, callback: Callback, *, queue: str = "") -> Subscription:
        """Subscribe. `callback` is called with each message on `subject`, one at a time."""
        subscription = Subscription(self._subscriptions.discard, subject, callback, queue)
        if self._open_client.is_closed:  # and is being replaced
            await self.wait_up(API_S)
        await self._attach_subscription(self._open_client, subscription)
        self._subscriptions.add(subscription)
        return subscription

    async def confirm_subscriptions(self, prefixes: tuple[str, ...]) -> None:
        """Return when the server has taken the subscriptions to `prefixes`. Raises AccessDenied, Unavailable."""
        await self.flush()
        for each in [each for each in self._subscriptions if each.subject.startswith(prefixes)]:
            each.check()

    async def publish(
        self, subject: str, body: bytes = b"", *, headers: Headers | None = None, reply: str = ""
    ) -> None:
        """Publish without an acknowledgement: hints, acks, requests. Raises TooLarge, BadInput, and Unavailable if not
        connected: nothing is queued for later.
        """
        block = frames.block(headers) if headers else b""
        frames.check_message(subject, block, body, self.max_payload, reply)
        await self.send(subject, reply, block, body)

    async def send(self, subject: str, reply: str, block: bytes, body: bytes) -> None:
        """As `publish`, with headers that `frames.block` has encoded and a size that is checked. Raises Unavailable."""
        self.tell(subject, body, reply=reply, block=block)
        await self._open_client.relieve()

    def tell(self, subject: str, body: bytes, *, reply: str = "", block: bytes = b"") -> None:
        """As `send`, without waiting for the socket: for messages that are short, such as acks. Raises Unavailable."""
        self.tell_frame(frames.publish_frame(subject, reply, block, body))

    def tell_frame(self, frame: bytes) -> None:
        """As `tell`, for a frame that `frames` has made."""
        if self._client is None or not self._up.is_set():
            raise Unavailable("not connected to a server")
        self._client.send(frame)

    def push(self) -> None:
        """Write queued messages to the socket now if it keeps up, and not at the end of this turn of the event loop:
        for a message whose reply is waited for.
        """
        if self._client is not None:
            self._client.push()

    async def flush(self) -> None:
        """Return when the server has read all that was published. Raises Unavailable."""
        try:
            await self._open_client.flush()
        except Exception as error:  # noqa: BLE001
            raise translate(error, "flush") from None

    async def request(
        self, subject: str, body: bytes = b"", *, headers: Headers | None = None, timeout_s: float = API_S
    ) -> Received:
        """Send a request and return its reply. Raises Unavailable, AccessDenied, TooLarge, BadInput."""
        await self.wait_up(timeout_s)
        block = frames.block(headers) if headers else b""
        frames.check_message(subject, block, body, self.max_payload)
        reply = await self._replies.request(subject, block, body, timeout_s)
        if reply.status is not None and reply.status.code == 503:
            raise Unavailable(f"{subject}: no responders")
        return reply

    def request_many(
        self, subject: str, body: bytes
    ) -> contextlib.AbstractAsyncContextManager[asyncio.Queue[Received | AIQueueError]]:
        """As `ReplyInbox.request_many`. Raises Unavailable if not connected."""
        return self._replies.request_many(subject, body)

    # -- JetStream

    async def api(
        self, subject: str, request: dict[str, Any] | None = None, *, timeout: float = API_S
    ) -> dict[str, Any]:
        """Call the JetStream API; `subject` comes without ``$JS.API.``.

        - The reply is an error: raises what its err_code stands for (NotFound, QueueFull …), or ServerError.
        - No reply within `timeout` seconds: raises Unavailable.
        - No responders (a cluster without a leader, a server without JetStream): raises Unavailable at once.
        """
        body, sent_at = json.dumps(request).encode() if request else b"", time.monotonic()
        try:
            reply = await self.request(f"$JS.API.{subject}", body, timeout_s=timeout)
        except Unavailable as error:
            if "no responders" in str(error):
                raise Unavailable(f"{subject}: JetStream does not respond: is it enabled on this server?") from None
            raise
        return self.clock.note_reply(sent_at, frames.parse_api_reply(reply.data, subject))

    async def store(self, subject: str, body: bytes, headers: Headers, *, timeout_s: float = 30.0) -> PubAck:
        """Publish to a stream and return the PubAck. Retries within `timeout_s` seconds while no server replies.

        The headers must carry Nats-Msg-Id, so that the stream drops the duplicates of a retry. Writes use optimistic
        concurrency if the headers carry an expected last sequence: a stale sequence is rejected.

        - Raises Conflict: the expected last sequence is stale.
        - Raises NotFound: no stream matches the subject.
        - Raises QueueFull, AccessDenied, TooLarge, BadInput: nothing is stored.
        - Raises Unavailable: no PubAck in time. `maybe_stored` says whether a try may have stored the message.
        """
        self._require_open()
        fenced = any(name.startswith("Nats-Expected-Last-") for name in headers)
        return await self.store_block(subject, frames.block(headers), body, fenced=fenced, timeout_s=timeout_s)

    def store_block(
        self, subject: str, block: bytes, body: bytes, *, fenced: bool = False, stream: str = "", timeout_s: float = 30
    ) -> Awaitable[PubAck]:
        """As `store`, with headers that `frames.block` has encoded. `fenced` and `stream`: see `Publish`."""
        self._require_open()
        frames.check_message(subject, block, body, self.max_payload)
        future = self._replies.window.loop.create_future()
        publish = AwaitedPublish(subject, block, body, future, fenced=fenced, stream=stream)
        return self._replies.store(publish, timeout_s)

    @property
    def window(self) -> Window:
        """The window of all publishes that await a PubAck, whoever called."""
        return self._replies.window

    def add(self, publish: Publish, timeout_s: float) -> None:
        """Put `publish` into the window; its `settled` reports the outcome. Raises TooLarge, Unavailable."""
        self._require_open()
        frames.check_size(publish.block, publish.body, self.max_payload)
        self._replies.window.add(publish, timeout_s)

    def add_all(self, publishes: Sequence[Publish], timeout_s: float) -> None:
        """As `add` for each. They have one stream, or none, and sizes that are checked. Raises Unavailable."""
        self._require_open()
        self._replies.window.add_all(publishes, timeout_s)

    @property
    def reply_prefix(self) -> bytes:
        """Where replies to a publish come, plus its token. `drop_queued` looks for this in first lines of frames."""
        return self._replies.inbox_bytes

    def write(self, encoded: bytes) -> None:
        """Queue encoded frames for the socket. For the window, which has checked that it is connected."""
        assert self._client is not None
        self._client.send(encoded)

    @property
    def behind(self) -> bool:
        """Whether so much is queued for the socket that a caller with more to send must await `relieve` first."""
        return self._client is not None and self._client.behind

    async def relieve(self) -> None:
        """If the socket is behind, wait until it has taken the queued messages."""
        if self._client is not None and self._up.is_set():
            await self._client.relieve()

    def _require_open(self) -> None:
        if self._client is None and self._replacing is None:
            raise Unavailable(NOT_OPEN)

    async def last(self, stream: str, subject: str) -> Stored | None:
        """The newest message of `subject`, read from the stream's leader: a direct get could be out of date."""
        return await reading.get_message(self, stream, {"last_by_subj": subject})

    async def get(self, stream: str, seq: int) -> Stored | None:
        """The message at this sequence, or None if there is none."""
        return await reading.get_message(self, stream, {"seq": seq})

    async def first(self, stream: str, subject: str) -> Stored | None:
        """The oldest message whose subject matches, read from the stream's leader."""
        return await reading.get_message(self, stream, {"seq": 1, "next_by_subj": subject})

    async def delete(self, stream: str, seq: int) -> bool:
        """Delete the message at this sequence. Returns False if there is none."""
        return await reading.delete_message(self, stream, seq)

    def read(
        self, stream: str, subject: str, *, seq: int = 1, since: float | None = None, batch: int = reading.BATCH,
        ahead: bool = False, confirmed: bool = True,
    ) -> AsyncGenerator[Stored, None]:  # fmt: skip
        """The stream's messages whose subject matches, in order from `seq`, without a consumer. `since` (seconds since
        the epoch): instead from the first one that was stored then or later. A page holds `batch` messages, or 4 MiB.
        With `ahead`, the next page is requested while this one is used. `confirmed`: in a cluster, the stream's leader
        says whether there is more. The stream needs allow_direct. Raises Unavailable if a reply takes 5 seconds.
        """
        return reading.read_messages(self, stream, subject, seq, batch=batch, ahead=ahead, since=since,
                                     confirmed=confirmed)  # fmt: skip

    async def _connect_client(self) -> None:
        on_error = self._permissions.on_error
        client = await dial(self.settings, self._on_disconnected, self._on_reconnected, self._on_closed, on_error)
        former, self._client = self._client, client
        self._replies.inbox = client.new_inbox() + "."
        self._replies.inbox_bytes = self._replies.inbox.encode()
        self._permissions.denied_inbox = ""
        try:
            await self._subscribe_all(client)
        except BaseException:
            self._client = former
            await client.abort()
            raise
        self._up.set()

    async def _subscribe_all(self, client: NatsClient) -> None:
        try:
            await client.subscribe_replies(self._replies.inbox + "*", self._replies.on_reply)
            for subscription in list(self._subscriptions):
                await self._attach_subscription(client, subscription)
            await client.flush(timeout=round(API_S))  # the server denies the inbox, if it does, before this returns
        except Exception as error:  # noqa: BLE001
            raise translate(error, "subscribing") from None
        if client.is_closed:
            raise Unavailable("the server closed the connection")
        if denied := self._permissions.denied_inbox:
            raise AccessDenied(f"this user may not subscribe to {denied}: set inbox_prefix to a permitted one")

    async def _attach_subscription(self, client: NatsClient, subscription: Subscription) -> None:
        try:
            await subscription.attach(client)
        except Exception as error:  # noqa: BLE001
            raise translate(error, subscription.subject) from None

    async def _on_disconnected(self) -> None:
        if not self._closing and self._up.is_set():
            self._up.clear()
            self._lost_at = time.monotonic()
            log.warning("lost the connection to %s, reconnecting", self.settings.addresses)
            self._replies.fail_requests(Unavailable("the connection was lost before the reply", maybe_stored=True))
            if self._client is not None:
                self._client.drop_queued(self._replies.inbox_bytes)
            self._replies.window.on_disconnected()
            if self._revive is not None:
                self._reviving = asyncio.create_task(self._revive_server(self._revive))

    async def _revive_server(self, revive: Revive) -> None:
        """Restart an embedded server, which nobody else would, while nats-py keeps dialling."""
        settings = await restart_server(revive, self.settings, lambda: not (self._up.is_set() or self._closing))
        if settings not in (None, self.settings) and not self._closing:
            log.warning("the embedded server is another one now, at %s", settings.addresses)
            self.settings = settings
            self.renew()

    def renew(self) -> None:
        """Replace the client, which delivers nothing although it is up, or whose server is another one now.

        Returns at once. Calls in flight are retried as after any lost connection.
        """
        if not self._closing and self._replacing is None and self._client is not None:
            self._replacing = asyncio.create_task(self._abort_and_replace(self._client))

    async def _abort_and_replace(self, former: NatsClient) -> None:
        await self._on_disconnected()
        with contextlib.suppress(TimeoutError):  # a dead connection may not take what is queued
            async with asyncio.timeout(ABORT_S):
                await former.abort()
        await self._replace_client()

    async def _on_reconnected(self) -> None:
        if self._reviving is not None:  # it creates the streams of a new embedded server
            await asyncio.wait([self._reviving], timeout=REVIVED_S)
        if self._closing or self._up.is_set() or self._client is None or not self._client.is_connected:
            return
        self._up.set()
        self.clock.expire()
        self._permissions.forget_logged()
        self._replies.window.on_reconnected()
        log.warning("reconnected to %s after %.1f s", self.server, time.monotonic() - self._lost_at)
        for callback in self._regained.all():
            callback()

    async def _on_closed(self) -> None:
        if self._closing or self._replacing is not None:
            return  # the client is being replaced already
        await self._on_disconnected()
        self._replacing = asyncio.create_task(self._replace_client())

    async def _replace_client(self) -> None:
        """Connect a new client in place of one that has closed, however long that takes."""
        tries = 0
        try:
            while not self._closing:
                try:
                    await self._connect_client()
                except AIQueueError as error:
                    (log.debug if isinstance(error, Unavailable) else self._permissions.log_once)(str(error))
                    await asyncio.sleep(reconnect_delay_s(tries))
                    tries += 1
                else:
                    self._up.clear()  # so that _on_reconnected logs its line and calls the callbacks
                    await self._on_reconnected()
                    return
        finally:
            self._replacing = None
