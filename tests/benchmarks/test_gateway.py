"""The judge of the gateway's kills: what it says of calls and records that are known."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from aiqueue.gateway import Price, UsageRecord
from aiqueue.gateway.standin import LoggedCall
from benchmarks.gateway import SCENARIOS, judge, main

from ..support import ROOT

PRICE = Price.of(1, 2)
USERS = {"r-1": "a/1"}
NONE: dict[str, int] = {}
ONE = {"r-1": 1}


def call(started_at: float, ended_at: float | None = None, *, tokens: int = 5, outcome: str = "ok") -> LoggedCall:
    return LoggedCall(
        0, "/v1/chat/completions", "m", "key", "", started_at, ended_at=ended_at, outcome=outcome,  # type: ignore[arg-type]
        prompt_tokens=10, completion_tokens=tokens, user="a/1",
    )  # fmt: skip


def record(
    outcome: str = "ok", *, tokens: int = 5, request_id: str = "r-1", cost: int = 20, **fields: Any
) -> UsageRecord:
    return UsageRecord(**{  # type: ignore[arg-type]
        "call_id": "c", "job_id": request_id, "request_id": request_id, "tenant": "a", "model": "m", "provider": "p",
        "started_at": 1.0, "outcome": outcome, "prompt_tokens": 10, "completion_tokens": tokens, "cost_micros": cost,
        **fields,
    })  # fmt: skip


def given_up(**fields: Any) -> UsageRecord:
    """What a worker records of a call that another one has noted, and never begins."""
    return record(**{"outcome": "failed", "tokens": 0, "prompt_tokens": 0, "cost": 0, "attempt": 0, **fields})


def test_a_call_that_was_under_way_at_a_kill_and_is_reported_is_accounted_for() -> None:
    calls = [call(1, 2, outcome="lost"), call(30, 31)]
    found = judge.accounts(calls, [record("possibly_billed"), record()], USERS, ONE, [1.5], PRICE)
    assert found == judge.Verdict(calls=2, extra=1, stated=1, held=1)


def test_an_answer_that_came_just_before_a_kill_may_be_asked_for_again() -> None:
    calls = [call(1, 2), call(30, 31)]
    found = judge.accounts(calls, [record("possibly_billed"), record()], USERS, ONE, [2.4], PRICE)
    assert found.early == []
    assert judge.accounts(calls, [record("possibly_billed"), record()], USERS, ONE, [2.6], PRICE).early == ["a/1"]


def test_a_second_call_without_a_kill_is_found_though_it_is_recorded() -> None:
    found = judge.accounts([call(1, 2), call(3, 4)], [record(), record()], USERS, NONE, [], PRICE)
    assert (found.early, found.unstated, found.unrecorded, found.wrong_tokens) == (["a/1"], ["a/1"], [], [])


def test_a_call_in_no_record_and_a_record_of_no_call_are_found() -> None:
    unrecorded = judge.accounts([call(1, 2), call(3, 4)], [record()], USERS, NONE, [1.5], PRICE)
    assert (unrecorded.unrecorded, unrecorded.false) == (["a/1"], [])
    false = judge.accounts([call(1, 2)], [record("possibly_billed"), record()], USERS, NONE, [0.5], PRICE)
    assert (false.false, judge.share(false.false, false.held), false.invented) == (["a/1"], 1.0, [])
    invented = judge.accounts([call(1, 2)], [record(), record()], USERS, NONE, [0.5], PRICE)
    assert (invented.invented, invented.false) == (["a/1"], [])


def test_an_answer_that_tells_of_a_call_that_was_none_is_found() -> None:
    found = judge.accounts([call(1, 2)], [record()], USERS, ONE, [1.5], PRICE)
    assert (found.overstated, judge.share(found.overstated, found.stated)) == (["a/1"], 1.0)


def test_tokens_and_costs_that_are_not_those_of_a_call_are_found() -> None:
    found = judge.accounts([call(1, 2)], [record(tokens=6, cost=22)], USERS, NONE, [], PRICE)
    assert (found.wrong_tokens, found.wrong_cost) == (["a/1"], [])
    assert judge.accounts([call(1, 2)], [record(cost=21)], USERS, NONE, [], PRICE).wrong_cost == ["a/1"]


def test_what_nobody_asked_for_and_what_nobody_called_are_found() -> None:
    found = judge.accounts([], [record(request_id="r-9")], USERS, NONE, [], PRICE)
    assert sorted(found.uncalled) == ["a/1", "unknown request r-9"]
    assert found.invented == ["unknown request r-9"]


def test_a_refused_call_costs_nothing_and_needs_no_record() -> None:
    calls = [call(1, 1.1, outcome="refused"), call(3, 4)]
    assert judge.accounts(calls, [record()], USERS, NONE, [], PRICE) == judge.Verdict(calls=1)


def test_a_call_that_was_given_up_before_it_was_made_is_no_call() -> None:
    found = judge.accounts([call(1, 2)], [given_up(), record()], USERS, NONE, [0.5], PRICE)
    assert found == judge.Verdict(calls=1, given_up=1)


@pytest.mark.parametrize(
    "fields", [{"outcome": "ok"}, {"tokens": 1}, {"prompt_tokens": 1}, {"cost": 1}, {"attempt": 1}, {"latency_s": 0.1}]
)
def test_a_record_that_is_not_quite_of_a_call_that_was_given_up_is_found(fields: dict[str, Any]) -> None:
    found = judge.accounts([call(1, 2)], [given_up(**fields), record()], USERS, NONE, [0.5], PRICE)
    assert (found.invented, found.given_up) == (["a/1"], 0)
    held = judge.accounts([call(1, 2)], [given_up(outcome="possibly_billed"), record()], USERS, NONE, [0.5], PRICE)
    assert (held.false, held.given_up) == (["a/1"], 0)


def test_an_unknown_scenario_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "choose from kills, " in capsys.readouterr().err


def test_the_help_names_every_scenario() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gateway", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [name for name in SCENARIOS if name not in done.stdout] == []
