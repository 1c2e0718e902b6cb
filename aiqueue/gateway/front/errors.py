"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``, and whether to try again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Self

import pydantic
from starlette.responses import JSONResponse

from ...errors import (
    AccessDenied,
    BadInput,
    IdReused,
    JobCancelled,
    JobFailed,
    JobGone,
    NotFound,
    QueueFull,
    ResultTimeout,
    TooLarge,
    Unavailable,
)
from ..api_keys import KeyLimited, KeyRevoked
from ..failures import Failure, failure_of, failure_of_input, message_of

RETRY_S: Final = 1.0  # after an outage of the server


class ApiError(Exception):
    """What a request is answered with instead of a result.

    `message`: one line. `code`: for programs; `param`: the field of the request that is wrong. `retry_after_s`: when
    the same request may be sent again; None: never, so the client is told not to (`x-should-retry: false`).
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status = status
        self.message = " ".join(message.split())
        super().__init__(self.message)
        self.failure = Failure(status, code, param)
        self.retry_after_s = retry_after_s

    @classmethod
    def of(cls, failure: Failure, message: str) -> Self:
        """Return a failure that is not to be sent again."""
        return cls(failure.status, message, failure.code, failure.param)

    @property
    def code(self) -> str | None:
        return self.failure.code

    def body(self) -> dict[str, Any]:
        """Return the body of the answer, which is also that of an error amid a stream."""
        return self.failure.body(self.message)

    def headers(self) -> dict[str, str]:
        """Return the headers that say whether, and when, to send the request again."""
        if self.retry_after_s is None:
            return {"x-should-retry": "false"}
        wait_s = max(0.0, self.retry_after_s)
        return {
            "x-should-retry": "true",
            "retry-after": str(max(1, math.ceil(wait_s))),
            "retry-after-ms": str(round(wait_s * 1000)),
        }

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse(self.body(), self.status, {**self.headers(), **(headers or {})})


_LATE: Final = "there is no answer yet; the request goes on: send it again with the same Idempotency-Key"
# by the first class that matches: status, code, the text (None: the error's own), when to try again (None: never)
_ERRORS: Final[tuple[tuple[type[Exception], int, str | None, str | None, float | None], ...]] = (
    (KeyRevoked, 401, "invalid_api_key", "the API key is not known, or is revoked", None),
    (IdReused, 409, "idempotency_key_reused", None, None),
    (TooLarge, 413, "request_too_large", None, None),
    (ResultTimeout, 504, "timeout", _LATE, RETRY_S),
    (Unavailable, 503, "unavailable", "the queue does not answer now", RETRY_S),
    (NotFound, 404, "not_found", "there is no such request (any more)", None),
    (JobGone, 410, "gone", "the request is gone without an answer", None),
    (AccessDenied, 500, "misconfigured", "the gateway lacks a permission on its server", None),
    # without the text, which may tell of others
    (Exception, 500, "internal_error", "the gateway has failed", None),
)


def error_of(error: Exception) -> ApiError:
    """Return what an error means to the client."""
    match error:
        case ApiError():
            return error
        case JobFailed():
            return error_of_failure(error)
        case KeyLimited():
            return ApiError(429, str(error), code="rate_limit_exceeded", retry_after_s=error.retry_after_s)
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_after_s=error.retry_after_s)
        case BadInput() if not isinstance(error, IdReused | TooLarge):
            return ApiError.of(failure_of_input(error), str(error))
    _, status, code, text, retry_s = next(each for each in _ERRORS if isinstance(error, each[0]))
    return ApiError(status, text or str(error), code=code, retry_after_s=retry_s)


def error_of_failure(failed: JobFailed) -> ApiError:
    """Return what a request that has failed for good is answered with. None is to be sent again."""
    text = "the request was cancelled" if isinstance(failed, JobCancelled) else message_of(failed)
    return ApiError.of(failure_of(failed), text)


def error_of_validation(error: pydantic.ValidationError) -> ApiError:
    """Return the first thing that is wrong with a body, with the field that it is about."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(each) for each in first["loc"] if not str(each).startswith(("function-", "list[", "tagged-")))
    text = first["msg"].removeprefix("Value error, ")
    inner = text.partition(" ")[0].rstrip(":")  # the text of a validator may say which part of the field it means
    if inner.partition(".")[0] in (place, "messages", "tools", "options") and inner:
        return ApiError(400, text[:500], param=inner)
    return ApiError(400, f"{place}: {text}"[:500] if place else text[:500], param=place or None)
