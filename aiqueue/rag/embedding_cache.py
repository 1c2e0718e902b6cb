"""Vectors that were paid for, in a file for each tenant, so that the same text is not paid for twice."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

from .. import subjects

log = logging.getLogger(__name__)

T = TypeVar("T")

BYTES_MAX: Final = 256 * 1024 * 1024  # of one tenant's file
OPEN_MAX: Final = 32  # files
KEYS_AT_ONCE: Final = 500  # of one statement of SQL
WAIT_S: Final = 10.0  # for another process that writes
PENDING_KEPT_S: Final = 24 * 3600.0  # as long as the gateway keeps its answers
_TABLES: Final = (
    "CREATE TABLE IF NOT EXISTS vectors (number INTEGER PRIMARY KEY, key BLOB UNIQUE, vector BLOB NOT NULL)",
    "CREATE TABLE IF NOT EXISTS pending (id BLOB PRIMARY KEY, at REAL NOT NULL, batch TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS pending_keys (key BLOB, id BLOB, PRIMARY KEY (key, id)) WITHOUT ROWID",
)


class EmbeddingCache:
    """Vectors by the hash of their text and model, in SQLite, for any number of processes of one host.

    A tenant's file has at most 256 MiB: beyond that the oldest tenth of the vectors is dropped. It is a cache: what
    cannot be read or written is logged, and missing then. One tenant's vectors are never another's.
    """

    def __init__(self, directory: Path, *, bytes_max: int = BYTES_MAX) -> None:
        self._directory = directory
        self._bytes_max = bytes_max
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aiqueue-rag-embeddings")
        self._files: OrderedDict[str, sqlite3.Connection] = OrderedDict()
        self._is_closed = False

    async def get(self, tenant: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Return what is known of these keys."""

        def read(db: sqlite3.Connection) -> dict[bytes, bytes]:
            return dict(_select(db, "SELECT key, vector FROM vectors WHERE key", keys))

        return await self._run(tenant, read) or {}

    async def begin(self, tenant: str, batch: Mapping[bytes, str]) -> None:
        """Keep which texts are asked for together, by their keys, until `end`."""

        def write(db: sqlite3.Connection) -> None:
            number, now = _id_of(batch), time.time()
            texts = json.dumps([[key.hex(), text] for key, text in batch.items()])
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("DELETE FROM pending WHERE at < ?", (now - PENDING_KEPT_S,))
                db.execute("DELETE FROM pending_keys WHERE id NOT IN (SELECT id FROM pending)")
                db.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, ?)", (number, now, texts))
                db.executemany("INSERT OR IGNORE INTO pending_keys VALUES (?, ?)", ((key, number) for key in batch))

        await self._run(tenant, write)

    async def pending(self, tenant: str, keys: Sequence[bytes]) -> list[dict[bytes, str]]:
        """Return the batches with any of these keys that were begun and not ended, as by a process that was killed."""

        def read(db: sqlite3.Connection) -> list[dict[bytes, str]]:
            ids = sorted({row[0] for row in _select(db, "SELECT id FROM pending_keys WHERE key", keys)})
            rows = _select(db, "SELECT batch FROM pending WHERE id", ids)
            return [{bytes.fromhex(key): text for key, text in json.loads(row[0])} for row in rows]

        return await self._run(tenant, read) or []

    async def end(self, tenant: str, batch: Mapping[bytes, str]) -> None:
        """Forget a batch that was begun: its vectors are kept, or it has failed for good."""

        def write(db: sqlite3.Connection) -> None:
            number = _id_of(batch)
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.execute("DELETE FROM pending WHERE id = ?", (number,))
                db.executemany("DELETE FROM pending_keys WHERE key = ? AND id = ?", ((key, number) for key in batch))

        await self._run(tenant, write)

    async def put(self, tenant: str, vectors: Mapping[bytes, bytes]) -> None:
        """Keep vectors by their keys."""

        def write(db: sqlite3.Connection) -> None:
            with db:
                db.execute("BEGIN IMMEDIATE")
                db.executemany("INSERT OR IGNORE INTO vectors (key, vector) VALUES (?, ?)", vectors.items())
                while _used_bytes(db) > self._bytes_max:
                    oldest, newest = db.execute("SELECT min(number), max(number) FROM vectors").fetchone()
                    if oldest is None:
                        break
                    db.execute("DELETE FROM vectors WHERE number <= ?", (oldest + (newest - oldest) // 10,))

        await self._run(tenant, write)

    async def close(self) -> None:
        """Close all files. May be called twice."""

        def close() -> None:
            while self._files:
                self._files.popitem()[1].close()

        if not self._is_closed:
            self._is_closed = True
            await asyncio.get_running_loop().run_in_executor(self._thread, close)
            self._thread.shutdown(wait=False)

    async def _run(self, tenant: str, work: Callable[[sqlite3.Connection], T]) -> T | None:
        subjects.token("tenant", tenant)

        def run() -> T | None:
            try:
                return work(self._open(tenant))
            except (sqlite3.Error, OSError) as error:
                is_damaged = isinstance(error, sqlite3.DatabaseError) and not isinstance(
                    error, sqlite3.OperationalError
                )
                remedy = "remove it while no worker runs" if is_damaged else "check its disk and its owner"
                path = self._path_of(tenant)
                log.warning("the cache of embeddings of tenant %s is not used: %s: %s: %s", tenant, path, error, remedy)
                return None

        return await asyncio.get_running_loop().run_in_executor(self._thread, run)

    def _path_of(self, tenant: str) -> Path:
        return self._directory / f"{tenant.lower()}-{hashlib.sha256(tenant.encode()).hexdigest()[:12]}.sqlite"

    def _open(self, tenant: str) -> sqlite3.Connection:
        db = self._files.get(tenant)
        if db is None:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            db = sqlite3.connect(self._path_of(tenant), timeout=WAIT_S, isolation_level=None)
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")
            for each in _TABLES:
                db.execute(each)
            self._files[tenant] = db
            if len(self._files) > OPEN_MAX:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(tenant)
        return db


def _id_of(batch: Mapping[bytes, str]) -> bytes:
    return hashlib.sha256(b"".join(batch)).digest()


def _select(db: sqlite3.Connection, statement: str, keys: Sequence[bytes]) -> list[Any]:
    """Return the rows of a statement whose last column is one of the keys."""
    found: list[Any] = []
    for first in range(0, len(keys), KEYS_AT_ONCE):
        part = keys[first : first + KEYS_AT_ONCE]
        found += db.execute(f"{statement} IN ({', '.join('?' * len(part))})", part).fetchall()
    return found


def _used_bytes(db: sqlite3.Connection) -> int:
    """Return the size of a file without what is free in it. To add up the vectors would read all of them."""
    pages, free, size = (
        db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)
