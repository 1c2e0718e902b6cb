"""Jobs that become due while a stream of a cluster has no leader."""

from __future__ import annotations

import asyncio
import time
from itertools import count

import pytest

import aiqueue
from aiqueue import headers, subjects
from aiqueue.errors import AIQueueError
from aiqueue.topology import provision

from ..support import Cluster

JOBS = 2_000
DUE_IN_S = 12.0


class Task(aiqueue.Message, kind="task"):
    n: int = 0


async def first_ack(client: aiqueue.Client, subject: str) -> float:
    """Store messages on `subject` until one is acknowledged. Return when, in monotonic seconds."""
    for number in count():
        fields = {headers.MSG_ID: f"probe-{number}-{subjects.new_id()}"}
        if subject.startswith("ai.parked."):
            fields |= {headers.SCHEDULE: "@at 2099-01-01T00:00:00Z", headers.SCHEDULE_TARGET: "ai.parked.due.probe"}
            fields[headers.SCHEDULE_TARGET] = subject.replace(".at.", ".due.")
        try:
            await client.connection.store(subject, b"{}", fields, timeout_s=0.25)
        except AIQueueError:
            continue
        return time.monotonic()
    raise AssertionError


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("round_", range(3))
@pytest.mark.parametrize(
    ("stream", "probe"),
    [
        ("AI_AGENT_TASKS", "ai.agent.tasks.probe"),
        ("AI_PARKED", "ai.parked.at.agent.tasks.probe.normal.probe.new"),
    ],
)
async def test_due_jobs_start_soon_after_a_new_leader_takes_messages(
    own_cluster: Cluster, stream: str, probe: str, round_: int, record_property: pytest.RecordProperty
) -> None:
    account = own_cluster.account
    started: dict[int, float] = {}
    worker = aiqueue.Worker(concurrency=50, tenants=["acme"])

    @worker.handle(Task, result=False)
    async def task(job: aiqueue.Job[Task]) -> None:
        started.setdefault(job.message.n, time.monotonic())

    async with (
        aiqueue.connect(account.url, user=account.user, password=account.password, profile="cluster") as client,
        aiqueue.connect(account.url, user=account.user, password=account.password, profile="cluster") as probing,
    ):
        await provision.apply(client.connection, client.topology)
        async with worker.running(client):
            due_at, here = client.connection.clock.now() + DUE_IN_S, time.monotonic() + DUE_IN_S
            stored = client.enqueue_many((Task(n=n) for n in range(JOBS)), tenant="acme", at=due_at)
            assert len([each async for each in stored if isinstance(each, aiqueue.Handle)]) == JOBS
            assert time.monotonic() < here, "all jobs are parked before they are due"
            leader = await asyncio.to_thread(own_cluster.leader, stream)
            await asyncio.sleep(here + 0.1 - time.monotonic())  # the fault comes at a time, not after a fact
            leader.kill()
            acknowledged_at = await first_ack(probing, probe)
            async with asyncio.timeout(120):
                while len(started) < JOBS:
                    await asyncio.sleep(0.05)
    late_s = max(started.values()) - acknowledged_at
    record_property("late_s", late_s)
    print(f"\n{stream}: the last job started {late_s:.2f} s after the first PubAck, which came "
          f"{acknowledged_at - here - 0.1:.2f} s after the kill")  # fmt: skip
    assert late_s < 10, "not a minute"
