"""One execution of a batch, and the batch's document, which it alone may write: see `BatchRun`."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Final

from ...errors import AIQueueError, Conflict, Stale
from ...job import Job, Retry
from ..runtime import Runtime
from .messages import GatewayBatch
from .model import BatchQuotas, RequestBatch
from .store import BatchStore

log = logging.getLogger(__name__)

LOOK_S: Final = 1.0  # how often the batch is looked at for whether it was cancelled
ALIVE_S: Final = 60.0  # how often it is written at least


@dataclass(frozen=True, slots=True)
class BatchState:
    """What the handler has of its worker: the state of its jobs."""

    runtime: Runtime
    quotas: BatchQuotas = field(default_factory=BatchQuotas)
    stopping: asyncio.Event = field(default_factory=asyncio.Event)  # its worker stops, so batches are handed back


class BatchRun:
    """One execution of a batch. It writes the batch's document, of which others write only that it is cancelled."""

    def __init__(self, job: Job[GatewayBatch], store: BatchStore, batch: RequestBatch) -> None:
        self.job, self.store, self.batch = job, store, batch
        self.runtime: Runtime = job.state.runtime
        self.quotas: BatchQuotas = job.state.quotas
        self.stopping: asyncio.Event = job.state.stopping
        self.stop = ""  # "cancelled", "expired", "failed": no further line is called
        self._saving = asyncio.Lock()

    @classmethod
    async def claim(cls, job: Job[GatewayBatch]) -> BatchRun | None:
        """Become the one that writes the batch, and return its run. None: there is no such batch."""
        client = job.state.runtime.client
        store = BatchStore(client.connection, client.topology)
        batch = await _read(store, job.tenant, job.message.batch_id)
        if batch is None:
            return None
        run, owner = cls(job, store, batch), secrets.token_hex(8)
        while not run.batch.has_ended:
            draft = replace(run.batch, owner=owner)
            try:
                await run._put(draft)
                break
            except Conflict:
                found = await _read(store, job.tenant, batch.id)
                if found is None:
                    return None
                run.batch = found
        return run

    async def save(self, change: Callable[[RequestBatch], RequestBatch]) -> None:
        """Store what `change` makes of the batch, which somebody may have cancelled meanwhile. Raises Stale if another
        execution has taken over, and Unavailable.
        """
        async with self._saving:
            while True:
                try:
                    await self._put(change(self.batch))
                except Conflict:
                    found = await _read(self.store, self.batch.tenant, self.batch.id)
                    if found is None or found.owner != self.batch.owner:
                        raise Stale(f"batch {self.batch.id} is run elsewhere", ended=found is None) from None
                    self.batch = found
                else:
                    return

    async def _put(self, batch: RequestBatch) -> None:
        keep_s = batch.output_keep_s if batch.has_ended else None
        seq = await self.store.put(
            "batch", batch.tenant, batch.id, batch.plain(), expected=self.batch.seq, keep_s=keep_s
        )
        self.batch = replace(batch, seq=seq, written_at=await self.store.now())

    async def now(self) -> float:
        return await self.store.now()

    @asynccontextmanager
    async def looking_after(self) -> AsyncIterator[None]:
        """Look meanwhile for whether the batch is cancelled or has expired, and show that it is alive."""
        task = asyncio.create_task(self._look_after())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])

    async def look(self) -> None:
        """See whether the batch is to be stopped. Raises Unavailable."""
        found = await _read(self.store, self.batch.tenant, self.batch.id)
        if found is not None and found.problems:
            self.stop = "failed"
        elif found is not None and found.status == "cancelling":
            self.stop = "cancelled"
        elif await self.now() >= self.batch.expires_at:
            self.stop = self.stop or "expired"

    async def _look_after(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await self.look()
                if await self.now() - self.batch.written_at > ALIVE_S:
                    await self.save(lambda batch: batch)
            except AIQueueError as error:
                log.debug("batch %s is not looked at now: %s", self.batch.id, error)

    def hand_back_if_stopping(self) -> None:
        """Raise Retry if the worker stops: another one goes on from what is stored."""
        if self.stopping.is_set():
            raise Retry("its worker stops", after=0.0)


async def _read(store: BatchStore, tenant: str, batch_id: str) -> RequestBatch | None:
    kept = await store.get("batch", tenant, batch_id)
    return None if kept is None else RequestBatch.parse(tenant, kept.content, seq=kept.seq, written_at=kept.at)
