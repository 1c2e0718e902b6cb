"""The database file of one tenant: its name, its schema, and connections to it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from ...errors import AIQueueError, ConfigMismatch, EmbedderChanged
from ..errors import StoreDamaged, StoreUnavailable

T = TypeVar("T")

SCHEMA = 1
APPLICATION = 0x61697167  # "aiqg": what `file` shows of a database
WRITE_WAIT_S = 30.0  # for other processes' transactions; the commit of a document of 50,000 chunks takes seconds
READ_WAIT_S = 10.0
WAL_BYTES_MAX = 32 * 1024 * 1024  # above it the log is written back and truncated

# Row numbers of chunks are never used again, and those of one document are in a row. `removed` says which are gone, so
# that a vector cache need not compare. `vectors` holds the mixed vectors as float16, apart from the texts: a scan of
# the vectors reads nothing else. `fts` has no content of its own: what is removed is handed to it again.
TOKENIZER = "porter unicode61 remove_diacritics 2"
WORDS = "temp.words"  # each place of each word, by chunk
_TABLES = f"""
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE documents (
    number INTEGER PRIMARY KEY, document_id TEXT NOT NULL UNIQUE, shown INTEGER NOT NULL, state TEXT NOT NULL,
    stage TEXT NOT NULL DEFAULT '', done INTEGER NOT NULL DEFAULT 0, total INTEGER NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '', updated_at REAL NOT NULL, settled INTEGER NOT NULL DEFAULT 0,
    indexed INTEGER NOT NULL DEFAULT 0, content_hash TEXT NOT NULL DEFAULT '', title TEXT NOT NULL DEFAULT '',
    source TEXT NOT NULL DEFAULT '', metadata TEXT NOT NULL DEFAULT '{{}}', problems TEXT NOT NULL DEFAULT '[]',
    hints TEXT NOT NULL DEFAULT '{{}}',
    first_chunk INTEGER NOT NULL DEFAULT 0, chunks INTEGER NOT NULL DEFAULT 0, job_id TEXT NOT NULL DEFAULT ''
);
CREATE TABLE chunks (
    id INTEGER PRIMARY KEY, document INTEGER NOT NULL, number INTEGER NOT NULL, start INTEGER NOT NULL, page INTEGER,
    heading TEXT NOT NULL, body TEXT NOT NULL
);
CREATE TABLE vectors (id INTEGER PRIMARY KEY, document INTEGER NOT NULL, vector BLOB NOT NULL);
CREATE TABLE new_vectors (id INTEGER PRIMARY KEY, document INTEGER NOT NULL, vector BLOB NOT NULL);
CREATE TABLE removed (seq INTEGER PRIMARY KEY, first INTEGER NOT NULL, last INTEGER NOT NULL);
CREATE TABLE staged (
    document_id TEXT NOT NULL, version INTEGER NOT NULL, batch INTEGER NOT NULL, at REAL NOT NULL,
    content_hash TEXT NOT NULL, chunks TEXT NOT NULL, vectors BLOB NOT NULL, PRIMARY KEY (document_id, version, batch)
);
CREATE VIRTUAL TABLE fts USING fts5 (
    heading, body, content = '', tokenize = '{TOKENIZER}'
);
INSERT INTO meta VALUES ('embedder', ''), ('dimensions', 0), ('generation', 1), ('last_chunk', 0), ('chunks', 0),
    ('last_removed', 0), ('removed_floor', 0), ('new_embedder', '')
"""


def path_of(root: Path, tenant: str) -> Path:
    """Return the tenant's file. The hash keeps "Acme" apart from "acme" where file names have no case."""
    return root / f"{tenant.lower()}-{hashlib.sha256(tenant.encode()).hexdigest()[:12]}.sqlite"


def connect(path: Path, tenant: str, *, writer: bool) -> sqlite3.Connection:
    """Open the tenant's database, which is made ready if it is new. Raises ConfigMismatch, Corrupt, Unavailable."""
    with translated(path):
        db = sqlite3.connect(
            f"{path.absolute().as_uri()}?mode=rw", timeout=READ_WAIT_S, isolation_level=None, check_same_thread=False,
            uri=True, cached_statements=256,
        )  # fmt: skip
        try:
            _check(db, path, tenant)
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute(f"PRAGMA cache_size = {-16_384 if writer else -4_096}")  # KiB
            db.execute("PRAGMA temp_store = MEMORY")
            if writer:
                db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_MAX}")
                db.execute("PRAGMA wal_autocheckpoint = 2000")
                db.execute("PRAGMA busy_timeout = 0")  # `transaction` waits itself: SQLite's own waits grow to 100 ms
            else:
                db.execute(f"CREATE VIRTUAL TABLE {WORDS} USING fts5vocab (main, fts, instance)")
                db.execute("PRAGMA query_only = ON")
        except BaseException:
            db.close()
            raise
    return db


def create(path: Path) -> None:
    """Make an empty file that only this user can read, where there is none. `connect` makes the tables."""
    with translated(path):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))


def _check(db: sqlite3.Connection, path: Path, tenant: str) -> None:
    schema = db.execute("PRAGMA user_version").fetchone()[0]
    if schema == 0:
        _make_tables(db, path, tenant)
    elif db.execute("PRAGMA application_id").fetchone()[0] != APPLICATION:
        raise ConfigMismatch(f"{path}: is not a database of aiqueue: move it away, or set another directory")
    if schema > SCHEMA:
        raise ConfigMismatch(
            f"{path}: was written by a newer aiqueue (schema {schema}, this one reads {SCHEMA}): upgrade aiqueue"
        )
    owner = db.execute("SELECT value FROM meta WHERE name = 'tenant'").fetchone()[0]
    if owner != tenant:
        raise ConfigMismatch(f"{path}: holds the documents of tenant {owner}, not of {tenant}: restore its name")


def _make_tables(db: sqlite3.Connection, path: Path, tenant: str) -> None:
    """Make the tables in one transaction. Of several processes that try, one does."""
    end = time.monotonic() + WRITE_WAIT_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:  # another process switches: SQLite does not wait for that
            if not is_busy(error) or time.monotonic() > end:
                raise
            time.sleep(0.005)

    def make() -> None:
        if db.execute("PRAGMA user_version").fetchone()[0]:
            return
        if db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            raise ConfigMismatch(f"{path}: is not a database of aiqueue: move it away, or set another directory")
        for statement in _TABLES.split(";\n"):
            db.execute(statement)
        db.execute("INSERT INTO meta VALUES ('tenant', ?)", (tenant,))
        db.execute(f"PRAGMA application_id = {APPLICATION}")
        db.execute(f"PRAGMA user_version = {SCHEMA}")

    transaction(db, make)


def transaction(db: sqlite3.Connection, write: Callable[[], T]) -> T:
    """Run `write` in one transaction and return what it returned. It may run again: only before anything is stored.

    Waits up to 30 s for the transactions of other processes.
    """
    end = time.monotonic() + WRITE_WAIT_S
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            result = write()
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            if not isinstance(error, sqlite3.OperationalError) or not is_busy(error) or time.monotonic() > end:
                raise
            time.sleep(random.uniform(0.0005, 0.003))  # noqa: S311 - so that two writers do not keep step
        else:
            return result


@contextlib.contextmanager
def reading(db: sqlite3.Connection) -> Iterator[None]:
    """All that is read within is of one moment."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def truncate_log(db: sqlite3.Connection, path: Path) -> None:
    """Write the log back into the database if it has grown because readers were always there. Waits up to 1 s."""
    try:
        if Path(f"{path}-wal").stat().st_size <= WAL_BYTES_MAX:
            return
    except OSError:
        return
    db.execute("PRAGMA busy_timeout = 1000")
    with contextlib.suppress(sqlite3.OperationalError):
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.execute("PRAGMA busy_timeout = 0")


def is_busy(error: sqlite3.Error) -> bool:
    """Whether another connection holds the lock."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """Give each error of the database or the disk one of our names."""
    try:
        yield
    except AIQueueError:
        raise
    except sqlite3.OperationalError as error:
        raise StoreUnavailable(f"{path}: {error}: {_remedy(error)}", passes=is_busy(error)) from None
    except sqlite3.DatabaseError as error:
        raise StoreDamaged(f"{path}: {error}: move the file away and ingest its documents again") from None
    except OSError as error:
        raise StoreUnavailable(f"{path}: {error.strerror or error}: check its disk and its owner") from None


def _remedy(error: sqlite3.OperationalError) -> str:
    if is_busy(error):
        return "another process holds its lock: try again"
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return "free space on its disk"
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN | sqlite3.SQLITE_PERM:
            return "let the user of the workers write the file and its directory"
    return "check its disk and its owner"


def meta(db: sqlite3.Connection) -> dict[str, Any]:
    """Return what the database says of itself: embedder, counts, generation."""
    return dict(db.execute("SELECT name, value FROM meta").fetchall())


def set_meta(db: sqlite3.Connection, **values: Any) -> None:
    """Change some of what `meta` returns."""
    db.executemany("UPDATE meta SET value = ? WHERE name = ?", [(value, name) for name, value in values.items()])


def check_embedder(db: sqlite3.Connection, tenant: str, opened: tuple[str, int] | None) -> dict[str, Any]:
    """Return `meta`. Raises EmbedderChanged if the stored vectors are not of the embedder that the tenant was opened
    with.
    """
    stored = meta(db)
    if opened is not None and (stored["embedder"], stored["dimensions"]) != opened:
        raise EmbedderChanged(
            tenant, stored=stored["embedder"], stored_dimensions=stored["dimensions"], wanted=opened[0],
            wanted_dimensions=opened[1],
        )  # fmt: skip
    return stored
