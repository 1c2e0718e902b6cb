"""The judge of many busy tenants finds what it is to find."""

from __future__ import annotations

import pytest

from benchmarks.chaos.records import Run
from benchmarks.tenancy import _shape, bench, main, sharing
from benchmarks.tenancy.app import END, START
from benchmarks.tenancy.bench import Entry
from benchmarks.tenancy.killing import runs


def begun(*numbers: int) -> list[Entry]:
    return [Entry(START, 1, number, 0.0, float(at)) for at, number in enumerate(numbers)]


def test_a_job_that_never_began_and_one_that_began_twice_are_found() -> None:
    def wrong(entries: list[Entry]) -> list[str]:
        return [each.name for each in bench.accounts(entries, 3) if not each.holds]

    assert wrong(begun(2, 0, 1)) == []
    assert wrong(begun(2, 0)) == ["jobs that never began"]
    assert wrong(begun(2, 0, 1, 0)) == ["jobs that began twice"]


def backlog(*starts: int, seconds: int = 10) -> list[Entry]:
    """Each second so many starts of each tenant, whose jobs were sent before."""
    tenants = len(starts)
    return [
        Entry(START, 1, tenants * (second * most + number) + tenant, 0.0, 100.0 + second)
        for second in range(seconds)
        for tenant, most in enumerate(starts)
        for number in range(most)
    ]


def violated(entries: list[Entry], jobs: int = 1_000) -> list[str]:
    return [each.name for each in sharing.judge(entries, 4, jobs, 9.0) if not each.holds]


def test_shares_by_weight_hold_and_others_are_found() -> None:
    assert violated(backlog(3, 3, 1, 1)) == []
    assert violated(backlog(4, 4, 1, 1)) == ["light tenants' share of starts, of their due"]
    assert violated(backlog(1, 1, 1, 1)) == [
        f"{name} tenants' share of starts, of their due" for name in ("heavy", "light")
    ]
    assert violated(backlog(3, 3, 1, 1), jobs=30) == ["starts of a heavy tenant, most"]  # its backlog was at its end


def test_a_busy_tenant_without_a_start_is_found_at_the_begin_amid_and_at_the_end() -> None:
    all_of_them = backlog(3, 3, 1, 1)
    for since, until in ((100, 106), (102, 107), (104, 110)):
        some = [each for each in all_of_them if each.number % 4 != 3 or not since <= each.at < until]
        assert "longest without a start, s" in violated(some)


def test_jobs_that_were_sent_amid_the_run_count_for_no_backlog() -> None:
    later = [Entry(START, 1, 10_003, 101.0, 101.0 + number / 100) for number in range(100)]
    assert violated(backlog(3, 3, 1, 1) + later) == []


def test_the_p99_of_few_is_the_largest_and_of_many_the_one_above_the_hundredth_part() -> None:
    assert sharing.p99([3.0, 1.0, 2.0]) == 3.0
    assert sharing.p99(range(200)) == 197


def test_an_end_is_that_of_the_last_run_of_the_job_in_its_process() -> None:
    told = [
        Entry(START, 1, 7, 0.0, 1.0), Entry(START, 2, 7, 0.0, 2.0), Entry(END, 1, 7, 0.0, 3.0),
        Entry(START, 1, 7, 0.0, 4.0), Entry(END, 1, 7, 0.0, 5.0),
    ]  # fmt: skip
    assert runs(told) == [Run(7, "1-0", 1.0, end=3.0), Run(7, "2-1", 2.0), Run(7, "1-2", 4.0, end=5.0)]


def test_a_shape_names_tenants_and_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert _shape("1000x60") == (1_000, 60)
    with pytest.raises(SystemExit):
        main(["drain", "--shapes", "1000x0"])
    assert "write TENANTSxJOBS, such as 1000x60" in capsys.readouterr().err
