"""The vectors of a tenant in memory, for an exact scan: 0.5 ms for 20,000 of 256 numbers.

Memory: 4 bytes a number and 21 bytes a chunk, so 1 KiB for a chunk of 256 dimensions: 20 MiB for 20,000 chunks.
Nothing is loaded before the first question of a tenant. All tenants of a store share a bound; whoever was asked least
recently is dropped. A tenant that is larger than the bound alone is scanned from disk, block by block.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sqlite_file import meta, reading

Rows = NDArray[np.int64]
Matrix = NDArray[np.float32]
Lengths = NDArray[np.int32]

REFRESH_S = 0.2  # other processes' writes are looked for at most so often
BLOCK_ROWS = 4_096
FIRST_BLOCK_ROWS = 64
COMPACT_SHARE = 1 / 3  # of rows that are gone
CHUNK_BYTES = 21  # in memory, without its vector


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Vectors of one moment. Row i: chunk `rows[i]` of document `documents[i]`; `alive[i]`: it still exists.

    `lengths`: the words of each chunk, which the keyword search needs.
    """

    blocks: tuple[Matrix, ...]
    rows: Rows
    documents: Rows
    lengths: Lengths
    alive: NDArray[np.bool_]
    dead: int
    embedder: tuple[str, int]
    generation: int
    last_removed: int

    @property
    def size_bytes(self) -> int:
        return sum(block.nbytes for block in self.blocks) + CHUNK_BYTES * len(self.rows)

    def filled(self) -> Iterator[tuple[int, Matrix]]:
        """The blocks as far as they are filled, each with the place of its first row."""
        first = 0
        for block in self.blocks:
            if first < len(self.rows):
                yield first, block[: len(self.rows) - first]
            first += len(block)

    def best(self, vector: Matrix, count: int, allowed: Rows | None) -> dict[int, float]:
        """Return the `count` chunks that are most similar, with their dot products. `allowed`: documents."""
        scores = np.empty(len(self.rows), np.float32)
        for first, block in self.filled():
            products(block, vector, scores[first : first + len(block)])
        if allowed is not None:
            scores[~np.isin(self.documents, allowed)] = -np.inf
        if self.dead:
            scores[~self.alive] = -np.inf
        return best_of(self.rows, scores, count)


def products(block: Matrix, vector: Matrix, out: Matrix) -> Matrix:
    """Return the dot product of each row with the vector, in `out`.

    Not as one product of BLAS: its threads spin for each other, which takes 5 to 20 times the CPU where cores are busy.
    """
    np.vecdot(block, vector, out=out)
    return out


def best_of(rows: Rows, scores: Matrix, count: int) -> dict[int, float]:
    """Return the rows with the highest scores."""
    if len(scores) > count:
        chosen = np.argpartition(scores, len(scores) - count)[-count:]
        rows, scores = rows[chosen], scores[chosen]
    return {int(row): float(score) for row, score in zip(rows, scores, strict=True) if score > -np.inf}


def read_blocks(
    db: sqlite3.Connection, after: int, dimensions: int
) -> Iterator[tuple[Rows, Rows, Lengths, Matrix]]:  # fmt: skip
    """Read the vectors of all chunks after this row, as (rows, documents, lengths, vectors) of up to 4,096 chunks."""
    cursor = db.execute(
        "SELECT id, document, (SELECT sz FROM fts_docsize WHERE id = vectors.id), vector FROM vectors"
        " WHERE id > ? ORDER BY id",
        (after,),
    )
    while found := cursor.fetchmany(BLOCK_ROWS):
        rows, documents, sizes, blobs = zip(*found, strict=True)
        vectors = np.frombuffer(b"".join(blobs), "<f2").reshape(len(rows), dimensions).astype(np.float32)
        lengths = varints(b"".join(sizes)).reshape(len(rows), -1).sum(axis=1, dtype=np.int32)
        yield np.array(rows, np.int64), np.array(documents, np.int64), lengths, vectors


def varints(block: bytes) -> Rows:
    """Return the numbers of SQLite's varints: 7 bits a byte, the first ones first, and the highest bit in all but the
    last.
    """
    found = np.frombuffer(block, np.uint8).astype(np.int64)
    ends = np.flatnonzero(found < 128)
    counts = np.diff(ends, prepend=-1)
    shifts = np.repeat(ends, counts) - np.arange(len(found))
    return np.add.reduceat((found & 127) << (7 * shifts), ends - counts + 1)


def best_on_disk(
    db: sqlite3.Connection, vector: Matrix, count: int, allowed: Rows | None, dimensions: int
) -> dict[int, float]:
    """As `Snapshot.best`, without a cache: for a tenant that is larger than the bound of all caches."""
    rows, scores = np.empty(0, np.int64), np.empty(0, np.float32)
    for ids, documents, _, block in read_blocks(db, 0, dimensions):
        found = products(block, vector, np.empty(len(ids), np.float32))
        if allowed is not None:
            found[~np.isin(documents, allowed)] = -np.inf
        best = best_of(np.concatenate([rows, ids]), np.concatenate([scores, found]), count)
        rows, scores = np.array(list(best), np.int64), np.array(list(best.values()), np.float32)
    return best_of(rows, scores, count)


class CacheBudget:
    """The bound that all caches of a store share. Safe in threads."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._used: OrderedDict[VectorCache, int] = OrderedDict()

    @property
    def used_bytes(self) -> int:
        return sum(self._used.values())

    def take(self, cache: VectorCache, size_bytes: int) -> bool:
        """Note that this cache is used and how large it is. Others are dropped for it; False: it is too large alone."""
        dropped = []
        with self._lock:
            self._used.pop(cache, None)
            if size_bytes > self._limit:
                return False
            while self._used and sum(self._used.values()) + size_bytes > self._limit:
                dropped.append(self._used.popitem(last=False)[0])
            self._used[cache] = size_bytes
        for each in dropped:
            each.drop()
        return True

    def release(self, cache: VectorCache) -> None:
        with self._lock:
            self._used.pop(cache, None)


class VectorCache:
    """A tenant's vectors. Whoever searches has a Snapshot, which later refreshes do not change. Safe in threads."""

    def __init__(self, connect: Callable[[], sqlite3.Connection], budget: CacheBudget) -> None:
        self._connect = connect
        self._budget = budget
        self._lock = threading.Lock()
        self._db: sqlite3.Connection | None = None
        self._snapshot: Snapshot | None = None
        self._checked_at = 0.0
        self._data_version = -1
        self._written = True

    def note_write(self) -> None:
        """A write of this process has ended: the next search sees it."""
        self._written = True

    def drop(self) -> None:
        self._snapshot = None

    def close(self) -> None:
        with self._lock:
            self._snapshot = None
            self._budget.release(self)
            if self._db is not None:
                self._db.close()
                self._db = None

    def snapshot(self, last_removed: int = 0) -> Snapshot | None:
        """Return the vectors as they are now, or were at most 0.2 s ago. None: they are larger than the bound.

        `last_removed`: the last removal that the caller knows of, as `meta` says it. An older snapshot does not do: of
        a document that was replaced, the caller no longer finds the former chunks, and the snapshot has no later ones.
        """
        with self._lock:
            now = time.monotonic()
            known = self._snapshot
            is_recent = not self._written and now - self._checked_at < REFRESH_S
            if known is not None and is_recent and known.last_removed >= last_removed:
                return known
            self._written = False
            self._checked_at = now
            self._db = self._db or self._connect()
            version = self._db.execute("PRAGMA data_version").fetchone()[0]
            present = self._snapshot
            if present is None or version != self._data_version:
                with reading(self._db):
                    present = self._refreshed(self._db, present)
                self._data_version = version
            self._snapshot = present  # before it is counted: then whoever needs its room can drop it
            if present is not None and not self._budget.take(self, present.size_bytes):
                self._snapshot = present = None
            return present

    def _refreshed(self, db: sqlite3.Connection, old: Snapshot | None) -> Snapshot | None:
        stored = meta(db)
        if old is not None and (
            old.generation != stored["generation"] or old.last_removed < stored["removed_floor"]
        ):  # fmt: skip
            old = None
        if old is None:
            if not self._budget.take(self, stored["chunks"] * (4 * stored["dimensions"] + CHUNK_BYTES)):
                return None
            old = _empty(stored)
        old = _without_removed(db, old)
        blocks, rows, documents, lengths = [*old.blocks], [old.rows], [old.documents], [old.lengths]
        filled = len(old.rows)
        after = int(old.rows[-1]) if filled else 0
        for new_rows, new_documents, new_lengths, vectors in read_blocks(db, after, stored["dimensions"]):
            _append(blocks, filled, vectors)
            filled += len(new_rows)
            rows.append(new_rows)
            documents.append(new_documents)
            lengths.append(new_lengths)
        alive = np.concatenate([old.alive, np.ones(filled - len(old.rows), np.bool_)])
        new = Snapshot(
            tuple(blocks), np.concatenate(rows), np.concatenate(documents), np.concatenate(lengths), alive, old.dead,
            old.embedder, old.generation, old.last_removed,
        )  # fmt: skip
        return _compacted(new) if new.dead > COMPACT_SHARE * len(new.rows) else new


def _empty(stored: dict[str, Any]) -> Snapshot:
    none = np.empty(0, np.int64)
    embedder = (stored["embedder"], stored["dimensions"])
    return Snapshot(
        (), none, none, np.empty(0, np.int32), np.empty(0, np.bool_), 0, embedder, stored["generation"],
        stored["last_removed"],
    )  # fmt: skip


def _without_removed(db: sqlite3.Connection, old: Snapshot) -> Snapshot:
    ranges = db.execute(
        "SELECT seq, first, last FROM removed WHERE seq > ? ORDER BY seq", (old.last_removed,)
    ).fetchall()
    if not ranges:
        return old
    alive = old.alive.copy()
    for _, first, last in ranges:
        alive[np.searchsorted(old.rows, first) : np.searchsorted(old.rows, last, side="right")] = False
    dead = int(len(alive) - alive.sum())
    return replace(old, alive=alive, dead=dead, last_removed=int(ranges[-1][0]))


def _append(blocks: list[Matrix], filled: int, vectors: Matrix) -> None:
    """Write the vectors behind the `filled` rows of the blocks: where no snapshot looks. New blocks as needed."""
    free = sum(len(block) for block in blocks) - filled
    while len(vectors):
        if not free:
            size = min(BLOCK_ROWS, max(FIRST_BLOCK_ROWS, filled, len(vectors)))
            blocks.append(np.empty((size, vectors.shape[1]), np.float32))
            free = size
        count = min(free, len(vectors))
        place = len(blocks[-1]) - free
        blocks[-1][place : place + count] = vectors[:count]
        vectors, free, filled = vectors[count:], free - count, filled + count


def _compacted(old: Snapshot) -> Snapshot:
    blocks: list[Matrix] = []
    filled = 0
    for first, block in old.filled():
        living = block[old.alive[first : first + len(block)]]
        _append(blocks, filled, living)
        filled += len(living)
    return replace(
        old, blocks=tuple(blocks), rows=old.rows[old.alive], documents=old.documents[old.alive],
        lengths=old.lengths[old.alive], alive=np.ones(filled, np.bool_), dead=0,
    )  # fmt: skip
