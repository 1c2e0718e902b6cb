"""Documents are parsed here: small simple ones at once, others in child processes, within limits of time and memory."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, Self

from .. import codec
from ..connection import to_its_end
from ..errors import DecodeError, SettingsError, Unavailable
from .chunking import CHUNKS_MAX, chunk
from .errors import ParseFailed
from .parse_frames import LENGTH, encode_frame
from .parsing import HEAD, DocumentSource, Parsers
from .types import Chunk, ChunkedDocument, ParsedDocument, Section

Content = bytes | Path | IO[bytes]  # a path or open file is only read by the child
INLINE_BYTES_MAX = 64 * 1024  # a larger document is read in a child in any case: the event loop must go on
KEPT_BYTES_MAX = 256 * 1024**2  # a child that keeps more memory than this after a document is replaced
START_S = 60.0
END_S = 5.0
_CLOSED = "the parse pool is closed: make another ParsePool"
_NAME_CHARS_MAX = 1_000
_PIECE = 256 * 1024  # in which a child's answer is read
# As in `aiqueue work`, garbage collections are rarer from the first import on.
_CODE = (
    "import gc,json,sys;gc.set_threshold(10_000,20,20);sys.path[:]=json.loads(sys.argv[1]);"
    "from aiqueue.rag.parse_child import main;main(*json.loads(sys.argv[2]))"
)


@dataclass(frozen=True, slots=True)
class ParseLimits:
    """What one document may use: bytes, chunks, the memory of its child, seconds of CPU, and seconds in all."""

    size_bytes_max: int = 256 * 1024**2
    chunks_max: int = CHUNKS_MAX
    memory_bytes: int = 1024**3
    cpu_s: int = 60
    timeout_s: float = 120.0


class ParsePool:
    """At most `size` child processes, started when they are needed, kept for the next document, replaced when they die.

    `parsers`: the user's own, each a "module:attribute" that is a `Parser`; they come before those of aiqueue. Raises
    LoadError if one cannot be loaded. An async context manager: its end is `close`.
    """

    def __init__(self, *, size: int = 2, limits: ParseLimits | None = None, parsers: Sequence[str] = ()) -> None:
        self._limits = limits or ParseLimits()
        self._names = tuple(parsers)
        self._parsers = Parsers.load(self._names)
        self._free = asyncio.Semaphore(size)
        self._idle: list[_ParserProcess] = []
        self._all: set[_ParserProcess] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def pids(self) -> list[int]:
        """The pids of the living children."""
        return [each.pid for each in self._all]

    async def parse(self, content: Content, *, name: str = "", content_type: str = "") -> ParsedDocument:
        """Return the document's sections. `name` and `content_type` decide what the bytes themselves do not show.

        Raises ParseFailed for what can never be read; SettingsError if a package is missing; Unavailable if no child
        can be started.
        """
        source = DocumentSource(name[-_NAME_CHARS_MAX:], content_type[:_NAME_CHARS_MAX])
        content = await self._check(content)
        if (small := self._take_inline(content, source)) is not None:
            return self._parsers.parse(small, source)
        title, problems, rows = await self._ask("sections", content, source)
        return ParsedDocument(title, [Section(*each) for each in rows], problems)

    async def parse_to_chunks(self, content: Content, *, name: str = "", content_type: str = "") -> ChunkedDocument:
        """As `parse` and then `chunk`, both in the child where there is one. Raises what they raise."""
        source = DocumentSource(name[-_NAME_CHARS_MAX:], content_type[:_NAME_CHARS_MAX])
        content = await self._check(content)
        if (small := self._take_inline(content, source)) is not None:
            parsed = self._parsers.parse(small, source)
            return ChunkedDocument(parsed.title, chunk(parsed, chunks_max=self._limits.chunks_max), parsed.problems)
        title, problems, rows = await self._ask("chunks", content, source)
        return ChunkedDocument(title, [Chunk(*each) for each in rows], problems)

    async def close(self) -> None:
        """End all children; one that is busy is killed. Safe twice."""
        self._closed = True
        self._idle.clear()
        children, self._all = self._all, set()
        await asyncio.gather(*(each.end() for each in children))

    async def _check(self, content: Content) -> Content:
        """Return the content, in memory if it is small. Raises ParseFailed above the limit, OSError for its file."""
        if isinstance(content, bytes):
            size = len(content)
        elif isinstance(content, Path):
            size = await asyncio.to_thread(lambda: content.stat().st_size)
        else:
            size = os.fstat(content.fileno()).st_size
        if size > self._limits.size_bytes_max:
            limit = self._limits.size_bytes_max
            raise ParseFailed(
                f"its {size:,} bytes are above the limit of {limit:,}: split it, or raise limits.file in rag.toml"
            )
        if isinstance(content, bytes) or size > INLINE_BYTES_MAX:
            return content
        return await asyncio.to_thread(_read_small, content)

    def _take_inline(self, content: Content, source: DocumentSource) -> bytes | None:
        """Return the content if it is read in this process, else None."""
        if not isinstance(content, bytes) or len(content) > INLINE_BYTES_MAX:
            return None
        return None if content and self._parsers.find(content[:HEAD], source).in_child else content

    async def _ask(
        self, form: Literal["chunks", "sections"], content: Content, source: DocumentSource
    ) -> tuple[str, list[str], list[list[Any]]]:
        """Have a child read the document. A child that dies of it has read others before: only a fresh one is sure."""
        async with self._free:
            while True:
                child = self._idle.pop() if self._idle else await self._start()
                was_fresh = child.is_fresh
                try:
                    return await self._read(child, form, content, source)
                except _ParserDied as died:
                    if self._closed:  # by `close`, and not by the document
                        raise Unavailable(_CLOSED) from None
                    if was_fresh or died.is_certain:
                        raise ParseFailed(str(died)) from None
                finally:
                    if child.has_answered and child.kept_bytes <= KEPT_BYTES_MAX and not self._closed:
                        self._idle.append(child)
                    else:
                        self._all.discard(child)
                        await child.end()

    async def _start(self) -> _ParserProcess:
        if self._closed:
            raise Unavailable(_CLOSED)
        child = await _ParserProcess.start(self._limits, self._names)
        self._all.add(child)
        return child

    async def _read(
        self, child: _ParserProcess, form: str, content: Content, source: DocumentSource
    ) -> tuple[str, list[str], list[list[Any]]]:
        limits, rows = self._limits, []
        try:
            async with asyncio.timeout(limits.timeout_s):
                async for verb, *values in child.ask(form, content, source):
                    match verb:
                        case "rows":
                            rows += values[0]
                        case "done":
                            return values[0], values[1], rows
                        case "failed":
                            memory = f"it needs more than {_gib(limits.memory_bytes)} of memory to read"
                            raise ParseFailed(values[0] or f"{memory}: split it, or raise parsing.memory")
                        case _:
                            raise SettingsError(str(values[0]))
        except TimeoutError:
            raise _ParserDied(
                f"it takes longer than {limits.timeout_s:g} s to read: split it, or raise parsing.time", certain=True
            ) from None
        except (EOFError, ConnectionError, DecodeError, TypeError, IndexError):
            pass
        raise await child.describe_end()


class _ParserDied(Exception):
    """A child ended during a document. `is_certain`: the document is to blame, whatever the child did before."""

    def __init__(self, reason: str, *, certain: bool = False) -> None:
        super().__init__(reason)
        self.is_certain = certain


class _ParserProcess:
    """One child process, which leads a session: what it starts is killed with it."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket, limits: ParseLimits) -> None:
        self._process = process
        self._sock = sock
        self._limits = limits
        self.is_fresh = True  # it has read no document
        self.has_answered = False  # to the last document that it was sent
        self.kept_bytes = 0

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, limits: ParseLimits, parsers: Sequence[str]) -> Self:
        """Start a child, and wait until it is ready. Raises Unavailable, SettingsError."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -O, -W, -X: as multiprocessing
        arguments = json.dumps([os.getpid(), theirs.fileno(), limits.memory_bytes, list(parsers)])
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, *flags, "-P", "-c", _CODE, json.dumps(sys.path), arguments,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )  # fmt: skip
        except BaseException as error:
            ours.close()
            if isinstance(error, OSError):
                raise Unavailable(f"no child process for parsing: {sys.executable}: {error.strerror}") from error
            raise
        finally:
            theirs.close()
        child = cls(process, ours, limits)
        try:
            async with asyncio.timeout(START_S):
                verb, *values = await child._receive()
        except (TimeoutError, EOFError, ConnectionError, DecodeError) as error:
            await child.end()
            how = f"exit code {process.returncode}" if not isinstance(error, TimeoutError) else "it was not ready"
            raise Unavailable(f"no child process for parsing: {how} within {START_S:g} s") from None
        except BaseException:
            child._kill()
            await to_its_end(child.end())
            raise
        if verb != "ready":
            await child.end()
            raise SettingsError(str(values[0]))
        return child

    async def ask(self, form: str, content: Content, source: DocumentSource) -> AsyncIterator[list[Any]]:
        """Send a document, and yield the child's frames. Raises EOFError, ConnectionError, DecodeError."""
        self.is_fresh = self.has_answered = False
        size = len(content) if isinstance(content, bytes) else -1
        limits = [self._limits.cpu_s, self._limits.chunks_max]
        frame = encode_frame(["read", form, source.name, source.content_type, size, *limits])
        if isinstance(content, bytes):
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(self._sock, frame)
            await loop.sock_sendall(self._sock, content)
        elif isinstance(content, Path):
            with content.open("rb") as file:
                self._send_file(frame, file)
        else:
            self._send_file(frame, content)
        while True:
            items = await self._receive()
            if items[0] in ("done", "failed"):
                self.kept_bytes, self.has_answered = int(items[-1]), True
            yield items

    async def describe_end(self) -> _ParserDied:
        """Return how the child has ended, as a reason for the document's owner."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_S):
                await self._process.wait()
        code = self._process.returncode
        if code == -signal.SIGXCPU:
            return _ParserDied(
                f"it takes more than {self._limits.cpu_s} s of CPU to read: split it, or raise parsing.time",
                certain=True,
            )
        how = f"exit code {code}"
        if code is not None and code < 0:
            with contextlib.suppress(ValueError):
                how = signal.Signals(-code).name
        memory = _gib(self._limits.memory_bytes)
        return _ParserDied(
            f"its parser crashed ({how}), as happens when it needs more than {memory} of memory: split it, or save it "
            "anew with another program"
        )

    async def end(self) -> None:
        """End the child, whatever it is doing, and wait for its end. Safe twice."""
        self._sock.close()
        self._kill()
        await self._process.wait()

    def _kill(self) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def _send_file(self, frame: bytes, file: IO[bytes]) -> None:
        """Send a frame with an open file. The socket is empty here, so that it takes the small frame at once."""
        if socket.send_fds(self._sock, [frame], [file.fileno()]) != len(frame):
            raise ConnectionError

    async def _receive(self) -> list[Any]:
        size = int.from_bytes(await self._receive_bytes(LENGTH), "big")
        if size > self._limits.memory_bytes:  # a child may be in the hands of its document
            raise DecodeError("a frame is too long")
        body = await self._receive_bytes(size)
        items = codec.decode(body, codec.CBOR, max_bytes=size)
        if not isinstance(items, list) or not items:
            raise DecodeError("a frame is no list")
        return items

    async def _receive_bytes(self, size: int) -> bytes:
        loop, data = asyncio.get_running_loop(), bytearray()
        while len(data) < size:
            piece = await loop.sock_recv(self._sock, min(size - len(data), _PIECE))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)


def _gib(size: int) -> str:
    return f"{size / 1024**3:.3g} GiB"


def _read_small(content: Path | IO[bytes]) -> bytes:
    if isinstance(content, Path):
        return content.read_bytes()
    content.seek(0)
    return content.read()
