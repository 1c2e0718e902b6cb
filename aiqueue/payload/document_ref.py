"""The noun of a stored document, which messages can have as a field, and the readers of its bytes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import IO, Annotated, Any, ForwardRef, Generic, Literal, NamedTuple, TypeVar, get_args, get_origin

import pydantic

from .. import headers
from ..errors import BadInput

READ_MAX = 64 * 1024 * 1024
THREAD_WAIT_S = 300.0  # how long a thread waits for one chunk; includes the retries of a lost link

T = TypeVar("T")


class Document(pydantic.BaseModel):
    """Names large bytes that are stored: what `client.documents.put` returns.

    It can be a field of a Message. A handler of a job of the same tenant reads it by ``job.open(document)``. `name` and
    `content_type` are free texts of the caller.
    """

    model_config = pydantic.ConfigDict(frozen=True)

    tenant: Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    """Tenant that the document belongs to."""
    sha256: Annotated[str, pydantic.Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the content as 64 hexadecimal digits, which names the document."""
    size: Annotated[int, pydantic.Field(ge=0)]
    """Size of the content in bytes."""
    name: str = ""
    """Name that the caller gave, such as that of a file; empty: none."""
    content_type: str = ""
    """Media type that the caller gave; empty: none."""


class HeldDocument(NamedTuple):
    """A large value that is stored as a document, and the name of the hold on it."""

    document: Document
    ref: str

    @property
    def entry(self) -> dict[str, Any]:
        """What stands in its entry instead of the value: a reference, for readers that do not know the headers."""
        return self.document.model_dump()

    @property
    def headers(self) -> dict[str, str]:
        """The headers of its entry."""
        return {**reference_headers(self.document), headers.DOCUMENT_REF: self.ref}


def reference_headers(document: Document) -> dict[str, str]:
    """Return the headers by which a message says that its content is this document."""
    return {headers.DOCUMENT: document.sha256, headers.DOCUMENT_SIZE: str(document.size)}


def document_in(fields: Mapping[str, str], tenant: str) -> Document | None:
    """Return the document of this tenant that `reference_headers` name; None if there are none, or no valid ones."""
    if headers.DOCUMENT not in fields:
        return None
    try:
        size = headers.number(fields.get(headers.DOCUMENT_SIZE, ""))
        return Document(tenant=tenant, sha256=fields[headers.DOCUMENT], size=size)
    except pydantic.ValidationError:
        return None


ReadChunks = Callable[[Document], AsyncGenerator[bytes, None]]


class DocumentReader:
    """Reads a document: ``async for chunk in reader``, or all of it by `read`, or into a file by `save`.

    Each of these starts from the beginning. Size and hash are verified before the last chunk is returned. Raises
    NotFound if the document is not stored (any more), Corrupt if its bytes have changed, Unavailable if the server
    stays away.
    """

    def __init__(self, document: Document, read_chunks: ReadChunks) -> None:
        self.document = document
        self._read_chunks = read_chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._read_chunks(self.document)

    async def read(self, limit: int = READ_MAX) -> bytes:
        """Return all bytes, at most `limit` (64 MiB). Raises BadInput for a larger document."""
        _check_size(self.document, limit)
        async with contextlib.aclosing(self._read_chunks(self.document)) as chunks:
            return b"".join([chunk async for chunk in chunks])

    async def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the document to a file. The file appears whole and verified, or not at all. Raises OSError too."""
        target = Path(path)
        file = await asyncio.to_thread(_open_temporary, target)
        try:
            async with contextlib.aclosing(self._read_chunks(self.document)) as chunks:
                async for chunk in chunks:
                    await asyncio.to_thread(file.write, chunk)
            await asyncio.to_thread(_rename_to, file, target)
        except BaseException:
            _delete(file)
            raise
        return target


class SyncDocumentReader:
    """As DocumentReader, for code in a thread: ``for chunk in reader``, `read`, `save`."""

    def __init__(self, document: Document, read_chunks: ReadChunks, loop: asyncio.AbstractEventLoop) -> None:
        self.document = document
        self._read_chunks = read_chunks
        self._loop = loop

    def __iter__(self) -> Iterator[bytes]:
        chunks = SteppedGenerator(self._read_chunks(self.document))
        try:
            while (chunk := self._run(chunks.next())) is not None:
                yield chunk
        finally:
            self._run(chunks.close())

    def read(self, limit: int = READ_MAX) -> bytes:
        """As `DocumentReader.read`."""
        _check_size(self.document, limit)
        return b"".join(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """As `DocumentReader.save`."""
        target = Path(path)
        file = _open_temporary(target)
        try:
            for chunk in self:
                file.write(chunk)
            _rename_to(file, target)
        except BaseException:
            _delete(file)
            raise
        return target

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return run_from_thread(work, self._loop, "`open` and not `open_sync`")


def run_from_thread(work: Coroutine[Any, Any, T], loop: asyncio.AbstractEventLoop, instead: str) -> T:
    """Run `work` in `loop` and wait for its result in this thread. Raises BadInput in the thread of the loop.

    `instead` names what async code is to use, for the error text.
    """
    with contextlib.suppress(RuntimeError):
        if asyncio.get_running_loop() is loop:
            work.close()
            raise BadInput(f"this blocks the event loop: in async code use {instead}")
    return asyncio.run_coroutine_threadsafe(work, loop).result(THREAD_WAIT_S)


class SteppedGenerator(Generic[T]):
    """An async generator whose items a thread awaits one by one, by coroutines on the event loop.

    The thread may stop waiting before a step has ended: an exception of a signal handler, such as KeyboardInterrupt.
    """

    def __init__(self, items: AsyncGenerator[T, None]) -> None:
        self._items = items
        self._step: asyncio.Task[Any] | None = None

    async def next(self) -> T | None:
        """Return the next item. None: there is none."""
        self._step = asyncio.current_task()
        try:
            return await anext(self._items, None)
        finally:
            self._step = None

    async def close(self) -> None:
        """Close the generator, which a step that is not over would refuse: the step is cancelled first."""
        if self._step is not None:
            self._step.cancel()
            await asyncio.wait([self._step])
        await self._items.aclose()


def _check_size(document: Document, limit: int) -> None:
    if document.size > limit:
        raise BadInput(
            f"document of {document.size:,} bytes is above the limit of {limit:,} for reading it at once: "
            "iterate over its chunks, save it, or raise `limit`"
        )


def _open_temporary(target: Path) -> IO[bytes]:
    """Open a new file beside `target`, to be renamed to it. Raises OSError, also if `target` is no regular file."""
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.exists() and not target.is_file():  # a device, a pipe: the renaming would put a file in its place
        raise OSError(errno.EINVAL, "it is not a regular file", str(target))
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}.part").open("xb")


def _rename_to(file: IO[bytes], target: Path) -> None:
    file.close()
    Path(file.name).replace(target)


def _delete(file: IO[bytes]) -> None:
    file.close()
    Path(file.name).unlink(missing_ok=True)


def may_contain_documents(annotation: object, _seen: frozenset[object] = frozenset()) -> bool:
    """Return whether values of this type may contain a Document, as far as its annotations show."""
    if annotation is Document or isinstance(annotation, str | ForwardRef):
        return True
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        if annotation in _seen:
            return False
        seen = _seen | {annotation}
        return any(may_contain_documents(field.annotation, seen) for field in annotation.model_fields.values())
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return False
    # what else Annotated has is no type, and may be anything
    return any(may_contain_documents(each, _seen) for each in (arguments[:1] if origin is Annotated else arguments))


def find_documents(value: object) -> Iterator[Document]:
    """Yield the documents in a message, each as often as it occurs."""
    if isinstance(value, Document):
        yield value
    elif isinstance(value, pydantic.BaseModel):
        yield from find_documents({**value.__dict__, **(value.model_extra or {})})
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from find_documents(each)
    elif isinstance(value, list | tuple | set | frozenset):
        for each in value:
            yield from find_documents(each)
