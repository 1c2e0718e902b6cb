"""The status of a document by request and reply: what is stored, under way, failed or queued."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any, Final

from .. import codec, headers, subjects
from ..client import Client
from ..connection import Answer, Endpoint, Received, Service, Stored
from ..errors import AIQueueError, BadInput, DecodeError, NotFound, Unavailable
from ..requests import replies
from ..topology import Family
from . import sources
from .job_ends import end_of_job
from .types import DocumentState, VectorStore
from .versions import time_of, version_at

log = logging.getLogger(__name__)

FAMILY: Final = "rag.ingest"
NAME, VERSION = "aiqueue-rag-status", "1.0.0"
SCAN_JOBS_MAX: Final = 2_000  # stored jobs of the tenant that are read for one request
SCAN_BYTES_MAX: Final = 8 * 1024 * 1024
SCANS_MAX: Final = 4  # at once
WAITING_MAX: Final = 1_000
DRAIN_S: Final = 5.0
_CBOR_MAPS: Final = range(0xA0, 0xC0)  # the first byte of a map


@asynccontextmanager
async def serving(
    client: Client, store: VectorStore, tenants: tuple[str, ...] | None, problems: Mapping[str, str] | None = None
) -> AsyncIterator[Service]:
    """Answer requests for the status of documents while the block runs. `tenants`: None: of all. `problems`: by tenant,
    why documents wait for the store, which may not be able to keep a note of that.

    Raises AccessDenied, Unavailable.
    """
    status = DocumentStatus(client, store, problems or {})
    family = client.topology.family(FAMILY)
    endpoints = [
        Endpoint(f"rag-status{'' if each == '*' else f'-{each}'}", f"{family.journal}.{each}", status.answer)
        for each in tenants or ("*",)
    ]
    service = Service(
        client.connection, endpoints, name=NAME, version=VERSION, description="Says what becomes of documents"
    )
    await service.start()
    try:
        yield service
    finally:
        await service.stop(DRAIN_S)


class DocumentStatus:
    """Finds what is known of a document."""

    def __init__(self, client: Client, store: VectorStore, problems: Mapping[str, str]) -> None:
        self._client = client
        self._store = store
        self._problems = problems
        self._scans = asyncio.Semaphore(SCANS_MAX)
        self._waiting = 0

    async def answer(self, message: Received) -> Answer:
        """Return the answer to a request. Every error becomes an answer."""
        headers.restore_case(message.headers)
        as_json = replies.is_json(message.headers.get(headers.CONTENT_TYPE, ""), message.data)
        self._waiting += 1
        try:
            answer = replies.result_answer(asdict(await self._find_for(message)), "", as_json=as_json)
            return answer._replace(headers={k: v for k, v in answer.headers.items() if k != headers.JOB_ID})
        except AIQueueError as error:
            return replies.error_answer(error, "", as_json=as_json)
        except asyncio.CancelledError:
            stopping = Unavailable("this worker is stopping: repeat the request")
            return replies.error_answer(stopping, "", as_json=as_json)
        except Exception as error:
            log.exception("answering a request on %s failed", message.subject)
            return replies.error_answer(AIQueueError(f"{type(error).__name__}: {error}"), "", as_json=as_json)
        finally:
            self._waiting -= 1

    async def _find_for(self, message: Received) -> DocumentState:
        """Return what a request asks for. Raises BadInput, NotFound, Unavailable."""
        if self._waiting > WAITING_MAX:
            raise Unavailable(f"{WAITING_MAX:,} requests wait here already: repeat the request")
        tenant = subjects.token("tenant", message.subject.rpartition(".")[2])
        document_id = read_document_id(message.data, message.headers.get(headers.CONTENT_TYPE, ""))
        state = await self.find(tenant, document_id)
        if state is None:
            raise NotFound(
                f"document {document_id[:200]!r} of tenant {tenant} is neither stored, nor among the first "
                f"{SCAN_JOBS_MAX:,} queued ones: if it was enqueued, look for its job with `aiqueue dead ls`"
            )
        return state

    async def find(self, tenant: str, document_id: str) -> DocumentState | None:
        """Return what is known of the newest version of a document; None: it is neither stored nor queued."""
        async with self._scans:
            queued, in_lane = await self._find_queued(tenant, document_id)
        known = await self._store.document(tenant, document_id)  # after the scan: a job that has ended is stored
        if queued <= (known.version if known is not None else 0):
            if known is None or (known.version == queued and in_lane):
                return known
            return await self._ended(tenant, known)
        problem = self._problems.get(tenant, "")
        if known is None:
            return DocumentState(document_id, queued, "queued", reason=problem, updated_at=time_of(queued))
        return replace(
            known, version=queued, state="queued", stage="", done=0, total=0, reason=problem, problems=(),
            updated_at=time_of(queued), job_id="",
        )  # fmt: skip

    async def _ended(self, tenant: str, known: DocumentState) -> DocumentState | None:
        """Return the state of a version whose job is in no lane: it may have ended without its handler. A job that is
        cancelled while it is parked may stay so until its time.
        """
        if known.state != "working" or not known.job_id:
            return known
        ended = await end_of_job(self._client, tenant, known.job_id)
        if ended is None:
            return known
        document_id, reason = known.document_id, ended.reason[:2_000]
        await self._store.note(
            tenant, document_id, known.version, ended.state, reason=reason, job_id=known.job_id
        )  # fmt: skip
        return await self._store.document(tenant, document_id)

    async def _find_queued(self, tenant: str, document_id: str) -> tuple[int, bool]:
        """Return the highest version of a document among the stored jobs of a tenant, within the limits, and whether it
        is in a lane; 0: none.

        A job that waits for its next attempt is parked. One that waits for its first has no version yet.
        """
        topology = self._client.topology
        family, parking, lane = (
            topology.family(FAMILY),
            topology.parked_stream.name,
            subjects.Lane(FAMILY, tenant, "*"),
        )
        jobs, size, newest, in_lane = 0, 0, 0, False
        for stream, subject in (
            (family.stream, f"ai.{family.name}.{tenant}.*"),
            (parking, subjects.parked(lane, is_due=False)),
            (parking, subjects.parked(lane, is_due=True)),
        ):
            async with contextlib.aclosing(self._client.connection.read(stream, subject)) as found:
                async for stored in found:
                    jobs, size = jobs + 1, size + len(stored.data)
                    is_delayed = stream == parking and headers.RUN not in stored.headers
                    version = 0 if is_delayed else _version_of(stored)
                    if version > newest and _document_id_of(stored, family) == document_id:
                        newest, in_lane = version, stream == family.stream
                    if jobs >= SCAN_JOBS_MAX or size >= SCAN_BYTES_MAX:
                        return newest, in_lane
        return newest, in_lane


def _version_of(stored: Stored) -> int:
    return version_at(*headers.first_stored(stored.headers, stored.seq, stored.time))


def _document_id_of(stored: Stored, family: Family) -> str:
    """Return which document a stored job is about; "" if that cannot be read here."""
    fields = dict(stored.headers)
    headers.restore_case(fields)
    data: dict[str, Any] = {}
    if headers.DOCUMENT not in fields:  # else the body lies elsewhere, and only a header may name the document
        try:
            data = codec.decode_message(
                stored.data, content_type=fields.get(headers.CONTENT_TYPE, ""), kind=fields.get(headers.KIND, ""),
                default_kind=family.default_kind, aliases=family.aliases,
            ).data  # fmt: skip
        except DecodeError:
            return ""
    with contextlib.suppress(BadInput):
        return sources.document_id_of(data, fields, fields.get(headers.JOB_ID, ""))
    return ""


def read_document_id(body: bytes, content_type: str) -> str:
    """Return the document id in a request: ``{"document_id": …}`` in JSON or CBOR, or the bare id as text.

    Without a content type a body counts as a map only if it can be one: an id is free text, and may look like CBOR.
    Raises BadInput.
    """
    stripped = body.strip()
    media = content_type.partition(";")[0].strip().lower()
    is_map = stripped[:1] == b"{" or (body[:1] != b"" and body[0] in _CBOR_MAPS)
    data: Any = None
    if media.endswith(("json", "cbor")) or (is_map and not media.startswith("text/")):
        try:
            data = codec.decode(body, content_type)
        except DecodeError as error:
            raise BadInput(f"the body is not a request: {error}") from None
        data = data.get(sources.DOCUMENT_ID) if isinstance(data, dict) else data
    else:
        with contextlib.suppress(UnicodeDecodeError):
            data = stripped.decode()
    if not isinstance(data, str) or not data:
        raise BadInput('the request names no document: send {"document_id": "…"}, or the id as text')
    return data
