"""What a child process of a parse pool does: it reads one document at a time, within limits.

It ends with its parent: when the socket closes, and on Linux by the kernel, whatever both are doing. Elsewhere a child
that is busy ends after its document, at the latest by its limit of CPU time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cbor2

from ..errors import LoadError, SettingsError
from .chunking import chunk
from .errors import ParseFailed
from .parse_frames import LENGTH, ROWS, encode_frame
from .parsing import DocumentSource, Parsers
from .types import Chunk, Section

_PR_SET_PDEATHSIG = 1


def main(parent: int, number: int, memory_bytes: int, parsers: Sequence[str]) -> None:
    """Serve the process `parent` on the socket with this file descriptor, until the socket closes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _limit("RLIMIT_AS", memory_bytes)
    _limit("RLIMIT_CORE", 0)
    os.set_inheritable(number, False)
    with socket.socket(fileno=number) as sock:
        try:
            known = Parsers.load(parsers)
        except LoadError as error:
            sock.sendall(encode_frame(["unable", str(error)]))
            return
        sock.sendall(encode_frame(["ready"]))
        with contextlib.suppress(EOFError, ConnectionError):
            while True:
                _serve(sock, known)


def _serve(sock: socket.socket, parsers: Parsers) -> None:
    """Read one document. Raises EOFError when the parent has gone."""
    head, files = _receive_head(sock)
    try:
        request = cbor2.loads(_receive(sock, head))
        content = _receive(sock, request[4]) if not files else b""
        for frame in _answer(parsers, request, content, files):
            sock.sendall(encode_frame(frame))
    finally:
        for each in files:
            os.close(each)


def _answer(parsers: Parsers, request: list[Any], content: bytes, files: list[int]) -> Iterator[list[Any]]:
    _, form, name, content_type, _, cpu_s, chunks_max = request
    usage = resource.getrusage(resource.RUSAGE_SELF)
    _limit("RLIMIT_CPU", int(usage.ru_utime + usage.ru_stime) + cpu_s + 1)
    try:
        if files:
            content = _read_file(files[0])
        document = parsers.parse(content, DocumentSource(name, content_type))
        del content
        found: Sequence[Chunk | Section] = document.sections
        if form == "chunks":
            found = chunk(document, chunks_max=chunks_max)
        for begin in range(0, len(found), ROWS):
            yield ["rows", [_to_row(each) for each in found[begin : begin + ROWS]]]
        yield ["done", document.title, list(document.problems), _kept_bytes()]
    except ParseFailed as error:
        yield ["failed", error.reason, _kept_bytes()]
    except MemoryError:
        yield ["failed", "", _kept_bytes()]
    except (SettingsError, OSError) as error:
        yield ["unable", str(error)]


def _to_row(each: Chunk | Section) -> list[Any]:
    if isinstance(each, Chunk):
        return [each.number, each.text, each.heading, each.start, each.page]
    return [each.heading, each.text, each.start, each.page]


def _read_file(number: int) -> bytes:
    with open(number, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        return file.read()


def _limit(name: str, value: int) -> None:
    """Set a soft limit, where the system has it."""
    with contextlib.suppress(AttributeError, ValueError, OSError):
        which = getattr(resource, name)
        hard = resource.getrlimit(which)[1]
        resource.setrlimit(which, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _kept_bytes() -> int:
    """Return the memory of this process. (On Linux, ru_maxrss would begin with the parent's.)"""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _receive_head(sock: socket.socket) -> tuple[int, list[int]]:
    """Return the length of the next frame, and the open file that is sent along, if one is."""
    head, files, _, _ = socket.recv_fds(sock, LENGTH, 1)
    if len(head) < LENGTH:
        head += _receive(sock, LENGTH - len(head)) if head else b""
    if not head:
        raise EOFError
    return int.from_bytes(head, "big"), files


def _receive(sock: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count = sock.recv_into(view[got:])
        if not count:
            raise EOFError
        got += count
    view.release()
    return bytes(data)
