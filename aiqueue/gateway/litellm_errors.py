"""Errors of the gateway as litellm's own, by whose classes its Router and its users decide what to do."""

from __future__ import annotations

import math
import re
from typing import Any, Final

import httpx
import litellm

from ..errors import AIQueueError, BadInput, JobFailed, QueueFull, ResultTimeout, Unavailable
from .api_keys import KeyRevoked
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
_WRONG: Final = ("BadRequestError", 400)
_FAILURES: Final[dict[str, tuple[str, int]]] = {  # by the first words of a ProviderError
    "context length": ("ContextWindowExceededError", 400), "content policy": ("ContentPolicyViolationError", 400),
    "refused": _WRONG, "rate limited": ("RateLimitError", 429), "overloaded": ("ServiceUnavailableError", 503),
    "timeout": ("ServiceUnavailableError", 503),
}  # fmt: skip
_BY_PROVIDER: Final = ("auth", "broken stream", "connection", "server")  # the first words of other ones
_REASONS_WRONG: Final = frozenset({"cost", "document", "invalid", "limit", "undecodable"})  # of dead letters
_BUDGET: Final = re.compile(r"(API key \S+ of )?tenant \S+ has a budget of ")  # as BudgetSpent says it


def to_litellm(error: AIQueueError, model: str) -> Exception:
    """Return the error of litellm that says the same. Its Router waits as long as the response's headers say."""
    if isinstance(error, JobFailed):
        text = error.error or str(error)
        name, status = _of_failure(error.reason, text)
    else:
        text = str(error)
        name, status = next((name, status) for kind, name, status in _ERRORS if isinstance(error, kind))
    if status == 400 and text.startswith("unknown model "):
        name, status = "NotFoundError", 404
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


def _of_failure(reason: str, text: str) -> tuple[str, int]:
    """Return the class and status of a request that has failed for good: repeated, it has the same answer at once."""
    if reason in _REASONS_WRONG:
        return _WRONG
    if reason == "rejected":
        if _BUDGET.match(text):
            return "RateLimitError", 429
        for words, found in _FAILURES.items():
            if text.startswith(words):
                return found
        if not text.startswith(_BY_PROVIDER) and " has no key: " not in text:
            return _WRONG  # the gateway's own words
    return "APIError", 502
