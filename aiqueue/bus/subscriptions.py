"""Subscriptions: what runs for each, from `subscribe` to `unsubscribe`."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from typing import Any

from ..attempt import error_line
from ..connection import Connection, Received, Subscription
from ..errors import AIQueueError, Unavailable
from .message import Answer, Callback, Msg, to_bytes

log = logging.getLogger(__name__)

PENDING_MAX = 65_536  # messages of a plain subscription that wait for its callback
PENDING_BYTES_MAX = 64 * 1024 * 1024

LATE_END_S = 2.0  # what a callback gets to end that was cancelled

_inside: ContextVar[BusSubscription | None] = ContextVar("aiqueue_bus_subscription", default=None)


def calling_subscription() -> BusSubscription | None:
    """Return the subscription in whose callback this is; None outside of callbacks."""
    return _inside.get()


class BusSubscription:
    """A running subscription, as `NATSClient.subscribe` returns it.

    `subject` and `queue` are those of the call. `closed` is true once it has been unsubscribed, or has ended by itself.
    `error`: the error with which it has ended by itself, such as AccessDenied; None otherwise.
    """

    def __init__(self, subject: str, queue: str, forget: Callable[[BusSubscription], None]) -> None:
        """`forget` is called when it has ended."""
        self.subject = subject
        self.queue = queue
        self.error: Exception | None = None
        self._forget = forget
        self._start_over = asyncio.Event()  # whether it has started or not
        self._ending: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Subscription to {self.subject}{f' in {self.queue}' if self.queue else ''}>"

    @property
    def closed(self) -> bool:
        """Whether the subscription has ended, or is ending."""
        return self._ending is not None

    async def unsubscribe(self) -> None:
        """Take no more messages, and return when the callback has finished those that it has. Safe twice.

        Callbacks that take longer than the client's `drain_timeout` are cancelled; their jobs and mail come again.
        Inside the callback this returns at once. If this is cancelled, the subscription ends all the same.
        """
        ending = self.end()
        if _inside.get() is not self:
            await asyncio.shield(ending)

    async def drain(self) -> None:
        """As `unsubscribe`."""
        await self.unsubscribe()

    def end(self) -> asyncio.Future[None]:
        """Begin to end, and return what is done when it has ended."""
        if self._ending is None:
            self._ending = asyncio.create_task(self._end_and_forget())
        return self._ending

    async def start(self) -> None:
        """Start, and return when it takes messages. Raises what starting raises; and Unavailable if it was ended
        meanwhile.
        """
        try:
            await self._start()
        except BaseException:
            self._forget(self)
            raise
        finally:
            self._start_over.set()
        if self._ending is not None:
            await asyncio.shield(self._ending)
            raise self.error or Unavailable(f"the client was disconnected while it subscribed to {self.subject}")

    async def _end_and_forget(self) -> None:
        await self._start_over.wait()
        try:
            await self._end()
        finally:
            self._forget(self)

    async def _start(self) -> None:
        raise NotImplementedError

    async def _end(self) -> None:
        raise NotImplementedError

    def enter(self) -> None:
        """Note that this task is inside the callback."""
        _inside.set(self)

    async def call(self, callback: Callback, message: Msg) -> Any:
        """Call the subscriber's function. Raises what it raises."""
        self.enter()
        return await callback(message)

    async def call_safely(self, callback: Callback, message: Msg) -> Any:
        """As `call`. What is no Exception is raised as a RuntimeError: SystemExit would end the event loop."""
        try:
            return await self.call(callback, message)
        except (Exception, GeneratorExit):
            raise
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RuntimeError("the callback was cancelled from within") from None
        except BaseException as error:
            raise RuntimeError(f"the callback raised {error_line(error)}") from error


class PlainSubscription(BusSubscription):
    """Plain NATS: the callback gets one message after the other. Nothing is repeated.

    `is_stored` says of a subject whether the server stores its messages. The reply subject of these is their
    publisher's, for the server's PubAck, so the callback does not get it.
    """

    def __init__(
        self,
        subject: str,
        queue: str,
        forget: Callable[[BusSubscription], None],
        *,
        connection: Connection,
        callback: Callback,
        is_stored: Callable[[str], bool],
        drain_timeout_s: float,
    ) -> None:
        super().__init__(subject, queue, forget)
        self._connection = connection
        self._callback = callback
        self._is_stored = is_stored
        self._drain_timeout_s = drain_timeout_s
        self._pending: deque[Received] = deque()
        self._pending_bytes = 0
        self._dropped = 0
        self._arrived = asyncio.Event()
        self._draining = False
        self._wire: Subscription | None = None
        self._task: asyncio.Task[None] | None = None

    async def _start(self) -> None:
        """Subscribe. Raises AccessDenied, Unavailable."""
        self._wire = await self._connection.subscribe(self.subject, self._on_message, queue=self.queue)
        try:
            await self._connection.flush()
            self._wire.check()
        except BaseException:
            await self._wire.close()
            raise
        self._wire.on_denied = self._fail
        self._task = asyncio.create_task(self._run())

    def _fail(self, error: Exception) -> None:
        """End by itself."""
        if self._ending is None:
            log.error("the subscription to %s has ended: %s", self.subject, error)
            self.error = error
            self.end()

    def _on_message(self, message: Received) -> None:
        size_bytes = len(message.data)
        if len(self._pending) >= PENDING_MAX or self._pending_bytes + size_bytes > PENDING_BYTES_MAX:
            self._dropped += 1
            if self._dropped == 1:
                log.warning(
                    "the callback of %s is too slow: messages are dropped while %d wait for it; subscribe in more "
                    "processes, with a queue", self.subject, len(self._pending),
                )  # fmt: skip
            return
        self._pending.append(message)
        self._pending_bytes += size_bytes
        self._arrived.set()

    async def _run(self) -> None:
        """Take messages until the subscription has ended, also after a callback that has cancelled its own task."""
        while True:
            taking = asyncio.create_task(self._take())
            try:
                await asyncio.wait([taking])
            except asyncio.CancelledError:
                taking.cancel()
                await asyncio.wait([taking])
                raise
            if not taking.cancelled() and taking.exception() is None:
                return
            log.error("the callback of %s has ended its own task; the subscription goes on", self.subject)

    async def _take(self) -> None:
        while True:
            while self._pending:
                message = self._pending.popleft()
                self._pending_bytes -= len(message.data)
                await self._handle(message)
            if self._dropped:
                log.warning("the callback of %s keeps up again; %d messages were dropped", self.subject, self._dropped)
                self._dropped = 0
            if self._draining:
                return
            self._arrived.clear()
            await self._arrived.wait()

    async def _handle(self, received: Received) -> None:
        reply = received.reply and ("" if self._is_stored(received.subject) else received.reply)

        async def respond(answer: Answer) -> None:
            await self._connection.publish(reply, to_bytes(answer))

        message = Msg(
            received.subject, received.data, received.headers, reply=reply, respond=respond if reply else None
        )
        try:
            await self.call_safely(self._callback, message)
        except Exception:
            log.exception("the callback of %s raised; plain messages are not repeated", self.subject)

    async def _end(self) -> None:
        if self._wire is None or self._task is None:
            return  # it has not started
        await self._wire.drain()
        self._draining = True
        self._arrived.set()
        _, late = await asyncio.wait([self._task], timeout=self._drain_timeout_s)
        for task in late:
            log.warning("the callback of %s did not end within %g s: cancelled", self.subject, self._drain_timeout_s)
            self._pending.clear()
            task.cancel()
            await asyncio.wait([task], timeout=LATE_END_S)


class ServedSubscription(BusSubscription):
    """A worker, an agent or a responder that runs until the subscription ends. Leaving its context drains it."""

    def __init__(
        self,
        subject: str,
        queue: str,
        forget: Callable[[BusSubscription], None],
        *,
        serve: Callable[[ServedSubscription], AbstractAsyncContextManager[Any]],
    ) -> None:
        super().__init__(subject, queue, forget)
        self._serve = serve
        self._stopping = asyncio.Event()
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None

    async def _start(self) -> None:
        """Start what serves it. Raises what starting raises."""
        self._task = asyncio.create_task(self._run())
        try:
            await asyncio.shield(self._started)
        except BaseException:
            self._stopping.set()
            self._task.cancel()
            await asyncio.wait([self._task])
            raise

    async def _run(self) -> None:
        """Serve in a task of its own: a worker cancels the task that runs it if the server denies it a permission."""
        try:
            async with self._serve(self):
                if not self._started.done():
                    self._started.set_result(None)
                await self._stopping.wait()
        except Exception as error:
            if not self._started.done():
                self._started.set_exception(error)
                return
            if isinstance(error, AIQueueError):
                log.error("the subscription to %s has ended: %s", self.subject, error)  # noqa: TRY400
            else:
                log.exception("the subscription to %s has ended", self.subject)
            self.error = error
            self.end()
        finally:
            self._started.cancel()  # nothing waits for it if it has started

    async def _end(self) -> None:
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait([self._task])
