"""A batch whose job was lost, cancelled, or became a dead letter, and which has not ended: it is run to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from ... import subjects
from ...errors import AccessDenied, AIQueueError, Conflict, Corrupt, NotFound
from ...journal import CANCELLED, RESULT
from ..budgets import Budgets
from ..key_budgets import API_KEY
from ..ledger import UsageLedger, month_of
from ..usage_store import UsageStore
from .finishing import join_parts
from .messages import GatewayBatch
from .model import LineProblem, RequestBatch
from .output import LINES, line_id

if TYPE_CHECKING:
    from ...client import Client
    from ...subjects import OnDuplicate
    from .store import BatchStore

JOB_FAILED: Final = "job_failed"
CANCELS_AT_ONCE: Final = 16


async def enqueue_batch(client: Client, batch: RequestBatch, on_duplicate: OnDuplicate = "first") -> None:
    """Store the job that runs a batch."""
    message = GatewayBatch(batch_id=batch.id, input=batch.document)
    await client.enqueue(message, tenant=batch.tenant, on_duplicate=on_duplicate)


async def end_without_job(
    client: Client, store: BatchStore, batch: RequestBatch, *, may_be_lost: bool = False
) -> RequestBatch:
    """Look at the job of a batch that has not ended, and return the batch as it is then.

    1. There is no trace of the job, and it `may_be_lost`: it is enqueued again.
    2. The job was cancelled: so is the batch. Its job runs again, which stops the lines and makes the files.
    3. The job has failed: the same, and the batch ends as failed. If that run fails too, the batch ends here: its lines
       are cancelled, and the files have what was stored of them.
    """
    family = client.topology.family(GatewayBatch.aiq_family)
    assert family.journal is not None
    head = await client.journal.head(subjects.journal(family.journal, batch.tenant, batch.id))
    if head is None:
        if may_be_lost:
            try:
                await client.job(batch.id, family=family.name, tenant=batch.tenant)
            except NotFound:  # its creator has died between two writes
                await enqueue_batch(client, batch)
        return batch
    if not head.final:
        return batch
    draft, at = batch, int(await store.now())
    if head.event != CANCELLED:
        has_failed = any(each.code == JOB_FAILED for each in batch.problems)
        if not has_failed or batch.failed_run != head.run:  # else the run that is to end it waits, or was not enqueued
            why = "its job has ended" if head.event == RESULT else str(head.as_error(batch.id))
            problem = LineProblem(JOB_FAILED, why[:500])
            draft = replace(batch, problems=(*batch.problems, problem), failed_run=head.run)
            if has_failed or head.event == RESULT:
                return await _end(client, store, draft, at)
    elif batch.status not in ("cancelling", "finalizing"):
        draft = replace(batch, status="cancelling", times={**batch.times, "cancelling_at": at})
    if draft != batch and not (draft := await _put(store, draft)).seq:
        return await _read(store, batch)  # it was written meanwhile
    await enqueue_batch(client, draft, "rerun_failed")
    return draft


async def _end(client: Client, store: BatchStore, batch: RequestBatch, at: int) -> RequestBatch:
    """End a batch whose job fails whenever it runs."""
    done = {number for first, last in batch.done for number in range(first, last + 1)}
    await cancel_lines(client, batch, set(range(batch.line + 1, batch.sent + 1)) - done)
    output = errors = None
    with contextlib.suppress(NotFound, Corrupt):  # perhaps it has failed because of them
        output = await join_parts(client, store, batch, batch.output, "output")
        errors = await join_parts(client, store, batch, batch.error_output, "error")
    usage = UsageStore(client.connection, client.topology)
    budgets = Budgets(usage, UsageLedger(usage))
    for month in {batch.month} if batch.month else {month_of(batch.created_at), month_of(at)}:
        with contextlib.suppress(AccessDenied):  # of a user who only asks: it counts as held after a day
            await budgets.release(batch.tenant, batch.id, month=month, key=batch.headers.get(API_KEY, ""))
    await budgets.close()
    draft = replace(
        batch, status="failed", times={**batch.times, "failed_at": at}, output_file_id=output,
        error_file_id=errors, output=(), error_output=(), done=(), owner="",
    )  # fmt: skip
    draft = await _put(store, draft)
    return draft if draft.seq else await _read(store, batch)


async def cancel_lines(client: Client, batch: RequestBatch, numbers: Iterable[int]) -> None:
    """Cancel the jobs of lines, as far as there are any and the server answers."""

    async def cancel(number: int) -> None:
        async with at_once:
            with contextlib.suppress(AIQueueError):
                await client.cancel(line_id(batch.id, number), family=LINES, tenant=batch.tenant)

    at_once = asyncio.Semaphore(CANCELS_AT_ONCE)
    await asyncio.gather(*map(cancel, numbers))


async def _put(store: BatchStore, draft: RequestBatch) -> RequestBatch:
    """Store what has become of a batch, and return it. Without a sequence: another write came first."""
    keep_s = draft.output_keep_s if draft.has_ended else None
    try:
        seq = await store.put("batch", draft.tenant, draft.id, draft.plain(), expected=draft.seq, keep_s=keep_s)
    except Conflict:
        seq = 0
    return replace(draft, seq=seq)


async def _read(store: BatchStore, batch: RequestBatch) -> RequestBatch:
    """Return a batch as it is stored now. Raises NotFound."""
    kept = await store.get("batch", batch.tenant, batch.id)
    if kept is None:
        raise NotFound(f"no such batch: {batch.id!r}")
    return RequestBatch.parse(batch.tenant, kept.content, seq=kept.seq, written_at=kept.at)
