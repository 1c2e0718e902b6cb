"""The parts of a job's output on their way to its journal: one write under way, those given meanwhile are the next."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Protocol

from .. import codec
from ..errors import AccountFull, AIQueueError, DiskFull, Stale, TooLarge

log = logging.getLogger("aiqueue.chunks")

HELD_MAX, HELD_BYTES_MAX = 256, 1024 * 1024  # of one job, until a write is under way


class Pen(Protocol):
    """What writes entries: see `journal.Writer`."""

    @property
    def subject(self) -> str: ...
    async def append_chunks(self, body: bytes, tried: set[str]) -> None: ...
    def lose(self, chunks: int) -> None: ...


class Chunks:
    """The chunks of one attempt that are not stored yet. One write is under way; those given meanwhile are the next.

    Where the server has no room for them they are dropped, and the next entry says how many: only the ends of jobs make
    room, so that a job must never wait for it (docs/decisions/full-disk.md).
    """

    def __init__(self, writer: Pen, bytes_max: int) -> None:
        self._writer = writer
        self._bytes_max = bytes_max
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._entry: tuple[bytes, int, set[str]] | None = None  # under way, or failed: its body, chunks and tried ids
        self._room = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._problem: AIQueueError | None = None
        self._closed = False

    async def add(self, encoded: bytes) -> None:
        if len(encoded) > self._bytes_max:
            raise TooLarge(len(encoded), self._bytes_max)
        self._raise()
        while self._held and (len(self._held) >= HELD_MAX or self._held_bytes + len(encoded) > HELD_BYTES_MAX):
            self._room.clear()
            self._write()
            await self._room.wait()
            self._raise()
        self._held.append(encoded)
        self._held_bytes += len(encoded)
        self._write()

    async def flush(self) -> None:
        while self._held or self._entry is not None:
            self._write()
            assert self._writing is not None
            await asyncio.wait([self._writing])
            self._raise()

    def close(self) -> None:
        self._closed = True
        self._held.clear()
        self._room.set()
        if self._writing is not None:
            self._writing.cancel()

    def _raise(self) -> None:
        """Say what has gone wrong. It is tried again at the next call, but where the job is another attempt's."""
        problem = self._problem
        if problem is None and self._closed:
            raise Stale(f"{self._writer.subject}: this attempt is over", ended=False)
        if problem is not None:
            self._problem = problem if isinstance(problem, Stale) else None
            raise problem

    def _write(self) -> None:
        if self._writing is None:
            self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self) -> None:
        try:
            while self._held or self._entry is not None:
                await self._write_one()
        except AIQueueError as error:
            self._problem = error
        finally:
            self._writing = None
            self._room.set()

    async def _write_one(self) -> None:
        if self._entry is None:
            self._entry = self._next()
            self._room.set()
        body, count, tried = self._entry
        try:
            await self._writer.append_chunks(body, tried)
        except (AccountFull, DiskFull) as error:
            log.warning("%s: chunks are dropped for want of room: %s", self._writer.subject, error)
            self._writer.lose(count)
        self._entry = None

    def _next(self) -> tuple[bytes, int, set[str]]:
        """As many of the held chunks as one entry takes."""
        parts: list[bytes] = []
        size = 0
        while self._held and (not parts or size + len(self._held[0]) <= self._bytes_max - 8):
            parts.append(self._held.popleft())
            size += len(parts[-1])
        self._held_bytes -= size
        return codec.joined(parts), len(parts), set()
