"""What travels between a worker and its child processes: frames of CBOR on a pipe. Nothing is unpickled.

A frame is a length and a list, whose first item is the verb. `pool` is the worker's end, `child` the child's. Large
bytes at the end of a list follow the frame as they are, so that neither end copies them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
from typing import Any, BinaryIO

from .. import codec, errors
from ..attempt import RawJob
from ..errors import AIQueueError
from ..topology import Family

BEGIN = "begin"  # asked before the handler of a limited job is called: with its cost and key
QUESTIONS = frozenset({
    "progress", "chunk", "document", "close document", "step", "keep step", "call", "calls", "enqueue", "gather",
    BEGIN,
})  # fmt: skip
SETTLE = "settle"  # what a child says of its job without waiting for an answer
LENGTH = 4  # bytes of a frame's length, big-endian; its highest bit says that raw bytes follow
RAW_LENGTH = 8  # bytes of the length of raw bytes
RAW_MIN = 256 * 1024  # from this size on, bytes at the end of a list follow the frame
PIECE = 256 * 1024  # in which raw bytes are read from the pipe
_RAW_FOLLOWS = 1 << 31


def encode_frame(items: list[Any]) -> list[bytes]:
    """Return the frame of a list, in the pieces to be written. Raises EncodeError for items that are not plain data."""
    last = items[-1]
    if type(last) is not bytes or len(last) < RAW_MIN:
        body = codec.encode(items)
        return [len(body).to_bytes(LENGTH, "big") + body]
    body = codec.encode(items[:-1])
    head = (len(body) | _RAW_FOLLOWS).to_bytes(LENGTH, "big") + len(last).to_bytes(RAW_LENGTH, "big")
    return [head + body, last]


async def read_frame(reader: asyncio.StreamReader) -> list[Any]:
    """Read the next frame. Raises EOFError (asyncio's IncompleteReadError is one), DecodeError."""
    size = int.from_bytes(await reader.readexactly(LENGTH), "big")
    if not size & _RAW_FOLLOWS:
        return _decode_items(await reader.readexactly(size))
    left = int.from_bytes(await reader.readexactly(RAW_LENGTH), "big")
    items = _decode_items(await reader.readexactly(size ^ _RAW_FOLLOWS))
    raw = io.BytesIO()  # grows as the bytes come: what the pipe claims is not trusted
    while left:
        piece = await reader.read(min(left, PIECE))
        if not piece:
            raise EOFError
        left -= raw.write(piece)
    return [*items, raw.getvalue()]


def read_frame_blocking(pipe: BinaryIO) -> list[Any]:
    """Read the next frame, in a thread. Raises EOFError, DecodeError."""
    size = int.from_bytes(_read_exactly(pipe, LENGTH), "big")
    if not size & _RAW_FOLLOWS:
        return _decode_items(_read_exactly(pipe, size))
    raw_size = int.from_bytes(_read_exactly(pipe, RAW_LENGTH), "big")
    items = _decode_items(_read_exactly(pipe, size ^ _RAW_FOLLOWS))
    return [*items, _read_exactly(pipe, raw_size)]


def raw_job_to_plain(raw: RawJob) -> list[Any]:
    """Return a job as plain data, with the name of its family."""
    return [raw.family.name, *raw[1:5], dict(raw.headers), raw.body, raw.stored_at]


def family_to_plain(family: Family) -> dict[str, Any]:
    """Return a family as plain data. ``Family(**data)`` makes an equal one."""
    return {each.name: getattr(family, each.name) for each in dataclasses.fields(family)}


def error_to_plain(error: AIQueueError) -> list[Any]:
    """Return an error as plain data: the name of its nearest class in `errors`, its text, and its plain attributes."""
    name = next(each.__name__ for each in type(error).__mro__ if each.__name__ in _ERRORS)
    attributes = {key: value for key, value in vars(error).items() if isinstance(value, _PLAIN_TYPES)}
    return [name, str(error), attributes]


def error_from_plain(plain: list[Any]) -> AIQueueError:
    """Return the error that `error_to_plain` wrote."""
    name, text, attributes = plain
    cls = _ERRORS.get(name, AIQueueError)
    error = cls.__new__(cls, text)
    error.args = (text,)
    vars(error).update(attributes)
    return error


_PLAIN_TYPES = (bool, int, float, str, type(None))
_ERRORS: dict[str, type[AIQueueError]] = {
    name: each for name, each in vars(errors).items() if isinstance(each, type) and issubclass(each, AIQueueError)
}


def _decode_items(body: bytes) -> list[Any]:
    """Return the list in a frame's body, which may have the results of many children. Anything else becomes ``["?"]``,
    a verb that nobody knows.
    """
    items = codec.decode(body, codec.CBOR, max_bytes=len(body))
    return items if isinstance(items, list) and items else ["?"]


def _read_exactly(pipe: BinaryIO, size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data
