"""Daemon threads for sync handlers. One that hangs is abandoned, and can keep neither a slot nor the exit."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

_Work = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", contextvars.Context, Callable[[], Any]]


class Threads:
    """As many threads as are busy at once, kept for the next call. (concurrent.futures waits at exit for its own.)"""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._idle = 0
        self._started = 0
        self._closed = False
        self._lock = threading.Lock()

    async def run(self, call: Callable[[], Any]) -> Any:
        """What `call` returns or raises, run in a thread with this task's context. Cancelled, the thread goes on
        alone and its outcome is dropped.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        self._queue.put((loop, future, contextvars.copy_context(), call))
        return await future

    def close(self) -> None:
        """Let idle threads end."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._queue.put(None)

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            loop, future, context, call = work
            result, error = None, None
            try:
                result = context.run(call)
            except BaseException as raised:  # noqa: BLE001  (SystemExit too: it must not end the thread unseen)
                error = raised
            with self._lock:
                if self._closed:  # abandoned by a timeout, and done at last
                    self._queue.put(None)
                else:
                    self._idle += 1
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            del work, future, result, error


def _settle(future: asyncio.Future[Any], result: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # a future refuses it
        future.set_exception(RuntimeError("the handler raised StopIteration"))
    else:
        future.set_exception(error)
