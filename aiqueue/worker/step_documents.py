"""The large results of one run's steps: documents that are held for as long as the run's entries are kept."""

from __future__ import annotations

from collections.abc import Collection

from ..documents import Documents
from ..errors import BadInput
from ..payload import Document, HeldDocument
from ..subjects import ParentRun


class StepDocuments:
    """Stores them for one run; see `journal.LargeSteps`."""

    def __init__(self, documents: Documents, tenant: str, run: ParentRun) -> None:
        self._documents = documents
        self._tenant = tenant
        self._run = run.tokens

    async def hold(self, body: bytes) -> HeldDocument:
        """See `Documents.hold_step`. Raises BadInput if large bodies are not stored as documents."""
        if not self._documents.stores_large:
            raise BadInput(f"{len(body):,} bytes are too large for a step while the setting claim_check is 0")
        return await self._documents.hold_step(self._tenant, self._run, body)

    async def release(self, held: HeldDocument) -> None:
        """See `Documents.end_step`."""
        await self._documents.end_step(held)

    async def read(self, document: Document) -> bytes:
        """See `Documents.read_result_body`."""
        return await self._documents.read_result_body(document)

    async def forget(self, documents: Collection[Document]) -> None:
        """See `Documents.end_steps`."""
        await self._documents.end_steps(self._tenant, self._run, [each.sha256 for each in documents])
