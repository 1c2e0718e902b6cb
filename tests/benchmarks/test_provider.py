"""The judges of limits: what they say of calls that are known."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.limiting import judge
from benchmarks.limiting.judge import Call, Life, Log
from benchmarks.limiting.standin import StandIn
from benchmarks.provider import SCENARIOS, main
from benchmarks.scenarios import Finding

from ..support import ROOT, eventually


def call(
    at: float, *, end: float | None = None, pid: int = 1, status: int = 200, tenant: str = "a", key: str = "m",
    used: float = 1.0, number: int = 0, sent: float = 0.0, attempt: int = 1,
) -> Call:  # fmt: skip
    return Call(at, pid, status, tenant, key, used, number, sent, attempt, at if end is None else end)


def calls(times: Iterable[float], **fields: float) -> list[Call]:
    return [call(at, **fields) for at in times]  # type: ignore[arg-type]


def test_the_worst_window_is_found_wherever_it_lies() -> None:
    even = calls(range(0, 60, 6))
    burst = sorted([*even, *calls([31.0, 31.5, 32.0], used=5.0)], key=lambda each: each.at)
    assert judge.worst(even, 60) == (10, 10.0)
    assert judge.worst(even, 6) == (1, 1.0)  # a window holds its end, and not its beginning
    assert judge.worst(burst, 6) == (4, 16.0)
    assert judge.worst(burst, 6, since=40) == (1, 1.0)
    assert judge.worst(burst, 6, until=30) == (1, 1.0)


def test_twice_a_limit_at_the_turn_of_a_fixed_window_is_above_it() -> None:
    fixed = [*calls([59.9] * 100), *calls([60.1] * 100)]
    assert judge.worst(fixed, 60)[0] == 200


def test_use_is_whole_if_the_limit_is_used_at_once_and_again_after_each_window() -> None:
    bursts = [each for at in range(0, 60, 10) for each in calls([float(at)] * 5)]
    assert judge.used(bursts, 10, 10, 55, requests=5) == pytest.approx(1.0)
    assert judge.used(bursts, 10, 10, 55, requests=5, cost=10) == pytest.approx(1.0)
    assert judge.used(bursts, 10, 10, 55, requests=50, cost=10) == pytest.approx(0.5)


def test_use_counts_what_is_idle_between_bursts_and_not_what_is_left_out() -> None:
    late = [each for at in (0.0, 12.5, 25.0, 37.5, 50.0) for each in calls([at] * 5)]
    assert judge.used(late, 10, 12.5, 50, requests=5) == pytest.approx(0.8)
    silent = [each for at in (0.0, 10.0, 30.0, 40.0) for each in calls([at] * 5)]
    assert judge.used(silent, 10, 10, 50, requests=5) == pytest.approx(0.75)
    assert judge.used(silent, 10, 10, 50, requests=5, without=[(20, 30)]) == pytest.approx(1.0)


def test_use_is_not_a_number_and_so_never_enough_if_nothing_was_measured() -> None:
    assert not Finding("use", judge.used(calls([1, 2]), 10, 11, 11, requests=5), at_least=0).holds


def test_shares_are_of_calls_or_of_their_cost() -> None:
    both = [*calls([1, 2], used=10), call(3, tenant="b", used=60), call(99, tenant="b")]
    assert judge.shares(both, 0, 10, by_cost=False) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert judge.shares(both, 0, 10, by_cost=True) == pytest.approx({"a": 0.25, "b": 0.75})


def test_calls_are_open_until_they_end_and_one_that_follows_another_is_not_beside_it() -> None:
    assert judge.most_open([call(0, end=2), call(1, end=3), call(2, end=4)]) == 2
    endless = call(1)
    endless.end = None
    assert judge.most_open([endless, call(50, end=51)]) == 2


def test_a_process_that_holds_more_than_half_is_found_only_while_another_one_is_there() -> None:
    held = [call(0, end=9, pid=1), call(0, end=5, pid=1), call(5.05, end=9, pid=1), call(0, end=9, pid=2)]
    both = [Life(1, 0, 20), Life(2, 0, 6)]
    assert judge.longest_majority(Log(held, both), 3) == pytest.approx(6.0)  # a dip of 0.05 s is none
    assert judge.longest_majority(Log(held, both[:1]), 3) == 0
    assert judge.longest_majority(Log(held, both), 4) == 0


def test_a_pause_is_judged_from_the_first_refusal() -> None:
    seen = [call(1), call(2, status=429), call(2.03), call(2.04, status=429), call(22.5), call(23)]
    assert judge.pause(seen, 20) == judge.Pause(2, pytest.approx(40), pytest.approx(0.5))
    assert judge.pause(seen[:2], 20) == judge.Pause(1, 0.0, math.inf)
    with pytest.raises(ValueError, match="no call was refused"):
        judge.pause(seen[:1], 20)


def test_numbers_that_are_missing_or_doubled_are_counted() -> None:
    assert judge.accounts([call(0, number=0), call(1, number=2), call(2, number=2)], 4) == (2, 1)


def test_only_keys_above_their_limit_are_named() -> None:
    assert judge.above([*calls([1, 2, 3]), call(2, key="x"), call(9, key="x")], 5, 2) == {"m": 3}


def test_a_finding_holds_only_within_its_bounds() -> None:
    assert Finding("x", 2, at_most=2, at_least=1).holds
    assert not Finding("x", 3, at_most=2).holds
    assert not Finding("x", 0.5, at_least=1).holds
    assert not Finding("x", math.nan, at_most=2).holds


async def test_the_log_of_the_stand_in_tells_calls_refusals_and_lives(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with log.open("w") as lines:
        server = await asyncio.start_server(StandIn(lines).serve, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        fields = {"tenant": "a", "used": 7.0, "number": 3, "sent": 1.0, "attempt": 2, "takes_s": 0.0}
        for told in (
            {"hello": os.getpid()}, {"id": 1, "key": "m", **fields}, {"refuse": "m", "for_s": 9.0},
            {"id": 2, "key": "m", **fields}, {"id": 3, "key": "other", **fields},
        ):  # fmt: skip
            writer.write(json.dumps(told).encode() + b"\n")
        answers = {}
        for _ in range(3):
            answer = json.loads(await reader.readline())
            answers[answer["id"]] = answer["status"]
        writer.close()
        await eventually(lambda: not lines.flush() and '"bye"' in log.read_text())
        server.close()
    assert answers == {1: 200, 2: 429, 3: 200}
    found = judge.read(log)
    assert [(each.key, each.status, each.used, each.number, each.attempt) for each in found.calls] == [
        ("m", 200, 7.0, 3, 2), ("m", 429, 7.0, 3, 2), ("other", 200, 7.0, 3, 2),
    ]  # fmt: skip
    assert [each.key for each in found.of()] == ["m", "other"]
    assert all(each.end is not None for each in found.of())
    (life,) = found.lives
    assert life.pid == os.getpid()
    assert life.since < life.until < math.inf


def test_an_unknown_scenario_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["nothing"])
    assert "choose from requests, " in capsys.readouterr().err


def test_the_help_names_every_scenario() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "provider", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert [name for name in SCENARIOS if name not in done.stdout] == []
