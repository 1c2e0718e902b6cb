"""One job, one version of a document: read, cut, embedded, stored. The truth of what is done lies in the store."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any, Final

from ..errors import AIQueueError, BadInput, EmbedderChanged, SettingsError, Stale
from ..job import Job, Reject, Retry
from . import sources
from .embed_batcher import EmbedBatcher
from .errors import FetchFailed, StoreDamaged, StoreUnavailable
from .failures import counting_failures, is_waited_for, next_attempt, reason_of
from .fetch_share import NoRoom
from .messages import RagDelete, RagDocument, check_tenant
from .runtime import RagRuntime
from .types import (
    Chunk,
    ChunkedDocument,
    DocumentHeader,
    DocumentState,
    IndexedChunks,
    IndexedDocument,
    PutOutcome,
    State,
)
from .versions import version_of

BATCH: Final = 64  # chunks of a large document that are staged together; a smaller document is stored at once
REPORT_EVERY_S: Final = 1.0
CANCELLED_S: Final = 3.0  # for a note that the job was cancelled
EMBEDDER_CHANGED_S: Final = 30.0  # until a document is tried again whose tenant has to be indexed anew; longer later
EMBEDDER_CHANGED_MAX_S: Final = 300.0


async def ingest(job: Job[RagDocument]) -> dict[str, Any]:
    """Ingest a document: the handler of RagDocument."""
    return await ingest_as(job, job.message)


async def ingest_as(job: Job[Any], message: RagDocument, version: int | None = None) -> dict[str, Any]:
    """Ingest the document of a message as a version; None: that of this job. Returns what docs/guides/rag.md says.

    Raises Reject for what can never be ingested, Retry for what may pass; both stand in the document's status.
    """
    runtime: RagRuntime = job.state
    try:
        document_id = sources.document_id_of(_id_fields(message), job.headers, job.id)
        check_tenant(message, job.tenant)
    except BadInput as error:
        raise Reject(str(error)) from None
    made = _Version(job, runtime, message, document_id, version or version_of(job))
    try:
        result = await made.ingest()
    except (asyncio.CancelledError, Stale):
        await made.note_cancelled()
        raise
    except Reject as error:
        await made.note_failure(error.reason, final=True)
        raise
    except EmbedderChanged as error:  # an operator decides for how long: no attempt counts
        runtime.forget(job.tenant)
        await made.note_failure(str(error))
        raise Retry(str(error), after=min(EMBEDDER_CHANGED_S * job.attempt, EMBEDDER_CHANGED_MAX_S)) from None
    except NoRoom:
        raise
    except Retry as error:
        raise await made.count_failure(error.reason, error.after_s) from error
    except FetchFailed as error:
        raise await made.count_failure(str(error), error.retry_after_s, waits=error.waits) from None
    except BadInput as error:
        if isinstance(error, SettingsError):  # of this worker: another one may have what is missing
            raise await made.count_failure(str(error)) from error
        await made.note_failure(str(error), final=True)
        raise Reject(str(error)) from None
    except Exception as error:
        if isinstance(error, StoreDamaged | StoreUnavailable):  # which may not be able to keep a note of that
            runtime.store_problems[job.tenant] = str(error)
        raise await made.count_failure(reason_of(error), waits=is_waited_for(error)) from error
    else:
        runtime.store_problems.pop(job.tenant, None)
        return result


def _id_fields(message: RagDocument) -> dict[str, Any]:
    return {"document_id": message.document_id, "path": message.path, "url": message.url}


class _Version:
    """The version of a document that a job makes."""

    def __init__(
        self, job: Job[Any], runtime: RagRuntime, message: RagDocument, document_id: str, version: int
    ) -> None:
        self._job = job
        self._runtime = runtime
        self._store = runtime.store
        self._message = message
        self._id = document_id
        self._tenant = job.tenant
        self.version = version
        self._reported_at = 0.0

    async def ingest(self) -> dict[str, Any]:
        await self._runtime.open(self._tenant)
        known = await self._store.document(self._tenant, self._id)
        if self._is_superseded(known):
            return self._result("old")
        message, config = self._message, self._runtime.config
        if message.chunks is not None:
            chunked = ChunkedDocument(message.title, sources.given_chunks(message))
            content_hash = sources.content_hash(message, None, config.parsing.parsers)
            return await self._ingest(known, None, content_hash, chunked)
        async with sources.opened(
            self._job, message, config, self._runtime.fetch_limits, self._runtime.fetches, self._runtime.open_bytes
        ) as content:
            content_hash = sources.content_hash(message, content, config.parsing.parsers)
            return await self._ingest(known, content, content_hash, None)

    async def _ingest(
        self, known: DocumentState | None, content: sources.Content | None, content_hash: str,
        chunked: ChunkedDocument | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Store what is not stored with this hash yet."""
        if (
            known is not None
            and known.indexed_version is not None
            and await self._store.move(self._tenant, self._id, self.version, content_hash)
        ):
            return self._result("same", known.chunks, known.title, known.problems)
        if chunked is None:
            assert content is not None
            chunked = await self._runtime.pool.parse_to_chunks(
                content.content, name=content.name, content_type=content.content_type
            )
        header = DocumentHeader(
            self._id, self.version, content_hash, self._message.title or chunked.title,
            content.source if content is not None else "", self._message.metadata, chunked.problems,
            sources.hints(self._message),
        )  # fmt: skip
        if len(chunked.chunks) <= BATCH:
            rows = await embed_chunks(self._runtime.batcher, self._tenant, chunked.chunks)
            outcome = await self._runtime.upserter.put(self._tenant, IndexedDocument(header, rows))
        else:
            if not await self._stage(content_hash, chunked.chunks):
                return self._result("old")
            outcome = await self._commit(header, len(chunked.chunks))
        return self._result(outcome, len(chunked.chunks), header.title, header.problems)

    async def _stage(self, content_hash: str, chunks: Sequence[Chunk]) -> bool:
        """Embed and store what is missing of a large document. False: a newer version is stored meanwhile."""
        done = await self._store.staged(self._tenant, self._id, self.version, content_hash)
        total = len(chunks)
        for batch, at in enumerate(range(0, total, BATCH)):
            if batch in done:
                continue
            if self._job.deadline is not None and self._runtime.now() > self._job.deadline:
                raise Reject("its deadline has passed while it was ingested")
            if await self._report("embedding", at, total) and self._is_superseded(
                await self._store.document(self._tenant, self._id)
            ):
                return False
            part = chunks[at : at + BATCH]
            rows = await embed_chunks(self._runtime.batcher, self._tenant, part)
            await self._store.stage(self._tenant, self._id, self.version, content_hash, batch, rows)
        return True

    async def _commit(self, header: DocumentHeader, total: int) -> PutOutcome:
        await self._report("storing", total, total, now=True)
        try:
            return await self._store.commit(self._tenant, header)
        except BadInput:
            staged = await self._store.staged(self._tenant, self._id, self.version, header.content_hash)
            if len(staged) * BATCH >= total:
                raise
            why = "what was staged was dropped: the tenant's vectors were made anew, or its content has changed"
            raise Retry(why, after=1.0) from None

    async def _report(self, stage: str, done: int, total: int, *, now: bool = False) -> bool:
        """Report progress, at most once a second. Says whether."""
        if not now and time.monotonic() - self._reported_at < REPORT_EVERY_S:
            return False
        self._reported_at = time.monotonic()
        await self._note("working", stage=stage, done=done, total=total)
        await self._job.progress(done / total, f"{stage}: {done:,} of {total:,} chunks")
        return True

    async def count_failure(
        self, reason: str, after_s: float | None = None, *, waits: bool = False
    ) -> Retry | Reject:  # fmt: skip
        """Note why this attempt has failed, and return what to raise: see `next_attempt`."""
        found = await next_attempt(self._job, reason, after_s=after_s, waits=waits)
        is_final = isinstance(found, Reject)
        await self.note_failure(found.reason if is_final else reason, final=is_final)
        return found

    async def note_failure(self, reason: str, *, final: bool = False) -> None:
        """Note why this attempt has failed, and whether another one follows. What cannot be noted is left out."""
        state: State = "failed" if final else "working"
        with contextlib.suppress(AIQueueError):
            await self._note(state, stage="" if final else "waiting for the next attempt", reason=reason[:2_000])

    async def note_cancelled(self) -> None:
        """Note that the job was cancelled, which drops what is staged; nothing if its worker leaves, or has lost it."""
        with contextlib.suppress(AIQueueError, TimeoutError):
            async with asyncio.timeout(CANCELLED_S):
                if ended := await self._runtime.end_of_job(self._tenant, self._job.id):
                    await self._note(ended.state, reason=ended.reason)

    async def _note(self, state: State, **told: Any) -> None:
        await self._store.note(self._tenant, self._id, self.version, state, job_id=self._job.id, **told)

    def _is_superseded(self, known: DocumentState | None) -> bool:
        if known is None:
            return False
        is_deleted = known.state == "deleted" and known.version > self.version
        return is_deleted or (known.indexed_version or 0) > self.version

    def _result(
        self, outcome: str, chunks: int = 0, title: str = "", problems: Sequence[str] = ()
    ) -> dict[str, Any]:  # fmt: skip
        return {
            "document_id": self._id, "version": self.version,
            "state": "completed_with_errors" if problems else "completed",
            "outcome": outcome, "superseded": outcome == "old", "chunks": chunks, "title": title,
            "problems": list(problems),
        }  # fmt: skip


async def embed_chunks(batcher: EmbedBatcher, tenant: str, chunks: Sequence[Chunk]) -> IndexedChunks:
    """Return chunks with their vectors. A heading that several have is embedded once; "" is a vector of zeros."""
    import numpy as np  # noqa: PLC0415  (loaded where it is needed)

    headings = list(dict.fromkeys(each.heading for each in chunks if each.heading))
    vectors = await batcher.embed([*(each.text for each in chunks), *headings], tenant=tenant)
    bodies, of_headings = vectors[: len(chunks)], np.zeros((len(chunks), vectors.shape[1]), np.float32)
    places = {heading: len(chunks) + at for at, heading in enumerate(headings)}
    for row, each in enumerate(chunks):
        if each.heading:
            of_headings[row] = vectors[places[each.heading]]
    return IndexedChunks(chunks, bodies, of_headings)


async def delete(job: Job[RagDelete]) -> dict[str, Any]:
    """Delete a document: the handler of RagDelete."""
    runtime: RagRuntime = job.state
    try:
        check_tenant(job.message, job.tenant)
    except BadInput as error:
        raise Reject(str(error)) from None
    document_id, version = job.message.document_id, version_of(job)
    async with counting_failures(job):
        is_newest = await runtime.store.delete(job.tenant, document_id, version)
    return {"document_id": document_id, "version": version, "state": "deleted", "superseded": not is_newest}
