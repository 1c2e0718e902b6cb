"""Errors as OpenAI's clients read them: ``{"error": {message, type, param, code}}``, and whether to try again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, Final

import pydantic
from starlette.responses import JSONResponse

from ...enqueue import id_reused
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
from ..prices import PriceUnknown
from ..provider_errors import ProviderError

RETRY_S: Final = 1.0  # after an outage of the server
_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What a request is answered with instead of a result.

    `message`: one line. `type`: None: OpenAI's name for the status. `code`: for programs; `param`: the field of the
    request that is wrong. `retry_after_s`: when the same request may be sent again; None: never, so the client is told
    not to (`x-should-retry: false`).
    """

    def __init__(
        self,
        status: int,
        message: str,
        type: str | None = None,  # noqa: A002  (OpenAI's name)
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        self.status = status
        self.message = " ".join(message.split())
        super().__init__(self.message)
        self.type = type or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.code, self.param, self.retry_after_s = code, param, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the body of the answer, which is also that of an error amid a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

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
    (PriceUnknown, 400, "price_unknown", None, None),
    (TooLarge, 413, "request_too_large", None, None),
    (BadInput, 400, None, None, None),
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
    _, status, code, text, retry_s = next(each for each in _ERRORS if isinstance(error, each[0]))
    return ApiError(status, text or str(error), code=code, retry_after_s=retry_s)


_REASONS: Final[Mapping[str, tuple[int, str | None]]] = {  # of dead letters
    "deadline": (504, "deadline"), "limit": (400, "above_limit"), "cost": (400, "above_limit"), "invalid": (400, None),
    "undecodable": (400, None), "document": (400, None),
}  # fmt: skip
_KINDS: Final[Mapping[str, tuple[int, str]]] = {  # of errors of providers; others are a 502
    "context_length": (400, "context_length_exceeded"), "content_policy": (400, "content_policy_violation"),
    "rate_limited": (429, "rate_limit_exceeded"), "overloaded": (503, "overloaded"), "timeout": (504, "timeout"),
}  # fmt: skip
_BUDGET: Final = re.compile(r"(API key \S+ of )?tenant \S+ has a budget of ")  # as BudgetSpent says it
_REFUSALS: Final = frozenset({400, 404, 413, 415, 422})  # statuses of a provider that are about the request itself


def error_of_failure(failed: JobFailed) -> ApiError:
    """Return what a request that has failed for good is answered with. None is to be sent again."""
    text = failed.error
    if isinstance(failed, JobCancelled):
        return ApiError(409, "the request was cancelled", code="cancelled")
    if failed.reason == "rejected":
        return _error_of_rejection(text)
    if text == str(id_reused(failed.job_id)):
        return ApiError(409, text, code="idempotency_key_reused")
    status, code = _REASONS.get(failed.reason, (502, "failed"))
    return ApiError(status, text, code=code)


def _error_of_rejection(text: str) -> ApiError:
    if _BUDGET.match(text):
        return ApiError(429, text, "insufficient_quota", "insufficient_quota")
    found = ProviderError.parse(text)
    if found is None:  # the gateway's own words: it has no key, or the request is wrong
        return ApiError(502, text, code="provider_auth") if " has no key: " in text else ApiError(400, text)
    if found.kind == "refused" and found.status in _REFUSALS:
        return ApiError(found.status, text, code="refused")
    # the provider refuses the gateway's own key, and not the client's: no 401
    status, code = _KINDS.get(found.kind, (502, f"provider_{found.kind}"))
    return ApiError(status, text, code=code)


def error_of_validation(error: pydantic.ValidationError) -> ApiError:
    """Return the first thing that is wrong with a body, with the field that it is about."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(each) for each in first["loc"] if not str(each).startswith(("function-", "list[", "tagged-")))
    text = first["msg"].removeprefix("Value error, ")
    inner = text.partition(" ")[0].rstrip(":")  # the text of a validator may say which part of the field it means
    if inner.partition(".")[0] in (place, "messages", "tools", "options") and inner:
        return ApiError(400, text[:500], param=inner)
    return ApiError(400, f"{place}: {text}"[:500] if place else text[:500], param=place or None)
