"""Retrieval: documents of many tenants, ingested by durable jobs, and questions that are answered with passages.

A product: it uses the queue as any user does, by the public face. Neither numpy nor what reads documents is imported
until it is needed.
"""

from __future__ import annotations

from .errors import FetchFailed, FetchRefused, ParseFailed
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

__all__ = [
    "Chunk", "ChunkedDocument", "DocumentHeader", "DocumentSource", "DocumentState", "Embedder", "FetchFailed",
    "FetchRefused", "IndexedChunks", "IndexedDocument", "ParseFailed", "ParsedDocument", "Parser", "Passage", "Section",
    "StoreStats", "VectorStore",
]  # fmt: skip
