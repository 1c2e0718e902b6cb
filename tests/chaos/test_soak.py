"""The harness in short: what ``python -m benchmarks soak`` does for longer."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from benchmarks.chaos import soak
from benchmarks.chaos.nemesis import Plan
from benchmarks.chaos.places import Disk, Impossible
from benchmarks.chaos.show import plot, svg
from benchmarks.chaos.soak import Options, Report

from ..support import processes


def ran(options: Options) -> Report:
    before = set(Path(tempfile.gettempdir()).glob("aiqueue-chaos-*"))
    report = soak.run(options)
    assert set(Path(tempfile.gettempdir()).glob("aiqueue-chaos-*")) <= before
    assert not processes("benchmarks.chaos")
    return report


@pytest.mark.timeout(120)
def test_no_job_is_lost_and_no_result_overwritten_while_workers_and_the_server_are_killed() -> None:
    plans = (Plan(("worker-kill",), 1.0), Plan(("server-kill",), 2.0, 0.2))
    report = ran(Options(jobs=1_500, rate=400, ack_wait_s=2, plans=plans, seed=3))
    kinds = {fault.kind for fault in report.faults}
    assert kinds == {"worker-kill", "server-kill"}
    assert report.verdict.acknowledged == 1_500
    assert report.verdict.completed == 1_500
    assert report.verdict.sound, report.plain()
    assert not report.surprises
    lines = plot(report, 60)
    assert {"w", "z"} <= set(lines[-2])
    assert "server-kill" in svg(report)


@pytest.mark.timeout(120)
def test_a_worker_that_acknowledges_before_it_runs_is_found_out() -> None:
    plans = (Plan(("worker-kill",), 1.2),)
    report = ran(Options(jobs=600, rate=200, handler_ms=100, workers=1, plans=plans, broken=True))
    assert report.verdict.acknowledged == 600
    assert report.verdict.lost
    assert not report.verdict.sound


@pytest.mark.timeout(120)
def test_no_job_is_lost_while_leaders_of_a_cluster_die_and_stop_and_step_down() -> None:
    plans = (Plan(("step-down",), 1.5), Plan(("leader-kill", "leader-stop"), 4.0, 2.0))
    report = ran(Options(servers=3, jobs=1_200, rate=200, ack_wait_s=2, plans=plans, seed=2))
    assert {fault.kind for fault in report.faults} & {"leader-kill", "leader-stop"}
    assert report.verdict.completed == report.verdict.acknowledged == 1_200
    assert report.verdict.sound, report.plain()


def test_a_filled_disk_has_no_room_until_it_is_freed(tmp_path: Path) -> None:
    try:
        with Disk(tmp_path / "disk", 1) as disk:
            disk.fill()
            with pytest.raises(OSError, match="No space"):
                (disk.directory / "more").write_bytes(bytes(5_000))
            disk.free()
            (disk.directory / "more").write_bytes(bytes(5_000))
    except Impossible as problem:
        pytest.skip(str(problem))
    assert not any((tmp_path / "disk").iterdir())
