"""What is read from a tenant's database. Each function runs in a thread, on a reader's own connection."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..types import Chunk, DocumentState, Mode, Passage, StoreStats
from . import ranking, rows
from .filters import Condition, sqlite_where
from .keyword_search import KeywordSearch
from .sqlite_file import check_embedder, meta, reading
from .vector_cache import Rows, VectorCache, best_on_disk

_STATE = """SELECT document_id, shown, state, stage, done, total, reason, problems, title, source, metadata,
    CASE indexed WHEN 1 THEN settled END, chunks, updated_at, job_id, hints FROM documents"""


def search(
    db: sqlite3.Connection, cache: VectorCache, keywords: KeywordSearch, tenant: str, opened: tuple[str, int] | None,
    terms: Sequence[str], vector: Any, k: int, conditions: Sequence[Condition], mode: Mode,
) -> list[Passage]:  # fmt: skip
    """Return the best passages by the ranking recipe. `terms` and `vector`: of the question; `opened`: see `open`."""
    wanted = ranking.candidates_of(k)
    with reading(db):
        stored = check_embedder(db, tenant, opened if vector is not None and mode != "keyword" else None)
        allowed = _allowed(db, conditions) if conditions else None
        by_keyword: dict[int, float] = {}
        by_vector: dict[int, float] = {}
        wants_vectors = mode != "keyword" and vector is not None and stored["chunks"] > 0
        snapshot = cache.snapshot(stored["last_removed"]) if wants_vectors else None
        if mode != "vector" and terms:
            by_keyword = keywords.best(db, snapshot, terms, stored["chunks"], wanted, allowed)
        if wants_vectors:
            flat = rows.question_vector(vector, stored["dimensions"])
            if snapshot is None:
                by_vector = best_on_disk(db, flat, wanted, allowed, stored["dimensions"])
            elif snapshot.embedder == (stored["embedder"], stored["dimensions"]):
                by_vector = snapshot.best(flat, wanted, allowed)
        # Some candidates of an older snapshot may be gone: those after them take their places.
        ranked = ranking.fuse(by_keyword, by_vector, len(by_keyword) + len(by_vector), mode)
        return _passages(db, ranked, k)


def _allowed(db: sqlite3.Connection, conditions: Sequence[Condition]) -> Rows:
    where, values = sqlite_where(conditions)
    found = db.execute(f"SELECT number FROM documents WHERE indexed{where}", values).fetchall()
    return np.array([row[0] for row in found], np.int64)


def _passages(db: sqlite3.Connection, ranked: Sequence[tuple[int, float]], k: int) -> list[Passage]:
    passages: list[Passage] = []
    for first in range(0, len(ranked), 500):
        part = ranked[first : first + 500] if k > 500 else ranked[first : first + k + 20]
        found = db.execute(
            "SELECT c.id, d.document_id, d.settled, d.title, d.source, c.heading, c.number, c.start, c.page, c.body,"
            " d.metadata FROM chunks c JOIN documents d ON d.number = c.document"
            f" WHERE c.id IN ({', '.join('?' * len(part))})",
            [row for row, _ in part],
        )
        by_row = {row[0]: row[1:] for row in found}
        for row, score in part:
            if len(passages) < k and row in by_row:
                passages.append(rows.passage(by_row[row], score, json.loads(by_row[row][9])))
        if len(passages) == k:
            break
    return passages


def document(db: sqlite3.Connection, document_id: str) -> DocumentState | None:
    """Return what is known of a document."""
    row = db.execute(f"{_STATE} WHERE document_id = ?", (document_id,)).fetchone()
    return _document_state(row) if row else None


def documents(db: sqlite3.Connection, after: str, limit: int) -> list[DocumentState]:
    """Return a page of all documents but the deleted ones, in the order of their ids."""
    found = db.execute(
        f"{_STATE} WHERE document_id > ? AND state <> 'deleted' ORDER BY document_id LIMIT ?", (after, limit)
    )
    return [_document_state(row) for row in found]


def _document_state(row: Sequence[Any]) -> DocumentState:
    values = list(row)
    values[7], values[10] = json.loads(row[7]), json.loads(row[10])
    values[15] = json.loads(row[15])
    return DocumentState(*values)


def staged(db: sqlite3.Connection, document_id: str, version: int, content_hash: str) -> set[int]:
    """Return the numbers of the staged batches."""
    found = db.execute(
        "SELECT batch FROM staged WHERE document_id = ? AND version = ? AND content_hash = ?",
        (document_id, version, content_hash),
    )
    return {row[0] for row in found}


def chunks(db: sqlite3.Connection, embedder: str, after: int, limit: int, missing: bool) -> list[tuple[int, Chunk]]:
    """Return a page of chunks with their rows. `missing`: those without a kept vector of this embedder."""
    lacking = ""
    if missing and meta(db)["new_embedder"] == embedder:
        lacking = " AND NOT EXISTS (SELECT 1 FROM new_vectors n WHERE n.id = c.id)"
    found = db.execute(
        f"SELECT id, number, body, heading, start, page FROM chunks c WHERE id > ?{lacking} ORDER BY id LIMIT ?",
        (after, limit),
    )
    return [(row[0], Chunk(*row[1:])) for row in found]


def stats(db: sqlite3.Connection, path: Path) -> StoreStats:
    """Count the documents and chunks."""
    with reading(db):
        stored = meta(db)
        counts = db.execute(
            "SELECT coalesce(sum(indexed), 0), coalesce(sum(state = 'failed'), 0), coalesce(sum(state = 'deleted'), 0)"
            " FROM documents"
        ).fetchone()
    size = sum(each.stat().st_size for each in (path, Path(f"{path}-wal")) if each.exists())
    documents, failed, deleted = counts
    return StoreStats(
        documents, stored["chunks"], failed, deleted, size, stored["embedder"], stored["dimensions"]
    )  # fmt: skip
