"""What travels between a worker and its child processes: frames of CBOR on a pipe. Nothing is unpickled.

A frame is a length and a list, whose first item is the verb. `pool` is the worker's end, `child` the child's.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, BinaryIO

from .. import codec
from ..attempt import RawJob
from ..errors import AIQueueError, BadInput, Corrupt, NotFound, Stale, Unavailable
from ..topology import Family

QUESTIONS = frozenset({"progress", "chunk", "document", "close document", "step", "keep step", "call", "calls"})
LENGTH = 4  # bytes of a frame's length, big-endian


def encode_frame(items: list[Any]) -> bytes:
    """Return the frame of a list. Raises EncodeError for items that are not plain data."""
    body = codec.encode(items)
    return len(body).to_bytes(LENGTH, "big") + body


async def read_frame(reader: asyncio.StreamReader) -> list[Any]:
    """Read the next frame. Raises EOFError (asyncio's IncompleteReadError is one), DecodeError."""
    size = int.from_bytes(await reader.readexactly(LENGTH), "big")
    return _decode_items(await reader.readexactly(size))


def read_frame_blocking(pipe: BinaryIO) -> list[Any]:
    """Read the next frame, in a thread. Raises EOFError, DecodeError."""
    return _decode_items(_read_exactly(pipe, int.from_bytes(_read_exactly(pipe, LENGTH), "big")))


def raw_job_to_plain(raw: RawJob) -> list[Any]:
    """Return a job as plain data, with the name of its family."""
    return [raw.family.name, *raw[1:5], dict(raw.headers), raw.body]


def family_to_plain(family: Family) -> dict[str, Any]:
    """Return a family as plain data. ``Family(**data)`` makes an equal one."""
    return {each.name: getattr(family, each.name) for each in dataclasses.fields(family)}


def error_to_plain(error: AIQueueError) -> list[Any]:
    """Return an error as plain data, under the name of its nearest class that `error_from_plain` knows."""
    names = (each.__name__ for each in type(error).__mro__)
    name = next((each for each in names if each in _ERRORS or each == "Stale"), "")
    return [name, str(error), isinstance(error, Stale) and error.ended]


def error_from_plain(plain: list[Any]) -> AIQueueError:
    """Return the error that `error_to_plain` wrote. Of an unknown class, it is an AIQueueError with the same text."""
    name, text, ended = plain
    if name == "Stale":
        return Stale(text, ended=bool(ended))
    return _ERRORS.get(name, AIQueueError)(text)


_ERRORS: dict[str, type[AIQueueError]] = {
    each.__name__: each for each in (Unavailable, NotFound, Corrupt, BadInput)
}  # fmt: skip


def _decode_items(body: bytes) -> list[Any]:
    """Return the list in a frame's body. Anything else becomes ``["?"]``, a verb that nobody knows."""
    items = codec.decode(body, codec.CBOR)
    return items if isinstance(items, list) and items else ["?"]


def _read_exactly(pipe: BinaryIO, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data
