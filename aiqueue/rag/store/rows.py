"""Documents as the rows that stores write: checked, cleaned, vectors mixed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from ...errors import BadInput
from ..types import DIMENSIONS_MAX, Chunk, DocumentHeader, IndexedChunks, IndexedDocument, Passage, Vectors
from .filters import metadata_json
from .ranking import HEADING_SHARE
from .texts import check_document_id, clean, index_heading, index_text

ChunkRow = tuple[int, int, int | None, str, str]  # number, start, page, heading, body


class Told(TypedDict):
    """What a note says of a version, beside its state."""

    stage: str
    done: int
    total: int
    reason: str
    job_id: str


@dataclass(frozen=True, slots=True)
class HeaderRow:
    """A header with texts that every database takes. `metadata`, `problems` and `hints` are JSON."""

    document_id: str
    version: int
    content_hash: str
    title: str
    source: str
    metadata: str
    problems: str
    hints: str
    state: str


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A document to store. `vectors`: the mixed ones, one for each of `chunks`."""

    header: HeaderRow
    chunks: Sequence[ChunkRow]
    vectors: NDArray[np.floating[Any]]


def header_row(header: DocumentHeader) -> HeaderRow:
    """Raises BadInput if the id, the version or the metadata cannot be stored."""
    return HeaderRow(
        check_document_id(header.document_id),
        check_version(header.version),
        clean(header.content_hash),
        clean(header.title),
        clean(header.source),
        metadata_json(header.metadata),
        json.dumps([clean(each) for each in header.problems], ensure_ascii=False),
        json.dumps({name: clean(text) for name, text in header.hints.items()}, ensure_ascii=False),
        "completed_with_errors" if header.problems else "completed",
    )


def told(stage: str, done: int, total: int, reason: str, job_id: str) -> Told:
    """Return what a note says, with texts that every database takes."""
    return Told(stage=clean(stage), done=done, total=total, reason=clean(reason), job_id=clean(job_id))


def check_version(version: int) -> int:
    """Return the version. Raises BadInput if no database keeps such a number."""
    if isinstance(version, bool) or not isinstance(version, int) or not 0 < version < 2**63:
        raise BadInput(f"version {version!r}: give a number from 1 to 2^63 - 1")
    return version


def check_embedder(embedder: str, dimensions: int) -> None:
    """Raises BadInput unless this names an embedder."""
    if not embedder or isinstance(dimensions, bool) or not 1 <= dimensions <= DIMENSIONS_MAX:
        raise BadInput(f"embedder {embedder!r} of {dimensions!r} dimensions: give a name and 1 to {DIMENSIONS_MAX:,}")


def document_row(document: IndexedDocument, dimensions: int) -> DocumentRow:
    """Raises BadInput if a part cannot be stored."""
    header = header_row(document.header)
    return DocumentRow(header, chunk_rows(document.content.chunks), mixed(document.content, dimensions))


def chunk_rows(chunks: Sequence[Chunk]) -> list[ChunkRow]:
    """Return the chunks with texts that every database takes."""
    return [(each.number, each.start, each.page, clean(each.heading), clean(each.text)) for each in chunks]


def mixed(content: IndexedChunks, dimensions: int) -> NDArray[np.float32]:
    """Return one vector for each chunk: 0.35 of its heading's and 0.65 of its body's.

    The product of a question with the sum is the sum of the products, so that nothing is lost by storing one.
    """
    return mixed_vectors(content.bodies, content.headings, len(content.chunks), dimensions)


def mixed_vectors(bodies: Vectors, headings: Vectors, count: int, dimensions: int) -> NDArray[np.float32]:
    """Raises BadInput unless both are finite and of the shape (count, dimensions)."""
    for what, vectors in (("bodies", bodies), ("headings", headings)):
        if np.shape(vectors) != (count, dimensions):
            raise BadInput(f"vectors of {what} have the shape {np.shape(vectors)}: give {(count, dimensions)}")
    sums = HEADING_SHARE * np.asarray(headings, np.float32) + (1 - HEADING_SHARE) * np.asarray(bodies, np.float32)
    if not np.isfinite(sums).all():
        raise BadInput("vectors hold numbers that are not finite: look at the embedder")
    return sums.astype(np.float32, copy=False)


def question_vector(vector: Any, dimensions: int) -> NDArray[np.float32]:
    """Return the vector with the shape (dimensions,). Raises BadInput if it has another size or is not finite."""
    flat = np.asarray(vector, np.float32).reshape(-1)
    if len(flat) != dimensions or not np.isfinite(flat).all():
        raise BadInput(f"vector of {len(flat)} numbers: give {dimensions} finite ones, of the tenant's embedder")
    return flat


def passage(row: Sequence[Any], score: float, metadata: Mapping[str, Any]) -> Passage:
    """Return a passage of a row of document id, version, title, source, heading, number, start, page and text."""
    document_id, version, title, source, heading, number, start, page, text = row[:9]
    return Passage(document_id, version, title, source, heading, number, start, page, text, score, metadata)


def index_row(title: str, row: ChunkRow) -> tuple[str, str]:
    """Return the heading and the body of a chunk as the keyword index gets them."""
    return index_heading(title, row[3]), index_text(row[4])


def staged_json(rows: Sequence[ChunkRow]) -> str:
    """Return the form in which a batch waits for its commit."""
    return json.dumps(rows, ensure_ascii=False)


def staged_rows(text: str) -> list[ChunkRow]:
    """Return the batch that `staged_json` has written."""
    return [tuple(each) for each in json.loads(text)]


def check_numbers(numbers: Sequence[int], document_id: str, version: int) -> None:
    """Raises BadInput unless the chunks of a staged document are numbered 0, 1, 2 …"""
    if not numbers:
        raise BadInput(
            f"document {document_id[:80]!r}: nothing is staged of version {version}: stage its batches first"
        )
    for expected, number in enumerate(numbers):
        if number != expected:
            raise BadInput(
                f"document {document_id[:80]!r}: chunk {expected} of version {version} is not staged: stage its batch"
            )


def check_page(limit: int) -> int:
    """Return the limit. Raises BadInput unless it is 1 to 10,000."""
    if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= 10_000:
        raise BadInput(f"limit {limit!r}: give a number from 1 to 10,000")
    return limit
