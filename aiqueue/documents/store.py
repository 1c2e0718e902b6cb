"""Documents: large bytes beside the jobs, by tenant and hash, for as long as a job or a stated time holds them.

A hold is a message beside the document's own. Who holds first writes the hold and then touches the document; who
deletes first looks at the document, then for holds, and deletes only what nobody has touched since
(docs/decisions/documents.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import pydantic

from .. import codec, headers, subjects, units
from ..connection import Connection
from ..document_ref import Chunks, Document
from ..errors import AIQueueError, BadInput, Conflict, Corrupt, NotFound, TooLarge, Unavailable
from ..topology import Topology
from .objects import Info, Objects, Source

JOB, PUT = "job", "put"  # who holds a document: a job, or who has put it
KEEP_MIN_S = 1.0  # a message's time to live is whole seconds
LET_GO_S = 5.0
TOUCHES_MAX = 16  # each time somebody else's came between


class Hold(NamedTuple):
    """Who holds a document: `by` is JOB or PUT, `ref` the name of one."""

    tenant: str
    sha256: str
    by: str
    ref: str


class Words(NamedTuple):
    """What a caller says of a document."""

    title: str = ""
    content_type: str = ""


@dataclass(frozen=True)
class Listed:
    """A stored document: when it was last put or held (seconds since the epoch), and by how many it is held."""

    document: Document
    touched_at: float
    jobs: int
    puts: int

    def summary(self) -> dict[str, object]:
        """The same as plain data."""
        return {**self.document.model_dump(), "touched_at": self.touched_at, "jobs": self.jobs, "puts": self.puts}


class Documents:
    """The documents of all tenants; one per connection, without state of its own."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.objects = Objects(connection, topology.documents_stream.name)

    # -- for everybody

    async def put(
        self, source: Source, *, tenant: str, name: str = "", content_type: str = "", keep: str | float = "7d"
    ) -> Document:
        """Store bytes, a file (its path, or opened as binary), or what an iterable or async iterable of bytes gives.

        Constant memory for any size. What is stored already is not stored twice. It is kept for `keep` at least, and
        for as long as a job that was enqueued with it lives. Raises BadInput, QueueFull (nothing of it is left
        behind), NotFound where `aiqueue apply` has not been run, Unavailable.
        """
        subjects.token("tenant", tenant)
        try:
            keep_s = units.seconds(keep)
        except ValueError as error:
            raise BadInput(f"keep: {error}") from None
        if keep_s < KEEP_MIN_S:
            raise BadInput(f"keep: at least {KEEP_MIN_S:g} s, not {keep!r}")
        words = Words(headers.ascii_line(name, 250), headers.ascii_line(content_type, 250))
        uploaded = None
        if isinstance(source, bytes):  # its hash is known before it is sent
            sha256, size = await asyncio.to_thread(_sha256, source), len(source)
        else:
            uploaded = await self.objects.upload(source)
            sha256, size = uploaded.sha256, uploaded.size
        hold = Hold(tenant, sha256, PUT, subjects.new_id())
        try:
            await self._hold(hold, keep_s)
            await self._keep(tenant, sha256, uploaded or source, words)  # type: ignore[arg-type]  # bytes, else uploaded
        except AIQueueError as error:
            with contextlib.suppress(AIQueueError):
                await self.objects.purge(self._subject(hold))
            if uploaded is not None and not isinstance(error, Unavailable):  # else they may be the document's now
                await self._drop_unused(f"{tenant}/{sha256}", uploaded)
            raise
        return Document(tenant=tenant, sha256=sha256, size=size, name=name, content_type=content_type)

    def open(self, document: Document) -> Chunks:
        """Read a document: ``async for chunk in documents.open(document)``, or its `read` or `save`."""
        return Chunks(document, self.chunks)

    async def get(self, sha256: str, *, tenant: str) -> Document:
        """The stored document of this hash. Raises NotFound."""
        named = _named(tenant, sha256)
        info = await self._there(named)
        return named.model_copy(update={"size": info.size, "name": info.title, "content_type": info.content_type})

    async def find(self, tenant: str | None = None) -> AsyncIterator[Listed]:
        """The stored documents, of one tenant or all, the least recently touched first."""
        holds: dict[tuple[str, str], dict[str, int]] = {}
        async for hold, _, _ in self.holds():
            count = holds.setdefault((hold.tenant, hold.sha256), {JOB: 0, PUT: 0})
            count[hold.by] += 1
        async for info in self.objects.all():
            document = document_of(info)
            if document is None or info.deleted or tenant not in (None, document.tenant):
                continue
            held = holds.get((document.tenant, document.sha256), {JOB: 0, PUT: 0})
            yield Listed(document, info.time, held[JOB], held[PUT])

    async def forget(self, document: Document) -> bool:
        """End all holds of those who have put it. Deleted at once, and True, unless a job holds it."""
        await self.objects.purge(self._subject(Hold(document.tenant, document.sha256, PUT, "*")))
        return await self.drop(document.tenant, document.sha256)

    async def chunks(self, document: Document) -> AsyncGenerator[bytes, None]:
        """A document's bytes, the last of them once they are verified: what `Chunks` reads from."""
        info = await self._there(document)
        if info.size != document.size or info.sha256 != document.sha256:
            raise Corrupt(f"document {info.name} is stored with another size or hash than its own")
        async with contextlib.aclosing(self.objects.read(info)) as chunks:
            async for chunk in chunks:
                yield chunk

    # -- for jobs

    async def attach(self, tenant: str, documents: Iterable[Document], body: bytes | None = None) -> dict[str, str]:
        """What a job must carry to hold `documents`, and `body` where it is not to travel itself.

        Raises BadInput for another tenant's document, NotFound for one that is not stored, TooLarge, QueueFull.
        """
        told = {headers.DOCUMENT_REF: subjects.new_id()}
        wanted = tuple(dict.fromkeys(documents))
        for document in wanted:
            if document.tenant != tenant:
                raise BadInput(f"a job of {tenant} cannot hold a document of tenant {document.tenant}")
        if body is not None:
            if len(body) > codec.MAX_BYTES:
                raise TooLarge(len(body), codec.MAX_BYTES)
            sha256 = await asyncio.to_thread(_sha256, body)
            told |= {headers.DOCUMENT: sha256, headers.DOCUMENT_SIZE: str(len(body))}
        bodies = {document.sha256: None for document in wanted} | ({} if body is None else {sha256: body})
        hold = None
        try:
            for name, source in bodies.items():
                hold = Hold(tenant, name, JOB, told[headers.DOCUMENT_REF])
                await self._hold(hold)
                await self._keep(tenant, name, source)
        except BaseException as error:  # a caller's cancellation too: nobody else would end these holds for a long time
            with contextlib.suppress(TimeoutError, AIQueueError):
                async with asyncio.timeout(LET_GO_S):
                    if hold is not None and not isinstance(error, AIQueueError):
                        await self._hold(hold)  # its answer comes after what was under way: that is purged with it
                    await self.release(tenant, told)
            raise
        return told

    async def body(self, tenant: str, told: Mapping[str, str]) -> bytes:
        """The body of a job that carries a reference to it, verified.

        Raises NotFound, Corrupt, BadInput (a reference that is none): it will never be had. Raises Unavailable.
        """
        size = headers.number(told.get(headers.DOCUMENT_SIZE, ""))
        document = _named(tenant, told.get(headers.DOCUMENT, ""), size)
        if size > codec.MAX_BYTES:
            raise TooLarge(size, codec.MAX_BYTES)
        return await self.open(document).read(codec.MAX_BYTES)

    async def release(self, tenant: str, told: Mapping[str, str]) -> None:
        """End the holds of a job that has come to its end, by its headers; a body that nobody else holds goes at once.

        What cannot be done now is left to the collector: this never raises.
        """
        ref, sha256 = told.get(headers.DOCUMENT_REF, ""), told.get(headers.DOCUMENT, "")
        with contextlib.suppress(AIQueueError):
            if subjects.TOKEN.fullmatch(ref):
                await self.objects.purge(self._subject(Hold(tenant, "*", JOB, ref)))
            if sha256:
                _named(tenant, sha256)
                await self.drop(tenant, sha256)

    # -- for the collector

    async def drop(self, tenant: str, sha256: str) -> bool:
        """Delete a document that nobody holds. False where somebody does, or it is not there."""
        info = await self.objects.info(f"{tenant}/{sha256}")
        if info is None:  # the order matters: what is touched from here on is not deleted
            return False
        if not info.deleted and await self._connection.first(self.objects.stream, self._about(tenant, sha256)):
            return False
        return await self.objects.delete(info)

    async def holds(self) -> AsyncIterator[tuple[Hold, int, float]]:
        """All holds, each with the sequence and the time of its message."""
        async for stored in self._connection.read(self.objects.stream, self.objects.subject("R", "*", "*", "*", "*")):
            hold = Hold(*stored.subject.split(".")[3:])
            if hold.by in (JOB, PUT):
                yield hold, stored.seq, stored.time

    async def let_go(self, hold: Hold, *, upto: int) -> None:
        """End one hold, if it was not renewed after sequence `upto`."""
        await self.objects.purge(self._subject(hold), upto=upto)

    # -- within

    async def _hold(self, hold: Hold, keep_s: float | None = None) -> None:
        told = {headers.MSG_ID: subjects.new_id()}
        if keep_s is not None:
            told[headers.TTL] = f"{round(keep_s)}s"
        await self._connection.store(self._subject(hold), b"", told)

    async def _keep(
        self,
        tenant: str,
        sha256: str,
        source: bytes | Info | None,
        words: Words = Words(),  # noqa: B008  (frozen)
    ) -> None:
        """Touch the document, or store it from its bytes or its uploaded chunks. The hold is there already.

        Raises NotFound where there is no document and no source.
        """
        name = f"{tenant}/{sha256}"
        uploaded = source if isinstance(source, Info) else None
        for _ in range(TOUCHES_MAX):
            known = await self.objects.info(name)
            there = known if known is not None and not known.deleted else None
            if there is None and uploaded is None:
                if not isinstance(source, bytes):
                    raise _missing(tenant, sha256)
                uploaded = await self.objects.upload(source)
            wanted = there or uploaded
            assert wanted is not None
            title, content_type = words.title or wanted.title, words.content_type or wanted.content_type
            wanted = replace(wanted, name=name, title=title, content_type=content_type)
            try:
                await self.objects.say(wanted, instead_of=known.seq if known else 0)
            except Conflict:
                continue
            if uploaded is not None and uploaded.nuid != wanted.nuid:
                await self._drop_unused(name, uploaded)
            return
        if uploaded is not None:
            await self._drop_unused(name, uploaded)
        raise Unavailable(f"document {name}: {TOUCHES_MAX} others came between; try again")

    async def _drop_unused(self, name: str, uploaded: Info) -> None:
        """Delete an upload's chunks, unless they are the document's after all: a try that met a conflict, its answer
        having been lost, was stored. What cannot be asked now is left to the collector.
        """
        with contextlib.suppress(AIQueueError):
            known = await self.objects.info(name)
            if known is None or known.nuid != uploaded.nuid:
                await self.objects.purge(self.objects.subject("C", uploaded.nuid))

    async def _there(self, document: Document) -> Info:
        info = await self.objects.info(f"{document.tenant}/{document.sha256}")
        if info is None or info.deleted:
            raise _missing(document.tenant, document.sha256)
        return info

    def _subject(self, hold: Hold) -> str:
        return self.objects.subject("R", *hold)

    def _about(self, tenant: str, sha256: str) -> str:
        return self.objects.subject("R", tenant, sha256, ">")


def document_of(info: Info) -> Document | None:
    """The document in an object; None for what somebody else keeps in this store."""
    tenant, slash, sha256 = info.name.partition("/")
    try:
        return Document(
            tenant=tenant, sha256=sha256 if slash else "", size=info.size, name=info.title,
            content_type=info.content_type,
        )  # fmt: skip
    except pydantic.ValidationError:
        return None


def _named(tenant: str, sha256: str, size: int = 0) -> Document:
    subjects.token("tenant", tenant)
    try:
        return Document(tenant=tenant, sha256=sha256, size=size)
    except pydantic.ValidationError:
        raise BadInput(f"{sha256[:80]!r} names no document: it must be a SHA-256 of 64 hexadecimal digits") from None


def _missing(tenant: str, sha256: str) -> NotFound:
    return NotFound(f"document {sha256} of tenant {tenant} is not stored: put it, and enqueue while it is kept")


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
