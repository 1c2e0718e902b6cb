"""An open database of one tenant: one thread that writes, connections for readers, and the vector cache."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ...errors import EmbedderChanged
from .keyword_search import KeywordSearch, Stems
from .sqlite_file import check_embedder, connect, transaction, translated, truncate_log
from .sqlite_writes import open_embedder
from .vector_cache import CacheBudget, VectorCache

T = TypeVar("T")


class TenantDatabase:
    """Calls run in threads, so that a cancelled caller leaves no transaction half done. `opened`: by `open`."""

    def __init__(
        self, path: Path, tenant: str, readers: ThreadPoolExecutor, budget: CacheBudget, stems: Stems
    ) -> None:  # fmt: skip
        self.path = path
        self.tenant = tenant
        self.opened: tuple[str, int] | None = None
        self.busy = 0  # calls that have not ended
        self._file = _file_at(path)
        self.keywords = KeywordSearch(stems)
        self.cache = VectorCache(lambda: connect(path, tenant, writer=False), budget)
        self._readers = readers
        self._writer = ThreadPoolExecutor(1, thread_name_prefix=f"aiqueue-rag-{tenant}")
        self._db: sqlite3.Connection | None = None
        self._lock = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._closed = False

    @property
    def is_present(self) -> bool:
        """Whether the file that was opened is still the one at its path: else what is written would be lost."""
        return _file_at(self.path) == self._file

    async def write(self, write: Callable[[sqlite3.Connection], T], *, vectors: bool = False) -> T:
        """Run `write` in a transaction. With `vectors` it must be of the embedder that the tenant was opened with."""
        return await self._in_thread(self._writer, lambda: self._write(write, vectors))

    def _write(self, write: Callable[[sqlite3.Connection], T], vectors: bool) -> T:
        with translated(self.path):
            if self._db is None:
                self._db = connect(self.path, self.tenant, writer=True)
            db = self._db

            def checked() -> T:
                if vectors:
                    self._check_embedder(db)
                return write(db)

            result = transaction(db, checked)
            self.cache.note_write()
            truncate_log(db, self.path)
            return result

    def _check_embedder(self, db: sqlite3.Connection) -> None:
        try:
            check_embedder(db, self.tenant, self.opened)
        except EmbedderChanged as error:
            if error.stored or self.opened is None:
                raise
            open_embedder(db, *self.opened)  # the file is new: the one that was opened was moved away

    async def read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        return await self._in_thread(self._readers, lambda: self._read(read))

    def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        with translated(self.path):
            with self._lock:
                db = self._idle.pop() if self._idle else None
            db = db or connect(self.path, self.tenant, writer=False)
            try:
                return read(db)
            finally:
                with self._lock:
                    closed = self._closed
                    if not closed:
                        self._idle.append(db)
                if closed:
                    db.close()

    async def _in_thread(self, threads: ThreadPoolExecutor, call: Callable[[], T]) -> T:
        self.busy += 1
        future = asyncio.get_running_loop().run_in_executor(threads, call)
        future.add_done_callback(self._ended)
        return await future

    def _ended(self, future: asyncio.Future[Any]) -> None:
        self.busy -= 1
        if not future.cancelled():
            future.exception()  # of a caller that was cancelled: nobody else asks

    async def close(self) -> None:
        """Wait for the writes that have begun, then close all connections."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.shutdown(wait=True)
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for each in idle:
            each.close()
        self.cache.close()
        if self._db is not None:
            self._db.close()
            self._db = None


def _file_at(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None
