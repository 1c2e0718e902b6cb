"""Both stores keep what the protocol promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiqueue.rag.store import PgVectorStore, SqliteStore
from aiqueue.rag.store.conformance import StoreConformance
from aiqueue.rag.types import VectorStore


class TestSqliteStore(StoreConformance):
    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path) -> None:
        self.root = tmp_path

    def connect(self) -> VectorStore:
        return SqliteStore(self.root)


class TestPgVectorStore(StoreConformance):
    @pytest.fixture(autouse=True)
    def _server(self, postgres: str) -> None:
        self.dsn = postgres

    def connect(self) -> VectorStore:
        return PgVectorStore(self.dsn)
