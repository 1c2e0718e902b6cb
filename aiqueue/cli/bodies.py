"""Reads the bodies of jobs that `enqueue` is given: one JSON object, or a file or stdin with one on each line."""

from __future__ import annotations

import contextlib
import io
import json as jsonlib
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput
from . import output

CHUNK_BYTES = 65_536
LINE_BYTES_MAX = 64 * 1024 * 1024


@dataclass(frozen=True)
class Input:
    """Where bodies come from: a text, or an open file."""

    name: str
    text: bytes = b""
    fd: int | None = None
    size: int | None = None

    @property
    def is_many(self) -> bool:
        return self.name != "JSON"


@contextlib.contextmanager
def open_input(body: str) -> Iterator[Input]:
    """Open what the argument JSON|@FILE|- names. Raises BadInput if the file cannot be read."""
    import os  # noqa: PLC0415
    import stat  # noqa: PLC0415

    if body == "-":
        if sys.stdin.isatty():
            output.print_line("reading from the terminal: a JSON object on each line; Ctrl-D ends the input", err=True)
        try:
            yield Input("stdin", fd=sys.stdin.fileno())
        except io.UnsupportedOperation:
            yield Input("stdin", text=sys.stdin.buffer.read())
    elif body.startswith("@"):
        try:
            fd = os.open(body[1:], os.O_RDONLY)
        except OSError as error:
            raise BadInput(f"cannot read {body[1:]!r}: {error.strerror}") from None
        try:
            about = os.fstat(fd)
            if stat.S_ISDIR(about.st_mode):
                raise BadInput(f"cannot read {body[1:]!r}: it is a directory")
            yield Input(body[1:], fd=fd, size=about.st_size if stat.S_ISREG(about.st_mode) else None)
        finally:
            os.close(fd)
    else:
        yield Input("JSON", text=body.encode("utf-8", "surrogateescape"))


async def parse_bodies(source: Input) -> AsyncIterator[tuple[int, Any, int]]:
    """Yield line number, value and size in bytes of each JSON value: one per line, or a single one on several lines."""
    number, seen = 0, False
    lines = _read_lines(source)
    async for line in lines:
        number += 1
        if not line.strip():
            continue
        try:
            value = _parse_json(line)
        except ValueError as error:
            if seen:
                raise BadInput(f"{source.name} line {number}: not JSON: {error}") from None
            whole = [line]
            async for more in lines:
                whole.append(more)
                if sum(map(len, whole[-2:])) > LINE_BYTES_MAX:
                    break
            text = b"".join(whole)
            try:
                yield 1, _parse_json(text), len(text)
            except ValueError as problem:
                what = source.name if source.is_many else "the body"
                raise BadInput(f"{what} is not JSON: {problem}") from None
            return
        seen = True
        yield number, value, len(line)


def _parse_json(text: bytes) -> Any:
    try:
        return jsonlib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


async def _read_lines(source: Input) -> AsyncIterator[bytes]:
    rest = b""
    async for chunk in _read_chunks(source):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line + b"\n"
        if len(rest) > LINE_BYTES_MAX:
            raise BadInput(f"{source.name}: a line is longer than {LINE_BYTES_MAX:,} bytes")
    if rest:
        yield rest


async def _read_chunks(source: Input) -> AsyncIterator[bytes]:
    """Yield the input in chunks. A thread reads them, so that Ctrl-C does not wait for a blocked read."""
    import asyncio  # noqa: PLC0415
    import os  # noqa: PLC0415
    import threading  # noqa: PLC0415
    from concurrent.futures import CancelledError  # noqa: PLC0415

    if source.fd is None:
        yield source.text
        return
    fd = os.dup(source.fd)
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | OSError] = asyncio.Queue(maxsize=4)

    def read() -> None:
        try:
            while True:
                try:
                    got: bytes | OSError = os.read(fd, CHUNK_BYTES)
                except OSError as error:
                    got = error
                put = queue.put(got)
                try:
                    asyncio.run_coroutine_threadsafe(put, loop).result()
                except (
                    RuntimeError,
                    CancelledError,
                ):  # the loop is closed or closing: nobody reads the chunks any more
                    put.close()
                    return
                if not got or isinstance(got, OSError):
                    return
        finally:
            os.close(fd)

    threading.Thread(target=read, name="aiqueue-stdin", daemon=True).start()
    while chunk := await queue.get():
        if isinstance(chunk, OSError):
            raise BadInput(f"cannot read {source.name}: {chunk.strerror}")
        yield chunk
