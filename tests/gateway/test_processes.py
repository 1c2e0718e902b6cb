"""The gateway over real worker processes in short: what ``python -m benchmarks gateway`` does for longer."""

from __future__ import annotations

import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from benchmarks.gateway import money, strangers, traffic
from benchmarks.gateway.bench import Asked
from benchmarks.scenarios import Finding

Scenario = Callable[[Asked], Awaitable[list[Finding]]]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(autouse=True)
def leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.mark.parametrize("scenario", [money.kills, money.budget, strangers.hostile, traffic.priority])
async def test_a_scenario_has_no_figure_that_is_not_as_demanded(scenario: Scenario) -> None:
    findings = await scenario(Asked(workers=2, requests=150, waiting=500))
    assert [each for each in findings if not each.holds] == []


async def test_the_provider_never_sees_more_than_the_limits_allow() -> None:
    findings = await traffic.limits(Asked(workers=2, window_s=10, seconds=15))
    never = [each for each in findings if each.name.endswith("worst window") or "refused" in each.name]
    assert len(never) == 3
    assert [each for each in never if not each.holds] == []
