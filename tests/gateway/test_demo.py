"""`aiqueue gateway demo`: its bill, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from aiqueue.cli.demo.gateway_view import CallBoard, DemoBill
from aiqueue.cli.json_keys import OUTPUTS
from aiqueue.gateway import BudgetStats, ModelConfig, Price, ProviderConfig, UsageRecord
from aiqueue.gateway.standin import LoggedCall
from tools.docs.json_text import problems_of

from ..support import ROOT, processes, wait_until

MODELS = {"m": ModelConfig("m", ProviderConfig("p", "openai"), "m", price=Price.of(1, 2))}


def call(id_: str, *, outcome: str = "ok", tokens: int = 5) -> LoggedCall:
    return LoggedCall(
        0, "/v1/chat/completions", "m", "key", id_, 1.0, outcome=outcome, prompt_tokens=10,  # type: ignore[arg-type]
        completion_tokens=tokens, user="acme-1",
    )  # fmt: skip


def record(id_: str, outcome: str = "ok", *, cost: int | None = 20, reserved: int = 50) -> UsageRecord:
    return UsageRecord(
        call_id=id_, job_id="acme-1", request_id="acme-1", tenant="acme", model="m", provider="p", started_at=1.0,
        outcome=outcome, cost_micros=cost, reserved_micros=reserved,  # type: ignore[arg-type]
    )  # fmt: skip


def bill(
    calls: Sequence[LoggedCall], records: Sequence[UsageRecord], *, spent: int = 20, held: int = 0, answers: int = 1
) -> DemoBill:
    board = CallBoard(calls)
    board.expect("acme", "m")
    for _ in range(answers):
        board.answer("acme", "m", {"aiqueue": {}})
    return DemoBill.of(
        board, calls, records, [BudgetStats("acme", "2026-11", 10**6, spent, 0, held, 0, 1, None)], MODELS
    )


def test_a_bill_adds_up_if_all_that_is_billed_is_recorded_or_held() -> None:
    assert bill([call("c-1")], [record("c-1")]).is_right
    lost = bill(
        [call("c-0", outcome="lost"), call("c-1"), call("", outcome="refused")],
        [record("c-0", "possibly_billed", cost=None), record("c-1")],
        held=50,
    )
    assert lost.is_right
    assert (lost.billed_micros, lost.recorded_micros, lost.lost_micros, lost.held_micros) == (40, 20, 20, 50)
    assert (lost.calls, lost.refused, lost.possibly_billed) == (2, 1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        bill([call("c-1"), call("c-2")], [record("c-1")]),  # a call in no record
        bill([call("c-1", tokens=6)], [record("c-1")]),  # another cost
        bill([call("c-1")], [record("c-1")], spent=19),  # the budget is not charged
        bill([call("c-1")], [record("c-1")], answers=0),  # no answer
    ],
)
def test_a_bill_that_does_not_add_up_says_so(wrong: DemoBill) -> None:
    assert not wrong.is_right
    assert any("wrong" in line for line, _ in wrong.describe())


class Demo:
    """The demo as a process, with a directory for what it keeps while it runs."""

    def __init__(self, directory: Path, *arguments: str) -> None:
        self._directory, self._out = directory, directory / "out.txt"
        self._temporary = directory / "tmp"
        self._temporary.mkdir()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_"))}
        with self._out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "aiqueue", "gateway", "demo", *arguments], cwd=directory, stdout=out, stderr=out,
                env={**env, "TMPDIR": str(self._temporary), "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
            )  # fmt: skip

    def output(self) -> str:
        return self._out.read_text()

    def left(self) -> list[str]:
        return [*map(str, self._temporary.iterdir()), *map(str, processes(str(self._temporary)))]


@pytest.fixture
def demos(tmp_path: Path) -> Iterator[Any]:
    started: list[Demo] = []

    def start(*arguments: str) -> Demo:
        started.append(Demo(tmp_path, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.process.terminate()
        each.process.wait(30)


@pytest.mark.timeout(150)
def test_a_demo_that_is_interrupted_leaves_no_file_and_no_process(demos: Any) -> None:
    demo = demos()
    wait_until(
        lambda: "requests of 2 tenants are enqueued" in demo.output() or demo.process.poll() is not None, within=90
    )
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(30) == 130, demo.output()
    assert "0 of 0 requests" not in demo.output()
    wait_until(lambda: not demo.left())
    assert demo.output().endswith("interrupted; everything is cleaned up\n")


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_bill_of_a_whole_demo_adds_up_and_the_provider_refuses_only_what_it_is_told_to(demos: Any) -> None:
    demo = demos("--json")
    assert demo.process.wait(110) == 0, demo.output()
    report = json.loads(demo.output())
    assert problems_of(["gateway", "demo", "--json"], demo.output(), OUTPUTS) == []
    assert report["ok"]
    assert report["answered"] == report["requests"]
    assert report["refused"] == 1
    assert report["calls"] > report["requests"]  # those of the killed worker were made again
    wait_until(lambda: not demo.left())
