"""What a transaction writes into PostgreSQL: the same steps as in `sqlite_writes`, with the tenant in every key.

Writers of one tenant take turns: each first locks the tenant's row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BadInput, EmbedderChanged
from ..types import PutOutcome
from . import rows, settling
from .pgvector_connections import Cursor
from .rows import ChunkRow, DocumentRow, HeaderRow
from .settling import Known

F32 = "<f4"  # of staged vectors


@dataclass(slots=True)
class TenantRow:
    """What is stored of a tenant as a whole."""

    tenant: str
    embedder: str
    dimensions: int
    last_chunk: int
    chunks: int
    new_embedder: str


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """A document as the database knows it."""

    known: Known
    title: str
    first_chunk: int
    chunks: int


_TENANT = "SELECT tenant, embedder, dimensions, last_chunk, chunks, new_embedder FROM tenants WHERE tenant = %s"


async def read_tenant(cursor: Cursor, tenant: str) -> TenantRow | None:
    """Return what is known of the tenant."""
    await cursor.execute(_TENANT, (tenant,))
    row = await cursor.fetchone()
    return TenantRow(*row) if row else None


async def lock_tenant(cursor: Cursor, tenant: str) -> TenantRow:
    """Make the tenant known, and keep other writers out until the transaction ends."""
    await cursor.execute("INSERT INTO tenants (tenant) VALUES (%s) ON CONFLICT DO NOTHING", (tenant,))
    await cursor.execute(f"{_TENANT} FOR UPDATE", (tenant,))
    row = await cursor.fetchone()
    assert row is not None
    return TenantRow(*row)


def check_embedder(tenant: TenantRow, opened: tuple[str, int] | None) -> None:
    """Raises EmbedderChanged if the tenant was opened with another embedder."""
    if opened is not None and (tenant.embedder, tenant.dimensions) != opened:
        raise EmbedderChanged(
            tenant.tenant, stored=tenant.embedder, stored_dimensions=tenant.dimensions, wanted=opened[0],
            wanted_dimensions=opened[1],
        )  # fmt: skip


async def open_embedder(cursor: Cursor, tenant: TenantRow, embedder: str, dimensions: int) -> None:
    """Adopt the embedder where no chunk is stored yet."""
    if not tenant.chunks and (tenant.embedder, tenant.dimensions) != (embedder, dimensions):
        await cursor.execute("DELETE FROM staged WHERE tenant = %s", (tenant.tenant,))
        await cursor.execute("DELETE FROM new_vectors WHERE tenant = %s", (tenant.tenant,))
        await cursor.execute(
            "UPDATE tenants SET embedder = %s, dimensions = %s, new_embedder = '' WHERE tenant = %s",
            (embedder, dimensions, tenant.tenant),
        )
        tenant.embedder, tenant.dimensions, tenant.new_embedder = embedder, dimensions, ""


async def find(cursor: Cursor, tenant: str, document_id: str) -> StoredDocument | None:
    """Return the document as the database knows it."""
    await cursor.execute(
        "SELECT shown, settled, indexed, content_hash, title, first_chunk, chunks FROM documents"
        " WHERE tenant = %s AND document_id = %s",
        (tenant, document_id),
    )
    row = await cursor.fetchone()
    return StoredDocument(Known(*row[:4]), *row[4:]) if row else None


async def put(cursor: Cursor, tenant: TenantRow, documents: Sequence[DocumentRow]) -> list[PutOutcome]:
    """Store whole documents, one after the other."""
    outcomes: list[PutOutcome] = []
    for each in documents:
        outcome = await _begin(cursor, tenant, each.header)
        if outcome == "new":
            first = tenant.last_chunk + 1
            await _add_chunks(cursor, tenant, each.header, each.chunks, each.vectors)
            await _settle(cursor, tenant, each.header, first)
        await _drop_staged(cursor, tenant, each.header.document_id, each.header.version)
        outcomes.append(outcome)
    return outcomes


async def commit(cursor: Cursor, tenant: TenantRow, header: HeaderRow) -> PutOutcome:
    """Make the staged batches of this version the document. Raises BadInput if a batch is missing."""
    outcome = await _begin(cursor, tenant, header)
    if outcome == "new":
        first = tenant.last_chunk + 1
        key = (header.document_id, header.version)
        where = "WHERE tenant = %s AND document_id = %s AND version = %s AND content_hash = %s"
        staged = (tenant.tenant, *key, header.content_hash)
        await cursor.execute(f"SELECT batch FROM staged {where} ORDER BY batch", staged)
        numbers: list[int] = []
        for (batch,) in await cursor.fetchall():
            sql = f"SELECT chunks, vectors FROM staged {where} AND batch = %s"
            await cursor.execute(sql, (*staged, batch))
            for text, blob in await cursor.fetchall():
                chunks = rows.staged_rows(text)
                vectors = np.frombuffer(blob, F32).reshape(-1, tenant.dimensions)
                await _add_chunks(cursor, tenant, header, chunks, vectors)
                numbers += [each[0] for each in chunks]
        rows.check_numbers(numbers, *key)
        await _settle(cursor, tenant, header, first)
    await _drop_staged(cursor, tenant, header.document_id, header.version)
    return outcome


async def _begin(cursor: Cursor, tenant: TenantRow, header: HeaderRow) -> PutOutcome:
    """Decide what storing this version is. Former chunks are removed for a new one; "same" is done with this."""
    stored = await find(cursor, tenant.tenant, header.document_id)
    outcome = settling.settle_put(stored.known if stored else Known(), header.version, header.content_hash)
    if outcome == "new" and stored is not None:
        await remove_chunks(cursor, tenant, stored)
    if outcome == "same":
        assert stored is not None
        await cursor.execute(
            "UPDATE documents SET settled = %s, source = %s, metadata = %s::jsonb, problems = %s::jsonb,"
            " hints = %s::jsonb WHERE tenant = %s AND document_id = %s",
            (
                header.version,
                header.source,
                header.metadata,
                header.problems,
                header.hints,
                tenant.tenant,
                header.document_id,
            ),
        )
        await _show(
            cursor, tenant, header.document_id, header.version, header.state, done=stored.chunks, total=stored.chunks
        )
    return outcome


async def _add_chunks(
    cursor: Cursor, tenant: TenantRow, header: HeaderRow, chunks: Sequence[ChunkRow],
    vectors: np.ndarray[Any, Any],
) -> None:  # fmt: skip
    first = tenant.last_chunk + 1
    await cursor.executemany(
        "INSERT INTO chunks (tenant, id, document_id, number, start, page, heading, body, words)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s,"
        " setweight(to_tsvector('pg_catalog.english', %s), 'A') || to_tsvector('pg_catalog.english', %s))",
        [
            (tenant.tenant, row, header.document_id, *each, *rows.index_row(header.title, each))
            for row, each in enumerate(chunks, first)
        ],
    )
    await cursor.executemany(
        "INSERT INTO vectors (tenant, id, document_id, vector) VALUES (%s, %s, %s, %s::vector)",
        [(tenant.tenant, row, header.document_id, vector_text(each)) for row, each in enumerate(vectors, first)],
    )
    tenant.last_chunk += len(chunks)
    tenant.chunks += len(chunks)


def vector_text(vector: np.ndarray[Any, Any]) -> str:
    """Return the vector as pgvector reads it."""
    return f"[{','.join(f'{each:.7g}' for each in vector.tolist())}]"


async def _settle(cursor: Cursor, tenant: TenantRow, header: HeaderRow, first: int) -> None:
    """Make the chunks from `first` on those of the document."""
    count = tenant.last_chunk - first + 1
    await cursor.execute(
        "INSERT INTO documents (tenant, document_id, shown, state, done, total, updated_at)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING",
        (tenant.tenant, header.document_id, header.version, header.state, count, count, time.time()),
    )
    await cursor.execute(
        "UPDATE documents SET settled = %s, content_hash = %s, title = %s, source = %s, metadata = %s::jsonb,"
        " problems = %s::jsonb, hints = %s::jsonb, first_chunk = %s, chunks = %s, indexed = TRUE"
        " WHERE tenant = %s AND document_id = %s",
        (
            header.version, header.content_hash, header.title, header.source, header.metadata, header.problems,
            header.hints, first, count, tenant.tenant, header.document_id,
        ),
    )  # fmt: skip
    await cursor.execute(
        "UPDATE tenants SET last_chunk = %s, chunks = %s WHERE tenant = %s",
        (tenant.last_chunk, tenant.chunks, tenant.tenant),
    )
    await _show(cursor, tenant, header.document_id, header.version, header.state, done=count, total=count)


async def _show(
    cursor: Cursor, tenant: TenantRow, document_id: str, version: int, state: str, *, stage: str = "", done: int = 0,
    total: int = 0, reason: str = "", job_id: str = "",
) -> None:  # fmt: skip
    """Show this version in the status, unless a newer one was begun."""
    await cursor.execute(
        "UPDATE documents SET shown = %s, state = %s, stage = %s, done = %s, total = %s, reason = %s, job_id = %s,"
        " updated_at = %s WHERE tenant = %s AND document_id = %s AND shown <= %s",
        (version, state, stage, done, total, reason, job_id, time.time(), tenant.tenant, document_id, version),
    )


async def remove_chunks(cursor: Cursor, tenant: TenantRow, stored: StoredDocument) -> None:
    """Remove a document's chunks from all indexes."""
    if stored.chunks:
        bounds = (tenant.tenant, stored.first_chunk, stored.first_chunk + stored.chunks - 1)
        for table in ("chunks", "vectors", "new_vectors"):
            await cursor.execute(f"DELETE FROM {table} WHERE tenant = %s AND id BETWEEN %s AND %s".encode(), bounds)
        tenant.chunks -= stored.chunks
        await cursor.execute("UPDATE tenants SET chunks = %s WHERE tenant = %s", (tenant.chunks, tenant.tenant))


async def move_version(cursor: Cursor, tenant: TenantRow, document_id: str, version: int, content_hash: str) -> bool:
    """The stored chunks, which have this hash, become this version's. Says whether."""
    stored = await find(cursor, tenant.tenant, document_id)
    if stored is None or not settling.settle_move(stored.known, version, content_hash):
        return False
    key = (tenant.tenant, document_id)
    await cursor.execute(
        "UPDATE documents SET settled = %s WHERE tenant = %s AND document_id = %s RETURNING problems = '[]'",
        (version, *key),
    )
    is_clean = (await cursor.fetchall())[0][0]
    state = "completed" if is_clean else "completed_with_errors"
    await _show(cursor, tenant, document_id, version, state, done=stored.chunks, total=stored.chunks)
    await _drop_staged(cursor, tenant, document_id, version)
    return True


async def delete(cursor: Cursor, tenant: TenantRow, document_id: str, version: int) -> bool:
    """Remove the document. Its version stays, so that no older one comes back. Says whether."""
    stored = await find(cursor, tenant.tenant, document_id)
    if not settling.settle_delete(stored.known if stored else Known(), version):
        return False
    if stored is not None:
        await remove_chunks(cursor, tenant, stored)
    await cursor.execute(
        "INSERT INTO documents (tenant, document_id, shown, settled, state, updated_at)"
        " VALUES (%s, %s, %s, %s, 'deleted', %s) ON CONFLICT (tenant, document_id) DO UPDATE SET"
        " settled = EXCLUDED.settled, indexed = FALSE, content_hash = '', title = '', source = '', metadata = '{}',"
        " problems = '[]', hints = '{}', first_chunk = 0, chunks = 0",
        (tenant.tenant, document_id, version, version, time.time()),
    )
    await _show(cursor, tenant, document_id, version, "deleted")
    await _drop_staged(cursor, tenant, document_id, version)
    return True


async def note(
    cursor: Cursor, tenant: TenantRow, document_id: str, version: int, state: str, told: rows.Told
) -> None:  # fmt: skip
    """Show what becomes of a version, unless a newer one is known."""
    if state == "cancelled":
        await cursor.execute(
            "DELETE FROM staged WHERE tenant = %s AND document_id = %s AND version = %s",
            (tenant.tenant, document_id, version),
        )
    stored = await find(cursor, tenant.tenant, document_id)
    if settling.accepts_note(stored.known if stored else Known(), version):
        await cursor.execute(
            "INSERT INTO documents (tenant, document_id, shown, state, updated_at) VALUES (%s, %s, %s, %s, %s)"
            " ON CONFLICT DO NOTHING",
            (tenant.tenant, document_id, version, state, time.time()),
        )
        await _show(cursor, tenant, document_id, version, state, **told)


async def stage(
    cursor: Cursor, tenant: TenantRow, document_id: str, version: int, content_hash: str, batch: int, chunks: str,
    vectors: bytes,
) -> None:  # fmt: skip
    """Keep a batch of a version, unless a newer one is stored. Those of another content of this version are dropped."""
    stored = await find(cursor, tenant.tenant, document_id)
    if stored is not None and version < stored.known.settled:
        return
    now = time.time()
    await cursor.execute(
        "DELETE FROM staged WHERE tenant = %s AND document_id = %s AND version = %s AND content_hash <> %s",
        (tenant.tenant, document_id, version, content_hash),
    )
    await cursor.execute(
        "INSERT INTO staged VALUES (%s, %s, %s, %s, %s, %s, %s, %s) ON CONFLICT (tenant, document_id, version, batch)"
        " DO UPDATE SET at = EXCLUDED.at, chunks = EXCLUDED.chunks, vectors = EXCLUDED.vectors",
        (tenant.tenant, document_id, version, batch, now, content_hash, chunks, vectors),
    )
    await cursor.execute(
        "DELETE FROM staged WHERE tenant = %s AND (document_id, version) IN (SELECT document_id, version FROM staged"
        " WHERE tenant = %s GROUP BY document_id, version HAVING max(at) < %s)",
        (tenant.tenant, tenant.tenant, now - settling.STAGED_KEPT_S),
    )


async def _drop_staged(cursor: Cursor, tenant: TenantRow, document_id: str, version: int) -> None:
    await cursor.execute(
        "DELETE FROM staged WHERE tenant = %s AND document_id = %s AND version <= %s",
        (tenant.tenant, document_id, version),
    )


async def replace_vectors(
    cursor: Cursor, tenant: TenantRow, embedder: str, ids: Sequence[int], vectors: np.ndarray[Any, Any]
) -> None:
    """Keep vectors of another embedder for these chunks. Those of a third one, kept before, are dropped."""
    if tenant.new_embedder != embedder:
        await cursor.execute("DELETE FROM new_vectors WHERE tenant = %s", (tenant.tenant,))
        await cursor.execute("UPDATE tenants SET new_embedder = %s WHERE tenant = %s", (embedder, tenant.tenant))
    await cursor.execute("SELECT vector_dims(vector) FROM new_vectors WHERE tenant = %s LIMIT 1", (tenant.tenant,))
    if (found := await cursor.fetchone()) and found[0] != vectors.shape[1]:
        raise BadInput(f"vectors of {vectors.shape[1]} numbers: those stored by {embedder} have {found[0]}")
    await cursor.executemany(
        "INSERT INTO new_vectors SELECT tenant, id, document_id, %s::vector FROM chunks WHERE tenant = %s AND id = %s"
        " ON CONFLICT (tenant, id) DO UPDATE SET vector = EXCLUDED.vector",
        [(vector_text(each), tenant.tenant, row) for row, each in zip(ids, vectors, strict=True)],
    )


async def switch(cursor: Cursor, tenant: TenantRow, embedder: str, dimensions: int) -> bool:
    """Make the kept vectors the present ones if every chunk has one."""
    if (tenant.embedder, tenant.dimensions) == (embedder, dimensions) and tenant.new_embedder != embedder:
        return True  # done before: this is a repetition
    key = (tenant.tenant,)
    await cursor.execute(
        "SELECT count(*), min(vector_dims(vector)), max(vector_dims(vector)) FROM new_vectors WHERE tenant = %s", key
    )
    count, low, high = (await cursor.fetchall())[0]
    if tenant.chunks and (tenant.new_embedder != embedder or count != tenant.chunks):
        return False
    if count and (low, high) != (dimensions, dimensions):
        raise BadInput(f"dimensions {dimensions}: the vectors stored by {embedder} have {low}")
    await cursor.execute("DELETE FROM vectors WHERE tenant = %s", key)
    await cursor.execute("INSERT INTO vectors SELECT * FROM new_vectors WHERE tenant = %s", key)
    await cursor.execute("DELETE FROM new_vectors WHERE tenant = %s", key)
    await cursor.execute("DELETE FROM staged WHERE tenant = %s", key)  # of the former embedder
    await cursor.execute(
        "UPDATE tenants SET embedder = %s, dimensions = %s, new_embedder = '' WHERE tenant = %s",
        (embedder, dimensions, tenant.tenant),
    )
    return True
