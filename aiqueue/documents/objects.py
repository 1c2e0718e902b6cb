"""An object store as NATS lays it out (ADR-20), so that stock NATS clients can read the objects.

The bytes of an object are chunks on a subject of their own. Its metadata is the only message of another subject. A
writer replaces the metadata only if it knows the message's sequence (optimistic concurrency), so that somebody who
writes and somebody who deletes the same object notice each other.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from .. import headers, subjects
from ..connection import Connection, PubAck, Stored
from ..errors import AIQueueError, BadInput, Conflict, Corrupt, NotFound, Unavailable

CHUNK_BYTES = 512 * 1024  # at most; half of max_payload if that is less
SENDS_AHEAD = 8  # chunks whose PubAck is awaited
READ_AHEAD = 64  # chunks in one batch of a read, or 4 MiB of them; two batches are held
STALL_S = 600.0  # an upload fails if its source yields nothing for so long; less than the collector's ORPHAN_S
FAILED_UPLOAD_S = 5.0  # how long a failed upload waits for the PubAcks of chunks already sent
REREAD_S = 0.2  # pause before a read continues
SERVER_AWAY_S, MISSING_CHUNK_S = 30.0, 5.0  # without progress: no replica answers, or a chunk is missing
_DIGEST = "SHA-256="

Source = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryIO | Iterable[bytes] | AsyncIterable[bytes]


@dataclass(frozen=True, kw_only=True)
class ObjectInfo:
    """The metadata of an object. `seq` and `time` are those of its message, 0 if it is not stored yet."""

    name: str
    nuid: str
    size: int
    chunks: int
    sha256: str
    title: str = ""
    content_type: str = ""
    deleted: bool = False
    seq: int = 0
    time: float = 0.0


class ObjectStore:
    """The object store in one stream."""

    def __init__(self, connection: Connection, stream: str) -> None:
        self._connection = connection
        self.stream = stream

    def subject(self, kind: str, *tokens: str) -> str:
        """Return a subject of this store: see `subjects.objects`."""
        return subjects.objects(self.stream, kind, *tokens)

    async def read_info(self, name: str) -> ObjectInfo | None:
        """Return an object's metadata from the stream's leader, of a deleted object too; None if there is none."""
        try:
            stored = await self._connection.last(self.stream, self._info_subject(name))
        except NotFound:
            raise Unavailable(f"stream {self.stream} is missing: run `aiqueue apply`, which creates it") from None
        return _parse_info(stored) if stored else None

    async def list_infos(self) -> AsyncIterator[ObjectInfo]:
        """Yield the metadata of all objects, the deleted ones too."""
        async for stored in self._connection.read(self.stream, self.subject("M", ">")):
            if (info := _parse_info(stored)) is not None:
                yield info

    async def write_info(self, info: ObjectInfo, *, expected_seq: int) -> None:
        """Replace an object's metadata, if its message has sequence `expected_seq` (0: there is none).

        Raises Conflict if it has another.
        """
        metadata = {
            "name": info.name, "bucket": self.stream.removeprefix(subjects.OBJECTS), "nuid": info.nuid,
            "size": info.size, "chunks": info.chunks, "mtime": datetime.now(UTC).isoformat(),
            "digest": _DIGEST + base64.urlsafe_b64encode(bytes.fromhex(info.sha256)).decode(),
            "options": {"max_chunk_size": CHUNK_BYTES}, "deleted": info.deleted,
        }  # fmt: skip
        if info.title:
            metadata["description"] = info.title
        if info.content_type:
            metadata["headers"] = {headers.CONTENT_TYPE: [info.content_type]}
        await self._connection.store(
            self._info_subject(info.name),
            json.dumps(metadata).encode(),
            {
                headers.MSG_ID: subjects.new_id(),
                headers.ROLLUP: "sub",
                headers.EXPECTED: str(expected_seq),
            },
        )

    async def upload(self, source: Source) -> ObjectInfo:
        """Store the bytes of a source as chunks under a nuid of their own. The object has no name and metadata yet.

        A failed upload deletes its chunks. A process that dies leaves them to the collector. Raises QueueFull,
        Unavailable, BadInput for a source that stalls, and what the source raises.
        """
        nuid = subjects.new_id()
        subject = self.subject("C", nuid)
        digest, size, count, last = hashlib.sha256(), 0, 0, 0
        sent: deque[tuple[bytes, asyncio.Task[PubAck]]] = deque()
        chunk_bytes = min(CHUNK_BYTES, self._connection.max_payload // 2)
        try:
            async with contextlib.aclosing(_split_source(source, chunk_bytes)) as pieces:
                while chunk := await _next_piece(pieces):
                    if len(sent) >= SENDS_AHEAD:
                        last = await self._ensure_order(subject, *sent[0], last)
                        sent.popleft()
                    storing = self._connection.store(subject, chunk, {headers.MSG_ID: f"{nuid}/{count}"})
                    sent.append((chunk, asyncio.create_task(storing)))
                    digest.update(chunk)
                    size, count = size + len(chunk), count + 1
            while sent:
                last = await self._ensure_order(subject, *sent[0], last)
                sent.popleft()
        except BaseException:
            tasks = [task for _, task in sent]
            if tasks:  # a chunk that is stored after the purge would stay
                await asyncio.wait(tasks, timeout=FAILED_UPLOAD_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(AIQueueError):
                await self.purge(subject)
            raise
        return ObjectInfo(name="", nuid=nuid, size=size, chunks=count, sha256=digest.hexdigest())

    async def _ensure_order(self, subject: str, chunk: bytes, storing: asyncio.Task[PubAck], last: int) -> int:
        """Wait until a chunk is stored, and return its sequence, which is above `last`, that of the chunk before.

        If the chunk before was sent again, this one may have been stored first. It is then stored once more, behind.
        """
        ack = await asyncio.shield(storing)  # a cancelled upload waits for it before it deletes the chunks
        if ack.seq > last:
            return ack.seq
        second = await self._connection.store(subject, chunk, {headers.MSG_ID: subjects.new_id()})
        await self._connection.api(f"STREAM.MSG.DELETE.{self.stream}", {"seq": ack.seq, "no_erase": True})
        return second.seq

    async def read(self, info: ObjectInfo) -> AsyncGenerator[bytes, None]:
        """Yield an object's chunks, the last one after size and hash were verified. Holds at most two batches.

        Continues after a lost link. Raises Corrupt, NotFound if the object is deleted meanwhile, Unavailable.
        """
        digest, size, count, seq = hashlib.sha256(), 0, 0, 1
        held = b""
        progressed_at = time.monotonic()
        while count < info.chunks:
            before, unavailable = count, None
            try:
                stored = self._connection.read(
                    self.stream, self.subject("C", info.nuid), seq=seq, batch=READ_AHEAD, ahead=True
                )
                async with contextlib.aclosing(stored):
                    async for each in stored:
                        seq, count, size = each.seq + 1, count + 1, size + len(each.data)
                        digest.update(each.data)
                        if held:
                            yield held
                        held = each.data
                        if count == info.chunks:
                            break
            except (Unavailable, NotFound) as error:  # no replica of the stream answers now
                unavailable = Unavailable(str(error))
            if count > before:
                progressed_at = time.monotonic()
            elif time.monotonic() - progressed_at > (MISSING_CHUNK_S if unavailable is None else SERVER_AWAY_S):
                raise unavailable or await self._error_of_missing(info, count)
            if count < info.chunks:
                await asyncio.sleep(REREAD_S)  # a replica may lag behind
        if size != info.size:
            raise Corrupt(f"{info.name} is damaged: {size:,} bytes were read instead of {info.size:,}")
        if digest.hexdigest() != info.sha256:
            raise Corrupt(f"{info.name} is damaged: its SHA-256 is not the one that was stored with it")
        if held:
            yield held

    async def _error_of_missing(self, info: ObjectInfo, count: int) -> AIQueueError:
        """Return why an object has only `count` chunks: deleted, replaced or damaged."""
        now = await self.read_info(info.name)
        if now is None or now.deleted:
            return NotFound(f"{info.name} was deleted while it was read")
        if now.nuid != info.nuid:
            return Unavailable(f"{info.name} was replaced while it was read: read it again")
        return Corrupt(f"{info.name}: {count} of its {info.chunks} chunks are stored")

    async def delete(self, info: ObjectInfo) -> bool:
        """Delete an object: mark it as deleted, then purge its chunks and its metadata.

        False if its metadata was replaced since `info` was read: nothing is deleted then.
        """
        metadata_seq = info.seq
        if not info.deleted:
            deleted = ObjectInfo(name=info.name, nuid=info.nuid, size=0, chunks=0, sha256=info.sha256, deleted=True)
            try:
                await self.write_info(deleted, expected_seq=metadata_seq)
            except Conflict:
                return False
            tombstone = await self.read_info(info.name)
            metadata_seq = tombstone.seq if tombstone is not None and tombstone.deleted else 0
        await self.purge(self.subject("C", info.nuid))
        if metadata_seq:
            await self.purge(self._info_subject(info.name), upto=metadata_seq)
        return True

    async def purge(self, subject: str, *, upto: int | None = None) -> int:
        """Delete all messages on a subject, or those up to and including sequence `upto`. Returns how many."""
        request: dict[str, Any] = {"filter": subject} | ({} if upto is None else {"seq": upto + 1})
        answer = await self._connection.api(f"STREAM.PURGE.{self.stream}", request)
        return int(answer["purged"])

    def _info_subject(self, name: str) -> str:
        return self.subject("M", base64.urlsafe_b64encode(name.encode()).decode())


def _parse_info(stored: Stored) -> ObjectInfo | None:
    """Return the metadata in a message; None if it is not that of an object."""
    try:
        metadata = json.loads(stored.data)
        own_headers = metadata.get("headers") or {}
        return ObjectInfo(
            name=str(metadata["name"]), nuid=subjects.token("nuid", metadata["nuid"]),
            size=int(metadata.get("size") or 0), chunks=int(metadata.get("chunks") or 0),
            deleted=bool(metadata.get("deleted")),
            sha256=base64.urlsafe_b64decode(str(metadata.get("digest") or "")[len(_DIGEST) :]).hex(),
            title=str(metadata.get("description") or ""),
            content_type=str((own_headers.get(headers.CONTENT_TYPE) or [""])[0]),
            seq=stored.seq, time=stored.time,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, BadInput):
        return None


async def _next_piece(pieces: AsyncGenerator[bytes, None]) -> bytes | None:
    try:
        async with asyncio.timeout(STALL_S) as limit:
            return await anext(pieces, None)
    except TimeoutError:
        if limit.expired():
            raise BadInput(
                f"the source gave no bytes for {STALL_S:g} s: the document is not stored, put the document again"
            ) from None
        raise


async def _split_source(source: Source, size: int) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a source in pieces of `size`, the last one shorter. A thread reads files and iterables."""
    if isinstance(source, bytes | bytearray | memoryview):
        view = memoryview(source).cast("B")
        for start in range(0, len(view), size):
            yield bytes(view[start : start + size])
    elif isinstance(source, str | os.PathLike):
        with await asyncio.to_thread(_open_file, source) as file:
            async for piece in _split_source(file, size):
                yield piece
    elif hasattr(source, "read"):
        while piece := await asyncio.to_thread(source.read, size):
            yield _to_bytes(piece)
    else:
        gathered = bytearray()
        async for part in _iterate(source):
            for start in range(0, len(part), size):  # a part may be larger than what should be in memory
                gathered += part[start : start + size]
                while len(gathered) >= size:
                    yield bytes(gathered[:size])
                    del gathered[:size]
        if gathered:
            yield bytes(gathered)


async def _iterate(source: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    if isinstance(source, AsyncIterable):
        async for part in source:
            yield _to_bytes(part)
    elif isinstance(source, Iterable):
        parts = iter(source)
        while (each := await asyncio.to_thread(_next_part, parts)) is not None:
            yield _to_bytes(each)
    else:
        raise BadInput(
            f"a document is put from bytes, a path, a binary file or an iterable, not {type(source).__name__}"
        )


def _next_part(parts: Iterator[bytes]) -> bytes | None:
    return next(parts, None)


def _to_bytes(part: object) -> bytes:
    if not isinstance(part, bytes | bytearray | memoryview):
        raise BadInput(f"a document is made of bytes, not of {type(part).__name__}: open the file as binary")
    return bytes(part)


def _open_file(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise BadInput(f"cannot read {os.fspath(path)!r}: {error.strerror or error}") from None
