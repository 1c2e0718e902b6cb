"""What retrieval is asked for: documents to ingest, to delete and to index anew, and questions.

The envelopes of the integration guide's family are read too: rag_document and rag_query.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import pydantic

from ..errors import BadInput
from ..job import Message
from ..payload import Document
from .store.filters import METADATA_BYTES_MAX, json_of
from .store.texts import check_document_id
from .types import Mode

DOCUMENT_ID_CHARS_MAX: Final = 1_024
"""Characters of a document's id, at most."""
CONTENT_BYTES_MAX: Final = 64 * 1024 * 1024
"""Bytes of a document that is sent by value or claim check, at most."""
METADATA_KEYS_MAX: Final = 256
GIVEN_CHUNKS_MAX: Final = 50_000
GIVEN_CHUNK_CHARS_MAX: Final = 16_384
PLACE_MAX: Final = 2**31 - 1  # of a chunk: every store keeps such a number
QUERY_CHARS_MAX: Final = 8_192
"""Characters of a question, at most."""
WHERE_BYTES_MAX: Final = 16 * 1024
K_MAX: Final = 100


def _check_id(document_id: str) -> str:
    try:
        return check_document_id(document_id)
    except BadInput as error:
        raise ValueError(str(error)) from None


Id = Annotated[str, pydantic.Field(min_length=1, max_length=DOCUMENT_ID_CHARS_MAX)]
DocumentId = Annotated[Id, pydantic.AfterValidator(_check_id)]
ShortText = Annotated[str, pydantic.Field(max_length=1_024)]
Place = Annotated[str, pydantic.Field(min_length=1, max_length=8_192)]


def _json_size(what: str, value: Any) -> int:
    try:
        text = json_of(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} cannot be written as JSON: {error}") from None
    return len(text.encode("utf-8", "surrogatepass"))


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, str | int | float | bool)


def check_metadata(metadata: Any) -> dict[str, Any]:
    """Return the metadata of a document. Raises ValueError for what is none.

    Here and not by the type, which makes an error of each wrong item: millions take a GB.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise ValueError("must be a map")
    if len(metadata) > METADATA_KEYS_MAX:
        raise ValueError(f"at most {METADATA_KEYS_MAX} keys, not {len(metadata):,}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not 1 <= len(key) <= 256:
            raise ValueError("its keys must be texts of 1 to 256 characters")
        items = value if isinstance(value, list) else [value]
        if not all(_is_scalar(each) for each in items):
            raise ValueError(f"{key[:80]} must be a text, a number, true, false, null, or a list of these")
    size = _json_size("metadata", metadata)
    if size > METADATA_BYTES_MAX:
        raise ValueError(f"has {size:,} bytes as JSON, above the limit of {METADATA_BYTES_MAX:,}")
    return dict(metadata)


Metadata = Annotated[dict[str, Any], pydantic.BeforeValidator(check_metadata)]


class _RagMessage(Message[dict[str, Any]], kind="rag", family="rag.ingest"):
    """What all have. `tenant_id`: of the guide's envelope; must be the job's tenant."""

    tenant_id: Id | None = None
    timestamp: str | float | None = None
    """When the message was made, as the guide's envelope says it. It is not used."""

    @pydantic.model_serializer(mode="wrap")
    def _write(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {
            name: value
            for name, value in handler(self).items()
            if value is not None and value != {} and (value != "" or name == "content")
        }


class GivenChunk(pydantic.BaseModel):
    """A chunk that the publisher has cut itself, as in the guide's envelope ``{chunk_id, content, embedding,
    metadata}``.

    `content`: 1 to 16,384 characters. Of `metadata`, `heading`, `page` and `start` are kept. `chunk_id` and `embedding`
    are ignored: the chunks' place is their order, and vectors of different models cannot be compared.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    content: Annotated[str, pydantic.Field(min_length=1, max_length=GIVEN_CHUNK_CHARS_MAX)]
    heading: ShortText = ""
    page: Annotated[int, pydantic.Field(ge=1, le=PLACE_MAX)] | None = None
    start: Annotated[int, pydantic.Field(ge=0, le=PLACE_MAX)] | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"content": data}
        if not isinstance(data, Mapping):
            return data
        given = data.get("metadata")
        metadata = given if isinstance(given, Mapping) else {}
        kept = {name: metadata[name] for name in ("heading", "page", "start") if metadata.get(name) is not None}
        return {**kept, **{name: value for name, value in data.items() if name not in ("metadata", "embedding")}}

    @pydantic.model_serializer(mode="wrap")
    def _write(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value not in (None, "")}


def _check_count(chunks: Any) -> Any:
    if isinstance(chunks, list) and len(chunks) > GIVEN_CHUNKS_MAX:
        raise ValueError(f"at most {GIVEN_CHUNKS_MAX:,} chunks, not {len(chunks):,}")
    return chunks or None


class RagDocument(_RagMessage, kind="rag.document"):
    """A document to ingest: exactly one of `content`, `document`, `path`, `url` and `chunks`.

    - `document_id`: 1 to 1,024 characters and at most 2,000 bytes, free but for NULs. Each job of one id is a version
      of the document; the last one wins. None: the header ``document_id``, else `path` or `url`, else the job's id.
    - `content`: a text, or bytes, up to 64 MiB. With ``encoding="base64"`` a text stands for bytes, for JSON.
    - `document`: what `client.documents.put` returns (a claim check).
    - `path`, `url`: read by the worker, only where rag.toml allows the tenant this root or host.
    - `chunks`: cut by the publisher, at most 50,000. `content` beside them, as in the guide's envelope, is not cut.
    - `metadata`: texts, numbers, true, false, null, and lists of these, by keys; up to 64 KiB as JSON. Questions are
      filtered by them.
    - `content_type`, `name`: hints at the format; the content's own marks go first. `title`: in place of its own.

    The result is ``{document_id, state, version, chunks, problems, …}``, see docs/guides/rag.md.
    """

    document_id: DocumentId | None = None
    content: str | bytes | None = None
    encoding: Literal["base64"] | None = None
    """With "base64", the text in `content` stands for bytes; None: a text is stored as UTF-8."""
    document: Document | None = None
    path: Place | None = None
    url: Place | None = None
    chunks: Annotated[list[GivenChunk] | None, pydantic.BeforeValidator(_check_count)] = None
    metadata: Metadata = pydantic.Field(default_factory=dict)
    content_type: ShortText = ""
    title: ShortText = ""
    name: ShortText = ""

    @pydantic.model_validator(mode="after")
    def _check(self) -> RagDocument:
        names = ("content", "document", "path", "url", "chunks")
        given = [name for name in names if getattr(self, name) is not None]
        if given not in (["content", "chunks"], *([name] for name in names)):
            found = " and ".join(given) if given else "none"
            raise ValueError(f"give exactly one of {', '.join(names)}, not {found}")
        if self.encoding is not None and not isinstance(self.content, str):
            raise ValueError("encoding is given without a text in content: leave encoding out")
        if self.content is not None and len(self.content) > CONTENT_BYTES_MAX:
            raise ValueError(f"content has {len(self.content):,} bytes, above the limit of {CONTENT_BYTES_MAX:,}")
        return self

    def content_bytes(self) -> bytes:
        """Return `content` as bytes; a text as UTF-8. Raises BadInput for what is not base64 though it should be."""
        content = self.content or b""
        if isinstance(content, bytes):
            return content
        if self.encoding is None:
            return content.encode("utf-8", "replace")
        try:
            return base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            raise BadInput('content is not base64: correct it, or leave encoding = "base64" out') from None


class RagDelete(_RagMessage, kind="rag.delete"):
    """Deletes a document: versions that were enqueued before this job are gone, later ones stay."""

    document_id: DocumentId
    """Id of the document to delete."""


class RagReindex(_RagMessage, kind="rag.reindex"):
    """Exactly one of `document_id` and `all`.

    - `document_id`: read this document again from its path or URL. It keeps its version, so that no version that was
      enqueued since is hidden.
    - `all`: embed all chunks of the tenant anew, such as after a change of the embedder. Questions are answered by the
      former vectors until all new ones are stored; where the embedder has changed, they are refused until then.
    """

    document_id: DocumentId | None = None
    all: bool = False

    @pydantic.model_validator(mode="after")
    def _check(self) -> RagReindex:
        if (self.document_id is None) is not self.all:
            raise ValueError("give either document_id, or all = true")
        return self


class RagQuery(_RagMessage, kind="rag.query", family="rag.queries"):
    """A question to a tenant's documents.

    - `query`: 1 to 8,192 characters. `k`: how many passages, 1 to 100; default 5.
    - `where`: a filter by metadata, see `store.filters`. `mode`: "hybrid", "keyword" or "vector".
    - `answer`: also answer in words, by a model of the gateway. `model`: which one; None: that of rag.toml.
    - `query_id`: the job's id.
    """

    query: Annotated[str, pydantic.Field(min_length=1, max_length=QUERY_CHARS_MAX)]
    query_id: Id | None = None
    k: Annotated[int, pydantic.Field(ge=1, le=K_MAX)] = 5
    where: dict[str, Any] | None = None
    mode: Mode = "hybrid"
    answer: bool = False
    model: Annotated[str, pydantic.Field(min_length=1, max_length=256)] | None = None

    @pydantic.field_validator("where")
    @classmethod
    def _check_where(cls, where: dict[str, Any] | None) -> dict[str, Any] | None:
        if where is not None and _json_size("where", where) > WHERE_BYTES_MAX:
            raise ValueError(f"is above {WHERE_BYTES_MAX:,} bytes as JSON")
        return where


def check_tenant(message: _RagMessage, tenant: str) -> None:
    """Raise BadInput if the message names another tenant than the job's."""
    if message.tenant_id is not None and message.tenant_id != tenant:
        raise BadInput(f"tenant_id {message.tenant_id[:64]!r} is not the tenant of this job, {tenant}")
