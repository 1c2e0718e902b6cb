"""The parts of the pipeline, opened as the worker opens them, for who measures them without a queue."""

from __future__ import annotations

from pathlib import Path

from aiqueue.rag import Embedder, VectorStore


def open_store(root: Path) -> VectorStore:
    from aiqueue.rag.store import SqliteStore  # noqa: PLC0415 - loads numpy

    return SqliteStore(root)


def open_embedder() -> Embedder:
    from aiqueue.rag.embedding import WordLlamaEmbedder  # noqa: PLC0415 - loads its model

    return WordLlamaEmbedder()
