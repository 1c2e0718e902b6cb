"""nats-py's client with a fast path for messages in and out, and a message as the socket delivers it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import nats.errors as ne
from nats.aio.client import Client, Srv
from nats.protocol.command import sub_cmd, unsub_cmd
from nats.protocol.parser import PERMISSIONS_ERR

from ..server_urls import Credentials
from .frames import Status, read_headers
from .parsing import FastParser

log = logging.getLogger(__name__)

USER_TIMEOUT_MS = 5_000  # of unacknowledged writes: nats-py never notices a dead connection whose buffer is full
WRITE_BUFFER_MAX = 256 * 1024  # bytes in the socket's write buffer, above which nats-py's flusher takes over
PENDING_BYTES = 8 * 1024 * 1024
FLUSH_S = 2
T = TypeVar("T")


class WireMessage:
    """A message as the socket delivered it; see `frames.Received`. Subject and headers are decoded when they are asked
    for.
    """

    _decoded: tuple[dict[str, str], Status | None] | None = None

    def __init__(self, subject: bytes, reply: bytes, data: bytes, block: bytes | None) -> None:
        self._subject = subject
        self.reply = reply.decode()
        self.data = data
        self.block = block

    @property
    def subject(self) -> str:
        return self._subject.decode()

    @property
    def headers(self) -> dict[str, str]:
        return self._decode()[0]

    @property
    def status(self) -> Status | None:
        return self._decode()[1]

    def _decode(self) -> tuple[dict[str, str], Status | None]:
        if self._decoded is None:
            self._decoded = read_headers(self.block) if self.block else ({}, None)
        return self._decoded


async def heed_cancel(work: Awaitable[T]) -> T:
    """Await code of nats-py, and raise the cancellation that it may have swallowed meanwhile.

    nats-py's flush and close do that, and in Python 3.11 also `asyncio.wait_for`, when its result comes at that moment.
    """
    task = asyncio.current_task()
    before = task.cancelling() if task is not None else 0
    result = await work
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
    return result


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """Await `work` to its end, also if this is cancelled meanwhile. The cancellation is raised then."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not task.cancelled():
            task.exception()  # so that it counts as seen
        raise cancelled
    return task.result()


MessageCallback = Callable[[WireMessage], None]
ReplyCallback = Callable[[bytes, bytes, bytes | None], None]


async def _ignore_message(_message: Any) -> None:
    """nats-py demands a callback, and never calls this one: see NatsClient._dispatch."""


def credential_options(credentials: Credentials) -> dict[str, str | None]:
    """nats-py's options for these credentials, in plain text."""
    secrets = {"password": credentials.password, "token": credentials.token}
    plain = {name: None if value is None else value.get_secret_value() for name, value in secrets.items()}
    return {"user": credentials.user, **plain}


class NatsClient(Client):
    """nats-py's client, changed in four ways.

    - Every socket gets TCP_USER_TIMEOUT, those of reconnects included.
    - If the settings ask for TLS, a server without TLS is refused; nats-py would continue in plain text.
    - Credentials come from the options, not from the server's URL: servers that the cluster announces have none there,
      and nats-py does not decode those of a URL. Single servers, by host and port, can have their own.
    - Messages take a fast path: nats-py spends some 30 µs on a message, most of them on a queue and a task for each
      subscription and on parsing headers (docs/decisions/short-way.md).
    """

    def __init__(self, credentials: Mapping[str, Credentials], on_error: Callable[[Exception], None]) -> None:
        """`credentials` are those of single servers, by host and port. All others get those of the options.

        `on_error` hears of the server's errors.
        """
        super().__init__()
        self._credentials = credentials
        self._on_error = on_error
        self._default_credentials: dict[str, Any] | None = None
        self._ps: FastParser = FastParser(self, self._dispatch)
        self._push_scheduled = False
        self._loop: asyncio.AbstractEventLoop | None = None  # cached: getting it is a system call in Python 3.11
        self._callbacks: dict[int, MessageCallback] = {}  # by subscription id
        self._reply_sid = -1
        self._on_reply: ReplyCallback | None = None

    async def subscribe_direct(self, subject: str, queue: str, callback: MessageCallback) -> Any:
        """Subscribe. The socket reader calls `callback` with each message, and does not await it."""
        unused: asyncio.Future[Any] = asyncio.Future()  # in place of a callback, for which nats-py starts a task
        unused.cancel()
        subscription = await self.subscribe(subject, queue=queue, future=unused)
        self._callbacks[subscription._id] = callback
        return subscription

    async def subscribe_replies(self, subject: str, callback: ReplyCallback) -> None:
        """Subscribe to the reply inbox. `callback` gets subject, body and header block as raw bytes."""
        self._on_reply = callback
        self._reply_sid = (await self.subscribe(subject, cb=_ignore_message))._id

    def unread_refusal(self) -> str:
        """Return the text of a -ERR that nats-py has not read: the server closes the connection after it."""
        reader = getattr(self._transport, "_io_reader", None)
        _, found, line = bytes(getattr(reader, "_buffer", b"")).partition(b"-ERR ")
        return line.split(b"\r\n")[0].decode("utf-8", "replace").strip("'") if found else ""

    def remove_callback(self, subscription: Any) -> None:
        self._callbacks.pop(subscription._id, None)

    def send(self, frame: bytes) -> None:
        """Queue a complete frame. All frames of this turn of the event loop are written together."""
        self._pending.append(frame)
        self._pending_data_size += len(frame)
        if not self._push_scheduled:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._push_scheduled = True
            self._loop.call_soon(self.push)

    def push(self) -> None:
        """Write the queued frames to the socket now. If the socket is behind, leave that to nats-py's flusher."""
        self._push_scheduled = False
        if not self._pending or not self.is_connected or self._flush_queue is None:
            return  # nats-py sends the queued frames after it has reconnected
        writer = getattr(self._transport, "_io_writer", None)
        transport = writer.transport if writer is not None else None
        if (
            transport is not None
            and not transport.is_closing()
            and transport.get_write_buffer_size() < WRITE_BUFFER_MAX
        ):
            with contextlib.suppress(RuntimeError):  # the transport is closing: keep the frames
                transport.write(b"".join(self._pending))
                self._pending, self._pending_data_size = [], 0
                return
        if self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    def drop_queued(self, inbox: bytes) -> None:
        """Drop queued frames whose reply goes to `inbox`. The window sends these again after a reconnect; nats-py would
        send them too, ahead of older ones.
        """
        self._pending = [frame for frame in self._pending if inbox not in frame[: frame.find(b"\r\n")]]
        self._pending_data_size = sum(map(len, self._pending))

    @property
    def behind(self) -> bool:
        """Whether more than PENDING_BYTES are queued for the socket."""
        return self._pending_data_size > PENDING_BYTES

    async def relieve(self) -> None:
        """If the socket is behind, wait until it has taken the queued frames."""
        if self.behind:
            await self._flush_pending(force_flush=True)

    def _dispatch(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        """Hand a message to its callback. Without one, its subscription has ended."""
        callback = self._callbacks.get(sid)
        try:
            if callback is not None:
                callback(WireMessage(subject, reply, data, headers))
            elif sid == self._reply_sid and self._on_reply is not None:
                self._on_reply(subject, data, headers)
        except (Exception, asyncio.CancelledError):  # raised from here, it would end the reading of the socket
            log.exception("the callback of a message on %s raised", subject.decode("utf-8", "replace"))

    async def note_error(self, error: Exception) -> None:
        """Report an error, as nats-py's `error_cb`."""
        self._on_error(error)

    async def _send_subscribe(self, sub: Any) -> None:
        """Queue it with the other frames of this turn; nats-py has its flusher write it by itself."""
        self.send(sub_cmd(sub._subject, sub._queue or "", sub._id))

    async def _send_unsubscribe(self, sid: int, limit: int = 0) -> None:
        self.send(unsub_cmd(sid, limit))

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        self._dispatch(sid, subject, reply, data, headers or None)

    def _connect_command(self) -> bytes:
        if self.options.get("tls") and not self._server_info.get("tls_required"):
            raise ne.SecureConnWantedError
        if self._credentials:
            if self._default_credentials is None:
                self._default_credentials = {name: self.options[name] for name in ("user", "password", "token")}
            own = self._credentials.get(self._current_server.uri.netloc) if self._current_server else None
            self.options.update(credential_options(own) if own else self._default_credentials)
        command: bytes = super()._connect_command()
        return command

    async def _connect_to_server(self, s: Srv) -> None:
        former: Any = self._transport
        if former:  # from a failed attempt: nats-py drops such a transport without closing it
            with contextlib.suppress(Exception):
                former.close()
        await super()._connect_to_server(s)
        self._ps.reset()  # the old socket's last read may have come after nats-py's own reset
        writer = getattr(self._transport, "_bare_io_writer", None)
        sock = writer.get_extra_info("socket") if writer else None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
        if sock is not None and option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, USER_TIMEOUT_MS)

    async def _process_connect_init(self) -> None:
        """Also have the socket's protocol parse what comes, without nats-py's read loop. WebSockets keep the loop."""
        await super()._process_connect_init()
        reader = getattr(self._transport, "_io_reader", None)
        if not isinstance(reader, asyncio.StreamReader):
            return
        parser, to_read_loop = self._ps, reader.feed_data
        parser.start(len(reader._buffer))  # type: ignore[attr-defined]

        def feed_data(data: bytes) -> None:
            if self.is_closed or self.is_reconnecting or getattr(self._transport, "_io_reader", None) is not reader:
                return  # of a socket that is given up
            if left := parser.feed(data):
                to_read_loop(left)

        reader.feed_data = feed_data  # type: ignore[method-assign, assignment]

    async def _process_err(self, err_msg: str) -> None:
        """Report a denied right with its subject as it is; nats-py reports it in lower case."""
        text = self._ps.refusal.partition(" ")[2].strip("'")
        if PERMISSIONS_ERR in err_msg and text.lower() == err_msg.strip("'"):
            self._on_error(ne.Error(f"nats: {text}"))
            return
        await super()._process_err(err_msg)

    async def _attempt_reconnect(self) -> None:
        """Close the client on an unexpected error, such as another program on the server's port, so that `Connection`
        replaces it. nats-py's reconnect task would end and leave the client dead.
        """
        try:
            await super()._attempt_reconnect()
        except Exception as error:  # noqa: BLE001
            self._on_error(error)
            self._reconnection_task = None  # this task, which _close would cancel
            await self._close(Client.CLOSED, True)

    async def flush(self, timeout: int = 10) -> None:
        """Send the queued frames, then ping. nats-py's `flush` pings first, so its pong would prove nothing."""
        await self._flush_pending(force_flush=True)
        await heed_cancel(super().flush(timeout))

    async def _flush_pending(self, force_flush: bool = False) -> Any:
        return await heed_cancel(super()._flush_pending(force_flush))

    async def _process_pong(self) -> None:
        """As nats-py's, which raises, and so ends its socket reader, if the flush that waits for it was cancelled."""
        if self._pongs and self._pongs[0].done():
            self._pongs.pop(0)
            self._pings_outstanding = 0
            return
        await super()._process_pong()

    async def disconnect(self) -> None:
        """Flush what was published, and close. If this is cancelled, the socket is closed all the same."""
        try:
            with contextlib.suppress(Exception):
                if self.is_connected:
                    await self.flush(timeout=FLUSH_S)
            # gathered, because nats-py's close raises CancelledError if its reconnect task was cancelled
            await asyncio.gather(self.close(), return_exceptions=True)
        finally:
            self._release()

    async def abort(self) -> None:
        """Close from any state, without calling the connection callbacks."""
        self._disconnected_cb = self._closed_cb = self._reconnected_cb = None
        try:
            with contextlib.suppress(Exception):
                await heed_cancel(self.close())
        finally:
            self._release()
        if self._transport:
            await asyncio.sleep(0)  # its wait_closed raises CancelledError if the connect was cancelled

    def _release(self) -> None:
        """Close the socket, end the tasks: nats-py keeps them if it never connected, or if its close was cancelled."""
        transport: Any = self._transport
        if transport:
            with contextlib.suppress(Exception):
                transport.close()
        current = asyncio.current_task()
        readers = [each._wait_for_msgs_task for each in self._subs.values()]
        for task in (self._reading_task, self._ping_interval_task, self._flusher_task, *readers):
            if task is not None and task is not current:
                task.cancel()
