"""The harness that sets aiqueue beside other queues, in small."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from aiqueue.errors import BadInput
from benchmarks.peers import Plan, compare, comparison
from benchmarks.peers.adapters.verbs import RECORD
from benchmarks.peers.catalogue import PEERS, Peer
from benchmarks.peers.comparison import chosen
from benchmarks.peers.records import Ledger, Tally
from benchmarks.peers.trial import DRAIN, Figure
from benchmarks.report import OURS, RAW

pytestmark = pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="it reads /proc")

SMALL = Plan(rounds=1, jobs=200, rates=(200,), pace_s=2.0, quiet_s=0.0)


def programs(place: Path) -> Iterator[str]:
    """The command lines of processes that were told of a place, or work there."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            told = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if str(place) in told.decode(errors="replace") or (process / "cwd").readlink().is_relative_to(place):
                yield (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue  # it ended meanwhile


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_aiqueue_and_raw_nats_py_give_all_figures_and_leave_nothing(tmp_path: Path) -> None:
    compared = compare(SMALL, only=["aiqueue", "raw"], scratch=tmp_path, say=print)
    assert not compared.skipped
    assert not compared.failed
    for row in compared.rows:
        assert {side: len(figures) for side, figures in row.sides.items()} == {OURS: 1, RAW: 1}, row.name
        least = 0 if row.unit == "CPU s" else 1e-3  # so few jobs may take less than a tick of the clock
        assert all(figure >= least for figures in row.sides.values() for figure in figures), row
    assert {row.name for row in compared.rows} >= {"drain, two workers", "latency at 200/s, p99"}
    assert compared.plain()["rows"][0]["question"] == "peers"
    assert not list(programs(tmp_path))
    assert not list(tmp_path.iterdir())


def test_aiqueue_and_raw_nats_py_run_in_every_round_and_only_the_best_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    class Trial:
        """The later a peer stands in the catalogue, the faster; aiqueue and raw nats-py are the slowest."""

        def __init__(self, peer: Peer, *_: object) -> None:
            self.peer, self.notes, self.failures = peer, [], {}
            self.figures = [Figure(peer, DRAIN, float(PEERS.index(peer)), 0.0)]

        def run(self) -> None:
            ran.append(self.peer.name)

    monkeypatch.setattr(comparison, "Trial", Trial)
    monkeypatch.setattr(comparison, "_made_ready", lambda *_: (Path("python"), "how"))
    compared = compare(Plan(rounds=3), only=None, scratch=tmp_path, say=print)
    names = [peer.name for peer in PEERS]
    assert names[:2] == [OURS, RAW]
    assert ran == names + 2 * [*names[:2], *names[-comparison.BEST :]]
    drain = next(row for row in compared.rows if row.name == DRAIN)
    assert {len(drain.sides[side]) for side in (OURS, RAW, names[-1])} == {3}


def test_a_peer_whose_server_is_not_here_is_skipped_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compared = compare(SMALL, only=["arq"], scratch=tmp_path, say=print)
    assert compared.skipped == {"arq": "there is no redis-server here"}
    assert not any(row.sides for row in compared.rows)


def test_a_peer_that_is_not_known_is_refused() -> None:
    with pytest.raises(BadInput, match="there is no peer sidekiq"):
        chosen(["sidekiq"])


def test_a_record_without_a_job_and_one_that_ran_twice_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(b"".join(RECORD.pack(1.0, 1.5, number) for number in (0, 1, 3, 3, 9)))
    tally = Tally.of(Ledger(path).runs(), range(4))
    assert tally.lacking == "1 of 4 jobs did not run"
    assert tally.surplus == "1 runs beside those of 4 jobs"
    assert Tally.of(Ledger(path).runs(), range(2)).lacking == ""


def test_records_that_ran_into_each_other_are_no_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    path.write_bytes(RECORD.pack(1.0, 1.5, 0)[:-1])
    with pytest.raises(ValueError, match="no whole records"):
        Ledger(path).runs()
