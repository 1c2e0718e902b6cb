"""Stores messages of one stream all together or not at all, for callers that decide themselves about a next try."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ..errors import AIQueueError, NotFound, Unavailable
from . import frames
from .frames import Headers, Received

TOGETHER_MAX = 1_000  # messages: the server's limit
DUPLICATE = 10201  # err_code: the batch has a Nats-Msg-Id that the stream knows
ANSWER_S = 5.0
LOOKUP_S = 2.0


class AtomicConnection(Protocol):
    """What an atomic batch needs of the connection."""

    async def wait_up(self, timeout_s: float) -> None: ...
    def tell(self, subject: str, body: bytes, *, reply: str = "", block: bytes = b"") -> None: ...
    async def request(
        self, subject: str, body: bytes = b"", *, headers: Headers | None = None, timeout_s: float = ...
    ) -> Received: ...
    async def api(
        self, subject: str, request: dict[str, Any] | None = None, *, timeout: float = ...
    ) -> dict[str, Any]: ...


async def store_together(
    connection: AtomicConnection,
    stream: str,
    messages: Sequence[tuple[str, Mapping[str, str]]],
    *,
    timeout_s: float = ANSWER_S,
) -> bool:
    """Store messages, each a subject and its headers, as one atomic batch (ADR-50). `stream` has all the subjects.

    Returns False if the stream knows the Nats-Msg-Id of one, and so has stored none of them now. There is one try.
    Raises Unavailable, whose `maybe_stored` says whether they may be stored, NotFound where there is no such stream,
    AccessDenied, and ServerError: the stream refuses them.
    """
    await connection.wait_up(timeout_s)
    name, last = secrets.token_hex(8), len(messages)
    for number, (subject, given) in enumerate(messages[:-1], 1):
        connection.tell(subject, b"", block=frames.block(_numbered(given, name, number)))
    subject, given = messages[-1]
    commit = {**_numbered(given, name, last), "Nats-Batch-Commit": "1"}
    try:
        reply = await connection.request(subject, headers=commit, timeout_s=timeout_s)
    except Unavailable as error:
        if "no responders" in str(error):
            raise await _explain_no_responders(connection, stream) from None
        error.maybe_stored = True
        raise
    if _err_code(reply.data) == DUPLICATE:
        return False
    if frames.parse_stream_reply(reply.data, subject) is None:
        raise Unavailable(f"{subject}: the reply is not the stream's", maybe_stored=True)
    return True


def _numbered(given: Mapping[str, str], name: str, number: int) -> dict[str, str]:
    return {**given, "Nats-Batch-Id": name, "Nats-Batch-Sequence": str(number)}


def _err_code(data: bytes) -> int | None:
    try:
        code = json.loads(data)["error"]["err_code"]
    except (ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) else None


async def _explain_no_responders(connection: AtomicConnection, stream: str) -> AIQueueError:
    """Return why nobody answers: the stream does not exist, or it has no leader now. Nothing is stored."""
    try:
        await connection.api(f"STREAM.INFO.{stream}", timeout=LOOKUP_S)
    except NotFound as error:
        return error
    except AIQueueError:
        pass
    return Unavailable(f"nobody responds for stream {stream}: it has no leader now, or lacks some of the subjects")
