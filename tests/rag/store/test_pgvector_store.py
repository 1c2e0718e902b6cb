"""What is the PostgreSQL store's own: its tables, its connections, its errors."""

from __future__ import annotations

import asyncio
import secrets

import psycopg
import pytest

from aiqueue.errors import AccessDenied, BadInput, ConfigMismatch, Unavailable
from aiqueue.rag.store import PgVectorStore
from aiqueue.rag.store.conformance.data import (
    DIMENSIONS,
    EMBEDDER,
    document_of,
    everything,
    found,
    new_tenant,
    vector_of,
)


def new_schema() -> str:
    return f"s_{secrets.token_hex(6)}"


async def test_many_first_users_make_the_tables_once(postgres: str) -> None:
    schema, tenant = new_schema(), new_tenant()
    stores = [PgVectorStore(postgres, schema=schema) for _ in range(6)]
    await asyncio.gather(*(each.open(tenant, EMBEDDER, DIMENSIONS) for each in stores))
    await asyncio.gather(*(each.put(tenant, [document_of(f"d{n}", 1, "apple")]) for n, each in enumerate(stores)))
    assert {each[0] for each in await everything(stores[0], tenant)} == {f"d{n}" for n in range(6)}
    other = PgVectorStore(postgres, schema=new_schema())
    assert await other.document(tenant, "d1") is None
    for each in (*stores, other):
        await each.close()


async def test_tables_of_a_newer_aiqueue_are_refused_with_the_remedy(postgres: str) -> None:
    schema = new_schema()
    store = PgVectorStore(postgres, schema=schema)
    await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.close()
    with psycopg.connect(postgres) as connection:
        connection.execute(f"UPDATE {schema}.layout SET version = 99".encode())
    store = PgVectorStore(postgres, schema=schema)
    with pytest.raises(ConfigMismatch, match="upgrade aiqueue"):
        await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.close()


async def test_a_server_that_does_not_answer_is_an_error_that_may_be_retried_and_shows_no_password() -> None:
    store = PgVectorStore("postgresql://bob:hunter2@127.0.0.1:1/x")
    with pytest.raises(Unavailable, match="check the server") as error:
        await store.open("acme", EMBEDDER, DIMENSIONS)
    assert error.value.retryable
    assert "hunter2" not in str(error.value)
    await store.close()


@pytest.mark.parametrize(
    "dsn", ["hunter2", "host=db password=my hunter2", "postgresql://bob:x@hunter2@db:1/x y", "postgresql://[hunter2/x"]
)
def test_a_wrong_connection_string_is_refused_at_once_and_shown_nowhere(dsn: str) -> None:
    with pytest.raises(BadInput, match=r"give one such as postgresql://user:password@host:5432/database$") as error:
        PgVectorStore(dsn)
    assert "hunter2" not in str(error.value)


async def test_a_user_without_rights_is_refused_by_name(postgres: str) -> None:
    user = f"u_{secrets.token_hex(4)}"
    with psycopg.connect(postgres) as connection:
        connection.execute(f"CREATE ROLE {user} LOGIN PASSWORD 'x'".encode())
    store = PgVectorStore(psycopg.conninfo.make_conninfo(postgres, user=user, password="x"), schema=new_schema())
    with pytest.raises(AccessDenied, match="permission denied"):
        await store.open("acme", EMBEDDER, DIMENSIONS)
    await store.close()


@pytest.mark.parametrize("schema", ["", "a b", 'a"; DROP SCHEMA public; --', "Ä", "1a", "x" * 64])
def test_a_schema_is_a_plain_name(schema: str) -> None:
    with pytest.raises(BadInput, match="schema"):
        PgVectorStore("", schema=schema)


async def test_the_store_goes_on_after_its_connections_were_cut_and_its_callers_have_left(postgres: str) -> None:
    store, tenant = PgVectorStore(postgres), new_tenant()
    await store.open(tenant, EMBEDDER, DIMENSIONS)
    tasks = [asyncio.create_task(store.put(tenant, [document_of(f"d{n}", 1, "apple")])) for n in range(20)]
    for n, task in enumerate(tasks):
        await asyncio.sleep(0.002)
        if n % 2:
            task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert {f"d{n}" for n in range(0, 20, 2)} <= {each[0] for each in await everything(store, tenant)}
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
        )
    with pytest.raises(Unavailable):
        await store.put(tenant, [document_of("after", 1, "apple")])
    assert await store.put(tenant, [document_of("after", 1, "apple")]) == ["new"]
    await store.close()
    with pytest.raises(BadInput, match="closed"):
        await store.document(tenant, "after")


async def test_where_few_connections_are_allowed_all_calls_take_turns_on_these(postgres: str) -> None:
    user = f"u_{secrets.token_hex(4)}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        connection.execute(f"CREATE ROLE {user} LOGIN CONNECTION LIMIT 2".encode())
        connection.execute(f"GRANT CREATE ON DATABASE postgres TO {user}".encode())
    store = PgVectorStore(psycopg.conninfo.make_conninfo(postgres, user=user), schema=new_schema())
    tenants = [new_tenant() for _ in range(20)]
    await asyncio.gather(*(store.open(each, EMBEDDER, DIMENSIONS) for each in tenants))
    puts = await asyncio.gather(*(store.put(each, [document_of("d", 1, "apple")]) for each in tenants))
    assert puts == [["new"]] * 20
    await store.close()


async def test_frequent_words_are_left_out_and_rare_ones_decide(postgres: str) -> None:
    store, tenant = PgVectorStore(postgres), new_tenant()
    await store.open(tenant, EMBEDDER, DIMENSIONS)
    documents = [document_of(f"d{n}", 1, f"stone iron water sand w{n}") for n in range(60)]
    await store.put(tenant, documents)
    passages = await store.search(tenant, "stone iron water sand w7 w8 w9", None, 60, mode="keyword")
    assert found(passages) == {(f"d{n}", 1, f"stone iron water sand w{n}") for n in (7, 8, 9)}
    passages = await store.search(tenant, "stone w7", vector_of("w7"), 1)
    assert [each.document_id for each in passages] == ["d7"]
    await store.close()
