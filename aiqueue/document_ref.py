"""A document: large bytes that are kept beside the jobs, under the hash of what they are."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, ForwardRef, TypeVar, get_args

import pydantic

from .errors import BadInput

READ_MAX = 64 * 1024 * 1024
ANSWER_S = 300.0  # what a thread waits for one answer: the tries of a lost link are within it

T = TypeVar("T")


class Document(pydantic.BaseModel):
    """The name of large bytes that are stored: what `client.documents.put` returns. It can be a field of a Message,
    and a handler of the same tenant's job reads it by ``job.open(document)``. `name` and `content_type` are the
    caller's own words.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    tenant: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, pydantic.Field(ge=0)]
    name: str = ""
    content_type: str = ""


Source = Callable[[Document], AsyncGenerator[bytes, None]]


class Chunks:
    """A document that is read: ``async for chunk in chunks``, or all of it by `read`, or into a file by `save`.

    Each begins anew. Size and hash are verified before the last chunk is handed out. Raises NotFound where it is not
    stored (any more), Corrupt where it is not what it was, Unavailable where the server stays away.
    """

    def __init__(self, document: Document, source: Source) -> None:
        self.document = document
        self._source = source

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._source(self.document)

    async def read(self, limit: int = READ_MAX) -> bytes:
        """All of it, at most `limit` bytes (64 MiB). Raises BadInput for a larger one."""
        _within(self.document, limit)
        async with contextlib.aclosing(self._source(self.document)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file, which is there, whole and verified, or not at all. Raises OSError too."""
        target = Path(path)
        file = await asyncio.to_thread(_beside, target)
        try:
            async with contextlib.aclosing(self._source(self.document)) as chunks:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(_finish, file, target)
        except BaseException:
            _drop(file)
            raise
        return target


class SyncChunks:
    """The same for code in a thread: ``for chunk in chunks``, `read`, `save`."""

    def __init__(self, document: Document, source: Source, loop: asyncio.AbstractEventLoop) -> None:
        self.document = document
        self._source = source
        self._loop = loop

    def __iter__(self) -> Iterator[bytes]:
        chunks = self._source(self.document)
        try:
            while (chunk := self._drive(_next(chunks))) is not None:
                yield chunk
        finally:
            self._drive(chunks.aclose())

    def read(self, limit: int = READ_MAX) -> bytes:
        """As `Chunks.read`."""
        _within(self.document, limit)
        return b"".join(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As `Chunks.save`."""
        target = Path(path)
        file = _beside(target)
        try:
            for chunk in self:
                file.write(chunk)
            _finish(file, target)
        except BaseException:
            _drop(file)
            raise
        return target

    def _drive(self, work: Coroutine[Any, Any, T]) -> T:
        return drive(work, self._loop, "`open` and not `open_sync`")


def drive(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, instead: str) -> T:
    """What comes of `work` in `loop`, waited for in a thread. Raises BadInput in the loop's own."""
    with contextlib.suppress(RuntimeError):
        if asyncio.get_running_loop() is loop:
            work.close()
            raise BadInput(f"this blocks the event loop: in async code use {instead}")
    return asyncio.run_coroutine_threadsafe(work, loop).result(ANSWER_S)


async def _next(chunks: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(chunks, None)


def _within(document: Document, limit: int) -> None:
    if document.size > limit:
        raise BadInput(
            f"document of {document.size:,} bytes is above the limit of {limit:,} for reading it at once: "
            "iterate over its chunks, save it, or raise `limit`"
        )


def _beside(target: Path) -> IO[bytes]:
    """A fresh file in the directory of `target`, to be renamed to it."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part").open("xb")


def _finish(file: IO[bytes], target: Path) -> None:
    file.close()
    Path(file.name).replace(target)


def _drop(file: IO[bytes]) -> None:
    file.close()
    Path(file.name).unlink(missing_ok=True)


def mentions(annotation: object, _seen: frozenset[object] = frozenset()) -> bool:
    """Whether values of this type may hold a Document, as far as its annotations tell."""
    if annotation is Document or isinstance(annotation, str | ForwardRef):
        return True
    if annotation in _seen:
        return False
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        seen = _seen | {annotation}
        return any(mentions(field.annotation, seen) for field in annotation.model_fields.values())
    return any(mentions(each, _seen) for each in get_args(annotation))


def found_in(value: object) -> Iterator[Document]:
    """The documents in a message, as often as they stand there."""
    if isinstance(value, Document):
        yield value
    elif isinstance(value, pydantic.BaseModel):
        yield from found_in({**value.__dict__, **(value.model_extra or {})})
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from found_in(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from found_in(each)
