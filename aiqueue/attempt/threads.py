"""Daemon threads for sync handlers. A thread that hangs is abandoned: it keeps neither a slot nor the process."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any

_Work = tuple[
    asyncio.AbstractEventLoop, "asyncio.Future[Any]", contextvars.Context, Callable[[], Any], Callable[[], None] | None
]


class Threads:
    """A pool with as many threads as calls run at once; an idle thread is kept for the next call.

    `_idle` counts threads that wait for work, minus calls that are queued for them. `_started` counts all threads ever
    started, and names them. `run` and the threads themselves change both, under `_lock`. (concurrent.futures would wait
    for its threads when the process exits.)
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        self._idle = 0
        self._started = 0
        self._closed = False
        self._lock = threading.Lock()

    async def run(self, call: Callable[[], Any], ended: Callable[[], None] | None = None) -> Any:
        """Run `call` in a thread, with this task's context variables, and return or raise what it does.

        When this task is cancelled, the thread goes on alone, and what it returns is dropped. `ended` is called on the
        loop as soon as the thread has done with it, in both cases.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._started += 1
                threading.Thread(target=self._work, name=f"{self._name}-{self._started}", daemon=True).start()
        self._queue.put((loop, future, contextvars.copy_context(), call, ended))
        return await future

    def close(self) -> None:
        """Let idle threads end."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, 0
        for _ in range(idle):
            self._queue.put(None)

    def _work(self) -> None:
        """Run calls until there is a None in the queue: the body of each thread."""
        while (work := self._queue.get()) is not None:
            loop, future, context, call, ended = work
            result, error = None, None
            try:
                result = context.run(call)
            except BaseException as raised:  # noqa: BLE001  (SystemExit too: it must not end the thread unseen)
                error = raised
            with self._lock:
                if self._closed:  # this call was abandoned, and ends after `close`
                    self._queue.put(None)
                else:
                    self._idle += 1
            try:
                loop.call_soon_threadsafe(_set_outcome, future, result, error, ended)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            del work, loop, future, context, call, result, error, ended  # an idle thread keeps no job in memory


def _set_outcome(
    future: asyncio.Future[Any], result: Any, error: BaseException | None, ended: Callable[[], None] | None
) -> None:
    """Give a future its result or error, unless it was cancelled."""
    if ended is not None:
        ended()
    if future.done():
        return
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration | GeneratorExit):  # a future refuses the one, the other ends who awaits it
        future.set_exception(RuntimeError(f"the handler raised {type(error).__name__}"))
    else:
        future.set_exception(error)
