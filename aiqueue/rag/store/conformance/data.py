"""Documents, vectors and hostile texts of the suite."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Sequence
from typing import Any

import numpy as np

from ....errors import AIQueueError
from ...types import Chunk, DocumentHeader, IndexedChunks, IndexedDocument, Passage, Vectors, VectorStore

EMBEDDER = "words-32"
DIMENSIONS = 32
HOSTILE_TEXTS = (
    "", " ", "?!.,;", '"', '""', "'", "\\", "the and of", "NEAR(a b)", "NEAR/3", "a NEAR b", "*", "apple*", "^apple",
    "heading:apple", "body : apple", "{heading body}: apple", "-heading:apple", "a AND", "OR", "NOT apple", "(",
    "((apple", ")", "a + b", 'apple" OR "1', "apple\x00pear", "\x00", "\ud83d", "apple; DROP TABLE documents",
    "' OR 1=1 --", "%s %(x)s %", "a:* & b", "!apple", "<->", "a <-> b", "数据库 检索", "日本語のテキスト", "ภาษาไทย",
    "한국어", "🍎🍏", "e\u0301cole", "\ufb01", "\u202eabc", "a\u200bb", "_", "__init__", "x" * 100_000,
    "apple " * 20_000, "( " * 50_000, '"' * 100_000, " ".join(f"w{i}" for i in range(20_000)),
)  # fmt: skip
HOSTILE_WHERE: tuple[Any, ...] = (
    {"a'b": 1}, {"": 1}, {"x" * 65: 1}, {'"': 1}, {"$.a": 1}, {"a b": 1}, {1: 1}, {"a": {}}, {"a": {"like": "x"}},
    {"a": {"in": "abc"}}, {"a": {"in": [[1]]}}, {"a": [1]}, {"a": {"gt": None}}, {"a": {"gt": True}},
    {"a": float("nan")}, {"a": 2**63}, {"a": b"x"}, "a = 1", [("a", 1)], {"a": {"in": [0] * 257}},
    {f"k{i}": 1 for i in range(33)}, {"a": {"eq": object()}},
)  # fmt: skip


def vector_of(text: str) -> Vectors:
    """A vector of which each word is one direction: the more words two texts share, the more similar they are."""
    vector = np.full(DIMENSIONS, 1e-3, np.float32)
    for word in text.lower().split():
        vector[sum(word.encode("utf-8", "replace")) % DIMENSIONS] += 1
    return vector / np.float32(np.linalg.norm(vector))


def content_of(texts: Sequence[str], heading: str = "", first: int = 0) -> IndexedChunks:
    """Chunks of these texts with their vectors."""
    chunks = [Chunk(first + i, text, heading, 100 * (first + i), i + 1) for i, text in enumerate(texts)]
    bodies = np.array([vector_of(text) for text in texts], np.float32).reshape(-1, DIMENSIONS)
    headings = np.array([vector_of(heading) for _ in texts], np.float32).reshape(-1, DIMENSIONS)
    return IndexedChunks(chunks, bodies, headings)


def document_of(document_id: str, version: int, *texts: str, heading: str = "", **header: Any) -> IndexedDocument:
    """A document of these chunks. Its hash is of its texts, unless given."""
    header.setdefault("content_hash", repr((texts, heading)))
    return IndexedDocument(DocumentHeader(document_id, version, **header), content_of(texts, heading))


def found(passages: Sequence[Passage]) -> set[tuple[str, int, str]]:
    """The document id, version and text of each passage."""
    return {(each.document_id, each.version, each.text) for each in passages}


def new_tenant() -> str:
    """A tenant that no test has used."""
    return f"t-{secrets.token_hex(6)}"


async def everything(store: VectorStore, tenant: str) -> set[tuple[str, int, str]]:
    """All that can be found of a tenant: every chunk is a candidate of a vector search."""
    return found(await store.search(tenant, "", vector_of("apple"), 1_000, mode="vector"))


async def raises(kind: type[AIQueueError], awaitable: Awaitable[Any], *words: str) -> None:
    """Check that this raises the error, in one line with these words."""
    try:
        result = await awaitable
    except kind as caught:
        text = str(caught)
    else:
        raise AssertionError(f"did not raise {kind.__name__}, but returned {result!r}")
    assert len(text.splitlines()) == 1, text
    for word in words:
        assert word in text, f"{word!r} is not in {text!r}"
