"""Bodies of requests: whole, within a time and a size, and as JSON that is not too deep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from starlette.requests import Request
from starlette.types import Message, Receive, Scope

from ... import codec
from ...errors import DecodeError
from ..json_bounds import find_excess
from .context import Front
from .errors import RETRY_S, ApiError

T = TypeVar("T")

DROPPED_MAX: Final = 64 * 1024 * 1024  # of a body that is refused, and how long: see `Incoming.drop_rest`
DROPPED_S: Final = 60.0
STALLED_S: Final = 2.0
IN_THREAD_BYTES: Final = 256 * 1024  # larger JSON would hold up other requests


class ClientGone(Exception):
    """The client has closed the connection: nobody waits for an answer."""


class Incoming:
    """What a client sends, as an ASGI application receives it: `receive`. It knows whether the body was read."""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        names = {name for name, _ in scope["headers"]}
        self._is_read = not names & {b"content-length", b"transfer-encoding"} or b"expect" in names
        self._receive = receive

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.disconnect" or not message.get("more_body"):
            self._is_read = True
        return message

    async def drop_rest(self) -> bool:
        """Read what is left of the body, before an answer that does not need it: a connection that is closed with bytes
        unread is reset, and the client reads no answer. Return whether all was read: not from a client that stalls, or
        sends without end. One that waits for a status before its body (Expect) sends none.
        """
        if self._is_read:
            return True
        left = DROPPED_MAX
        try:
            async with asyncio.timeout(DROPPED_S):
                while not self._is_read and left > 0:
                    async with asyncio.timeout(STALLED_S):
                        message = await self.receive()
                    left -= len(message.get("body", b""))
        except TimeoutError:
            pass
        return self._is_read


async def read_chunks(request: Request, *, bytes_max: int, within_s: float) -> AsyncIterator[bytes]:
    """Yield the body as it comes. Raises ApiError: 413 above `bytes_max`, 408 after `within_s` seconds; ClientGone."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise ApiError(415, f"content-encoding {encoding[:40]!r} is not supported: send the body as it is")
    size, end = 0, asyncio.get_running_loop().time() + within_s
    declared = request.headers.get("content-length", "0")
    is_too_large = declared.isdecimal() and int(declared) > bytes_max
    while not is_too_large:
        try:
            async with asyncio.timeout_at(end):
                message = await request.receive()
        except TimeoutError:
            problem = f"the body has not arrived within {within_s:g} s"
            raise ApiError(408, problem, code="request_timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        part, is_last = message.get("body", b""), not message.get("more_body")
        size += len(part)
        if size > bytes_max:
            break
        if part:
            yield part
        if is_last:
            return
    raise ApiError(413, f"the body has more than {bytes_max:,} bytes", code="request_too_large")


@asynccontextmanager
async def json_body(
    request: Request, front: Front, parse: Callable[[dict[str, Any]], T]
) -> AsyncIterator[tuple[dict[str, Any], T]]:
    """Lend the body, a JSON object of at most 64 levels, and what `parse` makes of it. While it is lent, it counts as
    held. Raises what `read_chunks` and `parse` raise, and ApiError: 400, or 503 if the process holds too much.
    """
    settings, tenant, held = front.settings, request.state.key.tenant, 0
    parts: list[bytes] = []
    try:
        async for part in read_chunks(request, bytes_max=settings.body_bytes_max, within_s=settings.body_s):
            if not front.bodies.take(tenant, len(part)):
                problem = "the gateway has too many large requests at once"
                raise ApiError(503, problem, code="overloaded", retry_after_s=RETRY_S)
            held += len(part)
            parts.append(part)
        body = b"".join(parts)
        parts.clear()
        if len(body) > IN_THREAD_BYTES:
            yield await asyncio.to_thread(_read_json, body, parse)
        else:
            yield _read_json(body, parse)
    finally:
        front.bodies.give_back(tenant, held)


def _read_json(body: bytes, parse: Callable[[dict[str, Any]], T]) -> tuple[dict[str, Any], T]:
    if excess := find_excess(body):
        raise ApiError(400, f"the body has {excess}", code="invalid_json")
    try:
        data = codec.decode_map(body, codec.JSON)
    except DecodeError as error:
        raise ApiError(400, error.reason, code="invalid_json") from None
    return data, parse(data)
