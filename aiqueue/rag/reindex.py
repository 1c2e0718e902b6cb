"""Reindexing: one document from where it came from, or all vectors of a tenant by another embedder."""

from __future__ import annotations

from typing import Any, Final

from ..errors import BadInput
from ..job import Job, Reject
from .failures import counting_failures
from .ingest import embed_chunks, ingest_as
from .messages import RagDocument, RagReindex, check_tenant
from .runtime import RagRuntime
from .sources import why_not_read

ROWS: Final = 256  # chunks that are embedded and stored together
ROUNDS_MAX: Final = 1_000  # of what other workers have ingested meanwhile


async def reindex(job: Job[RagReindex]) -> dict[str, Any]:
    """Index a document or all documents anew: the handler of RagReindex."""
    try:
        check_tenant(job.message, job.tenant)
    except BadInput as error:
        raise Reject(str(error)) from None
    if job.message.document_id is not None:
        return await _reindex_document(job, job.message.document_id)
    async with counting_failures(job):
        return await _reindex_all(job)


async def _reindex_document(job: Job[RagReindex], document_id: str) -> dict[str, Any]:
    runtime: RagRuntime = job.state
    async with counting_failures(job):
        known = await runtime.store.document(job.tenant, document_id)
    if known is None or not known.source:  # no dead letter: no replay could mend that
        return {"document_id": document_id, "state": "failed", "outcome": "", "problems": [why_not_read(known)]}
    is_url = known.source.startswith(("http://", "https://"))
    where: dict[str, Any] = {"url": known.source} if is_url else {"path": known.source}
    where |= known.hints
    message = RagDocument(document_id=document_id, metadata=dict(known.metadata), **where)
    # As the version that it is: as a newer one it would hide versions by value that are queued before this job.
    return await ingest_as(job, message, known.indexed_version)


async def _reindex_all(job: Job[RagReindex]) -> dict[str, Any]:
    """Embed what has no vector of this embedder yet, until every chunk has one, and make these the present ones.

    Another attempt goes on with what is missing. What other workers ingest meanwhile is missing too, and done next.
    """
    runtime: RagRuntime = job.state
    store, embedder, tenant = runtime.store, runtime.batcher.embedder, job.tenant
    stats = await store.stats(tenant)
    embedded = 0
    for _ in range(ROUNDS_MAX):
        if await store.switch(tenant, embedder.name, embedder.dimensions):
            runtime.forget(tenant)
            return {
                "documents": stats.documents,
                "chunks": stats.chunks,
                "embedded": embedded,
                "embedder": embedder.name,
            }
        after = 0
        while rows := await store.chunks(tenant, embedder.name, after=after, limit=ROWS, missing=True):
            found = await embed_chunks(runtime.batcher, tenant, [chunk for _, chunk in rows])
            await store.replace_vectors(tenant, embedder.name, [row for row, _ in rows], found.bodies, found.headings)
            after, embedded = rows[-1][0], embedded + len(rows)
            await job.progress(min(1.0, embedded / max(1, stats.chunks)), f"{embedded:,} chunks embedded")
    raise Reject("documents come in faster than they are embedded anew: stop ingesting, and reindex again")
