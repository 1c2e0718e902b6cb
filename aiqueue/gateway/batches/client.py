"""Files and batches as their users have them, on an open client. The routes of the front use nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, TypeVar

from ... import subjects
from ...errors import AIQueueError, BadInput, Conflict, IdReused, NotFound
from .ended_jobs import end_without_job, enqueue_batch
from .model import BATCH_ENDPOINTS, ENDED, WINDOW_S, BatchFile, BatchQuota, BatchQuotas, RequestBatch
from .store import BatchStore, KeptDocument, What

if TYPE_CHECKING:
    from ...client import Client
    from ...payload import DocumentReader

log = logging.getLogger(__name__)
T = TypeVar("T")

FILE_KEEP_S: Final = 30 * 24 * 3600  # OpenAI's default for files of batches
KEEP_MIN_S, KEEP_MAX_S = 3600, FILE_KEEP_S  # OpenAI's bounds
METADATA_MAX: Final = 16
PIECE_BYTES: Final = 512 * 1024
LOOK_AFTER_S: Final = 5.0  # after the last write of a batch, whether its job has ended without it
QUIET_S: Final = 180.0  # a batch that nobody has written for so long may have lost its job
POLL_S: Final = 1.0
FileSource = bytes | str | os.PathLike[str] | BinaryIO | AsyncIterable[bytes]


class BatchEnded(AIQueueError):
    """A batch cannot be cancelled, because its lines have ended."""


class Batches:
    """Files and batches of all tenants, on an open client::

        batches = Batches(client)
        file = await batches.upload(Path("in.jsonl"), tenant="acme")
        batch = await batches.create(file.id, tenant="acme", endpoint="/v1/chat/completions")
        batch = await batches.wait(batch.id, tenant="acme")
        async for part in batches.content(await batches.file(batch.output_file_id, tenant="acme")): ...

    A gateway worker runs them. Without state of its own. What is another tenant's is not found. All methods raise
    NotFound without the stream (run `aiqueue apply`), AccessDenied and Unavailable.
    """

    def __init__(self, client: Client, quotas: BatchQuotas | None = None) -> None:
        self._client = client
        self._quotas = quotas or BatchQuotas()
        self._store = BatchStore(client.connection, client.topology)

    # -- files

    async def upload(
        self, source: FileSource, *, tenant: str, filename: str = "", keep_s: int = FILE_KEEP_S
    ) -> BatchFile:
        """Store the input of a batch: bytes, a path, a file opened as binary, or an async iterable of bytes.

        `filename`: default: that of the path. `keep_s`: 1 hour to 30 days. Memory is constant for any size. Raises
        BadInput (too large, empty), BatchQuota, QueueFull.
        """
        filename = filename or (Path(source).name if isinstance(source, str | os.PathLike) else "batch.jsonl")
        if not 1 <= len(filename) <= 255 or not filename.isprintable():
            raise BadInput("a filename is a text of 1 to 255 printable characters")
        _check_keep(keep_s)
        await self._check_room(tenant, 0)
        file_id = f"file-{subjects.new_id()}"
        document = await self._client.documents.put(
            _bounded(source, self._quotas.file_bytes), tenant=tenant, keep=keep_s, hold=file_id, name=filename,
            content_type="application/jsonl",
        )  # fmt: skip
        at = int(await self._store.now())
        file = BatchFile(
            id=file_id, tenant=tenant, filename=filename, size=document.size, sha256=document.sha256, purpose="batch",
            created_at=at, expires_at=at + keep_s,
        )  # fmt: skip
        try:
            if not document.size:
                raise BadInput("the file is empty")  # noqa: TRY301
            await self._store.add("file", tenant, file_id, file.plain(), keep_s=keep_s)
            await self._check_room(tenant, 1)  # again: others may have uploaded meanwhile
        except BaseException:
            with contextlib.suppress(AIQueueError):
                await self._client.documents.forget(document, hold=file_id)
                await self._forget("file", tenant, file_id)
            raise
        return file

    async def file(self, file_id: str, *, tenant: str) -> BatchFile:
        """Return a file. Raises NotFound."""
        return BatchFile.parse(tenant, (await self._find("file", file_id, tenant)).content)

    async def files(self, tenant: str) -> list[BatchFile]:
        """Return all files of a tenant, the newest first."""
        found = await self._read_all("file", tenant, lambda kept: BatchFile.parse(tenant, kept.content))
        return sorted(found, key=lambda each: (each.created_at, each.id), reverse=True)

    def content(self, file: BatchFile) -> DocumentReader:
        """Return a reader of a file: ``async for part in content``, or its `read` or `save`."""
        return self._client.documents.open(file.document)

    async def delete_file(self, file_id: str, *, tenant: str) -> None:
        """Delete a file. A batch that was created with it goes on. Raises NotFound."""
        file = await self.file(file_id, tenant=tenant)
        await self._forget("file", tenant, file_id)
        await self._client.documents.forget(file.document, hold=file_id)

    # -- batches

    async def create(
        self,
        input_file_id: str,
        *,
        tenant: str,
        endpoint: str,
        completion_window: str = "24h",
        metadata: Mapping[str, str] | None = None,
        output_keep_s: int = FILE_KEEP_S,
        models: tuple[str, ...] | None = None,
        headers: Mapping[str, str] | None = None,
        unique: str | None = None,
    ) -> RequestBatch:
        """Create a batch of the lines of a file; a gateway worker checks and runs it.

        `endpoint`: of all its lines, ``/v1/chat/completions`` or ``/v1/embeddings``. `metadata`: up to 16 texts, by
        names of up to 64 characters. `output_keep_s`: of its files, 1 hour to 30 days. `models`: those that it may
        call; None: all. `headers`: of the jobs of its lines. `unique`: a text by which a repeated call returns the
        first one's batch. Raises BadInput (IdReused: the first one was for something else), NotFound (no such file),
        BatchQuota, QueueFull.
        """
        if endpoint not in BATCH_ENDPOINTS:
            raise BadInput(f"endpoint must be one of {', '.join(BATCH_ENDPOINTS)}, not {endpoint!r:.80}")
        if completion_window != "24h":
            raise BadInput(f'completion_window must be "24h", not {completion_window!r:.40}')
        _check_metadata(metadata)
        _check_keep(output_keep_s)
        batch_id = f"batch_{subjects.new_id() if unique is None else subjects.hashed(unique)}"
        if unique is not None and (kept := await self._store.get("batch", tenant, batch_id)) is not None:
            return _same(_parse(kept), input_file_id, endpoint, metadata)
        file = await self.file(input_file_id, tenant=tenant)
        if file.purpose != "batch":
            raise BadInput(f"file {file.id} has the purpose {file.purpose}: upload the input with the purpose batch")
        await self._check_batches(tenant, 0)
        at = int(await self._store.now())
        batch = RequestBatch(
            id=batch_id, tenant=tenant, endpoint=endpoint, input_file_id=file.id,
            input=(file.sha256, file.size), completion_window=completion_window, created_at=at,
            expires_at=at + int(WINDOW_S), metadata=None if metadata is None else dict(metadata), models=models,
            headers=dict(headers or {}), output_keep_s=output_keep_s,
        )  # fmt: skip
        try:
            batch = replace(batch, seq=await self._store.add("batch", tenant, batch_id, batch.plain()))
        except Conflict:  # the same call, made twice at once
            return _same(await self._batch(batch_id, tenant), input_file_id, endpoint, metadata)
        try:
            await self._check_batches(tenant, 1)  # again: others may have created some meanwhile
            await self._enqueue(batch)
        except BaseException:
            with contextlib.suppress(AIQueueError):
                await self._forget("batch", tenant, batch.id)
            raise
        return batch

    async def batch(self, batch_id: str, *, tenant: str) -> RequestBatch:
        """Return a batch. Raises NotFound. One whose job was lost, cancelled, or has failed, is enqueued again by this,
        to its end.
        """
        batch = await self._batch(batch_id, tenant)
        if batch.has_ended or (quiet_s := await self._store.now() - batch.written_at) < LOOK_AFTER_S:
            return batch
        return await end_without_job(self._client, self._store, batch, may_be_lost=quiet_s >= QUIET_S)

    async def batches(self, tenant: str | None) -> list[RequestBatch]:
        """Return all batches of a tenant, or of all tenants (None), the newest first. Ended ones are kept for as long
        as their files.
        """
        found = await self._read_all("batch", tenant, _parse)
        return sorted(found, key=lambda each: (each.created_at, each.id), reverse=True)

    async def age_s(self, batch: RequestBatch) -> float:
        """Return how long ago a batch was created, in seconds."""
        return await self._store.now() - batch.created_at

    async def cancel(self, batch_id: str, *, tenant: str) -> RequestBatch:
        """Cancel a batch: lines that wait are not called, those that run end within 10 minutes. Safe twice.

        Its files then have what has ended, and say of all other lines that they were not called. Raises NotFound, and
        BatchEnded.
        """
        while True:
            batch = await self._batch(batch_id, tenant)
            if batch.status in ("cancelling", "cancelled"):
                return batch
            if batch.status in ENDED or batch.status == "finalizing":
                raise BatchEnded(f"batch {batch_id} cannot be cancelled: it is {batch.status}")
            at = int(await self._store.now())
            draft = replace(batch, status="cancelling", times={**batch.times, "cancelling_at": at})
            try:
                seq = await self._store.put("batch", tenant, batch_id, draft.plain(), expected=batch.seq)
            except Conflict:
                continue
            return replace(draft, seq=seq)

    async def wait(
        self, batch_id: str, *, tenant: str, progress: Callable[[RequestBatch], object] | None = None
    ) -> RequestBatch:
        """Return a batch when it has ended. `progress` gets it once a second meanwhile. Raises NotFound."""
        while True:
            batch = await self.batch(batch_id, tenant=tenant)
            if progress is not None:
                progress(batch)
            if batch.has_ended:
                return batch
            await asyncio.sleep(POLL_S)

    # -- within

    async def _enqueue(self, batch: RequestBatch) -> None:
        await enqueue_batch(self._client, batch)

    async def _batch(self, batch_id: str, tenant: str) -> RequestBatch:
        return _parse(await self._find("batch", batch_id, tenant))

    async def _find(self, what: What, key: str, tenant: str) -> KeptDocument:
        kept = None
        if isinstance(key, str) and subjects.TOKEN.fullmatch(key):
            kept = await self._store.get(what, tenant, key)
        if kept is None:
            raise NotFound(f"no such {what}: {str(key)[:80]!r}")
        return kept

    async def _read_all(self, what: What, tenant: str | None, parse: Callable[[KeptDocument], T]) -> list[T]:
        """Return all that is kept for a tenant. What is damaged is logged, and left out."""
        found = []
        async for kept in self._store.read(what, tenant):
            try:
                found.append(parse(kept))
            except BadInput as error:
                log.warning("%s", error)
        return found

    async def _forget(self, what: What, tenant: str, key: str) -> None:
        kept = await self._store.get(what, tenant, key)
        if kept is not None:
            with contextlib.suppress(Conflict):  # deleted, or expired, meanwhile
                await self._store.delete(what, tenant, key, expected=kept.seq)

    async def _check_room(self, tenant: str, own: int) -> None:
        """Raise BatchQuota if a tenant has more files than it may have beside a new one, of which `own` are counted."""
        quotas, files = self._quotas, await self.files(tenant)
        if len(files) + 1 - own > quotas.files:
            raise BatchQuota(f"at most {quotas.files:,} files: delete some")
        if sum(each.size for each in files) > quotas.total_bytes:
            raise BatchQuota(f"at most {quotas.total_bytes:,} bytes in all files: delete some")

    async def _check_batches(self, tenant: str, own: int) -> None:
        running = [each for each in await self.batches(tenant) if not each.has_ended]
        if len(running) + 1 - own > self._quotas.batches:
            for each in running:  # the job of one may have ended without it
                await self.batch(each.id, tenant=tenant)
            raise BatchQuota(f"at most {self._quotas.batches:,} batches that have not ended: wait, or cancel some")


def _parse(kept: KeptDocument) -> RequestBatch:
    return RequestBatch.parse(kept.tenant, kept.content, seq=kept.seq, written_at=kept.at)


def _same(batch: RequestBatch, input_file_id: str, endpoint: str, metadata: Mapping[str, str] | None) -> RequestBatch:
    """Return a batch that a call repeats. Raises IdReused if it was for something else."""
    if (batch.input_file_id, batch.endpoint, batch.metadata or {}) != (input_file_id, endpoint, metadata or {}):
        raise IdReused(f"batch {batch.id} was created for something else: use another key")
    return batch


def _check_keep(keep_s: int) -> None:
    if isinstance(keep_s, bool) or not isinstance(keep_s, int) or not KEEP_MIN_S <= keep_s <= KEEP_MAX_S:
        raise BadInput(f"files are kept for {KEEP_MIN_S:,} to {KEEP_MAX_S:,} seconds, not {keep_s!r:.40}")


def _check_metadata(metadata: Mapping[str, str] | None) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or len(metadata) > METADATA_MAX:
        raise BadInput(f"metadata is an object of at most {METADATA_MAX} texts")
    for name, value in metadata.items():
        if not isinstance(name, str) or not isinstance(value, str) or len(name) > 64 or len(value) > 512:
            raise BadInput("metadata has names of up to 64 characters, and texts of up to 512 as values")
        try:
            (name + value).encode()
        except UnicodeEncodeError:
            raise BadInput("metadata must be texts that UTF-8 can hold") from None


async def _bounded(source: FileSource, most: int) -> AsyncIterator[bytes]:
    """Yield the bytes of a source. Raises BadInput above `most`."""
    size = 0
    async for piece in _pieces(source):
        size += len(piece)
        if size > most:
            raise BadInput(f"the file is larger than {most:,} bytes: split it")
        yield piece


async def _pieces(source: FileSource) -> AsyncIterator[bytes]:
    if isinstance(source, bytes):
        yield source
    elif isinstance(source, str | os.PathLike):
        try:
            file = await asyncio.to_thread(Path(source).open, "rb")
        except OSError as error:
            raise BadInput(f"cannot read {os.fspath(source)!r}: {error.strerror or error}") from None
        with file:
            while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                yield piece
    elif isinstance(source, AsyncIterable):
        async for piece in source:
            yield piece
    else:
        while piece := await asyncio.to_thread(source.read, PIECE_BYTES):
            yield piece
