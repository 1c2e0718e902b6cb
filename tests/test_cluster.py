"""The cluster that other tests rest on."""

from __future__ import annotations

from pathlib import Path

import aiqueue
from aiqueue import provision

from .support import Cluster, processes, wait_until

STREAM = "AI_AGENT_TASKS"


class Ping(aiqueue.Message, kind="ping"):
    n: int


async def _declare(cluster: Cluster) -> None:
    account = cluster.account
    async with aiqueue.connect(account.url, user=account.user, password=account.password, profile="cluster") as client:
        await provision.apply(client.connection, client.topology)
        await client.enqueue(Ping(n=1), tenant="acme")


async def test_a_cluster_keeps_a_job_over_the_death_of_its_streams_leader(own_cluster: Cluster) -> None:
    await _declare(own_cluster)
    own_cluster.wait_ready([STREAM], current=True)
    first = own_cluster.leader(STREAM)
    port = first.port
    first.kill()
    second = own_cluster.leader(STREAM)
    assert second is not first
    first.start()
    assert first.port == port
    own_cluster.wait_ready([STREAM], current=True)
    assert own_cluster.ask(f"STREAM.INFO.{STREAM}")["state"]["messages"] == 1


async def test_a_stopped_leader_and_one_that_steps_down_are_followed_by_another(own_cluster: Cluster) -> None:
    await _declare(own_cluster)
    own_cluster.wait_ready([STREAM], current=True)
    first = own_cluster.leader(STREAM)
    first.pause()
    second = own_cluster.leader(STREAM)
    assert second is not first
    first.resume()
    own_cluster.wait_ready([STREAM], current=True)
    second = own_cluster.leader(STREAM)
    own_cluster.step_down(STREAM)
    wait_until(lambda: own_cluster.leader_of(STREAM) not in ("", second.directory.name), within=30)


def test_the_end_of_a_cluster_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "c")
    cluster.start()
    assert len(processes(str(tmp_path))) == 3
    cluster.end()
    assert not (tmp_path / "c").exists()
    assert not processes(str(tmp_path))
