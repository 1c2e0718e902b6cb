"""Buffers the chunks of a job's output on their way to its journal: while one write is under way, the next collects."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Any, Protocol

from .. import codec
from ..codec import secret_paths
from ..errors import AccountFull, AIQueueError, Conflict, DiskFull, Stale, TooLarge
from .chunk_pace import ChunkPace, SentChunks

log = logging.getLogger(__name__)

BUFFERED_MAX, BUFFERED_BYTES_MAX = 256, 1024 * 1024  # of one job, until a write is under way


class ChunkSink(Protocol):
    """Stores entries of chunks: `writer.Writer`."""

    @property
    def subject(self) -> str: ...
    async def write_chunks(self, encoded: codec.Encoded, tried: set[str]) -> None: ...
    def begin_chunks(self, encoded: codec.Encoded, tried: set[str]) -> SentChunks | None: ...
    def end_chunks(self, seq: int | None = None) -> None: ...
    async def resolve_chunks(self, encoded: codec.Encoded, tried: set[str]) -> None: ...
    def count_lost_chunks(self, count: int) -> None: ...


class ChunkBuffer:
    """Holds the chunks of one attempt that are not stored yet. At most one write is under way; the chunks that are
    added meanwhile share the next entry.

    Mostly an entry is sent by the `ChunkPace`, together with those of other jobs, and no task waits for it. A task
    writes an entry that the server has refused, or that needs more than one try.

    If the server has no space for chunks, they are dropped, and the next entry carries their number. Only ended jobs
    free space, so a job must not wait for it (docs/decisions/full-disk.md).
    """

    def __init__(self, writer: ChunkSink, bytes_max: int, pace: ChunkPace) -> None:
        self._writer = writer
        self._pace = pace
        self._sent: SentChunks | None = None  # under way without a task
        self._has_lock = False  # the writer is locked for that entry, or for the one that was refused
        self._bytes_max = bytes_max
        self._buffered: deque[codec.Encoded] = deque()
        self._buffered_bytes = 0
        self._joiner = codec.TextJoiner()
        self._entry: tuple[codec.Encoded, int, set[str]] | None = (
            None  # under way, or failed: body, number of chunks, tried ids
        )
        self._has_space = asyncio.Event()
        self._writing: asyncio.Task[None] | None = None
        self._problem: AIQueueError | None = None
        self._closed = False

    async def add(self, data: Any) -> None:
        """Buffer a chunk. Waits while the buffer is full. Half of a character at its end goes into the next chunk.

        Raises EncodeError, TooLarge, and what earlier chunks' write raised.
        """
        for part in self._joiner.take(data):
            encoded = codec.encode_marked(part)
            if not self._try_add(encoded):
                await self._add_encoded(encoded)

    def _try_add(self, encoded: codec.Encoded) -> bool:
        """Buffer a chunk if there is space, and nothing is wrong."""
        size = len(encoded.body)
        if size > self._bytes_max or self._closed or self._problem is not None or not self._fits(size):
            return False
        self._buffered.append(encoded)
        self._buffered_bytes += size
        if self._writing is None and self._sent is None:
            self._start_writing()
        return True

    def _fits(self, size: int) -> bool:
        count = len(self._buffered)
        return not count or (count < BUFFERED_MAX and self._buffered_bytes + size <= BUFFERED_BYTES_MAX)

    async def _add_encoded(self, encoded: codec.Encoded) -> None:
        size = len(encoded.body)
        if size > self._bytes_max:
            raise TooLarge(size, self._bytes_max)
        self._raise_problem()
        while not self._fits(size):
            self._has_space.clear()
            self._start_writing()
            await self._has_space.wait()
            self._raise_problem()
        self._buffered.append(encoded)
        self._buffered_bytes += size
        self._start_writing()

    async def flush(self, *, ends: bool = True) -> None:
        """Wait until all chunks are stored, or dropped for lack of space. Raises what writing them raised.

        `ends`: no chunk follows, so half of a character waits for its other half no longer.
        """
        for part in self._joiner.rest() if ends else ():
            await self._add_encoded(codec.encode_marked(part))
        while self._buffered or self._entry is not None:
            self._start_writing()
            self._pace.send()
            if self._writing is not None:
                await asyncio.wait([self._writing])
            elif self._sent is not None:
                self._has_space.clear()
                await self._has_space.wait()
            self._raise_problem()

    def close(self) -> None:
        """Drop all chunks that are not stored. Safe twice."""
        self._closed = True
        self._buffered.clear()
        self._has_space.set()
        if self._writing is not None:
            self._writing.cancel()
        if self._sent is not None:
            self._pace.abandon(self._sent)
            self._sent = None
        self._unlock()

    def begin(self) -> SentChunks | None:
        """Return the next entry to be sent, if there is one and none is under way. See `ChunkSender`."""
        if not self._buffered or self._entry is not None or self._writing is not None:
            return None
        self._entry = encoded, _, tried = self._pop_entry()
        self._has_space.set()
        self._sent = sent = self._writer.begin_chunks(encoded, tried)
        if sent is None:
            self._writing = asyncio.create_task(self._write_all())
        else:
            sent.sender, self._has_lock = self, True
        return sent

    def on_settled(self, sent: SentChunks) -> None:
        """Note what became of an entry that was sent. See `ChunkSender`."""
        outcome, entry = sent.outcome, self._entry
        assert entry is not None
        self._sent = None
        if isinstance(outcome, Conflict):  # the writer stays locked until this is resolved
            self._writing = asyncio.create_task(self._write_all(is_refused=True))
            return
        if not isinstance(outcome, AIQueueError):
            assert outcome is not None
            self._unlock(outcome.seq)
            self._entry = None
        else:
            self._unlock()
            if isinstance(outcome, AccountFull | DiskFull):
                self._drop_entry(outcome)
            else:
                self._problem = outcome
        self._has_space.set()
        if self._buffered and self._problem is None:
            self._pace.ask(self)

    def _unlock(self, seq: int | None = None) -> None:
        """Let others write again. `seq`: where the entry is stored; None: it is not, or nobody knows. Safe twice."""
        if self._has_lock:
            self._has_lock = False
            self._writer.end_chunks(seq)

    def _raise_problem(self) -> None:
        """Raise what writing earlier chunks raised. The next call writes again, except after Stale."""
        problem = self._problem
        if problem is None and self._closed:
            raise Stale(f"{self._writer.subject}: this attempt is over", ended=False)
        if problem is not None:
            self._problem = problem if isinstance(problem, Stale) else None
            raise problem

    def _start_writing(self) -> None:
        if self._writing is None and self._sent is None:
            if self._entry is None:
                self._pace.ask(self)
            else:
                self._writing = asyncio.create_task(self._write_all())

    async def _write_all(self, *, is_refused: bool = False) -> None:
        """Write all entries. `is_refused`: the one under way was sent and refused, and the writer is locked."""
        try:
            while self._buffered or self._entry is not None:
                await self._write_entry(is_refused=is_refused)
                is_refused = False
        except AIQueueError as error:
            self._problem = error
        finally:
            self._writing = None
            self._has_space.set()

    async def _write_entry(self, *, is_refused: bool) -> None:
        """Write the entry that failed before, or else the next one."""
        if self._entry is None:
            self._entry = self._pop_entry()
            self._has_space.set()
        encoded, _, tried = self._entry
        write = self._writer.resolve_chunks if is_refused else self._writer.write_chunks
        try:
            await write(encoded, tried)
        except (AccountFull, DiskFull) as error:
            self._drop_entry(error)
        finally:
            self._unlock()
        self._entry = None

    def _drop_entry(self, error: AIQueueError) -> None:
        assert self._entry is not None
        count, self._entry = self._entry[1], None
        log.warning("%s: %d chunks dropped, the server has no space: %s", self._writer.subject, count, error)
        self._writer.count_lost_chunks(count)

    def _pop_entry(self) -> tuple[codec.Encoded, int, set[str]]:
        """Take as many buffered chunks as fit into one entry."""
        if len(self._buffered) == 1:
            encoded = self._buffered.popleft()
            self._buffered_bytes = 0
            secrets = secret_paths.within_list(encoded.secrets) if encoded.secrets else ""
            return codec.Encoded(codec.join_encoded([encoded.body]), secrets), 1, set()
        parts: list[codec.Encoded] = []
        size = 0
        while self._buffered and (not parts or size + len(self._buffered[0].body) <= self._bytes_max - 8):
            parts.append(self._buffered.popleft())
            size += len(parts[-1].body)
        self._buffered_bytes -= size
        found = [each.secrets for each in parts if each.secrets]
        secrets = secret_paths.within_list(secret_paths.merge(*found)) if found else ""
        return codec.Encoded(codec.join_encoded([each.body for each in parts]), secrets), len(parts), set()
