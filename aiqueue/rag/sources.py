"""The content of a document's job: by value, by claim check, by path or by URL."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

from .. import headers
from ..errors import BadInput
from ..job import Job
from .byte_budget import ByteBudget
from .config import RagConfig
from .fetch_share import FetchShare
from .fetched import FetchLimits
from .fetching import fetch_url, find_size, read_path
from .messages import DOCUMENT_ID_CHARS_MAX, RagDocument
from .store.texts import check_document_id
from .types import Chunk, DocumentState

HASH_OF = 1  # raised when chunks of the same content would come out otherwise
DOCUMENT_ID = "document_id"


@dataclass(frozen=True, slots=True)
class Content:
    """A document's bytes, in memory or as an open file. `sha256`: of the bytes, as hex. `source`: "": by value."""

    content: bytes | IO[bytes]
    sha256: str
    name: str
    content_type: str
    source: str = ""


def document_id_of(data: Mapping[str, Any], job_headers: Mapping[str, str], job_id: str) -> str:
    """Return which document a job is about, given the fields of its message: the field, else the header
    ``document_id``, else the path or URL, else the job's id. Raises BadInput for one that is too long, or
    that no store can keep.
    """
    found = data.get(DOCUMENT_ID) or headers.find(job_headers, DOCUMENT_ID) or data.get("path") or data.get("url")
    text = str(found or job_id)
    if len(text) > DOCUMENT_ID_CHARS_MAX:
        raise BadInput(f"document_id has {len(text):,} characters: at most {DOCUMENT_ID_CHARS_MAX:,} are allowed")
    return check_document_id(text)


def id_headers(document_id: str) -> dict[str, str]:
    """Return headers for a document's job, by which its status finds it while it is queued, also where its body lies
    beside the queue. None for an id that no header can hold.
    """
    fits = document_id.isascii() and document_id.isprintable() and document_id == document_id.strip()
    return {DOCUMENT_ID: document_id} if fits else {}


@contextlib.asynccontextmanager
async def opened(
    job: Job[Any], message: RagDocument, config: RagConfig, limits: FetchLimits, fetches: FetchShare,
    open_bytes: ByteBudget,
) -> AsyncIterator[Content]:  # fmt: skip
    """Lend the content of a document that is not cut into chunks yet.

    One by claim check or path waits for its share of `open_bytes`; the size of one by URL is known too late.

    Raises BadInput (FetchRefused) for what may not be read, or is too large; FetchFailed for what may pass; NoRoom.
    """
    size = await _size(job, message, config, limits)
    async with open_bytes.share(size), _opened(job, message, config, limits, fetches) as content:
        yield content


async def _size(job: Job[Any], message: RagDocument, config: RagConfig, limits: FetchLimits) -> int:
    """Return how many bytes will be read; 0: they are in memory already, or it is not known. Raises as `opened`."""
    if message.path is not None:
        return await find_size(message.path, config.tenant(job.tenant).roots, limits=limits)
    if message.document is not None:
        _check_size(message.document.size, config.limits.document_bytes)
        return message.document.size
    return 0


@contextlib.asynccontextmanager
async def _opened(
    job: Job[Any], message: RagDocument, config: RagConfig, limits: FetchLimits, fetches: FetchShare
) -> AsyncIterator[Content]:
    if message.path is not None or message.url is not None:
        allowed = config.tenant(job.tenant)
        if message.path is not None:
            fetched = await read_path(message.path, allowed.roots, limits=limits)
        else:
            url, hosts, private = message.url or "", allowed.hosts, allowed.private_hosts
            fetched = await fetches.run(
                job.tenant, lambda: fetch_url(url, hosts, private_hosts=private, limits=limits)
            )  # fmt: skip
        with fetched:
            content_type = message.content_type or fetched.content_type
            yield Content(
                fetched.content,
                fetched.sha256,
                message.name or fetched.name,
                content_type,
                message.path or message.url or "",
            )
        return
    most = config.limits.document_bytes
    if message.document is not None:
        document = message.document
        content = await job.open(document).read(most)
        name, content_type = message.name or document.name, message.content_type or document.content_type
        yield Content(content, document.sha256, name, content_type)
        return
    content = message.content_bytes()
    _check_size(len(content), most)
    is_text = isinstance(message.content, str) and message.encoding is None
    content_type = message.content_type or ("" if message.name or not is_text else "text/plain; charset=utf-8")
    yield Content(content, hashlib.sha256(content).hexdigest(), message.name or job_name(message), content_type)


def hints(message: RagDocument) -> dict[str, str]:
    """Return what a reindex has to know, beside the path or URL, to read and show the document as now."""
    if message.path is None and message.url is None:
        return {}
    given = {"title": message.title, "name": message.name, "content_type": message.content_type}
    return {name: text for name, text in given.items() if text}


def job_name(message: RagDocument) -> str:
    """Return what hints at the format where no name is given: the document's id, such as ``guide.md``."""
    return message.document_id or ""


def why_not_read(known: DocumentState | None) -> str:
    """Return why a document cannot be read again."""
    if known is None or known.indexed_version is None:
        return "it is not indexed: ingest it"
    return "it was ingested by value, and its file is not known: ingest it again"


def _check_size(size: int, most: int) -> None:
    if size > most:
        raise BadInput(
            f"the document has {size:,} bytes, above the limit of {most:,}: split it, or raise limits.document"
        )


def given_chunks(message: RagDocument) -> list[Chunk]:
    """Return the chunks that the publisher has cut, without blank ones. Raises BadInput if none is left."""
    heading = message.title
    found = [each for each in message.chunks or () if each.content.strip()]
    if not found:
        raise BadInput("the document holds no text: its chunks are blank")
    return [
        Chunk(number, each.content, each.heading or heading, each.start or 0, each.page)
        for number, each in enumerate(found)
    ]


def content_hash(message: RagDocument, content: Content | None, parsers: tuple[str, ...]) -> str:
    """Return a hash of all that decides what is stored of a document: its content, and how it is read and shown."""
    if content is None:
        shown: list[Any] = [[each.model_dump() for each in message.chunks or ()]]
    else:
        shown = [content.sha256, content.name.rpartition(".")[2].lower(), content.content_type, content.source]
    told = [HASH_OF, parsers, message.title, message.metadata, shown]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
