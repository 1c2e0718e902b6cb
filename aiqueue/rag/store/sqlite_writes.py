"""What a transaction writes into a tenant's database. Each function runs within `transaction`."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import BadInput
from ..types import PutOutcome
from . import rows, settling
from .rows import ChunkRow, DocumentRow, HeaderRow
from .settling import Known
from .sqlite_file import meta, set_meta

REMOVED_KEPT = 10_000  # entries for vector caches; one that has missed more loads all anew
F16 = "<f2"


@dataclass(frozen=True, slots=True)
class KnownRow:
    """A document as the database knows it."""

    number: int
    known: Known
    title: str
    first_chunk: int
    chunks: int


def find(db: sqlite3.Connection, document_id: str) -> KnownRow | None:
    """Return the document as the database knows it."""
    row = db.execute(
        "SELECT number, shown, settled, indexed, content_hash, title, first_chunk, chunks FROM documents"
        " WHERE document_id = ?",
        (document_id,),
    ).fetchone()
    return KnownRow(row[0], Known(row[1], row[2], bool(row[3]), row[4]), *row[5:]) if row else None


def put(db: sqlite3.Connection, documents: Sequence[DocumentRow]) -> list[PutOutcome]:
    """Store whole documents. Of several versions of one document the higher stands, whatever their order."""
    writing = _Writing(db)
    outcomes: list[PutOutcome] = []
    for each in documents:
        if each.header.document_id in writing.ids:
            writing.flush()  # what is known of it must be read again
        outcomes.append(writing.put(each.header, [(each.chunks, each.vectors.astype(F16))]))
    writing.flush()
    return outcomes


def commit(db: sqlite3.Connection, header: HeaderRow, dimensions: int) -> PutOutcome:
    """Make the staged batches of this version the document. Raises BadInput if a batch is missing."""
    key = (header.document_id, header.version)
    writing = _Writing(db)
    outcome = writing.put(header, _staged_batches(db, (*key, header.content_hash), dimensions))
    if outcome == "new":
        rows.check_numbers(writing.numbers, *key)
    writing.flush()
    return outcome


def _staged_batches(
    db: sqlite3.Connection, key: tuple[str, int, str], dimensions: int
) -> Iterator[tuple[list[ChunkRow], np.ndarray[Any, Any]]]:
    found = db.execute(
        "SELECT chunks, vectors FROM staged WHERE document_id = ? AND version = ? AND content_hash = ? ORDER BY batch",
        key,
    )
    for chunks, vectors in found:
        yield rows.staged_rows(chunks), np.frombuffer(vectors, F16).reshape(-1, dimensions)


class _Writing:
    """Rows of several documents, written together: one statement for each table is much faster than one a row."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        stored = meta(db)
        self._next_chunk: int = stored["last_chunk"] + 1
        self._chunks: int = stored["chunks"]
        self._next_document = (db.execute("SELECT max(number) FROM documents").fetchone()[0] or 0) + 1
        self.ids: set[str] = set()
        self.numbers: list[int] = []
        self._new: list[tuple[Any, ...]] = []
        self._settled: list[tuple[str, int]] = []

    def put(self, header: HeaderRow, batches: Iterable[tuple[Sequence[ChunkRow], np.ndarray[Any, Any]]]) -> PutOutcome:
        self.ids.add(header.document_id)
        stored = find(self._db, header.document_id)
        outcome = settling.settle_put(stored.known if stored else Known(), header.version, header.content_hash)
        self._settled.append((header.document_id, header.version))
        if outcome == "old":
            return outcome
        if outcome == "same":
            assert stored is not None
            move(self._db, stored, header)
            return outcome
        if stored is None:
            number, self._next_document = self._next_document, self._next_document + 1
        else:
            number = stored.number
            self._chunks -= remove_chunks(self._db, stored)
        first = self._next_chunk
        for chunks, vectors in batches:
            self._add_chunks(number, header.title, chunks, vectors)
        count = self._next_chunk - first
        if stored is None:
            self._new.append((number, *_columns(header, first, count), header.version, header.state, count, count))
        else:
            _update(self._db, stored, header, first, count)
        return outcome

    def _add_chunks(self, document: int, title: str, chunks: Sequence[ChunkRow], vectors: np.ndarray[Any, Any]) -> None:
        first = self._next_chunk
        ids = range(first, first + len(chunks))
        texts = [rows.index_row(title, each) for each in chunks]
        whole, size = vectors.tobytes(), vectors.itemsize * vectors.shape[1]
        blobs = (whole[at : at + size] for at in range(0, len(whole), size))
        self._db.executemany(
            "INSERT INTO chunks (id, document, number, start, page, heading, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
            [(row, document, *each) for row, each in zip(ids, chunks, strict=True)],
        )
        self._db.executemany(
            "INSERT INTO fts (rowid, heading, body) VALUES (?, ?, ?)",
            [(row, *each) for row, each in zip(ids, texts, strict=True)],
        )
        self._db.executemany(
            "INSERT INTO vectors (id, document, vector) VALUES (?, ?, ?)",
            [(row, document, blob) for row, blob in zip(ids, blobs, strict=True)],
        )
        self._next_chunk += len(chunks)
        self._chunks += len(chunks)
        self.numbers += [each[0] for each in chunks]

    def flush(self) -> None:
        now = time.time()
        self._db.executemany(
            "INSERT INTO documents (number, document_id, settled, content_hash, title, source, metadata, problems,"
            " hints, first_chunk, chunks, indexed, shown, state, done, total, updated_at)"
            f" VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?, ?, ?, {now!r})",
            self._new,
        )
        self._db.executemany("DELETE FROM staged WHERE document_id = ? AND version <= ?", self._settled)
        set_meta(self._db, last_chunk=self._next_chunk - 1, chunks=self._chunks)
        self.ids.clear()
        self._new.clear()
        self._settled.clear()


def _columns(header: HeaderRow, first: int, count: int) -> tuple[Any, ...]:
    return (
        header.document_id, header.version, header.content_hash, header.title, header.source, header.metadata,
        header.problems, header.hints, first, count,
    )  # fmt: skip


def _update(db: sqlite3.Connection, stored: KnownRow, header: HeaderRow, first: int, count: int) -> None:
    db.execute(
        "UPDATE documents SET (document_id, settled, content_hash, title, source, metadata, problems, hints,"
        " first_chunk, chunks, indexed) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1) WHERE number = ?",
        (*_columns(header, first, count), stored.number),
    )
    _show(db, stored, header.version, header.state, done=count, total=count)


def move(db: sqlite3.Connection, stored: KnownRow, header: HeaderRow) -> None:
    """The stored chunks are those of this version too. The title stays: the keyword index was made with it."""
    db.execute(
        "UPDATE documents SET settled = ?, source = ?, metadata = ?, problems = ?, hints = ? WHERE number = ?",
        (header.version, header.source, header.metadata, header.problems, header.hints, stored.number),
    )
    _show(db, stored, header.version, header.state, done=stored.chunks, total=stored.chunks)


def move_version(db: sqlite3.Connection, document_id: str, version: int, content_hash: str) -> bool:
    """The stored chunks, which have this hash, become this version's. Says whether."""
    stored = find(db, document_id)
    if stored is None or not settling.settle_move(stored.known, version, content_hash):
        return False
    db.execute("UPDATE documents SET settled = ? WHERE number = ?", (version, stored.number))
    problems = db.execute("SELECT problems FROM documents WHERE number = ?", (stored.number,)).fetchone()[0]
    state = "completed" if problems == "[]" else "completed_with_errors"
    _show(db, stored, version, state, done=stored.chunks, total=stored.chunks)
    _drop_staged(db, document_id, version)
    return True


def delete(db: sqlite3.Connection, document_id: str, version: int) -> bool:
    """Remove the document. Its version stays, so that no older one comes back. Says whether."""
    stored = find(db, document_id)
    if not settling.settle_delete(stored.known if stored else Known(), version):
        return False
    if stored is None:
        db.execute(
            "INSERT INTO documents (document_id, shown, settled, state, updated_at) VALUES (?, ?, ?, 'deleted', ?)",
            (document_id, version, version, time.time()),
        )
    else:
        gone = remove_chunks(db, stored)
        db.execute("UPDATE meta SET value = value - ? WHERE name = 'chunks'", (gone,))
        db.execute(
            "UPDATE documents SET settled = ?, indexed = 0, content_hash = '', title = '', source = '',"
            " metadata = '{}', problems = '[]', hints = '{}', first_chunk = 0, chunks = 0 WHERE number = ?",
            (version, stored.number),
        )
        _show(db, stored, version, "deleted")
    _drop_staged(db, document_id, version)
    return True


def note(db: sqlite3.Connection, document_id: str, version: int, state: str, told: rows.Told) -> None:
    """Show what becomes of a version, unless a newer one is known."""
    if state == "cancelled":
        db.execute("DELETE FROM staged WHERE document_id = ? AND version = ?", (document_id, version))
    stored = find(db, document_id)
    if not settling.accepts_note(stored.known if stored else Known(), version):
        return
    if stored is None:
        db.execute(
            "INSERT INTO documents (document_id, shown, state, updated_at) VALUES (?, ?, ?, ?)",
            (document_id, version, state, time.time()),
        )
        stored = find(db, document_id)
        assert stored is not None
    _show(db, stored, version, state, **told)


def _show(
    db: sqlite3.Connection, stored: KnownRow, version: int, state: str, *, stage: str = "", done: int = 0,
    total: int = 0, reason: str = "", job_id: str = "",
) -> None:  # fmt: skip
    """Show this version in the status, unless a newer one was begun."""
    if version >= stored.known.shown:
        db.execute(
            "UPDATE documents SET (shown, state, stage, done, total, reason, job_id, updated_at)"
            " = (?, ?, ?, ?, ?, ?, ?, ?) WHERE number = ?",
            (version, state, stage, done, total, reason, job_id, time.time(), stored.number),
        )


def remove_chunks(db: sqlite3.Connection, stored: KnownRow) -> int:
    """Remove a document's chunks from all indexes. Return how many there were."""
    if not stored.chunks:
        return 0
    bounds = (stored.first_chunk, stored.first_chunk + stored.chunks - 1)
    for first in range(bounds[0], bounds[1] + 1, 1_000):  # a document may have 50,000
        part = (first, min(first + 999, bounds[1]))
        texts = db.execute("SELECT id, heading, body FROM chunks WHERE id BETWEEN ? AND ?", part).fetchall()
        db.executemany(
            "INSERT INTO fts (fts, rowid, heading, body) VALUES ('delete', ?, ?, ?)",
            [(row, *rows.index_row(stored.title, (0, 0, None, heading, body))) for row, heading, body in texts],
        )
    for table in ("chunks", "vectors", "new_vectors"):
        db.execute(f"DELETE FROM {table} WHERE id BETWEEN ? AND ?", bounds)
    seq = db.execute("SELECT value FROM meta WHERE name = 'last_removed'").fetchone()[0] + 1
    db.execute("INSERT INTO removed VALUES (?, ?, ?)", (seq, *bounds))
    set_meta(db, last_removed=seq)
    if seq % 1_000 == 0 and seq > REMOVED_KEPT:
        db.execute("DELETE FROM removed WHERE seq <= ?", (seq - REMOVED_KEPT,))
        set_meta(db, removed_floor=seq - REMOVED_KEPT)
    return stored.chunks


def stage(
    db: sqlite3.Connection, document_id: str, version: int, content_hash: str, batch: int, chunks: str, vectors: bytes
) -> None:  # fmt: skip
    """Keep a batch of a version, unless a newer one is stored. Those of another content of this version are dropped."""
    stored = find(db, document_id)
    if stored is not None and version < stored.known.settled:
        return
    now = time.time()
    db.execute(
        "DELETE FROM staged WHERE document_id = ? AND version = ? AND content_hash <> ?",
        (document_id, version, content_hash),
    )
    db.execute(
        "INSERT OR REPLACE INTO staged VALUES (?, ?, ?, ?, ?, ?, ?)",
        (document_id, version, batch, now, content_hash, chunks, vectors),
    )
    db.execute(
        "DELETE FROM staged WHERE (document_id, version) IN"
        " (SELECT document_id, version FROM staged GROUP BY document_id, version HAVING max(at) < ?)",
        (now - settling.STAGED_KEPT_S,),
    )


def _drop_staged(db: sqlite3.Connection, document_id: str, version: int) -> None:
    db.execute("DELETE FROM staged WHERE document_id = ? AND version <= ?", (document_id, version))


def replace_vectors(db: sqlite3.Connection, embedder: str, ids: Sequence[int], vectors: np.ndarray[Any, Any]) -> None:
    """Keep vectors of another embedder for these chunks. Those of a third one, kept before, are dropped."""
    if meta(db)["new_embedder"] != embedder:
        db.execute("DELETE FROM new_vectors")
        set_meta(db, new_embedder=embedder)
    sizes = db.execute("SELECT length(vector) FROM new_vectors LIMIT 1").fetchone()
    if sizes and sizes[0] != vectors.shape[1] * 2:
        raise BadInput(f"vectors of {vectors.shape[1]} numbers: those stored by {embedder} have {sizes[0] // 2}")
    db.executemany(
        "INSERT OR REPLACE INTO new_vectors SELECT id, document, ? FROM chunks WHERE id = ?",
        [(each.tobytes(), row) for row, each in zip(ids, vectors.astype(F16), strict=True)],
    )


def switch(db: sqlite3.Connection, embedder: str, dimensions: int) -> bool:
    """Make the kept vectors the present ones if every chunk has one."""
    stored = meta(db)
    if (stored["embedder"], stored["dimensions"]) == (embedder, dimensions) and stored["new_embedder"] != embedder:
        return True  # done before: this is a repetition
    if stored["chunks"]:
        if stored["new_embedder"] != embedder:
            return False
        if db.execute("SELECT count(*) FROM new_vectors").fetchone()[0] != stored["chunks"]:
            return False
    other = db.execute("SELECT length(vector) FROM new_vectors WHERE length(vector) <> ? LIMIT 1", (2 * dimensions,))
    if found := other.fetchone():
        raise BadInput(f"dimensions {dimensions}: the vectors stored by {embedder} have {found[0] // 2}")
    db.execute("DROP TABLE vectors")
    db.execute("ALTER TABLE new_vectors RENAME TO vectors")
    db.execute("CREATE TABLE new_vectors (id INTEGER PRIMARY KEY, document INTEGER NOT NULL, vector BLOB NOT NULL)")
    db.execute("DELETE FROM staged")  # their vectors are of the former embedder
    set_meta(
        db, embedder=embedder, dimensions=dimensions, generation=stored["generation"] + 1, new_embedder=""
    )  # fmt: skip
    return True


def open_embedder(db: sqlite3.Connection, embedder: str, dimensions: int) -> None:
    """Adopt the embedder where no chunk is stored yet."""
    stored = meta(db)
    if not stored["chunks"] and (stored["embedder"], stored["dimensions"]) != (embedder, dimensions):
        db.execute("DELETE FROM staged")
        set_meta(
            db, embedder=embedder, dimensions=dimensions, generation=stored["generation"] + 1, new_embedder=""
        )  # fmt: skip
