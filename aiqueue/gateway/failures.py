"""What a request that has failed for good is answered with, by every door: a status, and OpenAI's names for it.

A failure is known by the text and the reason of its dead letter. Repeated, the request has the same answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ..enqueue import id_reused
from ..errors import BadInput, JobCancelled, JobFailed
from .prices import PriceUnknown
from .provider_errors import ProviderError

_TYPES: Final = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Failure(NamedTuple):
    """An HTTP status; `code` for programs; `param`: the field of the request that is wrong."""

    status: int
    code: str | None = None
    param: str | None = None

    def body(self, message: str) -> dict[str, Any]:
        """Return the failure as OpenAI's clients read it."""
        kind = "insufficient_quota" if self.code == "insufficient_quota" else type_of(self.status)
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


def type_of(status: int) -> str:
    """Return OpenAI's name for an error of this status."""
    return _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")


MODEL_NOT_FOUND: Final = Failure(404, "model_not_found", "model")
MODEL_NOT_ALLOWED: Final = Failure(403, "model_not_allowed", "model")
_WRONG: Final = Failure(400)
_REASONS: Final[Mapping[str, Failure]] = {  # of dead letters; others are a 502
    "deadline": Failure(504, "deadline"), "limit": Failure(400, "above_limit"), "cost": Failure(400, "above_limit"),
    "invalid": _WRONG, "undecodable": _WRONG, "document": _WRONG,
}  # fmt: skip
_KINDS: Final[Mapping[str, Failure]] = {  # of errors of providers; others are a 502
    "context_length": Failure(400, "context_length_exceeded"),
    "content_policy": Failure(400, "content_policy_violation"), "rate_limited": Failure(429, "rate_limit_exceeded"),
    "overloaded": Failure(503, "overloaded"), "timeout": Failure(504, "timeout"),
}  # fmt: skip
_BUDGET: Final = re.compile(r"(API key \S+ of )?tenant \S+ has a budget of ")  # as BudgetSpent says it
_REFUSALS: Final = frozenset({400, 404, 413, 415, 422})  # statuses of a provider that are about the request itself


def failure_of(failed: JobFailed) -> Failure:
    """Return what the job of a request has failed of."""
    if isinstance(failed, JobCancelled):
        return Failure(409, "cancelled")
    if failed.reason == "rejected":
        return _of_rejection(failed.error)
    if failed.error == str(id_reused(failed.job_id)):
        return Failure(409, "idempotency_key_reused")
    return _REASONS.get(failed.reason, Failure(502, "failed"))


def message_of(failed: JobFailed) -> str:
    """Return the error of a request that has failed for good, for whoever has sent it."""
    if failed.reason != "limit":
        return failed.error
    problem = (
        "this request can use more tokens than the limit of its model allows at all: lower max_tokens, or shorten "
    )
    return f"{problem}the prompt. In terms of limits, cost is tokens, and the key is the model: {failed.error}"


def failure_of_input(error: BadInput) -> Failure:
    """Return what a request is refused for before it has a job."""
    return Failure(400, "price_unknown") if isinstance(error, PriceUnknown) else _of_rejection(str(error))


def _of_rejection(text: str) -> Failure:
    if _BUDGET.match(text):
        return Failure(429, "insufficient_quota")
    found = ProviderError.parse(text)
    if found is None:  # the gateway's own words
        if text.startswith("unknown model "):
            return MODEL_NOT_FOUND
        return Failure(502, "provider_auth") if " has no key: " in text else _WRONG
    if found.kind == "refused" and found.status in _REFUSALS:
        return Failure(found.status, "refused")
    # the provider refuses the gateway's own key, and not the client's: no 401
    return _KINDS.get(found.kind, Failure(502, f"provider_{found.kind}"))
