"""The child's end of the pipe to its worker."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any, BinaryIO

from . import protocol


class WorkerPipe:
    """A thread reads it, so that its end is noticed while the event loop is busy.

    `task` is the task in which an async handler runs, `cancelled` whether the running job was cancelled. `_answer` is
    the future of the last question; questions are asked one at a time, under `_asking`.
    """

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self.reader = reader
        self._writer = writer
        self._writing = threading.Lock()
        self._answer: asyncio.Future[list[Any]] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.cancelled = False
        self._asking = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "it is set by start_reading"
        return self._loop

    def send(self, *items: Any) -> None:
        """Write a frame. Raises EncodeError."""
        self._write(protocol.encode_frame(list(items)))

    def _write(self, pieces: list[bytes]) -> None:
        with self._writing:
            for piece in pieces:
                left = memoryview(piece)
                while left:
                    left = left[self._writer.write(left) or 0 :]

    def start_reading(self, requests: asyncio.Queue[list[Any]]) -> None:
        """Read frames in a thread, and put the worker's requests in `requests`. When the pipe closes, exit."""
        self._loop = loop = asyncio.get_running_loop()

        def read_frames() -> None:
            with contextlib.suppress(EOFError, OSError, RuntimeError):
                while True:
                    items = protocol.read_frame_blocking(self.reader)
                    loop.call_soon_threadsafe(self._on_frame, requests, items)
            os._exit(0)

        threading.Thread(target=read_frames, name="aiqueue-pipe", daemon=True).start()

    async def ask(self, check: Callable[[], None], *items: Any) -> Any:
        """Ask the worker something for the running job, and return its answer. Raises what the worker raised.

        `check` is called when the question's turn has come, and raises if it must not be asked any more.
        """
        async with self._asking:
            if self._answer is not None:  # of a question whose asker was cancelled: the next answer belongs to it
                await asyncio.wait([self._answer])
            check()
            packed = protocol.encode_frame(list(items))
            self._answer = asyncio.get_running_loop().create_future()
            self._write(packed)
            problem, value = await asyncio.shield(self._answer)
        if problem:
            raise protocol.error_from_plain(problem)
        return value

    def _on_frame(self, requests: asyncio.Queue[list[Any]], items: list[Any]) -> None:
        """Handle one frame: "stop" cancels the job, "answer" answers a question, anything else is a request."""
        if items[0] == "stop":
            self.cancelled = True
            if self.task is not None:
                self.task.cancel()
        elif items[0] != "answer":
            self.cancelled = False
            requests.put_nowait(items)
        elif self._answer is not None and not self._answer.done():
            self._answer.set_result(items[1:])
