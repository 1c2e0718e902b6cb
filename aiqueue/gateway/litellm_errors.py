"""Errors of the gateway as litellm's own, by whose classes its Router and its users decide what to do."""

from __future__ import annotations

import math
from typing import Any, Final

import httpx
import litellm

from ..errors import AIQueueError, BadInput, JobFailed, QueueFull, ResultTimeout, Unavailable
from .api_keys import KeyRevoked
from .failures import Failure, failure_of, failure_of_input, message_of
from .litellm_chunks import StreamCut


class NoApiKey(AIQueueError):
    """A call without a valid API key."""


class NotAllowed(AIQueueError):
    """A call that its API key does not allow."""


# by the first class that matches: the name of litellm's class, and the status of its response
_ERRORS: Final[tuple[tuple[type[AIQueueError], str, int], ...]] = (
    (NoApiKey, "AuthenticationError", 401),
    (KeyRevoked, "AuthenticationError", 401),
    (NotAllowed, "PermissionDeniedError", 403),
    (QueueFull, "RateLimitError", 429),  # KeyLimited, too
    (ResultTimeout, "Timeout", 408),
    (StreamCut, "APIConnectionError", 500),
    (Unavailable, "ServiceUnavailableError", 503),
    (BadInput, "BadRequestError", 400),
    (AIQueueError, "InternalServerError", 500),
)
_FAILURES: Final[dict[str, tuple[str, int]]] = {  # by their code; others by their status
    "context_length_exceeded": ("ContextWindowExceededError", 400),
    "content_policy_violation": ("ContentPolicyViolationError", 400),
    "model_not_found": ("NotFoundError", 404), "insufficient_quota": ("RateLimitError", 429),
    "rate_limit_exceeded": ("RateLimitError", 429), "overloaded": ("ServiceUnavailableError", 503),
    "timeout": ("ServiceUnavailableError", 503),
}  # fmt: skip


def to_litellm(error: AIQueueError, model: str) -> Exception:
    """Return the error of litellm that says the same. Its Router waits as long as the response's headers say."""
    if isinstance(error, JobFailed):
        text = message_of(error) or str(error)
        name, status = _of_failure(failure_of(error))
    else:
        text = str(error)
        name, status = next((name, status) for kind, name, status in _ERRORS if isinstance(error, kind))
        if isinstance(error, BadInput):
            name, status = _of_failure(failure_of_input(error))
    given: dict[str, Any] = {"message": text, "llm_provider": "aiqueue", "model": model}
    if name == "APIError":
        given["status_code"] = status
    elif name not in ("Timeout", "APIConnectionError"):
        wait_s = error.retry_after_s if isinstance(error, QueueFull) else None
        headers = {} if wait_s is None else {"retry-after": str(max(1, math.ceil(wait_s)))}
        request = httpx.Request("POST", "http://aiqueue.invalid")
        given["response"] = httpx.Response(status, headers=headers, request=request)
    made: Exception = getattr(litellm, name)(**given)
    return made


def _of_failure(failure: Failure) -> tuple[str, int]:
    """Return the class and status of what will not go away."""
    status, code, _ = failure
    if found := _FAILURES.get(code or ""):
        return found
    return ("BadRequestError", 400) if status < 500 and code != "cancelled" else ("APIError", 502)
