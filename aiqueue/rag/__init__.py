"""Retrieval: documents of many tenants, ingested by durable jobs, and questions that are answered with passages.

A product: it uses the queue as any user does, by the public face. Neither numpy nor what reads documents is imported
until it is needed.
"""

from __future__ import annotations

from .config import AnswerConfig, EmbedderConfig, LimitConfig, ParsingConfig, RagConfig, StoreConfig, TenantConfig
from .config_file import load
from .messages import GivenChunk, RagDelete, RagDocument, RagQuery, RagReindex, check_tenant
from .parsing import DocumentSource, Parser
from .types import (
    Chunk,
    ChunkedDocument,
    DocumentHeader,
    DocumentState,
    Embedder,
    IndexedChunks,
    IndexedDocument,
    ParsedDocument,
    Passage,
    Section,
    StoreStats,
    VectorStore,
)
from .versions import time_of, version_at, version_of

__all__ = [
    "AnswerConfig", "Chunk", "ChunkedDocument", "DocumentHeader", "DocumentSource", "DocumentState",
    "Embedder", "EmbedderConfig", "GivenChunk", "IndexedChunks", "IndexedDocument", "LimitConfig", "ParsedDocument",
    "Parser", "ParsingConfig", "Passage", "RagConfig", "RagDelete", "RagDocument", "RagQuery", "RagReindex", "Section", "StoreConfig",
    "StoreStats", "TenantConfig", "VectorStore", "check_tenant", "load", "time_of", "version_at", "version_of",
]  # fmt: skip
