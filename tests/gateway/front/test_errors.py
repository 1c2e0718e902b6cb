"""What a failed request is answered with: the status that tells a client what to do."""

from __future__ import annotations

import time
from typing import get_args

import pytest

import aiqueue.errors as e
from aiqueue.gateway import Budget, BudgetSpent, PriceUnknown, ProviderError
from aiqueue.gateway.budget_use import BudgetUse
from aiqueue.gateway.front.errors import error_of
from aiqueue.gateway.provider_errors import Kind


def failed(text: str, reason: str = "rejected") -> e.JobFailed:
    return e.JobFailed("j", reason=reason, error=text, attempt=1)


def spent(key: str = "") -> str:
    budget = Budget("acme", 10, key=key)
    return str(BudgetSpent(budget, "acme", time.strftime("%Y-%m"), 20, BudgetUse()))


def test_a_request_above_its_limit_is_told_what_to_lower() -> None:
    error = e.AboveLimit("cost", 1_070, 1_000, "gateway.requests, key 'm', tenant acme: cost 1,000 in 1d", "m")
    told = error_of(failed(str(error), "limit")).message
    assert told.startswith(
        "this request can use more tokens than the limit of its model allows at all: lower max_tokens"
    )
    assert "cost 1,070 is above the limit of 1,000 itself (gateway.requests, key 'm', tenant acme: " in told


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_provider_s_error_is_read_again_from_its_text(kind: Kind) -> None:
    for status, wait_s in ((None, None), (429, None), (503, 2.5)):
        error = ProviderError(kind, "first: (status 7) of all", status=status, retry_after_s=wait_s)
        found = ProviderError.parse(f"{error}; fallback large: refused (status 400): no")
        assert found is not None
        assert (found.kind, found.status) == (kind, status)
    for other in ("", "unknown model 'a'", "refused", "refused by all", "tenant acme has a budget of $1"):
        assert ProviderError.parse(other) is None


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (failed(str(ProviderError("context_length", "long", status=400))), 400, "context_length_exceeded"),
        (failed(str(ProviderError("content_policy", "no", status=400))), 400, "content_policy_violation"),
        (failed(str(ProviderError("refused", "no", status=422))), 422, "refused"),
        (failed(str(ProviderError("refused", "moved", status=302))), 502, "provider_refused"),
        (failed(str(ProviderError("auth", "key", status=401))), 502, "provider_auth"),
        (failed(str(ProviderError("rate_limited", "slow", status=429))), 429, "rate_limit_exceeded"),
        (failed(str(ProviderError("overloaded", "full", status=529))), 503, "overloaded"),
        (failed(str(ProviderError("timeout", "late"))), 504, "timeout"),
        (failed(str(ProviderError("connection", "gone"))), 502, "provider_connection"),
        (failed("provider p has no key: environment variable K is empty or not set; set it"), 502, "provider_auth"),
        (failed(spent()), 429, "insufficient_quota"),
        (failed(spent("0123456789abcdef")), 429, "insufficient_quota"),
        (failed("option 'a' is not allowed for provider p; allowed: none"), 400, None),
        (failed("unknown model 'a'; models of the gateway: b"), 404, "model_not_found"),
        (failed("it was late", "deadline"), 504, "deadline"),
        (failed("cost 9 is above the limit", "limit"), 400, "above_limit"),
        (failed("ValueError: x", "attempts"), 502, "failed"),
        (failed("job j was stored with another body: use a new id, or send again what was sent before", "invalid"),
         409, "idempotency_key_reused"),
        (e.JobCancelled("j"), 409, "cancelled"),
        (e.JobGone("job j is gone"), 410, "gone"),
        (e.IdReused("other"), 409, "idempotency_key_reused"),
        (e.TooLarge(9, 8), 413, "request_too_large"),
        (PriceUnknown("acme", "m"), 400, "price_unknown"),
        (e.BadInput("wrong"), 400, None),
        (e.AccessDenied("the secret subject"), 500, "misconfigured"),
        (e.ConfigMismatch("the secret stream"), 500, "internal_error"),
        (KeyError("secret"), 500, "internal_error"),
    ],
)  # fmt: skip
def test_what_will_not_go_away_is_not_to_be_sent_again(error: Exception, status: int, code: str | None) -> None:
    told = error_of(error)
    assert (told.status, told.code) == (status, code)
    assert told.headers() == {"x-should-retry": "false"}
    assert "secret" not in told.message


@pytest.mark.parametrize(
    ("error", "status", "seconds"),
    [
        (e.LaneFull("acme", "full"), 429, "1"), (e.StreamFull("acme", "full"), 429, "5"),
        (e.Unavailable("gone"), 503, "1"), (e.ResultTimeout("late"), 504, "1"),
    ],
)  # fmt: skip
def test_what_may_go_away_says_when_to_send_it_again(error: Exception, status: int, seconds: str) -> None:
    told = error_of(error)
    assert told.status == status
    assert (told.headers()["x-should-retry"], told.headers()["retry-after"]) == ("true", seconds)
