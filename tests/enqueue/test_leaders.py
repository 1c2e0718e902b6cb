"""Jobs that become due while a stream of a cluster has no leader."""

from __future__ import annotations

import asyncio
import time
from itertools import count

import pytest

import aiqueue
from aiqueue import headers, subjects
from aiqueue.errors import AIQueueError, Unavailable
from aiqueue.topology import provision

from ..support import Cluster

JOBS = 2_000
DUE_IN_S = 12.0
PROBES = {
    "AI_AGENT_TASKS": "ai.agent.tasks.probe",
    "AI_PARKED": "ai.parked.at.agent.tasks.probe.normal.probe.new",
}


class Task(aiqueue.Message, kind="task"):
    n: int = 0


async def first_consumer(client: aiqueue.Client) -> float:
    """Create a consumer until the cluster does so, which takes a leader of its meta group. Return when."""
    config = {"durable_name": "probe", "ack_policy": "explicit", "filter_subject": "ai.parked.at.probe"}
    while True:
        try:
            request = {"stream_name": "AI_PARKED", "config": config}
            await client.connection.api("CONSUMER.CREATE.AI_PARKED.probe", request, timeout=0.5)
        except Unavailable:
            continue
        return time.monotonic()


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
@pytest.mark.parametrize("stream", PROBES)
async def test_due_jobs_start_soon_after_new_leaders_answer(
    own_cluster: Cluster, stream: str, round_: int, record_property: pytest.RecordProperty
) -> None:
    """The node may have led the other stream, or the cluster's meta group, too: the last new leader counts."""
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
            answers = [first_ack(probing, probe) for probe in PROBES.values()]
            *acks, created_at = await asyncio.gather(*answers, first_consumer(probing))
            async with asyncio.timeout(120):
                while len(started) < JOBS:
                    await asyncio.sleep(0.05)
    last = max(started.values())
    late_s = last - max(*acks, created_at)
    record_property("late_s", late_s)
    answers = dict(zip(PROBES, acks, strict=True))
    after_s = {name: round(at - here - 0.1, 2) for name, at in (answers | {"meta": created_at}).items()}
    print(
        f"\n{stream}: the last job started {late_s:.2f} s after the last new leader answered, and "
        f"{last - answers[stream]:.2f} s after the stream's own did. The answers came, after the kill: {after_s}"
    )
    assert late_s < 5, "not a minute"
