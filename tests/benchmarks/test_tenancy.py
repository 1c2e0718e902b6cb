"""The judge of many busy tenants finds what it is to find."""

from __future__ import annotations

import pytest

from benchmarks.tenancy import _shape, bench, main
from benchmarks.tenancy.app import START
from benchmarks.tenancy.bench import Entry


def begun(*numbers: int) -> list[Entry]:
    return [Entry(START, 1, number, 0.0, float(at)) for at, number in enumerate(numbers)]


def test_a_job_that_never_began_and_one_that_began_twice_are_found() -> None:
    def wrong(entries: list[Entry]) -> list[str]:
        return [each.name for each in bench.accounts(entries, 3) if not each.holds]

    assert wrong(begun(2, 0, 1)) == []
    assert wrong(begun(2, 0)) == ["jobs that never began"]
    assert wrong(begun(2, 0, 1, 0)) == ["jobs that began twice"]


def test_a_shape_names_tenants_and_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    assert _shape("1000x60") == (1_000, 60)
    with pytest.raises(SystemExit):
        main(["drain", "--shapes", "1000x0"])
    assert "write TENANTSxJOBS, such as 1000x60" in capsys.readouterr().err
