"""What the store holds, read from its files by SQL: neither the workers nor the store's own code is asked."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

HASH_BYTES = 8


class StoredChunk(NamedTuple):
    """A chunk that questions find. `text`: the hash of its text."""

    document: str
    number: int
    text: bytes


class Facts:
    """Of the databases in a directory. A tenant without one has nothing."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def _database(self, tenant: str) -> Iterator[sqlite3.Connection | None]:
        """Of the tenant, in one transaction."""
        files = [each for each in self._root.glob(f"{tenant.lower()}-*.sqlite") if each.stat().st_size]
        if not files:
            yield None
            return
        database = sqlite3.connect(f"{files[0].as_uri()}?mode=ro", uri=True, timeout=10, isolation_level=None)
        try:
            database.execute("BEGIN")
            yield database
        finally:
            database.close()

    def documents(self, tenant: str) -> int:
        """How many can be found."""
        with self._database(tenant) as database:
            if database is None:
                return 0
            row = database.execute("SELECT count(*) FROM documents WHERE indexed > 0").fetchone()
            return int(row[0])

    def states(self, tenant: str) -> dict[str, tuple[str, str]]:
        """State and reason of each document."""
        with self._database(tenant) as database:
            if database is None:
                return {}
            rows = database.execute("SELECT document_id, state, reason FROM documents").fetchall()
            return {document: (state, reason) for document, state, reason in rows}

    def texts(self, tenant: str) -> dict[str, list[str]]:
        """The texts of each document's chunks, in their order."""
        found: dict[str, list[str]] = {}
        for document, _, text in self._rows(tenant):
            found.setdefault(document, []).append(text)
        return found

    def chunks(self, tenant: str) -> Counter[StoredChunk]:
        """All chunks that questions find: each should be there once."""
        return Counter(StoredChunk(document, number, hash_of(text)) for document, number, text in self._rows(tenant))

    def kept(self, tenant: str) -> Counter[bytes]:
        """Hashes of the texts that need not be embedded again: of stored chunks and of staged ones."""
        with self._database(tenant) as database:
            if database is None:
                return Counter()
            bodies = [row[0] for row in database.execute("SELECT body FROM chunks")]
            staged = [row[0] for row in database.execute("SELECT chunks FROM staged")]
        return Counter(hash_of(each) for each in [*bodies, *(text for rows in staged for text in _staged(rows))])

    def _rows(self, tenant: str) -> list[tuple[str, int, str]]:
        with self._database(tenant) as database:
            if database is None:
                return []
            return database.execute(
                "SELECT document_id, chunks.number, body FROM chunks JOIN documents ON documents.number = document "
                "WHERE indexed > 0 ORDER BY chunks.document, chunks.number"
            ).fetchall()


def _staged(rows: str) -> list[str]:

    return [text for *_, text in json.loads(rows)]


def hash_of(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "replace"), digest_size=HASH_BYTES).digest()
