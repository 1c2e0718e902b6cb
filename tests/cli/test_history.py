"""``history``, and the last hour of ``inspect FAMILY``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue.cli import history
from aiqueue.cli.app import app
from aiqueue.metrics import Counts, Flusher, JobSums, Point, Series

from ..support import Account, create_streams

Cli = Callable[..., Result]


@pytest.fixture
def cli(account: Account, monkeypatch: pytest.MonkeyPatch) -> Cli:
    settings = {"URL": account.url, "USER": account.user, "PASSWORD": account.password, "FAMILIES": "agent.tasks"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, list(arguments))
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def declare() -> None:
    async def run() -> None:
        async with aiqueue.connect() as client:
            await create_streams(client)

    asyncio.run(run())


def flush(*kinds: str) -> None:
    counts = Counts()
    counts.done, counts.retried, counts.dead, counts.cancelled = 1_200, 3, 2, 1
    for time_s in (0.0001, 0.3, 0.3, 3.0):
        counts.add_run(time_s)
        counts.add_wait(time_s / 10)

    async def run() -> None:
        async with aiqueue.connect() as client:
            counted = {("agent.tasks", f"tenant-{kind}", kind): counts for kind in kinds}
            await Flusher(client.connection, client.topology, ["agent.tasks"], lambda: counted).flush()

    asyncio.run(run())


def test_before_there_is_a_history_the_command_says_what_to_do(cli: Cli) -> None:
    assert cli("history").exit_code == 1
    assert "aiqueue apply" in cli("history").stderr
    declare()
    shown = cli("history")
    assert (shown.exit_code, shown.stdout) == (0, "no jobs were counted in the last 1h\n")
    assert "last hour" not in cli("inspect", "agent.tasks").stdout


def test_families_kinds_and_tenants_are_shown_with_their_outcomes_and_times(cli: Cli) -> None:
    declare()
    flush("page.render", "=other")
    by_family = cli("history").stdout.splitlines()
    assert by_family[0].split() == [
        "family",
        "ended",
        "done",
        "failed",
        "dead",
        "wait",
        "p50/95/99",
        "run",
        "p50/95/99",
    ]
    assert by_family[1].split()[0] == "agent.tasks"
    assert by_family[1].split()[2:5] == ["2,400", "10", "4"]
    assert by_family[1].split()[-1] == "354ms/3.5s/3.9s"
    assert by_family[-1].startswith("ended: 3m a character, the first from 20")
    by_kind = cli("history", "agent.tasks").stdout
    assert "page.render " in by_kind
    assert "\n(all others) " in by_kind
    assert "(all others): kinds without a handler" in by_kind
    by_tenant = cli("history", "agent.tasks", "--tenants").stdout
    assert "tenant-page.render"[:6] in by_tenant
    assert "wait mean" in by_tenant
    for since in ("30m", "2d"):
        assert "agent.tasks" in cli("history", "--since", since).stdout
    last_hour = cli("inspect", "agent.tasks").stdout.splitlines()[-1]
    assert last_hour.startswith("last hour ·")
    assert last_hour.endswith(
        "2,400 done, 6 attempts failed and retried, 4 dead letters, run p50/95/99 354ms/3.5s/3.9s"
    )


def test_json_has_all_points_and_a_gap_is_null(cli: Cli) -> None:
    declare()
    flush("page.render")
    found = json.loads(cli("history", "agent.tasks", "--json", "--since", "10m").stdout)
    assert found["level"] == "minute"
    (series,) = found["series"]
    assert (series["family"], series["name"]) == ("agent.tasks", "page.render")
    assert series["run"]["p50_s"] == pytest.approx(0.3536, abs=0.001)
    counts = [each["counts"] for each in series["points"]]
    assert counts.count(None) == len(counts) - 1 >= 9
    (only,) = [each for each in counts if each is not None]
    assert (only["done"], only["failed"], only["retried"], only["dead"], only["cancelled"]) == (1_200, 5, 3, 2, 1)
    assert {each["workers"] for each in series["points"]} == {0, 1}


@pytest.mark.parametrize("arguments", [["nothing.here"], ["--since", "0"], ["--since", "x"]])
def test_wrong_arguments_are_refused(cli: Cli, arguments: list[str]) -> None:
    declare()
    assert cli("history", *arguments).exit_code == 2


@pytest.mark.parametrize(
    ("counts", "expected"),
    [([0, None, 8, 4, 1], "_·█▅▂"), ([None, None], "··"), ([], ""), ([0, 0], "__"), ([5] * 120, "█" * 30),
     ([None] * 30 + [1] * 30, "·" * 15 + "█" * 15)],
)  # fmt: skip
def test_a_line_tells_no_jobs_from_a_gap(counts: list[int | None], expected: str) -> None:
    points = [Point(n * 60, 60.0, 1, None if each is None else JobSums(done=each)) for n, each in enumerate(counts)]
    assert history.spark(Series("f", "", tuple(points))) == expected
