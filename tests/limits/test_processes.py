"""Limits over real worker processes in short: what ``python -m benchmarks provider`` does for longer."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from benchmarks.limiting import flights, many, rates, waiting
from benchmarks.limiting.bench import Asked
from benchmarks.scenarios import Finding

Scenario = Callable[[Asked], Awaitable[list[Finding]]]
NEVER = ("requests in the worst window", "cost in the worst window", "faults")


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def chosen(findings: list[Finding], *names: str) -> list[Finding]:
    """Those of these names: a loaded machine says nothing of use and latency in so short a time."""
    found = [each for each in findings if each.name in names]
    assert len(found) == len(names)
    return found


def figure(findings: list[Finding], name: str) -> float:
    return chosen(findings, name)[0].figure


@pytest.mark.timeout(120)
async def test_no_window_is_above_its_limits_while_worker_processes_are_killed() -> None:
    findings = await rates.costs_killed(Asked(window_s=3, seconds=5, workers=2))
    assert [each for each in chosen(findings, *NEVER) if not each.holds] == []
    assert figure(findings, "calls") >= 5


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_without_rules_the_judge_finds_windows_above_the_limits() -> None:
    findings = await rates.requests(Asked(window_s=6, seconds=9, workers=2, limits=False))
    assert figure(findings, "requests in the worst window") > rates.REQUESTS
    assert figure(findings, "cost in the worst window") > rates.COST


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_tenant_with_a_narrow_limit_and_two_others_are_never_above_with_clocks_2_s_apart() -> None:
    findings = await rates.tenants_uneven(Asked(window_s=10, seconds=30))
    names = (*NEVER[:2], "requests of the narrow tenant", "share of the heavy one, by requests")
    assert [each for each in chosen(findings, *names) if not each.holds] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_no_window_is_above_its_limits_while_leaders_of_three_servers_are_killed() -> None:
    findings = await rates.leader_killed(Asked(window_s=10, seconds=45))
    assert [each for each in chosen(findings, *NEVER) if not each.holds] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_changed_limits_hold_a_second_later() -> None:
    findings = await rates.changed(Asked(window_s=6, seconds=6))
    assert [each for each in findings[:4] if not each.holds] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("scenario", [flights.in_flight_killed, flights.in_flight_stopped])
async def test_no_more_calls_are_open_than_may_be_and_no_process_has_most_of_them_for_long(scenario: Scenario) -> None:
    findings = await scenario(Asked(seconds=25))
    assert [each for each in findings if not each.holds] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_key_that_is_refused_with_429_rests_in_all_processes() -> None:
    findings = await waiting.refused(Asked())
    names = "first call after the end of the pause, s", "jobs that ran twice"
    assert [each for each in chosen(findings, *names) if not each.holds] == []
    assert figure(findings, "last call after the first 429, ms") < 500  # on a loaded machine


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_pause_in_which_consumers_expire_keeps_the_counts_of_attempts() -> None:
    findings = await waiting.paused_long(Asked(pause_s=15, jobs=300))
    assert [each for each in findings if not each.holds] == []


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_a_rule_that_comes_and_goes_over_waiting_jobs_loses_doubles_and_leaves_none() -> None:
    findings = await many.rule_changed(Asked(window_s=4, jobs=2_000))
    assert [each for each in findings if not each.holds] == []
