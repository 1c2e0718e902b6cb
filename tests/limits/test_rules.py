"""Rules of limits.toml: what is read, what is refused and how, and which rule holds for which key. No server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiqueue.errors import BadInput, TopologyError
from aiqueue.limits.rules import Override, Rule, RuleId, load_rules, make_rule, matches, parse_rules

from .provider import NAME, TOPOLOGY, rules


def refusal(table: str) -> str:
    with pytest.raises(TopologyError) as caught:
        parse_rules(TOPOLOGY, ("limits.toml", table))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_table_is_a_rule() -> None:
    found = rules('key = "gpt-*"\nrequests = 100\ncost = 10_000.5\nwindow = "90s"', 'tenant = "acme"\nin_flight = 3')
    assert list(found.declared.values()) == [
        Rule(RuleId(NAME, "gpt-*", None), 100, 10_000.5, None, 90.0),
        Rule(RuleId(NAME, "*", "acme"), None, None, 3, 60.0),
    ]
    assert [each.rule.describe() for each in found.effective(0)] == [
        "100 requests and cost 10,000.5 in 1m30s",
        "3 in flight",
    ]


def test_rules_lie_beside_the_streams(tmp_path: Path) -> None:
    (tmp_path / "limits.toml").write_text(f'[[limit]]\nfamily = "{NAME}"\nrequests = 5')
    assert len(load_rules(TOPOLOGY, tmp_path, tmp_path / "none").declared) == 1
    (tmp_path / "limits.toml").write_bytes(b"\xff")
    with pytest.raises(TopologyError, match="cannot be read"):
        load_rules(TOPOLOGY, tmp_path)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("requests = nan", "limits.toml: limit 1.requests: must be a whole number from 1 to 1,000,000,000, not nan"),
        ("cost = nan", "limits.toml: limit 1.cost: must be a number above 0, up to 1e+15, not nan"),
        ("cost = inf", "not inf"),
        ("cost = -1", "not -1"),
        ("cost = 0", "not 0"),
        ("requests = -5", "not -5"),
        ("requests = 2.5", "not 2.5"),
        ("requests = true", "not True"),
        ('in_flight = "3"', 'limit 1.in_flight: must be a whole number from 1 to 1,000,000,000, not "3"'),
        ("requests = 1\nwindow = 0.5", "limit 1.window: must be a duration from 1s to 31d"),
        ('requests = 1\nwindow = "soon"', 'such as "1m", not "soon"'),
        ('in_flight = 1\nwindow = "1m"', "limit 1.window: is of requests or cost"),
        ("", "limit 1: limits nothing: give at least one of requests, cost and in_flight"),
        ("request = 5", "limit 1.request: unknown field; did you mean requests?"),
        ('model = "gpt"\nrequests = 5', "limit 1.model: unknown field; known here: family, key, tenant"),
        ('key = ""\nrequests = 5', "limit 1.key: must be a text of 1 to 1,024 characters"),
        ("key = 5\nrequests = 5", "not 5"),
        (
            'tenant = "a b"\nrequests = 5',
            'limit 1.tenant: must be a tenant, or "*" for each tenant by itself, not "a b"',
        ),
    ],
)
def test_a_wrong_field_is_refused_in_one_line(fields: str, problem: str) -> None:
    assert problem in refusal(f'[[limit]]\nfamily = "{NAME}"\n{fields}\n')


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            '[[limit]]\nfamily = "no.such"\nrequests = 5',
            "unknown family 'no.such'; families with a limit_key: gateway.requests, llm.calls",
        ),
        (
            '[[limit]]\nfamily = "agent.tasks"\nrequests = 5',
            "agent.tasks has no limit_key, so its jobs cannot be limited",
        ),
        ("[[limit]]\nrequests = 5", "limit 1.family: is missing"),
        ("[limit]\nrequests = 5", "limit: must be tables: write [[limit]]"),
        ("[[limits]]\nrequests = 5", "limits: unknown key; rules are tables [[limit]]"),
        ("[[limit", "is not TOML"),
        (
            f'[[limit]]\nfamily = "{NAME}"\nrequests = 5\n' * 2,
            "limit 2: there is a rule for llm.calls, key '*', all tenants together already: write one table",
        ),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(text: str, problem: str) -> None:
    assert problem in refusal(text)


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from(["key", "tenant", "requests", "cost", "in_flight", "window"]), scalars))
def test_whatever_a_table_holds_it_is_a_usable_rule_or_refused_in_one_line(fields: dict[str, Any]) -> None:
    try:
        rule = make_rule(TOPOLOGY, {"family": NAME, **fields})
    except BadInput as error:
        assert "\n" not in str(error)  # noqa: PT017
        return
    assert not rule.is_unlimited
    assert rule.requests is None or rule.requests >= 1
    assert rule.cost is None or 0 < rule.cost < float("inf")
    assert 1 <= rule.window_s <= 31 * 86_400


@pytest.mark.parametrize(
    ("key", "tenant", "wide", "narrow"),
    [
        ("other", "x", 1, 10),
        ("gpt-4", "x", 2, 10),
        ("gpt-4-mini", "x", 3, 10),
        ("gpt-4o/x:y.z", "acme", 4, 11),
        ("free", "x", None, None),
    ],
)
def test_the_most_specific_rule_holds(key: str, tenant: str, wide: int | None, narrow: int | None) -> None:
    found = rules(
        "requests = 1", 'key = "gpt-*"\nrequests = 2', 'key = "gpt-*-mini"\nrequests = 3',
        'key = "gpt-4o/x:y.z"\nrequests = 4', 'tenant = "*"\nrequests = 10', 'tenant = "acme"\nrequests = 11',
        'key = "free"\nin_flight = 5', 'key = "free"\ntenant = "*"\nin_flight = 5',
    )  # fmt: skip
    for each in (None, "*"):
        which = RuleId(NAME, "free", each)
        found.override(which, Override(Rule(which), "ops", 0, None))
    chosen = found.choose(NAME, key, tenant, 0)
    assert tuple(each and each.requests for each in chosen) == (wide, narrow)


def test_an_override_holds_until_it_expires() -> None:
    found = rules("requests = 5")
    which = RuleId(NAME, "*", None)
    found.override(which, Override(Rule(which, 2), "ops", 0, 100.0))
    assert [each and each.requests for each in found.choose(NAME, "k", "t", 99.9)] == [2, None]
    assert [each and each.requests for each in found.choose(NAME, "k", "t", 100.0)] == [5, None]
    found.override(which, Override(Rule(which, 3), "ops", 0, None))
    assert [(each.rule.requests, each.declared and each.declared.requests) for each in found.effective(0)] == [(3, 5)]
    found.override(which, None)
    assert [each.override for each in found.effective(0)] == [None]


@given(st.lists(st.text("ab.*\n", max_size=4), min_size=1, max_size=3), st.text("ab.\n", max_size=6))
def test_a_pattern_takes_every_text_that_has_its_parts_in_order(parts: list[str], text: str) -> None:
    literal = [each.replace("*", "") for each in parts]
    assert matches("*".join(literal), text.join(literal))
    assert matches("a.b", "a.b")
    assert not matches("a.b", "axb")
