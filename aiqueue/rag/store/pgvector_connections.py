"""Connections to PostgreSQL, the tables, and errors by our names."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
from psycopg import errors as pg
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import TransactionStatus

from ...errors import AccessDenied, AIQueueError, BadInput, ConfigMismatch
from ..errors import StoreUnavailable

Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Cursor = psycopg.AsyncCursor[tuple[Any, ...]]

SCHEMA = 1
CONNECTIONS_MAX = 8
CONNECT_S = 10
FULL_S = 30.0  # until another connection is tried for, after PostgreSQL has refused one more
_LOCK = 0x61697167  # of those who make the tables

_TABLES = """
CREATE TABLE layout (version integer NOT NULL);
CREATE TABLE tenants (
    tenant text COLLATE "C" PRIMARY KEY, embedder text NOT NULL DEFAULT '', dimensions integer NOT NULL DEFAULT 0,
    last_chunk bigint NOT NULL DEFAULT 0, chunks bigint NOT NULL DEFAULT 0, new_embedder text NOT NULL DEFAULT ''
);
CREATE TABLE documents (
    tenant text COLLATE "C" NOT NULL, document_id text COLLATE "C" NOT NULL, shown bigint NOT NULL,
    state text NOT NULL, stage text NOT NULL DEFAULT '', done integer NOT NULL DEFAULT 0,
    total integer NOT NULL DEFAULT 0, reason text NOT NULL DEFAULT '', updated_at double precision NOT NULL,
    settled bigint NOT NULL DEFAULT 0, indexed boolean NOT NULL DEFAULT FALSE, content_hash text NOT NULL DEFAULT '',
    title text NOT NULL DEFAULT '', source text NOT NULL DEFAULT '', metadata jsonb NOT NULL DEFAULT '{}',
    problems jsonb NOT NULL DEFAULT '[]', hints jsonb NOT NULL DEFAULT '{}',
    first_chunk bigint NOT NULL DEFAULT 0, chunks integer NOT NULL DEFAULT 0,
    job_id text NOT NULL DEFAULT '', PRIMARY KEY (tenant, document_id)
);
CREATE TABLE chunks (
    tenant text COLLATE "C" NOT NULL, id bigint NOT NULL, document_id text COLLATE "C" NOT NULL,
    number integer NOT NULL, start bigint NOT NULL, page integer, heading text NOT NULL, body text NOT NULL,
    words tsvector NOT NULL, PRIMARY KEY (tenant, id)
);
CREATE INDEX chunks_words ON chunks USING gin (words);
CREATE TABLE vectors (
    tenant text COLLATE "C" NOT NULL, id bigint NOT NULL, document_id text COLLATE "C" NOT NULL,
    vector vector NOT NULL, PRIMARY KEY (tenant, id)
);
CREATE TABLE new_vectors (LIKE vectors INCLUDING ALL);
CREATE TABLE staged (
    tenant text COLLATE "C" NOT NULL, document_id text COLLATE "C" NOT NULL, version bigint NOT NULL,
    batch integer NOT NULL, at double precision NOT NULL, content_hash text NOT NULL, chunks text NOT NULL,
    vectors bytea NOT NULL,
    PRIMARY KEY (tenant, document_id, version, batch)
)
"""


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Give each error of PostgreSQL one of our names. None shows the connection string."""
    try:
        yield
    except (pg.InsufficientPrivilege, pg.InvalidPassword, pg.InvalidAuthorizationSpecification) as error:
        raise AccessDenied(f"PostgreSQL: {error}: grant the user of the store what it needs") from None
    except (pg.FeatureNotSupported, pg.UndefinedFile, pg.UndefinedObject) as error:
        raise ConfigMismatch(f"PostgreSQL: {error}: install pgvector 0.5 or newer on the server") from None
    except (psycopg.OperationalError, psycopg.InterfaceError) as error:
        text = f"PostgreSQL: {error or type(error).__name__}: check the server, then try again"
        raise StoreUnavailable(text, passes=True) from None
    except psycopg.Error as error:
        raise AIQueueError(f"PostgreSQL: {type(error).__name__}: {error}") from None


class Connections:
    """Up to 8 connections, opened when they are needed, or as many as PostgreSQL allows. Needs session pooling where a
    pooler stands between.
    """

    def __init__(self, dsn: str, schema: str) -> None:
        if not re.fullmatch(r"[a-z_][a-z0-9_]{0,62}", schema):
            raise BadInput(f"schema {schema!r}: give 1 to 63 characters of a-z 0-9 _, not beginning with a digit")
        try:
            conninfo_to_dict(dsn)
        except psycopg.ProgrammingError:  # its text shows parts of the string
            form = "postgresql://user:password@host:5432/database"
            raise BadInput(f"PostgreSQL's connection string cannot be read: give one such as {form}") from None
        self._dsn = dsn
        self._schema = schema
        self._idle: list[Connection] = []
        self._slots = asyncio.Semaphore(CONNECTIONS_MAX)
        self._open = 0  # connections that are opened or being opened
        self._full_until = 0.0
        self._changed = asyncio.Event()  # a connection has come back, or is closed
        self._made = asyncio.Lock()
        self._is_ready = False
        self._is_closed = False

    @contextlib.asynccontextmanager
    async def transaction(self, *, reads: bool = False) -> AsyncIterator[Cursor]:
        """One transaction. With `reads` it changes nothing, and all that it reads is of one moment."""
        async with self._slots:
            with translated():
                connection = await self._take()
                try:
                    async with connection.transaction(), connection.cursor() as cursor:
                        if reads:
                            await cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
                        yield cursor
                finally:
                    await self._give_back(connection)

    async def close(self) -> None:
        self._is_closed = True
        await self._close_idle()

    async def _take(self) -> Connection:
        """Return a connection. Where no further one is allowed, wait for one that is in use. Raises what psycopg raises
        where there is none at all.
        """
        refused: psycopg.OperationalError | None = None
        while True:
            if self._is_closed:
                raise BadInput("the store is closed: make another PgVectorStore")
            while self._idle:
                connection = self._idle.pop()
                if not connection.closed:
                    return connection
                self._count_closed()
            if refused is not None and not self._open:
                raise refused
            if not self._open or time.monotonic() >= self._full_until:
                try:
                    return await self._connect()
                except psycopg.errors.ConnectionTimeout:
                    raise
                except psycopg.OperationalError as error:  # most likely a limit: its text depends on the language
                    refused = error
                    self._full_until = time.monotonic() + FULL_S
                    continue
            self._changed.clear()
            await self._changed.wait()

    async def _connect(self) -> Connection:
        self._open += 1
        connection: Connection | None = None
        try:
            connection = await psycopg.AsyncConnection.connect(self._dsn, autocommit=True, connect_timeout=CONNECT_S)
            async with self._made:
                if not self._is_ready:
                    await self._make_tables(connection)
                    self._is_ready = True
            await self._set_search_path(connection)
        except BaseException:
            self._count_closed()
            if connection is not None:
                await connection.close()
            raise
        return connection

    async def _give_back(self, connection: Connection) -> None:
        if self._is_closed or connection.info.transaction_status != TransactionStatus.IDLE:
            self._count_closed()
            await connection.close()
            if not self._is_closed:  # the others are most likely as dead
                await self._close_idle()
        else:
            self._idle.append(connection)
            self._changed.set()

    async def _close_idle(self) -> None:
        idle, self._idle = self._idle, []
        for each in idle:
            self._count_closed()
            await each.close()

    def _count_closed(self) -> None:
        self._open -= 1
        self._changed.set()

    async def _set_search_path(self, connection: Connection) -> None:
        await connection.execute(
            "SELECT set_config('search_path', concat_ws(', ', %s::text, (SELECT extnamespace::regnamespace::text"
            " FROM pg_extension WHERE extname = 'vector'), nullif(current_setting('search_path'), '')), FALSE)",
            (self._schema,),
        )

    async def _make_tables(self, connection: Connection) -> None:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
            exists = await connection.execute("SELECT to_regclass(%s)", (f"{self._schema}.layout",))
            if (await exists.fetchone() or (None,))[0] is None:
                await connection.execute("CREATE EXTENSION IF NOT EXISTS vector")  # of all schemas of the database
                await connection.execute(f"CREATE SCHEMA IF NOT EXISTS {self._schema}".encode())
                await self._set_search_path(connection)
                for statement in _TABLES.split(";\n"):
                    await connection.execute(statement.encode())
                await connection.execute("INSERT INTO layout VALUES (%s)", (SCHEMA,))
            found = await (await connection.execute(f"SELECT version FROM {self._schema}.layout".encode())).fetchone()
            if found and found[0] > SCHEMA:
                raise ConfigMismatch(
                    f"schema {self._schema}: was written by a newer aiqueue (layout {found[0]}, this one reads "
                    f"{SCHEMA}): upgrade aiqueue"
                )
