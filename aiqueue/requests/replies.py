"""A responder's answers: a result, or an error in the form of NATS micro services (ADR-32) with a typed body."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import pydantic_core

from .. import codec, headers
from ..connection import Answer, Received, Status
from ..errors import (
    AccessDenied,
    AIQueueError,
    BadInput,
    DecodeError,
    IdReused,
    JobCancelled,
    JobFailed,
    NotFound,
    QueueFull,
    ResponderError,
    ResultTimeout,
    TooLarge,
    Unavailable,
    details,
)  # fmt: skip
from ..payload import Document, reference_headers

SERVICE_ERROR = "Nats-Service-Error"
SERVICE_ERROR_CODE = "Nats-Service-Error-Code"

_CODES: tuple[tuple[type[AIQueueError], int], ...] = (  # as in HTTP; the first class that matches an error counts
    (JobFailed, 422), (ResultTimeout, 504), (QueueFull, 429), (TooLarge, 413), (IdReused, 409), (BadInput, 400),
    (NotFound, 404), (AccessDenied, 403), (Unavailable, 503), (AIQueueError, 500),
)  # fmt: skip


def result_answer(value: Any, job_id: str, *, as_json: bool, secrets: str = "") -> Answer:
    """Return the answer with a job's result, and the header that names its secret fields. In JSON, bytes are base64."""
    answer_headers = {headers.JOB_ID: job_id, headers.EVENT: "result", **_content_type(as_json)}
    return Answer(answer_headers | ({headers.SECRET: secrets} if secrets else {}), _encode(value, as_json))


def reference_answer(document: Document, job_id: str, *, as_json: bool, secrets: str = "") -> Answer:
    """Return the answer with a result that is too large for a message: a reference to its document, in headers and
    body. The document is the result in CBOR.
    """
    answer = result_answer(document.model_dump(), job_id, as_json=as_json, secrets=secrets)
    return answer._replace(headers={**answer.headers, **reference_headers(document)})


class FetchedAnswer(NamedTuple):
    """An answer with the result in place of the reference to it."""

    subject: str
    reply: str
    data: bytes
    block: bytes | None
    headers: dict[str, str]
    status: Status | None


def with_result(answer: Received, body: bytes, job_id: str) -> FetchedAnswer:
    """Return the answer that `result_answer` would have made of the result, given an answer by `reference_answer` and
    the bytes of the document. Raises DecodeError.
    """
    if answer.headers.get(headers.CONTENT_TYPE) == codec.CBOR:
        answer_headers = {name: value for name, value in answer.headers.items() if name not in headers.DOCUMENTS}
    else:
        value, secrets = codec.decode(body, codec.CBOR, max_bytes=len(body)), answer.headers.get(headers.SECRET, "")
        whole = result_answer(value, job_id, as_json=True, secrets=secrets)
        answer_headers, body = dict(whole.headers), whole.body
    return FetchedAnswer(answer.subject, answer.reply, body, None, answer_headers, None)


def error_answer(error: AIQueueError, job_id: str, *, as_json: bool) -> Answer:
    """Return the answer with an error. Its body is `errors.details`.

    There, ``error`` is the error's class, and ``retryable`` states whether to repeat the request with the same id.
    """
    code = next(code for kind, code in _CODES if isinstance(error, kind))
    fields = details(error) | ({"job_id": job_id} if job_id else {})
    line = headers.ascii_line(str(error))
    answer_headers = {SERVICE_ERROR: line, SERVICE_ERROR_CODE: str(code), **_content_type(as_json)}
    return Answer(answer_headers | ({headers.JOB_ID: job_id} if job_id else {}), _encode(fields, as_json), line)


def read_answer(answer_headers: Mapping[str, str], body: bytes) -> Any:
    """Return the result in an answer that is no error, as plain data. Raises DecodeError for a body that is neither
    CBOR nor JSON.
    """
    return _decode(answer_headers, body) if body else None


def raise_error(answer_headers: Mapping[str, str], body: bytes, job_id: str) -> None:
    """Raise the error that an answer of any responder contains, if it does."""
    code = answer_headers.get(SERVICE_ERROR_CODE, "")
    if not code and SERVICE_ERROR not in answer_headers:
        return
    try:
        fields = _decode(answer_headers, body)
    except DecodeError:
        fields = None
    if not isinstance(fields, dict):
        fields = {}
    message = str(fields.get("message") or answer_headers.get(SERVICE_ERROR, "") or "an error without a message")
    raise _to_error(headers.number(code), message, fields, job_id)


def _decode(answer_headers: Mapping[str, str], body: bytes) -> Any:
    """Decode a body by its content type, or else as `codec.decode` does without one.

    The content type may be wrong: nats-py's `Msg.respond` sends the request's headers back, with its deadline.
    """
    if headers.DEADLINE in answer_headers:
        return codec.decode(body, max_bytes=len(body))
    try:
        return codec.decode(body, answer_headers.get(headers.CONTENT_TYPE, ""), max_bytes=len(body))
    except DecodeError:
        return codec.decode(body, max_bytes=len(body))


def _to_error(code: int, message: str, fields: Mapping[str, Any], job_id: str) -> AIQueueError:
    """Return the error for a code, with the fields of the answer's body."""
    match code:
        case 422:
            number, reason = fields.get("attempt"), str(fields.get("reason", ""))
            return (JobCancelled if reason == "cancelled" else JobFailed)(
                str(fields.get("job_id", job_id)),
                reason=reason,
                error=str(fields.get("cause", message)),
                attempt=number if isinstance(number, int) else 0,
            )
        case 504:
            return ResultTimeout(message)
        case 429:
            reason = str(fields.get("reason", message))
            return QueueFull(str(fields.get("lane", f"the lane of job {job_id}")), reason)
        case 400 | 409 | 413:
            return (IdReused if code == 409 else BadInput)(message)
        case 404:
            return NotFound(message)
        case 403:
            return AccessDenied(message)
        case 503:
            return Unavailable(message, maybe_stored=True)
        case _:
            return ResponderError(
                str(fields.get("job_id", job_id)), error=str(fields.get("cause", message)), code=code or 500
            )


def _content_type(as_json: bool) -> dict[str, str]:
    return {headers.CONTENT_TYPE: codec.JSON if as_json else codec.CBOR}


def _encode(value: Any, as_json: bool) -> bytes:
    if not as_json:
        return codec.encode(value)
    return pydantic_core.to_json(value, bytes_mode="base64", inf_nan_mode="null", fallback=str)


def is_json(content_type: str, body: bytes) -> bool:
    """Whether a request is JSON: by its content type, or without one by its body. A bare id counts as JSON."""
    if content_type:
        return "json" in content_type.lower() or content_type.lower().startswith("text/")
    try:
        json.loads(body)
    except ValueError:
        return body.isascii() and body.decode().isprintable()
    return True
