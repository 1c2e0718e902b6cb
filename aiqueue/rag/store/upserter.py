"""Group commit: documents that arrive together are stored in one transaction."""

from __future__ import annotations

import asyncio
import contextvars
import time
from dataclasses import dataclass, field

from ...errors import BadInput
from ..types import IndexedDocument, PutOutcome, VectorStore

DOCUMENTS_MAX = 64  # in a transaction
CHUNKS_MAX = 1_024  # in a transaction of more than one document
SPACING_S = 0.025  # from the begin of a transaction to that of the next one of the tenant


@dataclass(slots=True, eq=False)
class _PendingPut:
    document: IndexedDocument
    outcome: asyncio.Future[PutOutcome]


@dataclass(slots=True, eq=False)
class _TenantQueue:
    waiting: list[_PendingPut] = field(default_factory=list)
    task: asyncio.Task[None] | None = None


class Upserter:
    """Stores documents of all tenants through a store, in groups.

    One transaction of a tenant is under way; what arrives meanwhile, and until 25 ms after its begin, is the next: up
    to 64 different documents, or 1,024 chunks. So a document that comes alone is stored at once, and of a stream that
    trickles in, which costs questions most, several are stored together. What waits is bounded by the callers, who each
    wait for their document.
    """

    def __init__(self, store: VectorStore) -> None:
        self._store = store
        self._queues: dict[str, _TenantQueue] = {}
        self._is_closed = False

    async def put(self, tenant: str, document: IndexedDocument) -> PutOutcome:
        """Store one document, as `VectorStore.put` does. Raises what that raises for this document alone.

        A caller that is cancelled before its transaction begins stores nothing.
        """
        if self._is_closed:
            raise BadInput("the upserter is closed: make another Upserter")
        queue = self._queues.setdefault(tenant, _TenantQueue())
        mine = _PendingPut(document, asyncio.get_running_loop().create_future())
        queue.waiting.append(mine)
        if queue.task is None:  # in an empty context: the next documents may be of another job
            queue.task = asyncio.create_task(self._run(tenant, queue), context=contextvars.Context())
        return await mine.outcome

    async def close(self) -> None:
        """Wait until all that was put is stored or has failed. May be called twice."""
        self._is_closed = True
        await asyncio.gather(*(queue.task for queue in self._queues.values() if queue.task is not None))

    async def _run(self, tenant: str, queue: _TenantQueue) -> None:
        try:
            while group := _take_group(queue.waiting):
                begun = time.monotonic()
                await self._store_group(tenant, group)
                left_s = begun + SPACING_S - time.monotonic()
                if left_s > 0 and len(queue.waiting) < DOCUMENTS_MAX and not self._is_closed:
                    await asyncio.sleep(left_s)
        finally:
            queue.task = None
            del self._queues[tenant]
            for each in queue.waiting:  # only if this task was cancelled
                each.outcome.cancel()

    async def _store_group(self, tenant: str, group: list[_PendingPut]) -> None:
        try:
            outcomes = await self._store.put(tenant, [each.document for each in group])
        except asyncio.CancelledError:
            for each in group:
                each.outcome.cancel()
            raise
        except Exception as error:  # noqa: BLE001 - whatever a user's store raises is the caller's
            if len(group) == 1 or getattr(error, "retryable", False):
                _fail(group, error)
            else:  # one of them is at fault, and the others are not to suffer from it
                for each in group:
                    await self._store_group(tenant, [each])
        else:
            for each, outcome in zip(group, outcomes, strict=True):
                if not each.outcome.done():
                    each.outcome.set_result(outcome)


def _take_group(waiting: list[_PendingPut]) -> list[_PendingPut]:
    """Take the next group from the front. It has no document twice, because of two versions one may fail alone."""
    group: list[_PendingPut] = []
    ids: set[str] = set()
    chunks = taken = 0
    for each in waiting:
        header = each.document.header
        if not each.outcome.done():
            chunks += len(each.document.content.chunks)
            if group and (header.document_id in ids or len(group) == DOCUMENTS_MAX or chunks > CHUNKS_MAX):
                break
            ids.add(header.document_id)
            group.append(each)
        taken += 1
    del waiting[:taken]
    return group


def _fail(group: list[_PendingPut], error: Exception) -> None:
    for each in group:
        if not each.outcome.done():
            each.outcome.set_exception(error)
