"""Errors of providers: which kind they are, how long to wait, and that no key stands in them. No server."""

from __future__ import annotations

import json

import pytest

from aiqueue.gateway import ProviderError
from aiqueue.gateway.provider_errors import from_status, retry_after_s


def body(message: str, code: str | None = None) -> bytes:
    return json.dumps({"error": {"message": message, "type": "x", "code": code}}).encode()


@pytest.mark.parametrize(
    ("status", "said", "kind", "billed"),
    [
        (429, body("slow down"), "rate_limited", False),
        (429, body("You exceeded your current quota", "insufficient_quota"), "auth", False),
        (503, body("overloaded"), "overloaded", False),
        (529, body("Overloaded"), "overloaded", False),
        (500, body("oops"), "server", False),
        (502, b"<html>bad gateway</html>", "server", True),
        (504, b"", "server", True),
        (408, b"", "timeout", True),
        (409, body("conflict"), "server", False),
        (400, body("bad tools"), "refused", False),
        (400, body("too long", "context_length_exceeded"), "context_length", False),
        (400, body("This model's maximum context length is 8192 tokens"), "context_length", False),
        (400, body("prompt is too long: 200001 tokens > 200000 maximum"), "context_length", False),
        (413, body("Please reduce the length of the messages"), "context_length", False),
        (400, body("flagged", "content_filter"), "content_policy", False),
        (400, body("Your credit balance is too low"), "auth", False),
        (401, body("Incorrect API key"), "auth", False),
        (402, b"", "auth", False),
        (403, body("no access"), "auth", False),
        (404, body("no such model"), "refused", False),
        (422, body("unprocessable"), "refused", False),
        (302, b"", "refused", False),
        (200, b"nonsense", "refused", False),
    ],
)  # fmt: skip
def test_an_http_status_has_a_kind(status: int, said: bytes, kind: str, billed: bool) -> None:
    error = from_status(status, {}, said, provider="p")
    assert (error.kind, error.status, error.may_be_billed) == (kind, status, billed)
    assert error.is_retryable == (kind in ("rate_limited", "overloaded", "server", "timeout"))
    assert "\n" not in str(error)


NOW = 1_767_225_600.0  # 2026-01-01T00:00:00Z


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry-After": "20"}, 20.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "1"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "1"}, 1.0),
        ({"Retry-After": "Thu, 01 Jan 2026 00:00:30 GMT"}, 30.0),
        ({"Retry-After": "Wed, 31 Dec 2025 00:00:00 GMT"}, 0.0),
        ({"Retry-After": "1e300"}, 86_400.0),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "later"}, None),
        ({}, None),
    ],
)
def test_how_long_to_wait_is_told_in_seconds_or_as_a_date(headers: dict[str, str], wait_s: float | None) -> None:
    assert retry_after_s(headers, NOW) == wait_s


@pytest.mark.parametrize(
    ("status", "wait_s"),
    [(429, 86_400.0), (503, 600.0), (529, 600.0), (500, 600.0), (502, 600.0), (408, 600.0), (400, None), (401, None)],
)
def test_a_quota_is_waited_for_a_day_and_an_outage_ten_minutes_at_most(status: int, wait_s: float | None) -> None:
    assert from_status(status, {"Retry-After": "200000"}, b"", provider="p").retry_after_s == wait_s
    short = from_status(status, {"Retry-After": "7"}, b"", provider="p").retry_after_s
    assert short == (None if wait_s is None else 7.0)


def test_a_time_of_zero_pauses_nothing() -> None:
    error = from_status(429, {"Retry-After": "0"}, b"", provider="p")
    assert (error.retry_after_s, error.pauses) == (0.0, False)


def test_only_a_429_or_503_with_a_time_pauses() -> None:
    wait = {"retry-after": "20"}
    assert [from_status(status, wait, b"", provider="p").pauses for status in (429, 503, 500, 400)] == [
        True, True, False, False,
    ]  # fmt: skip
    assert not from_status(429, {}, b"", provider="p").pauses


@pytest.mark.parametrize(
    "said",
    [
        b" " * 590 + b"my-own-key-77",
        b'{"error": {"message": {"said": "my\\u002down-key-77"}}}',
        b"a line that ends in my-own-\r\n  key-77",
    ],
    ids=["cut", "escaped", "broken"],
)
def test_no_part_of_a_key_stands_in_an_error(said: bytes) -> None:
    error = from_status(400, {}, said, provider="p", key="my-own-key-77")
    assert "**********" in str(error)
    assert not any(part in str(error) for part in ("my-own", "own-key", "key-77"))


def test_no_key_stands_in_an_error() -> None:
    said = body(
        "Incorrect API key provided: my-own-key-77. sk-abcdef*****1234, Bearer eyJhbGciOi, AIzaSyA12345678901234567"
    )
    error = from_status(401, {}, said, provider="p", key="my-own-key-77")
    assert not any(part in str(error) for part in ("my-own-key-77", "sk-abc", "eyJ", "AIzaSy"))
    assert str(error).startswith("auth (status 401): p: Incorrect API key provided: **********")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (body("one\ntwo", "c"), "p: one two"),
        (b'{"error": {"code": "c", "type": "t"}}', "p: c"),
        (b'{"error": "plain"}', "p: plain"),
        (b'{"detail": "Not Found"}', "p: Not Found"),
        (b'{"message": "m", "code": 5}', "p: m"),
        (b'[{"error": {"code": 400, "message": "gemini"}}]', "p: gemini"),
        (b"<html><body>", "p: a page of HTML"),
        (b"", "p: no message, 0 bytes"),
        (b"\xff" * 5_000, "p: " + "\ufffd" * 296 + "\u2026"),
        (b"[" * 100_000, "p: " + "[" * 296 + "\u2026"),
    ],
)
def test_the_text_is_one_short_line_of_what_the_provider_says(said: bytes, text: str) -> None:
    assert from_status(400, {}, said, provider="p").text == text


def test_an_error_says_kind_status_text_and_wait() -> None:
    error = ProviderError("rate_limited", "p: slow\ndown", status=429, retry_after_s=20.0)
    assert str(error) == "rate limited (status 429): p: slow down; retry after 20 s"
