"""What travels between a worker and its children: frames of CBOR on a pipe, a length in front. Nothing is unpickled."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any, BinaryIO

from .. import codec
from ..attempt import RawJob
from ..errors import AIQueueError, BadInput, Corrupt, NotFound, Stale, Unavailable
from ..topology import Family

LENGTH = 4  # bytes of a frame's length, big-endian


def pack(said: list[Any]) -> bytes:
    """A frame. Raises EncodeError for what is no plain data."""
    body = codec.encode(said)
    return len(body).to_bytes(LENGTH, "big") + body


async def hear(reader: asyncio.StreamReader) -> list[Any]:
    """The next frame. Raises EOFError (asyncio's IncompleteReadError is one), DecodeError."""
    size = int.from_bytes(await reader.readexactly(LENGTH), "big")
    return _words(await reader.readexactly(size))


def hear_blocking(pipe: BinaryIO) -> list[Any]:
    """The next frame, for a thread. Raises EOFError, DecodeError."""
    return _words(_exactly(pipe, int.from_bytes(_exactly(pipe, LENGTH), "big")))


def plain_parcel(raw: RawJob) -> list[Any]:
    """A parcel as plain data, its family by name."""
    return [raw.family.name, *raw[1:5], dict(raw.headers), raw.body]


def plain_family(family: Family) -> dict[str, Any]:
    """A family as plain data; ``Family(**data)`` makes it again."""
    return {each.name: getattr(family, each.name) for each in dataclasses.fields(family)}


def plain_error(error: AIQueueError) -> list[Any]:
    """An error of what was done for a child, as `error_of` reads it: by the nearest class that is known there."""
    names = (each.__name__ for each in type(error).__mro__)
    name = next((each for each in names if each in _ERRORS or each == "Stale"), "")
    return [name, str(error), isinstance(error, Stale) and error.ended]


def error_of(plain: list[Any]) -> AIQueueError:
    """What a child raises where its parent could not do it: the same, or AIQueueError with the text."""
    name, text, ended = plain
    if name == "Stale":
        return Stale(text, ended=bool(ended))
    return _ERRORS.get(name, AIQueueError)(text)


_ERRORS: dict[str, type[AIQueueError]] = {
    each.__name__: each for each in (Unavailable, NotFound, Corrupt, BadInput)
}  # fmt: skip


def _words(body: bytes) -> list[Any]:
    said = codec.decode(body, codec.CBOR)
    return said if isinstance(said, list) and said else ["?"]


def _exactly(pipe: BinaryIO, size: int) -> bytes:
    found = pipe.read(size)
    if len(found) < size:
        raise EOFError
    return found
