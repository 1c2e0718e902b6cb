"""The end of a batch: its parts are joined to files, and what it had reserved is given back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ...errors import Conflict
from ...payload import Document
from .model import BatchFile, Part, RequestBatch, Status

if TYPE_CHECKING:
    from ...client import Client
    from .run import BatchRun
    from .store import BatchStore


async def finish(run: BatchRun) -> None:
    """Make the files of a batch whose lines have all ended, and say so. May be repeated after a crash."""
    if not run.batch.problems and run.batch.status == "in_progress" and not run.batch.stopped:
        at = int(await run.now())
        await run.save(lambda batch: _at(batch, "finalizing", at))
    client, store = run.runtime.client, run.store
    output = await join_parts(client, store, run.batch, run.batch.output, "output")
    errors = await join_parts(client, store, run.batch, run.batch.error_output, "error")
    key = await run.runtime.api_keys.key_of(run.batch.tenant, run.batch.headers)
    await run.runtime.budgets.release(  # also without a month, which is noted behind the reservation
        run.batch.tenant,
        run.batch.id,
        month=run.batch.month,
        key="" if key is None or key.budget is None else key.id,
    )
    parts = (*run.batch.output, *run.batch.error_output)
    at = int(await run.now())

    def end(batch: RequestBatch) -> RequestBatch:
        ended = _at(batch, _status_of(batch, run.stop), at)
        return replace(
            ended, output_file_id=output, error_file_id=errors, output=(), error_output=(), done=(), owner=""
        )

    await run.save(end)
    for sha256, size in parts:
        document = Document(tenant=run.batch.tenant, sha256=sha256, size=size)
        await run.runtime.client.documents.forget(document, hold=run.batch.id)


def _status_of(batch: RequestBatch, stop: str) -> Status:
    if batch.problems:
        return "failed"
    if batch.status == "cancelling":
        return "cancelled"
    return "expired" if batch.stopped or (stop == "expired" and batch.status == "validating") else "completed"


def _at(batch: RequestBatch, status: Status, at: int) -> RequestBatch:
    if batch.status == "cancelling" and status not in ("cancelled", "failed"):
        return batch  # it was cancelled meanwhile
    return replace(batch, status=status, times={**batch.times, f"{status}_at": at})


async def join_parts(
    client: Client, store: BatchStore, batch: RequestBatch, parts: tuple[Part, ...], what: Literal["output", "error"]
) -> str | None:
    """Join parts to a file, and return its id; None: there are none. Its id is made of the batch's. Raises NotFound and
    Corrupt for a part that cannot be read.
    """
    if not parts:
        return None
    file_id = f"file-{batch.id.removeprefix('batch_')}-{what}"
    document = await client.documents.put(
        _read_parts(client, batch.tenant, parts), tenant=batch.tenant, keep=batch.output_keep_s, hold=file_id,
        name=f"{batch.id}_{what}.jsonl", content_type="application/jsonl",
    )  # fmt: skip
    at = int(await store.now())
    file = BatchFile(
        id=file_id, tenant=batch.tenant, filename=f"{batch.id}_{what}.jsonl", size=document.size,
        sha256=document.sha256, purpose="batch_output", created_at=at, expires_at=at + batch.output_keep_s,
    )  # fmt: skip
    with contextlib.suppress(Conflict):  # made before a crash, of the same parts
        await store.put("file", batch.tenant, file_id, file.plain(), expected=0, keep_s=batch.output_keep_s)
    return file_id


async def _read_parts(client: Client, tenant: str, parts: tuple[Part, ...]) -> AsyncIterator[bytes]:
    for sha256, size in parts:
        document = Document(tenant=tenant, sha256=sha256, size=size)
        async with aclosing(client.documents.read_chunks(document)) as chunks:
            async for chunk in chunks:
                yield chunk
