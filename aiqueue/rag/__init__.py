"""Retrieval: documents of many tenants, ingested by durable jobs, and questions that are answered with passages.

A product: it uses the queue as any user does, by the public face. Neither numpy nor what reads documents is imported
until it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .client import Rag
from .config import AnswerConfig, EmbedderConfig, LimitConfig, ParsingConfig, RagConfig, StoreConfig, TenantConfig
from .config_file import load
from .errors import CANNOT_BE_READ, FetchFailed, FetchRefused, ParseFailed, StoreDamaged, StoreUnavailable
from .evaluation import EVALUATED_MODES, LabelledQuestion, Scores, evaluate, read_questions
from .messages import (
    CONTENT_BYTES_MAX,
    DOCUMENT_ID_CHARS_MAX,
    QUERY_CHARS_MAX,
    GivenChunk,
    RagDelete,
    RagDocument,
    RagQuery,
    RagReindex,
    check_metadata,
    check_tenant,
)
from .parsing import DocumentSource, Parser
from .sources import id_headers
from .store.filters import parse_where
from .types import (
    Chunk,
    ChunkedDocument,
    DocumentHeader,
    DocumentState,
    Embedder,
    IndexedChunks,
    IndexedDocument,
    Mode,
    ParsedDocument,
    Passage,
    Section,
    StoreStats,
    VectorStore,
)
from .versions import time_of, version_at, version_of

if TYPE_CHECKING:
    from .bindings import open_bound_store
    from .rag_worker import RagWorker, worker
    from .runtime import open_embedder

__all__ = [
    "CANNOT_BE_READ", "CONTENT_BYTES_MAX", "DOCUMENT_ID_CHARS_MAX", "EVALUATED_MODES", "QUERY_CHARS_MAX",
    "AnswerConfig", "Chunk", "ChunkedDocument", "DocumentHeader", "DocumentSource", "DocumentState", "Embedder",
    "EmbedderConfig", "FetchFailed", "FetchRefused", "GivenChunk", "IndexedChunks", "IndexedDocument",
    "LabelledQuestion", "LimitConfig", "Mode", "ParseFailed", "ParsedDocument", "Parser", "ParsingConfig", "Passage",
    "Rag", "RagConfig", "RagDelete", "RagDocument", "RagQuery", "RagReindex", "RagWorker", "Scores", "Section",
    "StoreConfig", "StoreDamaged", "StoreStats", "StoreUnavailable", "TenantConfig", "VectorStore", "check_metadata",
    "check_tenant", "evaluate", "id_headers", "load", "open_bound_store", "open_embedder", "parse_where",
    "read_questions", "time_of", "version_at", "version_of", "worker",
]  # fmt: skip


_LAZY = {"RagWorker": "rag_worker", "open_bound_store": "bindings", "open_embedder": "runtime", "worker": "rag_worker"}


def __getattr__(name: str) -> Any:
    """Import some names on first use: with the queue's worker they import the client of NATS."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
