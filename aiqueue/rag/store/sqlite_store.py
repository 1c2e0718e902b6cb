"""The default store: SQLite with FTS5 and numpy, a database for each tenant, for all processes of one host."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ... import subjects
from ...errors import BadInput
from ..types import (
    Chunk,
    DocumentHeader,
    DocumentState,
    IndexedChunks,
    IndexedDocument,
    Mode,
    Passage,
    PutOutcome,
    State,
    StoreStats,
    Vectors,
    Where,
)
from . import ranking, rows, sqlite_reads, sqlite_writes
from .filters import parse_where
from .keyword_search import Stems
from .sqlite_file import check_embedder, create, path_of
from .sqlite_tenant import TenantDatabase
from .texts import check_document_id, clean, terms_of
from .vector_cache import CacheBudget

CACHE_BYTES = 512 * 1024 * 1024
OPEN_TENANTS_MAX = 64  # each has a thread and a few connections; one that is idle is closed for another


class SqliteStore:
    """A VectorStore in a directory: one SQLite database for each tenant. Not for a directory on a network.

    `cache_bytes`: the bound of all vectors in memory, 1 KiB a chunk of 256 dimensions, loaded with a tenant's first
    question. A tenant above the bound is scanned from disk by each question. At most 64 tenants are open at a time.

    Safe in many processes of one host. All calls are of one event loop. What a call has written is found by the next
    search of this object, and at most 0.2 s later by other processes. A call that is cancelled may still be done.
    Raises Unavailable if the disk or another process' lock does not let it write, Corrupt for a damaged file,
    ConfigMismatch for the file of a newer aiqueue.
    """

    def __init__(self, root: Path | str, *, cache_bytes: int = CACHE_BYTES) -> None:
        self._root = Path(root).absolute()
        # A search is nothing but CPU: beside documents that come in, more at once than half of the cores are all late.
        self._readers = ThreadPoolExecutor(
            min(8, max(1, (os.cpu_count() or 1) // 2)), thread_name_prefix="aiqueue-rag-read"
        )
        self._budget = CacheBudget(cache_bytes)
        self._stems = Stems()
        self._tenants: OrderedDict[str, TenantDatabase] = OrderedDict()
        self._embedders: dict[str, tuple[str, int]] = {}  # of the tenants that were opened
        self._closing: set[asyncio.Task[None]] = set()
        self._is_closed = False

    @property
    def cached_bytes(self) -> int:
        """The vectors in memory now."""
        return self._budget.used_bytes

    async def open(self, tenant: str, embedder: str, dimensions: int) -> None:
        rows.check_embedder(embedder, dimensions)
        opened = (embedder, dimensions)

        def adopt(db: sqlite3.Connection) -> None:
            sqlite_writes.open_embedder(db, *opened)
            check_embedder(db, tenant, opened)

        database = self._made(tenant)
        await database.write(adopt)
        self._embedders[tenant] = database.opened = opened

    async def put(self, tenant: str, documents: Sequence[IndexedDocument]) -> list[PutOutcome]:
        database, dimensions = self._opened(tenant)
        prepared = [rows.document_row(each, dimensions) for each in documents]
        return await database.write(lambda db: sqlite_writes.put(db, prepared), vectors=True)

    async def stage(
        self, tenant: str, document_id: str, version: int, content_hash: str, batch: int, rows_: IndexedChunks
    ) -> None:
        database, dimensions = self._opened(tenant)
        key = (check_document_id(document_id), rows.check_version(version), clean(content_hash))
        chunks = rows.staged_json(rows.chunk_rows(rows_.chunks))
        vectors = rows.mixed(rows_, dimensions).astype(sqlite_writes.F16).tobytes()
        await database.write(lambda db: sqlite_writes.stage(db, *key, batch, chunks, vectors), vectors=True)

    async def staged(self, tenant: str, document_id: str, version: int, content_hash: str) -> set[int]:
        database = self._existing(tenant)
        if database is None:
            return set()
        key = (clean(document_id), version, clean(content_hash))
        return await database.read(lambda db: sqlite_reads.staged(db, *key))

    async def commit(self, tenant: str, header: DocumentHeader) -> PutOutcome:
        database, dimensions = self._opened(tenant)
        row = rows.header_row(header)
        return await database.write(lambda db: sqlite_writes.commit(db, row, dimensions), vectors=True)

    async def move(self, tenant: str, document_id: str, version: int, content_hash: str) -> bool:
        database = self._existing(tenant)
        key = (check_document_id(document_id), rows.check_version(version), clean(content_hash))
        return database is not None and await database.write(lambda db: sqlite_writes.move_version(db, *key))

    async def note(
        self, tenant: str, document_id: str, version: int, state: State, *, stage: str = "", done: int = 0,
        total: int = 0, reason: str = "", job_id: str = "",
    ) -> None:  # fmt: skip
        key = (check_document_id(document_id), rows.check_version(version), state)
        told = rows.told(stage, done, total, reason, job_id)
        await self._made(tenant).write(lambda db: sqlite_writes.note(db, *key, told))

    async def delete(self, tenant: str, document_id: str, version: int) -> bool:
        key = (check_document_id(document_id), rows.check_version(version))
        return await self._made(tenant).write(lambda db: sqlite_writes.delete(db, *key))

    async def document(self, tenant: str, document_id: str) -> DocumentState | None:
        database = self._existing(tenant)
        if database is None:
            return None
        return await database.read(lambda db: sqlite_reads.document(db, clean(document_id)))

    async def documents(self, tenant: str, *, after: str = "", limit: int = 1_000) -> list[DocumentState]:
        database = self._existing(tenant)
        rows.check_page(limit)
        if database is None:
            return []
        return await database.read(lambda db: sqlite_reads.documents(db, clean(after), limit))

    async def search(
        self, tenant: str, text: str, vector: Vectors | None, k: int, *, where: Where | None = None,
        mode: Mode = "hybrid",
    ) -> list[Passage]:  # fmt: skip
        ranking.check_question(vector, k, mode)
        conditions = parse_where(where)
        database = self._existing(tenant)
        if database is None:
            return []
        terms = terms_of(text) if mode != "vector" else []
        return await database.read(
            lambda db: sqlite_reads.search(
                db, database.cache, database.keywords, tenant, database.opened, terms, vector, k, conditions, mode
            )
        )

    async def chunks(
        self, tenant: str, embedder: str, *, after: int = 0, limit: int = 256, missing: bool = False
    ) -> list[tuple[int, Chunk]]:
        database = self._existing(tenant)
        rows.check_page(limit)
        if database is None:
            return []
        return await database.read(lambda db: sqlite_reads.chunks(db, embedder, after, limit, missing))

    async def replace_vectors(
        self, tenant: str, embedder: str, rows_: Sequence[int], bodies: Vectors, headings: Vectors
    ) -> None:
        ids = [int(each) for each in rows_]
        vectors = rows.mixed_vectors(bodies, headings, len(ids), bodies.shape[1])
        await self._made(tenant).write(lambda db: sqlite_writes.replace_vectors(db, embedder, ids, vectors))

    async def switch(self, tenant: str, embedder: str, dimensions: int) -> bool:
        database = self._made(tenant)
        done = await database.write(lambda db: sqlite_writes.switch(db, embedder, dimensions))
        if done:
            self._embedders[tenant] = database.opened = (embedder, dimensions)
        return done

    async def stats(self, tenant: str) -> StoreStats:
        database = self._existing(tenant)
        if database is None:
            return StoreStats(0, 0, 0, 0, 0, "", 0)
        return await database.read(lambda db: sqlite_reads.stats(db, database.path))

    async def close(self) -> None:
        """Wait for the writes that have begun, and close all files. May be called twice."""
        self._is_closed = True
        tenants, self._tenants = list(self._tenants.values()), OrderedDict()
        await asyncio.gather(*(each.close() for each in tenants), *self._closing)
        self._readers.shutdown(wait=False)

    def _opened(self, tenant: str) -> tuple[TenantDatabase, int]:
        if tenant not in self._embedders:
            raise BadInput(f"tenant {tenant!r} is not open: call open(tenant, embedder, dimensions) first")
        return self._made(tenant), self._embedders[tenant][1]

    def _made(self, tenant: str) -> TenantDatabase:
        """The tenant's database, which is made if there is none."""
        database = self._existing(tenant)
        if database is None:
            path = path_of(self._root, tenant)
            create(path)
            database = self._use(tenant, path)
        return database

    def _existing(self, tenant: str) -> TenantDatabase | None:
        if self._is_closed:
            raise BadInput("the store is closed: make another SqliteStore")
        database = self._tenants.get(tenant)
        if database is not None:
            if database.is_present:
                return self._use(tenant, database.path)
            self._drop(tenant)
        path = path_of(self._root, subjects.token("tenant", tenant))
        return self._use(tenant, path) if path.exists() else None

    def _use(self, tenant: str, path: Path) -> TenantDatabase:
        database = self._tenants.get(tenant)
        if database is None:
            database = self._tenants[tenant] = TenantDatabase(path, tenant, self._readers, self._budget, self._stems)
            database.opened = self._embedders.get(tenant)
        self._tenants.move_to_end(tenant)
        self._close_idle()
        return database

    def _close_idle(self) -> None:
        for tenant, database in list(self._tenants.items())[:-1]:
            if len(self._tenants) <= OPEN_TENANTS_MAX:
                return
            if not database.busy:
                self._drop(tenant)

    def _drop(self, tenant: str) -> None:
        task: asyncio.Task[Any] = asyncio.create_task(self._tenants.pop(tenant).close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
