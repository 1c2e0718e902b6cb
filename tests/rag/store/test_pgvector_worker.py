"""Retrieval end to end with its documents in PostgreSQL: workers of two hosts, commands, broken connections."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from typer.testing import CliRunner

import aiqueue
from aiqueue.cli.app import app
from aiqueue.rag import Rag, RagWorker

from ...support import Account


@pytest.fixture
def rag_files(tmp_path: Path) -> list[Path]:
    """A rag.toml for each of two hosts."""
    files = [tmp_path / f"{host}.toml" for host in ("one", "two")]
    for file in files:
        kind = f'[store]\nkind = "pgvector"\ndsn_env = "PG_OF_TEST"\nhost = "{file.stem}"\n'
        file.write_text(f"{kind}[parsing]\nprocesses = 1\n")
    return files


@pytest.fixture
def dsn(postgres: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The connection string of a database of the test's own."""
    name = f"d_{secrets.token_hex(6)}"
    with psycopg.connect(postgres, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
        found = make_conninfo(postgres, dbname=name)
        monkeypatch.setenv("PG_OF_TEST", found)
        yield found
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def break_connections(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as admin:
        admin.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


async def test_workers_of_two_hosts_share_documents_in_postgresql_and_the_command_line_reads_them(
    client: aiqueue.Client, account: Account, rag_files: list[Path], dsn: str
) -> None:
    rag = Rag(client)
    environment = {
        "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "AIQUEUE_RAG": str(rag_files[0]),
    }  # fmt: skip

    async def listed() -> list[str]:
        arguments = ["rag", "ls", "--tenant", "acme", "--json"]
        done = await asyncio.to_thread(CliRunner().invoke, app, arguments, env=environment)
        assert done.exit_code == 0, done.output
        return [each["document_id"] for each in json.loads(done.stdout)]

    async with RagWorker(rag_files[0], concurrency=4).running(client):
        for name, text in (("otter.md", "Otters hold paws while they sleep."), ("beaver.md", "Beavers build dams.")):
            result = await (await rag.ingest(name, tenant="acme", content=text, metadata={"n": 1})).result(25)
            assert (result["state"], result["chunks"]) == ("completed", 1)
    async with RagWorker(rag_files[1], concurrency=4).running(client):
        break_connections(dsn)
        asked = await (await rag.ask("Why do otters hold paws?", tenant="acme", k=1, where={"n": {"gte": 1}})).result(
            25
        )
        assert [each["document_id"] for each in asked["passages"]] == ["otter.md"]
        assert (await rag.status("beaver.md", tenant="acme")).state == "completed"
        assert await listed() == ["beaver.md", "otter.md"]
        await (await rag.delete("beaver.md", tenant="acme")).result(25)
        assert await listed() == ["otter.md"]
        assert (await (await rag.reindex(tenant="acme")).result(25))["embedded"] == 0
