"""What a responder answers: a result, or an error as NATS micro services tell one (ADR-32), with a typed body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pydantic_core

from .. import codec, headers
from ..connection import Answer
from ..errors import (
    AccessDenied,
    AIQueueError,
    BadInput,
    DecodeError,
    JobFailed,
    NotFound,
    QueueFull,
    ResultTimeout,
    ServerError,
    TooLarge,
    Unavailable,
    details,
)  # fmt: skip

SERVICE_ERROR = "Nats-Service-Error"
SERVICE_ERROR_CODE = "Nats-Service-Error-Code"

_CODES: tuple[tuple[type[AIQueueError], int], ...] = (  # of the first that an error is an instance of, as in HTTP
    (JobFailed, 422), (ResultTimeout, 504), (QueueFull, 429), (TooLarge, 413), (BadInput, 400), (NotFound, 404),
    (AccessDenied, 403), (Unavailable, 503), (AIQueueError, 500),
)  # fmt: skip


def result(value: Any, job_id: str, *, as_json: bool) -> Answer:
    """The answer with a job's result. JSON has bytes as base64."""
    return Answer({headers.JOB_ID: job_id, headers.EVENT: "result", **_form(as_json)}, _body(value, as_json))


def refusal(error: AIQueueError, job_id: str, *, as_json: bool) -> Answer:
    """The answer with an error; its body is `errors.details`: ``error`` is its class, ``retryable`` whether to ask
    again with the same id.
    """
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    told = details(error) | ({"job_id": job_id} if job_id else {})
    line = headers.ascii_line(str(error))
    kept = {SERVICE_ERROR: line, SERVICE_ERROR_CODE: str(code), **_form(as_json)}
    return Answer(kept | ({headers.JOB_ID: job_id} if job_id else {}), _body(told, as_json), line)


def read(told: Mapping[str, str], body: bytes, job_id: str) -> Any:
    """The result in an answer, ours or another responder's, as plain data. Raises the error that it tells, and
    DecodeError for a body that is neither CBOR nor JSON.
    """
    code = told.get(SERVICE_ERROR_CODE, "")
    if not code and SERVICE_ERROR not in told:
        return _decoded(told, body) if body else None
    try:
        found = _decoded(told, body)
    except DecodeError:
        found = None
    if not isinstance(found, dict):
        found = {}
    said = str(found.get("message") or told.get(SERVICE_ERROR, "") or "an error without a word")
    raise _error(headers.number(code), said, found, job_id)


def _decoded(told: Mapping[str, str], body: bytes) -> Any:
    """The body as its type says, or else as it looks: nats-py's `Msg.respond` sends the request's headers back."""
    try:
        return codec.decode(body, told.get(headers.CONTENT_TYPE, ""))
    except DecodeError:
        return codec.decode(body)


def _error(code: int, said: str, found: Mapping[str, Any], job_id: str) -> AIQueueError:
    match code:
        case 422:
            number = found.get("attempt")
            return JobFailed(
                str(found.get("job_id", job_id)),
                reason=str(found.get("reason", "")),
                error=str(found.get("cause", said)),
                attempt=number if isinstance(number, int) else 0,
            )
        case 504:
            return ResultTimeout(said)
        case 429:
            reason = str(found.get("reason", said))
            return QueueFull(str(found.get("lane", f"the lane of job {job_id}")), reason)
        case 400 | 413:
            return BadInput(said)
        case 404:
            return NotFound(said)
        case 403:
            return AccessDenied(said)
        case 503:
            return Unavailable(said, maybe_stored=True)
        case _:
            return ServerError(said, code=code)


def _form(as_json: bool) -> dict[str, str]:
    return {headers.CONTENT_TYPE: codec.JSON if as_json else codec.CBOR}


def _body(value: Any, as_json: bool) -> bytes:
    if not as_json:
        return codec.encode(value)
    return pydantic_core.to_json(value, bytes_mode="base64", inf_nan_mode="null", fallback=str)


def is_json(media: str, body: bytes) -> bool:
    """Whether a request speaks JSON: it says so, or says nothing and looks so. A bare id does."""
    if media:
        return "json" in media.lower() or media.lower().startswith("text/")
    try:
        json.loads(body)
    except ValueError:
        return body.isascii() and body.decode().isprintable()
    return True
