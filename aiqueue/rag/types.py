"""What the parts of retrieval pass to each other: documents, chunks, passages, and the two protocols of a user's own
parts, `Embedder` and `VectorStore`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vectors = NDArray[np.float32]  # of shape (texts, dimensions), each row of length 1
else:
    Vectors = Any  # numpy is imported by what computes

Mode = Literal["hybrid", "keyword", "vector"]
"""How passages are found: by words, by vectors, or by both with their ranks merged."""
State = Literal["queued", "working", "completed", "completed_with_errors", "failed", "cancelled", "deleted"]
PutOutcome = Literal["new", "same", "old"]  # stored; known with this hash, only its version moved; a newer one is known
DIMENSIONS_MAX: Final = 8_192  # of a vector
Where = Mapping[str, Any]  # a filter by metadata, see `store.filters`


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a parsed document. `heading`: the path of its headings, as "Install > Linux"; "": none.

    `start`: where it begins in the document's text, in characters. `page`: from 1; None: the format has no pages.
    """

    heading: str
    text: str
    """The section's text, without its heading."""
    start: int = 0
    page: int | None = None


@dataclass(frozen=True, slots=True)
class ParsedDocument:
    """What a parser makes of a document. `problems`: what could not be read, a line each, as "page 3: …"."""

    title: str
    """Title that the parser has found; "": none."""
    sections: Sequence[Section]
    """Parts of the document, in reading order."""
    problems: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document that is embedded, indexed and found. `number`: its place in the document, from 0."""

    number: int
    text: str
    """Text that is embedded and found."""
    heading: str = ""
    """Path of headings of its section, as "Install > Linux"; "": none."""
    start: int = 0
    """Where the chunk begins in the document's text, in characters."""
    page: int | None = None
    """Page of the document, from 1; None: the format has no pages."""


@dataclass(frozen=True, slots=True)
class ChunkedDocument:
    """A parsed document as chunks in reading order. `problems`: see `ParsedDocument`."""

    title: str
    """The document's title; "": none."""
    chunks: Sequence[Chunk]
    """All chunks, in reading order."""
    problems: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class DocumentHeader:
    """A version of a document, without its chunks.

    `version`: see `versions.version_of`. `content_hash`: of what was parsed and how, with the title; the same hash is
    the same chunks. `source`: where it came from, a path or URL; "": by value. `problems`: see `ParsedDocument`.
    `hints`: the title, name and content_type that were given with a path or URL, texts by these names.
    """

    document_id: str
    """Id by which the document was ingested."""
    version: int
    content_hash: str
    title: str = ""
    """The document's title; "": none."""
    source: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Values that questions may filter by, by name."""
    problems: Sequence[str] = ()
    hints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IndexedChunks:
    """Chunks with their vectors: row i of both arrays belongs to chunk i. `headings`: of each chunk's heading."""

    chunks: Sequence[Chunk]
    """The chunks that the rows belong to."""
    bodies: Vectors
    """Vectors of the chunks' texts, one row for each."""
    headings: Vectors


@dataclass(frozen=True, slots=True)
class IndexedDocument:
    """A version of a document with its chunks and their vectors."""

    header: DocumentHeader
    """The version, without its chunks."""
    content: IndexedChunks
    """The chunks of the version, and their vectors."""


@dataclass(frozen=True, slots=True)
class DocumentState:
    """What is known of a document.

    `version`, `state`, `stage`, `done`, `total`, `reason`: of the newest version that was begun. `done` of `total`
    chunks are embedded; 0 of 0: not known yet. `indexed_version`: the version that questions find; None: none.
    `updated_at`: seconds since the epoch. `job_id`: the job of a version that is not stored yet; "": not known.
    `hints`: see `DocumentHeader`.
    """

    document_id: str
    """Id by which the document was ingested."""
    version: int
    state: State
    stage: str = ""
    done: int = 0
    total: int = 0
    reason: str = ""
    problems: Sequence[str] = ()
    """What was wrong with a document that is indexed all the same, a line each."""
    title: str = ""
    """Title of the document; empty: none was found."""
    source: str = ""
    """Path or URL that the document was read from; empty: it was sent by value."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """What the owner of the document has noted."""
    indexed_version: int | None = None
    chunks: int = 0
    """How many chunks questions find."""
    updated_at: float = 0.0
    job_id: str = ""
    hints: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk that answers a question. `score`: 0 to 1, comparable within one answer only."""

    document_id: str
    """Id of the document that the passage is from."""
    version: int
    """Version of the document."""
    title: str
    """Title of the document; empty: none was found."""
    source: str
    """Path or URL that the document was read from; empty: it was sent by value."""
    heading: str
    """Section of the passage, with those above it."""
    number: int
    """Number of the chunk in its document, from 0."""
    start: int
    """Where the passage begins in the document's text, in characters."""
    page: int | None
    """Page of the passage, from 1; None: the format has none."""
    text: str
    """The passage itself."""
    score: float
    metadata: Mapping[str, Any]
    """What the owner of the document has noted."""


@dataclass(frozen=True, slots=True)
class StoreStats:
    """`documents`: that can be found. `bytes`: on disk."""

    documents: int
    chunks: int
    """How many chunks the documents have together."""
    failed: int
    """How many documents failed in their newest version."""
    deleted: int
    """How many documents were deleted, and are remembered."""
    bytes: int
    embedder: str
    """Embedder of the stored vectors; empty: there are none."""
    dimensions: int
    """How many numbers a stored vector has; 0: there are none."""


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into vectors. `name` says which vectors may be compared: of one model and its dimensions.

    `embed` raises what the queue knows how to handle: `Retry` for what may pass, `Reject` for what may not.
    """

    @property
    def name(self) -> str: ...
    @property
    def dimensions(self) -> int:
        """How many numbers a vector has."""

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Vectors: ...
    async def close(self) -> None:
        """Release what the embedder holds, at the worker's end."""


class VectorStore(Protocol):
    """Keeps the documents of many tenants, and finds passages. `store.conformance` tests any implementation.

    Every method is of one tenant, and none ever returns what is another's. Each call is one transaction: after a kill
    at any moment it is done or not. Any call may be repeated.

    Versions. The order of arrival decides nothing: what is found is the highest version that was stored, unless the
    same or a higher one deletes it; what `document` shows is the highest version that was begun. A failed version
    hides no former one. "old": a higher version is stored, or the same or a higher one is deleted; nothing changed.

    - `open`: make the tenant's part ready for vectors of this embedder. Before the first `put`, `stage` or `commit` of
      this object. Raises EmbedderChanged, as do these three and a search by vector, if the stored chunks have vectors
      of another. A tenant without chunks takes any.
    - `put`: store whole documents, all or none. With the hash that is stored, chunks, vectors and title stay ("same").
    - `stage`, `staged`, `commit`: a large document in batches, numbered from 0 in the order of its chunks, which are
      numbered 0, 1, 2 … Nothing of it is found before `commit`, which takes all staged batches of this version and hash
      and raises BadInput if one is missing. `staged` returns the numbers of the stored batches. They are dropped when
      one of this version with another hash is staged, for a file may have changed between two attempts; when this or a
      newer version is stored or deleted; and two days after the last of them was staged.
    - `move`: if the stored chunks have this hash and no higher version is known, they become this version's: True. Else
      nothing happens: False. Source and metadata stay: the hash should cover them, or `put` be called.
    - `note`: what becomes of a version that is under way or has failed. Ignored for a version that is lower than the
      one shown, and for one that is stored or deleted. "cancelled" drops the staged batches of this version.
    - `delete`: False: a higher version is stored or deleted. What was deleted stays known by its version.
    - `documents`: up to `limit` (10,000 at most) documents after the id `after`, by id; without the deleted ones.
    - `search`: the best `k` (1 to 1,000) chunks. Of `text` the words count; nothing in it is an operator or an error.
      `vector` is of the shape (dimensions,); None: by words only. Raises BadInput for a filter that is none.
    - `chunks`, `replace_vectors`, `switch`: embed all anew. `chunks` returns up to `limit` rows after the row id
      `after`; `replace_vectors` stores new vectors of rows beside the present ones, for one new embedder at a time, and
      ignores rows that are gone. `switch` makes them the present ones if every row has them: True. Else False: call
      `chunks` with `missing=True` for what is left.
    - What cannot be stored is BadInput: a document id that is empty, above 2,000 bytes or with NULs; a version that is
      not 1 to 2^63 - 1; metadata above 64 KiB of JSON; vectors that are not finite. Texts may hold anything: NULs and
      lone surrogates become U+FFFD.
    """

    async def open(self, tenant: str, embedder: str, dimensions: int) -> None: ...
    async def put(self, tenant: str, documents: Sequence[IndexedDocument]) -> list[PutOutcome]: ...
    async def stage(
        self, tenant: str, document_id: str, version: int, content_hash: str, batch: int, rows: IndexedChunks
    ) -> None: ...
    async def staged(self, tenant: str, document_id: str, version: int, content_hash: str) -> set[int]: ...
    async def commit(self, tenant: str, header: DocumentHeader) -> PutOutcome: ...
    async def move(self, tenant: str, document_id: str, version: int, content_hash: str) -> bool: ...
    async def note(
        self, tenant: str, document_id: str, version: int, state: State, *,
        stage: str = "", done: int = 0, total: int = 0, reason: str = "", job_id: str = "",
    ) -> None: ...  # fmt: skip
    async def delete(self, tenant: str, document_id: str, version: int) -> bool: ...
    async def document(self, tenant: str, document_id: str) -> DocumentState | None: ...
    async def documents(self, tenant: str, *, after: str = "", limit: int = 1_000) -> list[DocumentState]: ...
    async def search(
        self, tenant: str, text: str, vector: Vectors | None, k: int, *, where: Where | None = None,
        mode: Mode = "hybrid",
    ) -> list[Passage]: ...  # fmt: skip
    async def chunks(
        self, tenant: str, embedder: str, *, after: int = 0, limit: int = 256, missing: bool = False
    ) -> list[tuple[int, Chunk]]: ...
    async def replace_vectors(
        self, tenant: str, embedder: str, rows: Sequence[int], bodies: Vectors, headings: Vectors
    ) -> None: ...
    async def switch(self, tenant: str, embedder: str, dimensions: int) -> bool: ...
    async def stats(self, tenant: str) -> StoreStats:
        """Return how many documents and chunks a tenant has, and by which embedder."""

    async def close(self) -> None:
        """Release connections and files. Safe twice."""
