"""The checker can fail: each kind of harm, written down by hand, is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from aiqueue.errors import BadInput
from benchmarks.chaos import records
from benchmarks.chaos.checker import Evidence, Verdict, Word, check, recoveries
from benchmarks.chaos.nemesis import Fault, Nemesis, Plan
from benchmarks.chaos.records import Line, Run

ONCE = Run(1, "7-1", 10.0, 10.1, 10.2)
KEPT = {1: [Word("result", 5, "7-1")]}


def judged(
    runs: Sequence[Run] = (ONCE,),
    *,
    acked: Sequence[int] = (1,),
    faults: Sequence[Fault] = (),
    journals: Mapping[int, Sequence[Word]] | None = KEPT,
    dead: Sequence[int] = (),
    left: int = 0,
) -> Verdict:
    enqueued = [Line(records.ACKED, number, "0.1", 9.0) for number in acked]
    return check(Evidence(enqueued, runs, faults, journals, dead, left))


def test_a_run_with_one_result_is_sound() -> None:
    verdict = judged()
    assert verdict.sound
    assert (verdict.acknowledged, verdict.completed, verdict.repeats) == (1, 1, 0)


def test_an_acknowledged_job_that_never_ran_is_lost() -> None:
    verdict = judged(acked=[1, 2])
    assert verdict.lost == [2]
    assert not verdict.sound


def test_a_job_whose_handler_never_ended_or_whose_result_is_not_there_is_lost() -> None:
    assert judged([Run(1, "7-1", 10.0, 10.1, None)]).lost == [1]
    assert judged(journals={}).lost == [1]
    assert judged(journals=None).lost == []  # a worker that keeps no journals


def test_a_dead_letter_is_not_lost() -> None:
    assert judged([], journals={}, dead=[1]).sound


@pytest.mark.parametrize(
    "words",
    [
        [Word("result", 5, "7-1"), Word("result", 5, "7-1")],
        [Word("result", 5, "7-1"), Word("progress", 5, "")],
        [Word("result", 5, "7-1"), Word("failed", 5, "")],
        [Word("result", 5, "7-9")],
    ],
)
def test_a_second_word_after_the_final_one_or_a_result_of_no_run_is_an_overwritten_result(words: list[Word]) -> None:
    verdict = judged(journals={1: words})
    assert len(verdict.overwritten) == 1
    assert not verdict.sound


def test_another_run_of_the_same_job_may_have_its_own_result() -> None:
    assert judged(journals={1: [Word("result", 5, "7-1"), Word("result", 6, "7-1")]}).sound


def test_a_repeated_run_needs_a_fault_that_met_the_earlier_one() -> None:
    twice = [Run(1, "7-1", 10.0, 10.1, None), Run(1, "8-1", 15.0, 15.1, 15.2)]
    journals = {1: [Word("result", 5, "8-1")]}
    assert judged(twice, journals=journals).unexplained == [1]
    killed = Fault("worker-kill", 10.15, victim=7, what="worker 7")
    verdict = judged(twice, journals=journals, faults=[killed])
    assert verdict.sound
    assert (verdict.repeats, verdict.in_flight, verdict.double_effects) == (1, 1, 1)
    other = Fault("worker-kill", 10.15, victim=9, what="worker 9")
    assert judged(twice, journals=journals, faults=[other]).unexplained == [1]
    server = Fault("server-kill", 10.15, until=11.0, what="server")
    assert judged(twice, journals=journals, faults=[server]).sound


def test_a_run_that_began_while_its_worker_was_being_killed_was_in_flight() -> None:
    killed = Fault("worker-kill", 10.0, victim=7, what="worker 7")
    journals = {1: [Word("result", 5, "8-1")]}
    second = Run(1, "8-1", 15.0, 15.1, 15.2)
    verdict = judged([Run(1, "7-1", 10.0005, None, None), second], journals=journals, faults=[killed])
    assert (verdict.unexplained, verdict.in_flight) == ([], 1)
    assert judged([Run(1, "9-1", 10.0005, None, None), second], journals=journals, faults=[killed]).unexplained == [1]


def test_what_is_left_in_the_stream_is_told() -> None:
    assert not judged(left=1).sound


def test_recovery_is_the_longest_silence_and_how_long_the_deads_jobs_waited() -> None:
    runs = [Run(1, "7-1", 10.0, None, None), Run(2, "8-1", 10.0, 10.0, 10.1), Run(1, "8-2", 15.0, 15.0, 15.1)]
    (found,) = recoveries(runs, [Fault("worker-kill", 10.05, victim=7, what="worker 7")])
    assert found.silence == [pytest.approx(5.0)]
    assert found.elsewhere == [pytest.approx(4.95)]


def test_what_was_written_down_is_read_as_runs(tmp_path: Any) -> None:
    pen = records.Pen(tmp_path / "log")
    first, second = pen.mark(), pen.mark()
    for what, mark in ((records.START, first), (records.START, second), (records.EFFECT, first), (records.END, first)):
        pen.write(what, 3, mark)
    pen.close()
    one, other = records.runs(tmp_path / "log")
    assert one.start < (one.effect or 0) < (one.end or 0)
    assert (other.effect, other.end) == (None, None)
    assert one.number == other.number == 3


class Nothing:
    """A field with nothing to harm."""

    def __init__(self) -> None:
        self.servers: list[Any] = []
        self.cluster = self.disk = self.link = None
        self.stream = "S"
        self.workers = SimpleNamespace(alive=[])


def test_a_seed_gives_one_schedule_and_a_fault_without_a_victim_is_no_fault() -> None:
    plans = [Plan.parse("worker-kill:2s"), Plan.parse("leader-kill|leader-stop:20:5s")]
    assert plans[1] == Plan(("leader-kill", "leader-stop"), 20.0, 5.0)
    made = [Nemesis(plans, Nothing(), seed=seed) for seed in (1, 1, 2)]  # type: ignore[arg-type]
    first, same, other = ([round(due.at, 1) for due in nemesis._due] for nemesis in made)
    assert first == same
    assert first != other
    quick = Nemesis([Plan(("worker-kill", "step-down", "disk-full", "link-cut"), 1e-6)], Nothing(), seed=1)  # type: ignore[arg-type]
    for _ in range(20):
        quick.step()
    assert quick.skipped > 0
    assert quick.faults == []


@pytest.mark.parametrize("text", ["", "worker-kill", "worker-kill:", "no-such:2s", "worker-kill:x", "worker-kill:-1"])
def test_a_wrong_fault_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(BadInput, match="fault"):
        Plan.parse(text)
