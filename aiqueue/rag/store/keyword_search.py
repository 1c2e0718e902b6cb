"""The keyword search of a tenant's database: BM25 as FTS5 computes it, from FTS5's index, but in numpy.

FTS5's `bm25` looks up the length of each chunk with one of the terms, by a statement of its own: 1.2 µs a chunk, half
of a question's search. Here the lengths are in the vectors' snapshot, and a term's chunks are read from the index with
`fts5vocab`: 0.4 µs a chunk. The scores are the same to the last digits.
"""

from __future__ import annotations

import json
import math
import sqlite3
import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from . import ranking
from .sqlite_file import TOKENIZER, WORDS
from .texts import select_terms
from .vector_cache import Rows, Snapshot, varints

TERMS_KNOWN_MAX = 16_384  # counting the terms of each question anew would take longer than its search
K1, B = 1.2, 0.75  # FTS5's
_LEAST_IDF: Final = 1e-6

Scores = NDArray[np.float64]


def quoted(term: str) -> str:
    """Return the term as an FTS5 string: a phrase, of which nothing is an operator."""
    return '"' + term.replace('"', '""') + '"'


class TermCounts:
    """In how many chunks a term is, about: remembered until the number of chunks has changed by a fifth. A term in no
    chunk is looked for each time.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, bool]] = {}  # False: in more
        self._chunks = 0

    def select(self, db: sqlite3.Connection, terms: Sequence[str], chunks: int) -> list[str]:
        """Return the terms to search for, see `select_terms`."""
        if not 0.8 * self._chunks <= chunks <= 1.25 * self._chunks or len(self._known) > TERMS_KNOWN_MAX:
            self._known, self._chunks = {}, chunks
        known = self._known

        def count(term: str, limit: int) -> int:
            found, is_all = known.get(term, (0, False))
            if found < limit and not is_all:
                found = db.execute(
                    "SELECT count(*) FROM (SELECT rowid FROM fts WHERE fts MATCH ? LIMIT ?)", (quoted(term), limit)
                ).fetchone()[0]
                if found:
                    known[term] = found, found < limit
            return min(found, limit)

        return select_terms(terms, chunks, count)


class Stems:
    """What stands in the index for a word, by FTS5's own tokenizer. Safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, str | None] = {}
        self._db: sqlite3.Connection | None = None

    def of(self, term: str) -> str | None:
        """Return the indexed form of a term; None unless that is one word."""
        with self._lock:
            if term not in self._known:
                if len(self._known) >= TERMS_KNOWN_MAX:
                    self._known.clear()
                self._known[term] = self._find(term)
            return self._known[term]

    def _find(self, term: str) -> str | None:
        if self._db is None:
            self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            self._db.execute(f"CREATE VIRTUAL TABLE term USING fts5 (body, content = '', tokenize = '{TOKENIZER}')")
            self._db.execute("CREATE VIRTUAL TABLE words USING fts5vocab (term, instance)")
        self._db.execute("INSERT INTO term (rowid, body) VALUES (1, ?)", (term,))
        found = self._db.execute("SELECT term FROM words").fetchall()
        self._db.execute("INSERT INTO term (term) VALUES ('delete-all')")
        return found[0][0] if len(found) == 1 else None


class KeywordSearch:
    """The keyword search of one tenant, in many threads. `stems`: of all tenants."""

    def __init__(self, stems: Stems) -> None:
        self._stems = stems
        self._counts = TermCounts()

    def best(
        self, db: sqlite3.Connection, snapshot: Snapshot | None, terms: Sequence[str], chunks: int, count: int,
        allowed: Rows | None,
    ) -> dict[int, float]:  # fmt: skip
        """Return the `count` chunks with the highest scores, higher is better. `terms`: of a question; those in too
        many of the `chunks` are left out. `snapshot`: with the lengths of the chunks, of which no other is found; None:
        they are not in memory. `allowed`: documents.
        """
        chosen = self._counts.select(db, terms, chunks)
        if not chosen:
            return {}
        words = [self._stems.of(each) for each in chosen] if snapshot is not None else []
        if snapshot is None or None in words:  # a pair of letters of an unspaced script
            return best_in_index(db, chosen, count, allowed)
        chunks, average = _totals(db)
        places, scores = _summed([_scores(db, str(each), snapshot, chunks, average) for each in words])
        if allowed is not None:
            fit = np.isin(snapshot.documents[places], allowed)
            places, scores = places[fit], scores[fit]
        places, scores = _highest(places, scores, count)
        return dict(zip(snapshot.rows[places].tolist(), scores.tolist(), strict=True))


def best_in_index(
    db: sqlite3.Connection, terms: Sequence[str], count: int, allowed: Rows | None = None
) -> dict[int, float]:
    """As `KeywordSearch.best`, by FTS5 alone. `terms`: those that were chosen."""
    values: list[str | int] = [" OR ".join(map(quoted, terms))]
    among = ""
    if allowed is not None:
        among = " AND (SELECT document FROM chunks WHERE id = fts.rowid) IN (SELECT value FROM json_each(?))"
        values.append(json.dumps(allowed.tolist()))
    # Not `ORDER BY rank`: for that FTS5 sorts all matches, with their positions, which takes half as long again.
    sql = (
        f"SELECT rowid, bm25(fts, {ranking.HEADING_WEIGHT}, 1.0) AS score FROM fts WHERE fts MATCH ?{among}"
        " ORDER BY score LIMIT ?"
    )
    # All in one row: for each row the thread would give the interpreter away, and wait for it among other readers.
    sql = f"SELECT json_group_array(json_array(rowid, score)) FROM ({sql})"
    found = db.execute(sql, [*values, count]).fetchone()[0]
    return {row: -score for row, score in json.loads(found)}


def _totals(db: sqlite3.Connection) -> tuple[int, float]:
    """Return how many chunks FTS5 knows, and their words on average: its record of the rows and of each column's words.

    Raises sqlite3.DatabaseError for a record that is none.
    """
    block = db.execute("SELECT block FROM fts_data WHERE id = 1").fetchone()[0]
    chunks, *words = varints(block).tolist()
    return chunks, sum(words) / max(chunks, 1)


def _scores(
    db: sqlite3.Connection, word: str, snapshot: Snapshot, chunks: int, average: float
) -> tuple[Rows, Scores]:  # fmt: skip
    """Return the places in the snapshot of the chunks with a word, in their order, and its BM25 in each."""
    sql = f"SELECT group_concat(doc * 2 + (col = 'heading')) FROM {WORDS} WHERE term = ?"
    text = db.execute(sql, (word,)).fetchone()[0]
    instances = np.fromstring(text, np.int64, sep=",") if text else np.empty(0, np.int64)
    rows, weights = instances >> 1, np.where(instances & 1, ranking.HEADING_WEIGHT, 1.0)
    rows, weights = _sums(rows, weights)
    idf = math.log(max((chunks - len(rows) + 0.5) / (len(rows) + 0.5), 1.0)) or _LEAST_IDF
    places, known = _places(snapshot.rows, rows)
    if not known.all():
        places, weights = places[known], weights[known]
    lengths = snapshot.lengths[places]
    return places, idf * weights * (K1 + 1) / (weights + K1 * (1 - B + B * lengths / average))


def _places(among: Rows, rows: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """Return where each of the rows is, and whether it is there. Both arguments are in order."""
    if not len(among):
        return rows, np.zeros(len(rows), np.bool_)
    places = np.clip(rows - among[0], 0, len(among) - 1)  # as long as nothing was removed
    known = among[places] == rows
    if not known.all():
        places = np.minimum(np.searchsorted(among, rows), len(among) - 1)
        known = among[places] == rows
    return places, known


def _summed(found: Sequence[tuple[Rows, Scores]]) -> tuple[Rows, Scores]:
    """Return each place once, in their order, with the sum of its scores."""
    if len(found) == 1:
        return found[0]
    places, scores = (np.concatenate(each) for each in zip(*found, strict=True))
    order = np.argsort(places, kind="stable")  # merges what is in order already
    return _sums(places[order], scores[order])


def _sums(keys: Rows, values: Scores) -> tuple[Rows, Scores]:
    """Return each of the keys, which are in order, once, with the sum of its values."""
    if not len(keys):
        return keys, values
    firsts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return keys[firsts], np.add.reduceat(values, firsts)


def _highest(places: Rows, scores: Scores, count: int) -> tuple[Rows, Scores]:
    """Return the `count` highest scores; of equal ones the first."""
    if len(scores) <= count:
        return places, scores
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    above = np.flatnonzero(scores > least)
    chosen = np.concatenate([above, np.flatnonzero(scores == least)[: count - len(above)]])
    return places[chosen], scores[chosen]
