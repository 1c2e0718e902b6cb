"""What a job in a worker may ask for while it runs, and how its attempt is heard and stopped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from .. import headers, subjects
from ..attempt import RunningAttempt
from ..document_ref import Document
from ..documents import Documents
from ..errors import BadInput, Stale
from ..journal import PROGRESS, Journal, Retention, Writer
from ..lanes import Delivery
from ..topology import Family
from .settlement import Opened


class WorkerResources:
    """What all attempts of one worker speak through."""

    def __init__(self, journal: Journal, documents: Documents, families: Mapping[str, Family]) -> None:
        self.journal = journal
        self.documents = documents
        self.families = families
        self.loop = asyncio.get_running_loop()
        self.kept = {name: Retention(family.journal_ttl_s, family.chunk_ttl_s) for name, family in families.items()}


class JobContext(RunningAttempt):
    """What a job may ask for while it runs: see `job.Progress`. And how its attempt is stopped. A `silent` one writes
    nothing, for it would hide the entry of the trial that the job is in.

    Its writer is made when it is first asked for: most jobs end without a word.
    """

    silent = False
    _writer: Writer | None = None
    _begun = 0.0

    def __init__(self, resources: WorkerResources, delivery: Delivery, opened: Opened) -> None:
        task = delivery.task or asyncio.current_task(
            resources.loop
        )  # a task that is begun eagerly is not known there yet
        assert task is not None
        self.task = task
        self.journaled = bool(opened.raw.family.journal)
        self._means = resources
        self._delivery = delivery
        self._opened = opened
        self._since = delivery.lane.created

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._means.loop

    @property
    def cancelled(self) -> bool:
        return self.asked or self.over

    @property
    def writer(self) -> Writer | None:
        family = self._opened.raw.family
        if self._writer is None and family.journal:
            resources, delivery, opened = self._means, self._delivery, self._opened
            self._writer = resources.journal.writer(
                self.key[0],
                run=delivery.run,
                enqueued_at=delivery.enqueued_at,
                attempt=opened.attempt,
                record=opened.record,
                word=headers.word(opened.raw.headers),
                since=self._since,
                kept=resources.kept[family.name],
            )
            self._writer.begun = self._begun
        return self._writer

    @property
    def key(self) -> tuple[str, int]:
        journal = self._opened.raw.family.journal or ""
        return subjects.journal(journal, self._delivery.tenant, self._opened.job_id), self._delivery.run

    def begin(self) -> None:
        """The handler is about to be called."""
        self._begun = time.time()
        if self._writer is not None:
            self._writer.begun = self._begun

    @property
    def streams(self) -> bool:
        """Whether the job has given chunks, so that there is something to flush."""
        return self._writer is not None and self._writer.streams

    async def flush(self) -> None:
        """Return when all chunks are stored. Raises as the writer's."""
        if self._writer is not None:
            await self._writer.flush()

    def close(self) -> None:
        """Forget the chunks that are not stored."""
        if self._writer is not None:
            self._writer.close()

    async def progress(self, fraction: float, note: str) -> None:
        self._demand_wanted()
        if not self.silent and (writer := self.writer) is not None:
            await writer.write(PROGRESS, {"fraction": fraction, "note": note})

    async def chunk(self, data: Any) -> None:
        self._demand_wanted()
        if (writer := self.writer) is None:
            return
        if self.silent:
            writer.lose(1)
        else:
            await writer.chunk(data)

    def _demand_wanted(self) -> None:
        if self.asked:  # the journal refuses it too; else one that streams could keep who cancels from writing there
            raise Stale("the job was cancelled", ended=True)
        if self.over:
            raise Stale("this attempt is over, and says nothing more of its job", ended=False)

    def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        tenant = self._delivery.tenant
        if document.tenant != tenant:  # a child's word for it is not enough
            raise BadInput(f"a document of tenant {document.tenant} cannot be read by a job of {tenant}")
        return self._means.documents.chunks(document)
