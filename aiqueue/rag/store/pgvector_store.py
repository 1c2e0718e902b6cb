"""The store for those who outgrow one machine: PostgreSQL with pgvector, for workers on any number of hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

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
from . import pgvector_writes, ranking, rows
from .filters import Condition, parse_where, postgres_where
from .pgvector_connections import Connections, Cursor
from .pgvector_writes import TenantRow, check_embedder, lock_tenant, read_tenant
from .texts import FREQUENT_SHARE, RAREST_KEPT, check_document_id, clean, select_terms, terms_of

_STATE = """SELECT document_id, shown, state, stage, done, total, reason, problems, title, source, metadata,
    CASE WHEN indexed THEN settled END, chunks, updated_at, job_id, hints FROM documents WHERE tenant = %s"""


class PgVectorStore:
    """A VectorStore in PostgreSQL 13 or newer with the extension pgvector 0.5 or newer.

    `dsn`: as libpq takes it. `schema`: where the tables are made on first use; stores of two schemas share nothing.
    Every key and every query has the tenant. The vectors of a tenant are scanned exactly. Keywords are ranked by
    `ts_rank`, which knows no rarity, so that frequent words are left out; SQLite's BM25 ranks better.
    Raises Unavailable if PostgreSQL does not answer, AccessDenied if it refuses the user.
    """

    def __init__(self, dsn: str, *, schema: str = "aiqueue_rag") -> None:
        self._connections = Connections(dsn, schema)
        self._embedders: dict[str, tuple[str, int]] = {}

    async def open(self, tenant: str, embedder: str, dimensions: int) -> None:
        rows.check_embedder(embedder, dimensions)
        async with self._connections.transaction() as cursor:
            stored = await lock_tenant(cursor, subjects.token("tenant", tenant))
            await pgvector_writes.open_embedder(cursor, stored, embedder, dimensions)
            check_embedder(stored, (embedder, dimensions))
        self._embedders[tenant] = (embedder, dimensions)

    async def put(self, tenant: str, documents: Sequence[IndexedDocument]) -> list[PutOutcome]:
        opened = self._opened(tenant)
        prepared = [rows.document_row(each, opened[1]) for each in documents]
        async with self._connections.transaction() as cursor:
            stored = await self._lock(cursor, tenant, opened)
            return await pgvector_writes.put(cursor, stored, prepared)

    async def stage(
        self, tenant: str, document_id: str, version: int, content_hash: str, batch: int, rows_: IndexedChunks
    ) -> None:
        opened = self._opened(tenant)
        key = (check_document_id(document_id), rows.check_version(version), clean(content_hash))
        chunks = rows.staged_json(rows.chunk_rows(rows_.chunks))
        vectors = rows.mixed(rows_, opened[1]).astype(pgvector_writes.F32).tobytes()
        async with self._connections.transaction() as cursor:
            stored = await self._lock(cursor, tenant, opened)
            await pgvector_writes.stage(cursor, stored, *key, batch, chunks, vectors)

    async def staged(self, tenant: str, document_id: str, version: int, content_hash: str) -> set[int]:
        async with self._connections.transaction(reads=True) as cursor:
            await cursor.execute(
                "SELECT batch FROM staged WHERE tenant = %s AND document_id = %s AND version = %s"
                " AND content_hash = %s",
                (subjects.token("tenant", tenant), clean(document_id), version, clean(content_hash)),
            )
            return {row[0] for row in await cursor.fetchall()}

    async def commit(self, tenant: str, header: DocumentHeader) -> PutOutcome:
        opened = self._opened(tenant)
        row = rows.header_row(header)
        async with self._connections.transaction() as cursor:
            return await pgvector_writes.commit(cursor, await self._lock(cursor, tenant, opened), row)

    async def move(self, tenant: str, document_id: str, version: int, content_hash: str) -> bool:
        key = (check_document_id(document_id), rows.check_version(version), clean(content_hash))
        async with self._connections.transaction() as cursor:
            return await pgvector_writes.move_version(cursor, await self._lock(cursor, tenant), *key)

    async def note(
        self, tenant: str, document_id: str, version: int, state: State, *, stage: str = "", done: int = 0,
        total: int = 0, reason: str = "", job_id: str = "",
    ) -> None:  # fmt: skip
        key = (check_document_id(document_id), rows.check_version(version), state)
        told = rows.told(stage, done, total, reason, job_id)
        async with self._connections.transaction() as cursor:
            await pgvector_writes.note(cursor, await self._lock(cursor, tenant), *key, told)

    async def delete(self, tenant: str, document_id: str, version: int) -> bool:
        key = (check_document_id(document_id), rows.check_version(version))
        async with self._connections.transaction() as cursor:
            return await pgvector_writes.delete(cursor, await self._lock(cursor, tenant), *key)

    async def document(self, tenant: str, document_id: str) -> DocumentState | None:
        async with self._connections.transaction(reads=True) as cursor:
            key = (subjects.token("tenant", tenant), clean(document_id))
            await cursor.execute(f"{_STATE} AND document_id = %s", key)
            row = await cursor.fetchone()
            return DocumentState(*row) if row else None

    async def documents(self, tenant: str, *, after: str = "", limit: int = 1_000) -> list[DocumentState]:
        key = (subjects.token("tenant", tenant), clean(after), rows.check_page(limit))
        async with self._connections.transaction(reads=True) as cursor:
            await cursor.execute(
                f"{_STATE} AND document_id > %s AND state <> 'deleted' ORDER BY document_id LIMIT %s", key
            )
            return [DocumentState(*row) for row in await cursor.fetchall()]

    async def search(
        self, tenant: str, text: str, vector: Vectors | None, k: int, *, where: Where | None = None,
        mode: Mode = "hybrid",
    ) -> list[Passage]:  # fmt: skip
        subjects.token("tenant", tenant)
        ranking.check_question(vector, k, mode)
        conditions = parse_where(where)
        terms = terms_of(text) if mode != "vector" else []
        wanted = ranking.candidates_of(k)
        by_keyword: dict[int, float] = {}
        by_vector: dict[int, float] = {}
        async with self._connections.transaction(reads=True) as cursor:
            stored = await read_tenant(cursor, tenant)
            if stored is None:
                return []
            if terms and (query := await _tsquery(cursor, tenant, terms, stored.chunks)):
                by_keyword = await _keyword(cursor, tenant, query, wanted, conditions)
            if vector is not None and mode != "keyword":
                check_embedder(stored, self._embedders.get(tenant))
                if stored.chunks:
                    flat = rows.question_vector(vector, stored.dimensions)
                    by_vector = await _nearest(cursor, tenant, flat, wanted, conditions)
            return await _passages(cursor, tenant, ranking.fuse(by_keyword, by_vector, k, mode))

    async def chunks(
        self, tenant: str, embedder: str, *, after: int = 0, limit: int = 256, missing: bool = False
    ) -> list[tuple[int, Chunk]]:
        subjects.token("tenant", tenant)
        rows.check_page(limit)
        async with self._connections.transaction(reads=True) as cursor:
            stored = await read_tenant(cursor, tenant)
            lacking = ""
            if missing and stored is not None and stored.new_embedder == embedder:
                lacking = " AND NOT EXISTS (SELECT 1 FROM new_vectors n WHERE n.tenant = c.tenant AND n.id = c.id)"
            await cursor.execute(
                "SELECT id, number, body, heading, start, page FROM chunks c WHERE tenant = %s AND id > %s"
                f"{lacking} ORDER BY id LIMIT %s",
                (tenant, after, limit),
            )
            return [(row[0], Chunk(*row[1:])) for row in await cursor.fetchall()]

    async def replace_vectors(
        self, tenant: str, embedder: str, rows_: Sequence[int], bodies: Vectors, headings: Vectors
    ) -> None:
        ids = [int(each) for each in rows_]
        vectors = rows.mixed_vectors(bodies, headings, len(ids), bodies.shape[1])
        async with self._connections.transaction() as cursor:
            stored = await self._lock(cursor, tenant)
            await pgvector_writes.replace_vectors(cursor, stored, embedder, ids, vectors)

    async def switch(self, tenant: str, embedder: str, dimensions: int) -> bool:
        async with self._connections.transaction() as cursor:
            stored = await self._lock(cursor, tenant)
            done = await pgvector_writes.switch(cursor, stored, embedder, dimensions)
        if done:
            self._embedders[tenant] = (embedder, dimensions)
        return done

    async def stats(self, tenant: str) -> StoreStats:
        """`bytes`: of the texts and vectors of this tenant, without indexes, which tenants share."""
        subjects.token("tenant", tenant)
        async with self._connections.transaction(reads=True) as cursor:
            stored = await read_tenant(cursor, tenant) or TenantRow(tenant, "", 0, 0, 0, "")
            await cursor.execute(
                "SELECT count(*) FILTER (WHERE indexed), count(*) FILTER (WHERE state = 'failed'),"
                " count(*) FILTER (WHERE state = 'deleted'),"
                " (SELECT coalesce(sum(pg_column_size(body) + pg_column_size(words) + pg_column_size(heading)), 0)"
                " FROM chunks WHERE tenant = %s) FROM documents WHERE tenant = %s",
                (tenant, tenant),
            )
            documents, failed, deleted, size = (await cursor.fetchall())[0]
        size = int(size) + 4 * stored.dimensions * stored.chunks
        return StoreStats(
            documents, stored.chunks, failed, deleted, size, stored.embedder, stored.dimensions
        )  # fmt: skip

    async def close(self) -> None:
        """Close all connections. May be called twice."""
        await self._connections.close()

    def _opened(self, tenant: str) -> tuple[str, int]:
        if tenant not in self._embedders:
            raise BadInput(f"tenant {tenant!r} is not open: call open(tenant, embedder, dimensions) first")
        return self._embedders[tenant]

    async def _lock(self, cursor: Cursor, tenant: str, opened: tuple[str, int] | None = None) -> TenantRow:
        stored = await lock_tenant(cursor, subjects.token("tenant", tenant))
        check_embedder(stored, opened)
        return stored


async def _tsquery(cursor: Cursor, tenant: str, terms: Sequence[str], chunks: int) -> str:
    """Return the terms to search for as a tsquery: PostgreSQL makes each of them, so that nothing is an operator."""

    async def count(limit: int) -> tuple[dict[str, str], dict[str, int]]:
        await cursor.execute(
            "SELECT term, query::text, (SELECT count(*) FROM (SELECT 1 FROM chunks WHERE tenant = %s AND words @@ query"
            " LIMIT %s) AS found) FROM (SELECT term, phraseto_tsquery('pg_catalog.english', term) AS query"
            " FROM unnest(%s::text[]) WITH ORDINALITY AS t (term, place) ORDER BY place) AS each"
            " WHERE numnode(query) > 0",
            (tenant, limit, list(terms)),
        )
        found = await cursor.fetchall()
        return {row[0]: row[1] for row in found}, {row[0]: row[2] for row in found}

    cutoff = max(RAREST_KEPT, int(chunks * FREQUENT_SHARE))
    queries, counts = await count(cutoff + 1)
    rare = sum(0 < each <= cutoff for each in counts.values())
    if rare < RAREST_KEPT and any(each > cutoff for each in counts.values()):
        _, counts = await count(chunks + 1)
    chosen = select_terms(list(queries), chunks, lambda term, limit: min(limit, counts[term]))
    return " | ".join(f"({queries[term]})" for term in chosen)


def _matching(conditions: Sequence[Condition], table: str) -> tuple[str, list[Any]]:
    if not conditions:
        return "", []
    where, values = postgres_where(conditions, "d.metadata")
    return (
        f" AND EXISTS (SELECT 1 FROM documents d WHERE d.tenant = {table}.tenant"
        f" AND d.document_id = {table}.document_id{where})"
    ), values


async def _keyword(
    cursor: Cursor, tenant: str, query: str, count: int, conditions: Sequence[Condition]
) -> dict[int, float]:
    matching, values = _matching(conditions, "c")
    await cursor.execute(
        "SELECT id, ts_rank('{1,1,1,1}', words, %s::tsquery, 1) AS rank FROM chunks c WHERE tenant = %s"
        f" AND words @@ %s::tsquery{matching} ORDER BY rank DESC, id LIMIT %s",
        (query, tenant, query, *values, count),
    )
    return dict(await cursor.fetchall())


async def _nearest(
    cursor: Cursor, tenant: str, vector: np.ndarray[Any, Any], count: int, conditions: Sequence[Condition]
) -> dict[int, float]:
    matching, values = _matching(conditions, "v")
    text = pgvector_writes.vector_text(vector)
    await cursor.execute(
        f"SELECT id, -(vector <#> %s::vector) FROM vectors v WHERE tenant = %s{matching}"
        " ORDER BY vector <#> %s::vector, id LIMIT %s",
        (text, tenant, *values, text, count),
    )
    return dict(await cursor.fetchall())


async def _passages(cursor: Cursor, tenant: str, ranked: Sequence[tuple[int, float]]) -> list[Passage]:
    await cursor.execute(
        "SELECT c.id, d.document_id, d.settled, d.title, d.source, c.heading, c.number, c.start, c.page, c.body,"
        " d.metadata FROM chunks c JOIN documents d ON d.tenant = c.tenant AND d.document_id = c.document_id"
        " WHERE c.tenant = %s AND c.id = ANY(%s)",
        (tenant, [row for row, _ in ranked]),
    )
    by_row = {row[0]: row[1:] for row in await cursor.fetchall()}
    return [rows.passage(by_row[row], score, by_row[row][9]) for row, score in ranked]
