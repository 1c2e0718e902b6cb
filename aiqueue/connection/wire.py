"""nats-py's client as we use it, and a message as it comes off the socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import nats.errors as ne
from nats.aio.client import Client, Srv

from .frames import Status, read_headers
from .parsing import Reader

USER_TIMEOUT_MS = 5_000  # unacknowledged writes: nats-py alone never notices a dark link with a full buffer
BEHIND_BYTES = 256 * 1024  # that the socket has not taken yet
PENDING_BYTES = 8 * 1024 * 1024


class Message:
    """A message as it came in; `status` is set on control replies of the server, which have no body."""

    __slots__ = ("data", "headers", "reply", "status", "subject")

    def __init__(self, subject: str, reply: str, data: bytes, block: bytes | None) -> None:
        self.subject = subject
        self.reply = reply
        self.data = data
        self.headers: dict[str, str] = {}
        self.status: Status | None = None
        if block:
            self.headers, self.status = read_headers(block)


Direct = Callable[[Message], None]
Raw = Callable[[bytes, bytes, bytes | None], None]


async def _never(_message: Any) -> None:
    """nats-py's own way, unused: see Link._take."""


class Link(Client):
    """nats-py's client, with TCP_USER_TIMEOUT on every socket it opens (a reconnect opens a new one), TLS that is
    demanded where it was asked for (nats-py would go on in the clear with a server that does not offer it), and a
    short way for messages in and out: of some 30 µs that nats-py spends on a message, its queue and task for each
    subscription and its reading of headers are most (docs/decisions/short-way.md).
    """

    def __init__(self) -> None:
        super().__init__()
        self._ps = Reader(self, self._take)
        self._pushing = False  # a push is on its way
        self._loop: asyncio.AbstractEventLoop | None = None  # asked for once: it is a system call in Python 3.11
        self._direct: dict[int, Direct] = {}
        self._answers_sid = -1
        self._on_answer: Raw | None = None

    async def listen(self, subject: str, queue: str, callback: Direct) -> Any:
        """Subscribe; `callback` is called, not awaited, with each Message as it is read from the socket."""
        subscription = await self.subscribe(subject, queue=queue, cb=_never)
        self._direct[subscription._id] = callback
        return subscription

    async def listen_answers(self, subject: str, callback: Raw) -> None:
        """Subscribe to the one inbox of answers; `callback` gets subject, body and header block as they came."""
        self._on_answer = callback
        self._answers_sid = (await self.subscribe(subject, cb=_never))._id

    def unlisten(self, subscription: Any) -> None:
        self._direct.pop(subscription._id, None)

    def send(self, frame: bytes) -> None:
        """Queue a whole frame; it goes out with all others of this turn of the event loop."""
        self._pending.append(frame)
        self._pending_data_size += len(frame)
        if not self._pushing:
            if self._loop is None:
                self._loop = asyncio.get_running_loop()
            self._pushing = True
            self._loop.call_soon(self.push)

    def push(self) -> None:
        """Write what is queued to the socket now; where that is behind, nats-py's own flusher waits for it."""
        self._pushing = False
        if not self._pending or not self.is_connected or self._flush_queue is None:
            return  # once connected again nats-py sends what is queued
        writer = getattr(self._transport, "_io_writer", None)
        wire = writer.transport if writer is not None else None
        if wire is not None and not wire.is_closing() and wire.get_write_buffer_size() < BEHIND_BYTES:
            with contextlib.suppress(RuntimeError):  # it is being closed: the frames are kept
                wire.write(b"".join(self._pending))
                self._pending, self._pending_data_size = [], 0
                return
        if self._flush_queue.empty():
            self._flush_queue.put_nowait(asyncio.get_running_loop().create_future())

    def take_back(self, inbox: bytes) -> None:
        """Drop frames that wait for the socket and are answered on `inbox`: nats-py would send them after it has
        reconnected, ahead of what was sent before them and is to be sent again.
        """
        self._pending = [frame for frame in self._pending if inbox not in frame[: frame.find(b"\r\n")]]
        self._pending_data_size = sum(map(len, self._pending))

    @property
    def behind(self) -> bool:
        """Whether a lot is queued for the socket already."""
        return self._pending_data_size > PENDING_BYTES

    async def relieve(self) -> None:
        """Wait for the socket when a lot is queued already."""
        if self.behind:
            await self._flush_pending(force_flush=True)

    def _take(
        self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes | None
    ) -> Awaitable[None] | None:
        """A message that was read; what comes back is to be awaited."""
        callback = self._direct.get(sid)
        if sid != self._answers_sid and callback is None:
            theirs: Awaitable[None] = super()._process_msg(sid, subject, reply, data, headers or b"")
            return theirs
        try:
            if callback is not None:
                callback(Message(subject.decode(), reply.decode(), data, headers))
            elif self._on_answer is not None:
                self._on_answer(subject, data, headers)
        except Exception as error:  # noqa: BLE001  (raised here it would end nats-py's reading for good)
            failed: Awaitable[None] = self._error_cb(error)
            return failed
        return None

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        if (waits := self._take(sid, subject, reply, data, headers)) is not None:
            await waits

    def _connect_command(self) -> bytes:
        if self.options.get("tls") and not self._server_info.get("tls_required"):
            raise ne.SecureConnWantedError
        command: bytes = super()._connect_command()
        return command

    async def _connect_to_server(self, s: Srv) -> None:
        former: Any = self._transport
        if former:  # of a failed try, which nats-py drops unclosed
            with contextlib.suppress(Exception):
                former.close()
        await super()._connect_to_server(s)
        self._ps.reset()  # the former socket's last read may have come behind nats-py's own reset
        writer = getattr(self._transport, "_bare_io_writer", None)
        sock = writer.get_extra_info("socket") if writer else None
        option = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux only
        if sock is not None and option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, USER_TIMEOUT_MS)

    async def _attempt_reconnect(self) -> None:
        """nats-py's own ends for good on what it does not expect, such as a port that something else answers on."""
        try:
            await super()._attempt_reconnect()
        except Exception as error:  # noqa: BLE001
            await self._error_cb(error)
            self._reconnection_task = None  # this task, which _close would cancel
            await self._close(Client.CLOSED, True)

    async def flush(self, timeout: int = 10) -> None:
        """nats-py's own sends its ping ahead of what still waits to be sent: the answer would prove nothing."""
        await self._flush_pending(force_flush=True)
        await super().flush(timeout)

    async def forsake(self) -> None:
        """Close without a word to anybody, whatever state it is in."""
        self._disconnected_cb = self._closed_cb = self._reconnected_cb = None
        with contextlib.suppress(Exception):
            await self.close()
        transport: Any = self._transport
        if transport:  # a client that never connected does not close it
            with contextlib.suppress(Exception):
                transport.close()
            await asyncio.sleep(0)  # its wait_closed raises CancelledError where the connect was cancelled
