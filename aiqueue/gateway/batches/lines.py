"""The lines of a batch's input: found in a stream of bytes, checked, and made requests. Pure."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import AsyncIterator
from typing import Any, Final, NamedTuple

import pydantic

from ...errors import BadInput
from ..json_bounds import find_excess
from ..requests import REQUEST_BYTES_MAX, EmbeddingRequest, GatewayRequest
from ..runtime import Request
from .model import LineProblem

LINE_BYTES_MAX: Final = REQUEST_BYTES_MAX + 64 * 1024
CUSTOM_ID_MAX: Final = 512
_OWN: Final = ("request_id", "tenant_id", "timestamp", "reply_form", "prompt", "parameters")  # no fields of OpenAI's
_KEYS: Final = frozenset({"custom_id", "method", "url", "body"})
_BLANK = re.compile(rb"\s*\n")


class RawLine(NamedTuple):
    """A line of the input that is not blank. `number`: in the file, from 1. `end`: the byte behind it.

    `data`: None: it is longer than LINE_BYTES_MAX.
    """

    number: int
    end: int
    data: bytes | None


class BatchLine(NamedTuple):
    """A line that is in order but for its body, which only the model can judge."""

    number: int
    custom_id: str
    body: dict[str, Any]


class RefusedLine(Exception):
    """A line because of which its batch is refused."""

    def __init__(self, code: str, message: str, line: int, param: str | None = None) -> None:
        super().__init__(message)
        self.problem = LineProblem(code, message, line, param)


async def split_lines(chunks: AsyncIterator[bytes], *, offset: int = 0, number: int = 0) -> AsyncIterator[RawLine]:
    """Yield the lines of a stream of bytes that are not blank. Holds one line and one chunk.

    `offset`, `number`: pass over so many bytes, which are so many lines.
    """
    held, at, skip, too_long = bytearray(), offset, offset, False
    async for chunk in chunks:
        if skip >= len(chunk):
            skip -= len(chunk)
            continue
        start, skip = skip, 0
        while True:
            if not held and (blank := _BLANK.match(chunk, start)) is not None:  # 200 MB of them would take minutes
                number += chunk.count(b"\n", start, blank.end())
                at, start = at + blank.end() - start, blank.end()
            if (found := chunk.find(b"\n", start)) < 0:
                break
            held += chunk[start : found + 1]
            at, start, number = at + found + 1 - start, found + 1, number + 1
            if raw := _raw_line(held, number, at, too_long=too_long):
                yield raw
            held, too_long = bytearray(), False
        held += chunk[start:]
        at += len(chunk) - start
        if len(held) > LINE_BYTES_MAX:
            held, too_long = bytearray(b"x"), True  # its bytes are not kept
    if raw := _raw_line(held, number + 1, at, too_long=too_long):
        yield raw


def _raw_line(held: bytearray, number: int, end: int, *, too_long: bool) -> RawLine | None:
    data = bytes(held)
    if number == 1:
        data = data.removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        return None
    return RawLine(number, end, None if too_long or len(data) > LINE_BYTES_MAX + 1 else data)


def parse_line(raw: RawLine, endpoint: str) -> BatchLine:
    """Return what a line says. Raises RefusedLine."""
    number = raw.number
    if raw.data is None:
        raise RefusedLine("line_too_long", f"line {number} is longer than {LINE_BYTES_MAX:,} bytes", number)
    if excess := find_excess(raw.data):
        raise RefusedLine("invalid_json_line", f"line {number} has {excess}", number)
    try:
        line = json.loads(raw.data)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, json.JSONDecodeError) else "not UTF-8, or nested too deeply"
        raise RefusedLine("invalid_json_line", f"line {number} is no JSON: {why[:120]}", number) from None
    if not isinstance(line, dict):
        raise RefusedLine("invalid_json_line", f"line {number} is no JSON object", number)
    if unknown := line.keys() - _KEYS:
        name = min(map(str, unknown))[:80].encode("utf-8", "replace").decode()  # JSON can name a lone surrogate
        raise RefusedLine("unknown_parameter", f"line {number} has an unknown field {name!r}", number, name)
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= CUSTOM_ID_MAX or not _is_encodable(custom_id):
        text = f"line {number} needs a custom_id: a text of 1 to {CUSTOM_ID_MAX} characters"
        raise RefusedLine("invalid_custom_id", text, number, "custom_id")
    if line.get("method") != "POST":
        raise RefusedLine("invalid_method", f'line {number} needs "method": "POST"', number, "method")
    if line.get("url") != endpoint:
        text = f"line {number} needs the batch's endpoint as its url: {endpoint}"
        raise RefusedLine("invalid_url", text, number, "url")
    body = line.get("body")
    if not isinstance(body, dict):
        raise RefusedLine("missing_required_parameter", f"line {number} needs a body: an object", number, "body")
    return BatchLine(number, custom_id, body)


def make_request(line: BatchLine, endpoint: str) -> Request:
    """Return the request that a line's body asks for. Raises BadInput, in one line."""
    for name in _OWN:
        if name in line.body:
            raise BadInput(f"{name} is no parameter of {endpoint}")
    if line.body.get("stream"):
        raise BadInput("stream must be false in a batch")
    kind: type[Request] = EmbeddingRequest if endpoint.endswith("/embeddings") else GatewayRequest
    try:
        return kind.model_validate(line.body)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        text = f"{where}: {first['msg']}" if where else str(first["msg"])
        raise BadInput(text.removeprefix("Value error, ")[:500]) from None


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
