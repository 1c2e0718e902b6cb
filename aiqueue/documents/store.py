"""Stores documents by tenant and hash, and keeps each for as long as a job or a stated time holds it.

A hold is a message of its own, beside the document. Two orders keep a held document from being deleted
(docs/decisions/documents.md):

1. To hold: write the hold, then touch the document (write its metadata again).
2. To delete: read the document, then look for holds, and delete only if nobody has touched the document since.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pydantic

from .. import codec, headers, subjects, units
from ..connection import Connection
from ..errors import (
    AIQueueError,
    BadInput,
    Conflict,
    Corrupt,
    DecodeError,
    NotFound,
    ResultTimeout,
    TooLarge,
    Unavailable,
)  # fmt: skip
from ..payload import Document, DocumentReader, HeldDocument
from ..topology import Topology
from ..units import Duration
from .holds import HOLDERS, JOB, PUT, RESULT, STEP, DocumentHold, Labels, ListedDocument
from .objects import ObjectInfo, ObjectStore, Source

HOLD_MARGIN_S = 3600.0  # the hold of an entry outlives it by this, because the entry may be written so much later
KEEP_MIN_S = 1.0  # a message's time to live is in whole seconds
CLEANUP_S = 5.0  # of a failed `attach`
_REF = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})*")
TOUCH_TRIES_MAX = 16  # each is refused if another program has written the metadata since it was read


class Documents:
    """Stores, reads and deletes documents of all tenants; one per connection, without state of its own."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.objects = ObjectStore(connection, topology.documents_stream.name)
        self._results_kept_s = topology.journal_stream.config["max_age"] / 1e9  # 0: without end
        self._steps_kept_s = topology.checkpoints_stream.config["max_age"] / 1e9
        self._checkpoints = topology.checkpoints_stream.name

    @property
    def inline_max(self) -> int:
        """Above this size in bytes, a body or a result is stored as a document."""
        check_bytes = self._connection.settings.claim_check
        return min(check_bytes, self._connection.max_payload // 2) if check_bytes else sys.maxsize

    @property
    def stores_large(self) -> bool:
        """Whether large bodies and results are stored as documents: claim_check is not 0."""
        return self._connection.settings.claim_check > 0

    # -- public

    async def put(
        self,
        source: Source,
        *,
        tenant: str,
        name: str = "",
        content_type: str = "",
        keep: Duration = "7d",
        hold: str | None = None,
    ) -> Document:
        """Store bytes, a file (its path, or opened as binary), or the bytes of an iterable or async iterable.

        Memory is constant for any size. Bytes that are stored already are not stored twice. The document is kept for at
        least `keep`, and for as long as a job that was enqueued with it exists. `hold`: a name, 1 to 64 characters of
        `A-Z a-z 0-9 _ -`, by which `forget` can end this call's `keep` alone. Raises BadInput, QueueFull (nothing is
        stored then), NotFound if `aiqueue apply` has not been run, Unavailable.
        """
        subjects.token("tenant", tenant)
        keep_s = units.parse_duration("keep", keep)
        if keep_s < KEEP_MIN_S:
            raise BadInput(f"keep: must be at least {KEEP_MIN_S:g} s, not {keep!r}")
        ref = subjects.new_id() if hold is None else subjects.token("hold", hold)
        labels = Labels(headers.ascii_line(name, 250), headers.ascii_line(content_type, 250))
        uploaded = None
        if isinstance(source, bytes):  # its hash is known before it is sent
            sha256, size = await asyncio.to_thread(_sha256, source), len(source)
        else:
            uploaded = await self.objects.upload(source)
            sha256, size = uploaded.sha256, uploaded.size
        put = DocumentHold(tenant, sha256, PUT, ref)
        try:
            await self._write_hold(put, keep_s)
            await self._touch_or_store(tenant, sha256, uploaded or source, labels)  # type: ignore[arg-type]  # bytes, else uploaded
        except AIQueueError as error:
            with contextlib.suppress(AIQueueError):
                await self.objects.purge(self._hold_subject(put))
            if uploaded is not None and not isinstance(
                error, Unavailable
            ):  # Unavailable: they may be stored as the document
                await self._purge_unused_upload(f"{tenant}/{sha256}", uploaded)
            raise
        return Document(tenant=tenant, sha256=sha256, size=size, name=name, content_type=content_type)

    def open(self, document: Document) -> DocumentReader:
        """Return a reader: ``async for chunk in documents.open(document)``, or its `read` or `save`."""
        return DocumentReader(document, self.read_chunks)

    async def get(self, sha256: str, *, tenant: str) -> Document:
        """Return the stored document with this hash. Raises NotFound."""
        named = _document_named(tenant, sha256)
        info = await self._require_info(named)
        return named.model_copy(update={"size": info.size, "name": info.title, "content_type": info.content_type})

    async def find(self, tenant: str | None = None) -> AsyncIterator[ListedDocument]:
        """Yield the stored documents of one tenant or all, the least recently put or held first."""
        holds: dict[tuple[str, str], dict[str, int]] = {}
        async for hold, _, _ in self.list_holds():
            count = holds.setdefault((hold.tenant, hold.sha256), dict.fromkeys(HOLDERS, 0))
            count[hold.by] += 1
        async for info in self.objects.list_infos():
            document = document_of(info)
            if document is None or info.deleted or tenant not in (None, document.tenant):
                continue
            held = holds.get((document.tenant, document.sha256), dict.fromkeys(HOLDERS, 0))
            yield ListedDocument(document, info.time, held[JOB], held[PUT], held[RESULT], held[STEP])

    async def forget(self, document: Document, *, hold: str | None = None) -> bool:
        """End the holds of all who put a document, or only the one that was put with the name `hold`. If nothing else
        holds the document, it is deleted at once: True.
        """
        ref = "*" if hold is None else subjects.token("hold", hold)
        await self.objects.purge(self._hold_subject(DocumentHold(document.tenant, document.sha256, PUT, ref)))
        return await self.delete_if_unheld(document.tenant, document.sha256)

    async def read_chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        """Yield a document's bytes, the last of them after they were verified."""
        info = await self._require_info(document)
        if info.size != document.size or info.sha256 != document.sha256:
            raise Corrupt(
                f"document {info.name}: what is stored has another size or hash than the document that was put"
            )
        async with contextlib.aclosing(self.objects.read(info)) as chunks:
            async for chunk in chunks:
                yield chunk

    # -- for jobs

    async def attach(self, tenant: str, documents: Iterable[Document], body: bytes | None = None) -> dict[str, str]:
        """Hold `documents`, and store and hold `body` as a document, for a job that is about to be enqueued.

        Returns the headers by which the job names its holds. If this fails, no hold is left. Raises BadInput for
        another tenant's document, NotFound for a document that is not stored, TooLarge, QueueFull.
        """
        job_headers = {headers.DOCUMENT_REF: subjects.new_id()}
        wanted = tuple(dict.fromkeys(documents))
        for document in wanted:
            if document.tenant != tenant:
                raise BadInput(f"a job of {tenant} cannot hold a document of tenant {document.tenant}")
        if body is not None:
            if len(body) > codec.MAX_BYTES:
                raise TooLarge(len(body), codec.MAX_BYTES)
            sha256 = await asyncio.to_thread(_sha256, body)
            job_headers |= {headers.DOCUMENT: sha256, headers.DOCUMENT_SIZE: str(len(body))}
        sources = {document.sha256: None for document in wanted} | ({} if body is None else {sha256: body})
        await self._hold_all(tenant, sources, JOB, job_headers[headers.DOCUMENT_REF])
        return job_headers

    async def read_body(self, tenant: str, job_headers: Mapping[str, str]) -> bytes:
        """Return the body of a job that is stored as a document, verified.

        Raises NotFound, Corrupt, BadInput (no valid reference) if the body cannot be read ever again. Raises
        Unavailable if it cannot be read now.
        """
        size = headers.number(job_headers.get(headers.DOCUMENT_SIZE, ""))
        document = _document_named(tenant, job_headers.get(headers.DOCUMENT, ""), size)
        if size > codec.MAX_BYTES:
            raise TooLarge(size, codec.MAX_BYTES)
        return await self.open(document).read(codec.MAX_BYTES)

    async def end_holds(self, tenant: str, job_headers: Mapping[str, str]) -> None:
        """End the holds of a job that has ended. Its body is deleted at once if nobody else holds it.

        Never raises: the collector does later what fails now.
        """
        ref, sha256 = job_headers.get(headers.DOCUMENT_REF, ""), job_headers.get(headers.DOCUMENT, "")
        await self._end_all(tenant, JOB, ref, sha256)

    # -- for results

    async def hold_result(self, tenant: str, body: bytes, kept_s: float | None = None) -> HeldDocument:
        """Hold and store an encoded result as a document, before its journal entry is written.

        The hold expires HOLD_MARGIN_S after the entry, which is kept for `kept_s` seconds (None: as long as the
        journal's stream keeps entries). If this fails, no hold is left. If the entry is not written, call `end_result`.
        Raises QueueFull, AccessDenied, Unavailable.
        """
        return await self._hold_bytes(tenant, body, RESULT, subjects.new_id(), kept_s or self._results_kept_s)

    async def end_result(self, held: HeldDocument) -> None:
        """End the hold of a result whose entry was not written. The document is deleted if nobody else holds it.

        Never raises: without this call, the hold expires.
        """
        await self._end_all(held.document.tenant, RESULT, held.ref, held.document.sha256)

    # -- for steps

    async def hold_step(self, tenant: str, run: str, body: bytes) -> HeldDocument:
        """As `hold_result`, for the body of a step's entry. `run`: the tokens that name the run within its tenant."""
        return await self._hold_bytes(tenant, body, STEP, f"{run}.{subjects.new_id()}", self._steps_kept_s)

    async def end_step(self, held: HeldDocument) -> None:
        """As `end_result`, for a step."""
        await self._end_all(held.document.tenant, STEP, held.ref, held.document.sha256)

    async def end_steps(self, tenant: str, run: str, hashes: Iterable[str]) -> None:
        """End all holds of a run that has ended, those too of which no entry was written. Of its documents, those of
        `hashes` are deleted at once if nobody else holds them. Never raises: without this call, the holds expire.
        """
        with contextlib.suppress(AIQueueError):
            await self.objects.purge(self._hold_subject(DocumentHold(tenant, "*", STEP, f"{run}.*")))
        for sha256 in hashes:
            await self._end_all(tenant, STEP, "", sha256)

    async def read_result_body(self, document: Document, timeout_s: float | None = None) -> bytes:
        """Return an encoded result, verified. It may be of any size.

        Raises NotFound, Corrupt, AccessDenied, Unavailable, ResultTimeout after `timeout_s` seconds.
        """
        buffer = io.BytesIO()  # the bytes are in memory once, unlike with pieces that are joined
        try:
            async with asyncio.timeout(timeout_s), contextlib.aclosing(self.read_chunks(document)) as chunks:
                async for chunk in chunks:
                    buffer.write(chunk)
        except TimeoutError:
            text = f"timed out reading a result of {document.size:,} bytes: read the result again with a longer timeout"
            raise ResultTimeout(text) from None
        except NotFound as error:
            raise NotFound(f"a result of {document.size:,} bytes is not kept any more: {error}") from None
        return buffer.getvalue()

    async def read_result(self, document: Document, timeout_s: float | None = None) -> Any:
        """Return a result as plain data. Raises what `read_result_body` raises."""
        body = await self.read_result_body(document, timeout_s)
        try:
            return codec.decode(body, codec.CBOR, max_bytes=len(body))
        except DecodeError as error:
            raise Corrupt(f"the result in document {document.sha256} cannot be read: {error}") from None

    async def release_run(self, tenant: str, run: subjects.ParentRun) -> None:
        """End the holds that the entries of a run name, because no attempt of the run will follow.

        Never raises: without this call, the holds expire.
        """
        with contextlib.suppress(AIQueueError):
            async for entry in self._connection.read(self._checkpoints, run.checkpoints(tenant)):
                if ref := entry.headers.get(headers.DOCUMENT_REF, ""):
                    await self._end_all(tenant, STEP, ref, entry.headers.get(headers.DOCUMENT, ""))

    # -- for the collector

    async def delete_if_unheld(self, tenant: str, sha256: str) -> bool:
        """Delete a document if nobody holds it. False if somebody does, or the document is not stored."""
        info = await self.objects.read_info(f"{tenant}/{sha256}")  # before the holds: a touch from here on is noticed
        if info is None:
            return False
        if not info.deleted and await self._connection.first(self.objects.stream, self._holds_filter(tenant, sha256)):
            return False
        return await self.objects.delete(info)

    async def list_holds(self) -> AsyncIterator[tuple[DocumentHold, int, float]]:
        """Yield all holds, each with the sequence and the time of its message."""
        async for stored in self._connection.read(self.objects.stream, self.objects.subject("R", "*", "*", "*", ">")):
            hold = DocumentHold.parse(subjects.object_tokens(stored.subject))
            if hold.by in HOLDERS:
                yield hold, stored.seq, stored.time

    async def end_hold(self, hold: DocumentHold, *, upto: int) -> None:
        """End one hold, if it was not renewed after sequence `upto`."""
        await self.objects.purge(self._hold_subject(hold), upto=upto)

    # -- within

    async def _hold_bytes(self, tenant: str, body: bytes, by: str, ref: str, kept_s: float) -> HeldDocument:
        """Hold and store bytes for an entry that is kept for `kept_s` seconds; 0: without end."""
        sha256 = await asyncio.to_thread(_sha256, body)
        held = HeldDocument(Document(tenant=tenant, sha256=sha256, size=len(body), content_type=codec.CBOR), ref)
        await self._hold_all(tenant, {sha256: body}, by, ref, kept_s + HOLD_MARGIN_S if kept_s else None)
        return held

    async def _hold_all(
        self,
        tenant: str,
        sources: Mapping[str, bytes | None],
        by: str,
        ref: str,
        keep_s: float | None = None,
    ) -> None:
        """Hold the documents of these hashes under one name. Those with bytes are stored. If this fails, no hold is
        left.
        """
        hold = None
        try:
            for sha256, source in sources.items():
                hold = DocumentHold(tenant, sha256, by, ref)
                await self._write_hold(hold, keep_s)
                await self._touch_or_store(tenant, sha256, source)
        except BaseException as error:  # also a cancelled caller: only the collector would end these holds, days later
            with contextlib.suppress(TimeoutError, AIQueueError):
                async with asyncio.timeout(CLEANUP_S):
                    if hold is not None and not isinstance(error, AIQueueError):
                        # written again: its PubAck comes after the cancelled write, so that the purge below finds both
                        await self._write_hold(hold, keep_s)
                    stored = next((sha256 for sha256, source in sources.items() if source is not None), "")
                    await self._end_all(tenant, by, ref, stored)
            raise

    async def _end_all(self, tenant: str, by: str, ref: str, sha256: str) -> None:
        """End all holds of a name, and delete the document `sha256` if nobody else holds it. Never raises."""
        with contextlib.suppress(AIQueueError):
            if _REF.fullmatch(ref):
                await self.objects.purge(self._hold_subject(DocumentHold(tenant, "*", by, ref)))
            if sha256:
                _document_named(tenant, sha256)
                await self.delete_if_unheld(tenant, sha256)

    async def _write_hold(self, hold: DocumentHold, keep_s: float | None = None) -> None:
        """Store or renew a hold. It expires after `keep_s` seconds; None: never."""
        hold_headers = {headers.MSG_ID: subjects.new_id()}
        if keep_s is not None:
            hold_headers[headers.TTL] = f"{round(keep_s)}s"
        await self._connection.store(self._hold_subject(hold), b"", hold_headers)

    async def _touch_or_store(
        self,
        tenant: str,
        sha256: str,
        source: bytes | ObjectInfo | None,
        labels: Labels = Labels(),  # noqa: B008  (frozen)
    ) -> None:
        """Touch a document, or store it from its bytes or its uploaded chunks. The hold must be stored before.

        1. The document is stored: its metadata is written again, and an upload of the same bytes is deleted.
        2. It is not: `source` is stored as the document. Raises NotFound without a source.

        Raises Unavailable if other programs write the metadata first each time.
        """
        name = f"{tenant}/{sha256}"
        uploaded = source if isinstance(source, ObjectInfo) else None
        for _ in range(TOUCH_TRIES_MAX):
            known = await self.objects.read_info(name)
            existing = known if known is not None and not known.deleted else None
            if existing is None and uploaded is None:
                if not isinstance(source, bytes):
                    raise _not_stored(tenant, sha256, "put it, and enqueue before its `keep` has passed")
                uploaded = await self.objects.upload(source)
            wanted = existing or uploaded
            assert wanted is not None
            title, content_type = labels.title or wanted.title, labels.content_type or wanted.content_type
            wanted = replace(wanted, name=name, title=title, content_type=content_type)
            try:
                await self.objects.write_info(wanted, expected_seq=known.seq if known else 0)
            except Conflict:
                continue
            if uploaded is not None and uploaded.nuid != wanted.nuid:
                await self._purge_unused_upload(name, uploaded)
            return
        if uploaded is not None:
            await self._purge_unused_upload(name, uploaded)
        raise Unavailable(
            f"document {name}: other programs changed it before each of {TOUCH_TRIES_MAX} writes: try again"
        )

    async def _purge_unused_upload(self, name: str, uploaded: ObjectInfo) -> None:
        """Delete the chunks of an upload, unless the document uses them: a write may be stored and its ack lost.

        Never raises: the collector does later what fails now.
        """
        with contextlib.suppress(AIQueueError):
            known = await self.objects.read_info(name)
            if known is None or known.nuid != uploaded.nuid:
                await self.objects.purge(self.objects.subject("C", uploaded.nuid))

    async def _require_info(self, document: Document) -> ObjectInfo:
        info = await self.objects.read_info(f"{document.tenant}/{document.sha256}")
        if info is None or info.deleted:
            raise _not_stored(document.tenant, document.sha256, "it was never put, or deleted since")
        return info

    def _hold_subject(self, hold: DocumentHold) -> str:
        return self.objects.subject("R", *hold)

    def _holds_filter(self, tenant: str, sha256: str) -> str:
        return self.objects.subject("R", tenant, sha256, ">")


def document_of(info: ObjectInfo) -> Document | None:
    """Return the document in an object; None if another program has put the object into this store."""
    tenant, slash, sha256 = info.name.partition("/")
    try:
        return Document(
            tenant=tenant, sha256=sha256 if slash else "", size=info.size, name=info.title,
            content_type=info.content_type,
        )  # fmt: skip
    except pydantic.ValidationError:
        return None


def _document_named(tenant: str, sha256: str, size: int = 0) -> Document:
    subjects.token("tenant", tenant)
    try:
        return Document(tenant=tenant, sha256=sha256, size=size)
    except pydantic.ValidationError:
        raise BadInput(f"{sha256[:80]!r} is no document: pass a SHA-256 of 64 hexadecimal digits") from None


def _not_stored(tenant: str, sha256: str, hint: str) -> NotFound:
    return NotFound(f"document {sha256} of tenant {tenant} is not stored: {hint}")


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
