"""The cluster that other tests rest on. What it does for them, leaders and all, is tried by tests/chaos."""

from __future__ import annotations

from pathlib import Path

from .support import Cluster, NatsProcess, processes


def test_a_cluster_keeps_its_ports_over_the_death_of_a_node_and_leaves_nothing_behind(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "c")
    try:
        cluster.start()
        url = cluster.url
        cluster.node("n2").kill()
        assert [node.directory.name for node in cluster.alive] == ["n1", "n3"]
        cluster.wait_ready()
        cluster.start()
        assert cluster.url == url
        assert len(processes(str(tmp_path))) == 3
    finally:
        cluster.end()
    assert not processes(str(tmp_path))
    assert not (tmp_path / "c").exists()


def test_a_server_that_syncs_every_write_stores_in_its_own_directory(tmp_path: Path) -> None:
    server = NatsProcess(tmp_path / "s", storage="sync_interval: always")
    try:
        server.start()
        assert "Temporary storage directory" not in server.log.read_text()
        assert (tmp_path / "s" / "jetstream").is_dir()
    finally:
        server.kill()
