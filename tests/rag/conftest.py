"""Retrieval's worker on the real server, with a store of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from aiqueue.rag import RagWorker


@pytest.fixture
def rag_file(tmp_path: Path) -> Path:
    """A rag.toml; a test may write more into it."""
    file = tmp_path / "rag.toml"
    file.write_text('[store]\npath = "store"\n[parsing]\nprocesses = 1\n')
    return file


@pytest.fixture
def rag_worker(rag_file: Path) -> RagWorker:
    return RagWorker(rag_file, concurrency=16)
