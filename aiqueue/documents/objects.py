"""An object store as NATS lays it out (ADR-20), written and read in streams: stock clients read what is put here.

An object's bytes are chunks on a subject of their own; what is said of it stands in the one message of another. That
one is replaced only by who knows its sequence, so that a writer and one who deletes cannot miss each other.
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

CHUNK_BYTES = 512 * 1024  # at most; half of a smaller max_payload
SENT_AHEAD = 8  # chunks on their way to the server
READ_AHEAD = 64  # chunks in one batch of a read, or 4 MiB of them; two batches are held
STALL_S = 600.0  # a source that gives nothing for so long is given up, before its chunks are taken for abandoned
GIVE_UP_S = 5.0  # what is under way of a failed upload may still be answered
READ_AGAIN_S, READ_AWAY_S, READ_SHORT_S = 0.2, 30.0, 5.0
_DIGEST = "SHA-256="

Source = bytes | bytearray | memoryview | str | os.PathLike[str] | BinaryIO | Iterable[bytes] | AsyncIterable[bytes]


@dataclass(frozen=True, kw_only=True)
class Info:
    """What is said of an object. `seq` and `time` are those of the message that says it; 0 where it is yet to come."""

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


class Objects:
    """The object store in one stream."""

    def __init__(self, connection: Connection, stream: str) -> None:
        self._connection = connection
        self.stream = stream

    def subject(self, kind: str, *words: str) -> str:
        """A subject of this store: see `subjects.objects`."""
        return subjects.objects(self.stream, kind, *words)

    async def info(self, name: str) -> Info | None:
        """What the stream's leader says of an object, also that it is deleted; None where it says nothing."""
        try:
            stored = await self._connection.last(self.stream, self._about(name))
        except NotFound:
            raise Unavailable(f"there is no stream {self.stream}: has `aiqueue apply` been run?") from None
        return _info(stored) if stored else None

    async def all(self) -> AsyncIterator[Info]:
        """What is said of all objects, the deleted ones too."""
        async for stored in self._connection.read(self.stream, self.subject("M", ">")):
            if (info := _info(stored)) is not None:
                yield info

    async def say(self, info: Info, *, instead_of: int) -> None:
        """Replace what is said of an object, where its message has sequence `instead_of` (0: there is none).

        Raises Conflict where it has another one.
        """
        told = {
            "name": info.name, "bucket": self.stream.removeprefix(subjects.OBJECTS), "nuid": info.nuid,
            "size": info.size, "chunks": info.chunks, "mtime": datetime.now(UTC).isoformat(),
            "digest": _DIGEST + base64.urlsafe_b64encode(bytes.fromhex(info.sha256)).decode(),
            "options": {"max_chunk_size": CHUNK_BYTES}, "deleted": info.deleted,
        }  # fmt: skip
        if info.title:
            told["description"] = info.title
        if info.content_type:
            told["headers"] = {headers.CONTENT_TYPE: [info.content_type]}
        await self._connection.store(
            self._about(info.name),
            json.dumps(told).encode(),
            {
                headers.MSG_ID: subjects.new_id(),
                headers.ROLLUP: "sub",
                headers.EXPECTED: str(instead_of),
            },
        )

    async def upload(self, source: Source) -> Info:
        """Store a source's bytes under a nuid of their own. Nothing is said of them yet: `Info.name` is empty.

        What fails takes its chunks away again; a process that dies leaves them. Raises QueueFull, Unavailable,
        BadInput for a source that stalls, and what the source raises.
        """
        nuid = subjects.new_id()
        where = self.subject("C", nuid)
        digest, size, count, last = hashlib.sha256(), 0, 0, 0
        sent: deque[tuple[bytes, asyncio.Task[PubAck]]] = deque()
        chunk_bytes = min(CHUNK_BYTES, self._connection.max_payload // 2)
        try:
            async with contextlib.aclosing(_pieces(source, chunk_bytes)) as pieces:
                while chunk := await _piece(pieces):
                    if len(sent) >= SENT_AHEAD:
                        last = await self._in_order(where, *sent[0], last)
                        sent.popleft()
                    storing = self._connection.store(where, chunk, {headers.MSG_ID: f"{nuid}/{count}"})
                    sent.append((chunk, asyncio.create_task(storing)))
                    digest.update(chunk)
                    size, count = size + len(chunk), count + 1
            while sent:
                last = await self._in_order(where, *sent[0], last)
                sent.popleft()
        except BaseException:
            tasks = [task for _, task in sent]
            if tasks:  # what is stored after the purge would stay
                await asyncio.wait(tasks, timeout=GIVE_UP_S)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with contextlib.suppress(AIQueueError):
                await self.purge(where)
            raise
        return Info(name="", nuid=nuid, size=size, chunks=count, sha256=digest.hexdigest())

    async def _in_order(self, where: str, chunk: bytes, storing: asyncio.Task[PubAck], last: int) -> int:
        """The sequence of a chunk, which must be above `last`: one that had to be sent again may have been passed by
        those behind it. These are then stored once more, behind it.
        """
        ack = await asyncio.shield(storing)  # who leaves waits for it before he takes the chunks away
        if ack.seq > last:
            return ack.seq
        again = await self._connection.store(where, chunk, {headers.MSG_ID: subjects.new_id()})
        await self._connection.api(f"STREAM.MSG.DELETE.{self.stream}", {"seq": ack.seq, "no_erase": True})
        return again.seq

    async def read(self, info: Info) -> AsyncGenerator[bytes, None]:
        """An object's chunks, the last of them once size and hash are seen to be right. Holds two batches at most.

        Goes on where it was after a lost link. Raises Corrupt, NotFound where it is deleted meanwhile, Unavailable.
        """
        digest, size, count, seq = hashlib.sha256(), 0, 0, 1
        held = b""
        moved = time.monotonic()
        while count < info.chunks:
            before, away = count, None
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
                away = Unavailable(str(error))
            if count > before:
                moved = time.monotonic()
            elif time.monotonic() - moved > (READ_SHORT_S if away is None else READ_AWAY_S):
                raise away or await self._short(info, count)
            if count < info.chunks:
                await asyncio.sleep(READ_AGAIN_S)  # a replica may lag behind
        if size != info.size or digest.hexdigest() != info.sha256:
            raise Corrupt(f"{info.name}: {size:,} of {info.size:,} bytes were read, and their hash is another one")
        if held:
            yield held

    async def _short(self, info: Info, count: int) -> AIQueueError:
        now = await self.info(info.name)
        if now is None or now.deleted:
            return NotFound(f"{info.name} was deleted while it was read")
        if now.nuid != info.nuid:
            return Unavailable(f"{info.name} was put anew while it was read: read it again")
        return Corrupt(f"{info.name}: {count} of its {info.chunks} chunks are stored")

    async def delete(self, info: Info) -> bool:
        """Delete an object as `info` knows it; False where something newer is said of it."""
        at = info.seq
        if not info.deleted:
            gone = Info(name=info.name, nuid=info.nuid, size=0, chunks=0, sha256=info.sha256, deleted=True)
            try:
                await self.say(gone, instead_of=at)
            except Conflict:
                return False
            tombstone = await self.info(info.name)
            at = tombstone.seq if tombstone is not None and tombstone.deleted else 0
        await self.purge(self.subject("C", info.nuid))
        if at:
            await self.purge(self._about(info.name), upto=at)
        return True

    async def purge(self, subject: str, *, upto: int | None = None) -> int:
        """Delete all messages on a subject, or those up to a sequence. Returns how many."""
        wanted: dict[str, Any] = {"filter": subject} | ({} if upto is None else {"seq": upto + 1})
        answer = await self._connection.api(f"STREAM.PURGE.{self.stream}", wanted)
        return int(answer["purged"])

    def _about(self, name: str) -> str:
        return self.subject("M", base64.urlsafe_b64encode(name.encode()).decode())


def _info(stored: Stored) -> Info | None:
    """What a message says of an object; None for what no object store says."""
    try:
        told = json.loads(stored.data)
        own = told.get("headers") or {}
        return Info(
            name=str(told["name"]), nuid=subjects.token("nuid", told["nuid"]), size=int(told.get("size") or 0),
            chunks=int(told.get("chunks") or 0), deleted=bool(told.get("deleted")),
            sha256=base64.urlsafe_b64decode(str(told.get("digest") or "")[len(_DIGEST) :]).hex(),
            title=str(told.get("description") or ""), content_type=str((own.get(headers.CONTENT_TYPE) or [""])[0]),
            seq=stored.seq, time=stored.time,
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, BadInput):
        return None


async def _piece(pieces: AsyncGenerator[bytes, None]) -> bytes | None:
    try:
        async with asyncio.timeout(STALL_S) as limit:
            return await anext(pieces, None)
    except TimeoutError:
        if limit.expired():
            raise BadInput(f"the source gave nothing for {STALL_S:g} s: nothing is stored") from None
        raise


async def _pieces(source: Source, size: int) -> AsyncGenerator[bytes, None]:
    """A source's bytes in pieces of `size`, but for the last one. Files and plain iterables are read in a thread."""
    if isinstance(source, bytes | bytearray | memoryview):
        view = memoryview(source).cast("B")
        for start in range(0, len(view), size):
            yield bytes(view[start : start + size])
    elif isinstance(source, str | os.PathLike):
        with await asyncio.to_thread(_open, source) as file:
            async for piece in _pieces(file, size):
                yield piece
    elif hasattr(source, "read"):
        while piece := await asyncio.to_thread(source.read, size):
            yield _checked(piece)
    else:
        gathered = bytearray()
        async for part in _parts(source):
            for start in range(0, len(part), size):  # a part may be larger than all that should be held
                gathered += part[start : start + size]
                while len(gathered) >= size:
                    yield bytes(gathered[:size])
                    del gathered[:size]
        if gathered:
            yield bytes(gathered)


async def _parts(source: Iterable[bytes] | AsyncIterable[bytes]) -> AsyncGenerator[bytes, None]:
    if isinstance(source, AsyncIterable):
        async for part in source:
            yield _checked(part)
    elif isinstance(source, Iterable):
        parts = iter(source)
        while (each := await asyncio.to_thread(_next, parts)) is not None:
            yield _checked(each)
    else:
        raise BadInput(
            f"a document is put from bytes, a path, a binary file or an iterable, not {type(source).__name__}"
        )


def _next(parts: Iterator[bytes]) -> bytes | None:
    return next(parts, None)


def _checked(part: object) -> bytes:
    if not isinstance(part, bytes | bytearray | memoryview):
        raise BadInput(f"a document is made of bytes, not of {type(part).__name__}: open the file as binary")
    return bytes(part)


def _open(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise BadInput(f"cannot read {os.fspath(path)!r}: {error.strerror or error}") from None
