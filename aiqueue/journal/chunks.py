"""Buffers the chunks of a job's output on their way to its journal: while one write is under way, the next collects."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

from .. import codec
from ..errors import AccountFull, AIQueueError, DiskFull, Stale, TooLarge

log = logging.getLogger(__name__)

BUFFERED_MAX, BUFFERED_BYTES_MAX = 256, 1024 * 1024  # of one job, until a write is under way


class ChunkSink(Protocol):
    """Stores entries of chunks: `writer.Writer`."""

    @property
    def subject(self) -> str: ...
    async def write_chunks(self, body: bytes, tried: set[str]) -> None: ...
    def count_lost_chunks(self, count: int) -> None: ...


class ChunkBuffer:
    """Holds the chunks of one attempt that are not stored yet. At most one write is under way; the chunks that are
    added meanwhile share the next entry.

    If the server has no space for chunks, they are dropped, and the next entry carries their number. Only ended jobs
    free space, so a job must not wait for it (docs/decisions/full-disk.md).
    """

    def __init__(self, writer: ChunkSink, bytes_max: int) -> None:
        self._writer = writer
        self._bytes_max = bytes_max
        self._buffered: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._entry: tuple[bytes, int, set[str]] | None = (
            None  # under way, or failed: body, number of chunks, tried ids
        )
        self._has_space = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._problem: AIQueueError | None = None
        self._closed = False

    async def add(self, encoded: bytes) -> None:
        """Buffer a chunk. Waits while the buffer is full. Raises TooLarge, and what earlier chunks' write raised."""
        if len(encoded) > self._bytes_max:
            raise TooLarge(len(encoded), self._bytes_max)
        self._raise_problem()
        while self._buffered and (
            len(self._buffered) >= BUFFERED_MAX or self._buffered_bytes + len(encoded) > BUFFERED_BYTES_MAX
        ):
            self._has_space.clear()
            self._start_writing()
            await self._has_space.wait()
            self._raise_problem()
        self._buffered.append(encoded)
        self._buffered_bytes += len(encoded)
        self._start_writing()

    async def flush(self) -> None:
        """Wait until all chunks are stored, or dropped for lack of space. Raises what writing them raised."""
        while self._buffered or self._entry is not None:
            self._start_writing()
            assert self._writing is not None
            await asyncio.wait([self._writing])
            self._raise_problem()

    def close(self) -> None:
        """Drop all chunks that are not stored. Safe twice."""
        self._closed = True
        self._buffered.clear()
        self._has_space.set()
        if self._writing is not None:
            self._writing.cancel()

    def _raise_problem(self) -> None:
        """Raise what writing earlier chunks raised. The next call writes again, except after Stale."""
        problem = self._problem
        if problem is None and self._closed:
            raise Stale(f"{self._writer.subject}: this attempt is over", ended=False)
        if problem is not None:
            self._problem = problem if isinstance(problem, Stale) else None
            raise problem

    def _start_writing(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        try:
            while self._buffered or self._entry is not None:
                await self._write_entry()
        except AIQueueError as error:
            self._problem = error
        finally:
            self._writing = None
            self._has_space.set()

    async def _write_entry(self) -> None:
        """Write the entry that failed before, or else the next one."""
        if self._entry is None:
            self._entry = self._pop_entry()
            self._has_space.set()
        body, count, tried = self._entry
        try:
            await self._writer.write_chunks(body, tried)
        except (AccountFull, DiskFull) as error:
            log.warning("%s: %d chunks dropped, the server has no space: %s", self._writer.subject, count, error)
            self._writer.count_lost_chunks(count)
        self._entry = None

    def _pop_entry(self) -> tuple[bytes, int, set[str]]:
        """Take as many buffered chunks as fit into one entry."""
        parts: list[bytes] = []
        size = 0
        while self._buffered and (not parts or size + len(self._buffered[0]) <= self._bytes_max - 8):
            parts.append(self._buffered.popleft())
            size += len(parts[-1])
        self._buffered_bytes -= size
        return codec.join_encoded(parts), len(parts), set()
