"""The gateway's pages are true: their files are read, and the table of errors is what the code does."""

from __future__ import annotations

import re

import pytest

from aiqueue.gateway.config_file import parse
from aiqueue.gateway.provider_errors import from_status
from aiqueue.limits.rules import parse_rules
from aiqueue.topology.declared import Topology

from ..support import ROOT

PAGES = [
    ROOT / "docs" / each for each in ("get-started/first-gateway.md", "guides/gateway-config.md", "guides/gateway.md")
]
FILES = [
    file for page in PAGES for file in re.findall(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]
ERRORS = (ROOT / "docs/guides/gateway-failures.md").read_text()
ROWS = [(told, then) for told, then in re.findall(r"^\| (.+) \| (.+) \|$", ERRORS, re.MULTILINE)]
STATUSES = [(int(number), told, then) for told, then in ROWS for number in re.findall(r"\b[345]\d\d\b", told)]


def test_each_file_on_the_pages_is_a_gateway_toml_or_a_limits_toml_that_is_read() -> None:
    models = {model for text in FILES if "[[limit]]" not in text for model in parse("gateway.toml", text).models}
    assert models == {"small", "other", "embed", "claude"}
    limited = [parse_rules(Topology.load(), ("limits.toml", text)).declared for text in FILES if "[[limit]]" in text]
    assert [[each.key for each in rules] for rules in limited] == [["small", "*"]]


def test_the_table_of_errors_has_the_statuses_that_matter() -> None:
    assert {401, 402, 403, 404, 408, 409, 413, 422, 425, 429, 503, 529} <= {status for status, _, _ in STATUSES}


@pytest.mark.parametrize(("status", "told", "then"), STATUSES)
def test_a_status_is_retried_and_pauses_as_the_table_of_errors_says(status: int, told: str, then: str) -> None:
    if "except" in told and status in (503, 529):
        return
    said = b'{"error": {"code": "insufficient_quota"}}' if "insufficient_quota" in told else b"{}"
    fields = {} if "without Retry-After" in told else {"Retry-After": "7"}
    error = from_status(status, fields, said, provider="p")
    assert error.is_retryable == ("never tried again" not in then)
    assert error.pauses == ("is paused" in then)
