"""Lanes of which as many jobs are in flight as may be (max_ack_pending), beside others whose jobs can start."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue.worker.session import Session

from ..support import Eventually, create_streams

STREAM, FAMILY = "AI_AGENT_TASKS", "agent.tasks"
CAP, JOBS, TENANTS = 2, 50, [f"t{n}" for n in range(6)]


class Echo(aiqueue.Message, kind="echo"):
    n: int = 0


class Ran:
    """A worker, and which jobs its handler began. Those of TENANTS wait for `release`."""

    def __init__(self, *, concurrency: int) -> None:
        self.times: Counter[tuple[str, int]] = Counter()
        self.release = asyncio.Event()
        self.worker = aiqueue.Worker(concurrency=concurrency)

        @self.worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            self.times[job.tenant, job.message.n] += 1
            if job.tenant in TENANTS:
                await self.release.wait()


@pytest.fixture
async def client(account: Any) -> AsyncIterator[aiqueue.Client]:
    """Each tenant may have CAP jobs in flight, and has JOBS."""
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        family = dataclasses.replace(client.topology.families[FAMILY], max_ack_pending=CAP)
        client.topology = dataclasses.replace(client.topology, families={**client.topology.families, FAMILY: family})
        for tenant in TENANTS:
            for n in range(JOBS):
                await client.enqueue(Echo(n=n), tenant=tenant)
        yield client


async def polls(session: Session, count: int, eventually: Eventually) -> None:
    """Wait for so many answers to the poll."""
    for _ in range(count):
        before = session.discovery.poll_answered_at
        await eventually(lambda before=before: session.discovery.poll_answered_at > before)


async def none_left(client: aiqueue.Client) -> bool:
    return not (await client.connection.api(f"STREAM.INFO.{STREAM}"))["state"]["messages"]


async def test_a_worker_asks_for_no_more_jobs_of_a_lane_than_may_be_in_flight(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    ran, held = Ran(concurrency=20), CAP * len(TENANTS)
    async with ran.worker.running(client) as session:
        await eventually(lambda: session.running == held)
        await polls(session, 2, eventually)
        assert session.puller.asked == held
        assert not session.puller.busy
        await client.enqueue(Echo(), tenant="late")
        await eventually(lambda: ran.times["late", 0] == 1)
        ran.release.set()
        await eventually(lambda: none_left(client))
    assert len(ran.times) == JOBS * len(TENANTS) + 1
    assert set(ran.times.values()) == {1}


async def test_slots_are_not_kept_for_lanes_whose_jobs_another_worker_holds(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    one, two = Ran(concurrency=20), Ran(concurrency=3)
    async with one.worker.running(client) as holding:
        await eventually(lambda: holding.running == CAP * len(TENANTS))
        async with two.worker.running(client) as session:

            def waits_without_credits() -> bool:
                lanes = list(session.puller.lanes)
                standing = [lane for lane in lanes if lane.standing_request]
                return len(standing) == len(TENANTS) and not session.puller.granted and not session.puller.busy

            await eventually(waits_without_credits)
            await polls(session, 2, eventually)
            assert waits_without_credits()
            await client.enqueue(Echo(), tenant="late")
            await eventually(lambda: (one.times + two.times)["late", 0] == 1)
            one.release.set()
            two.release.set()
            await eventually(lambda: none_left(client))
    assert two.times
    assert set((one.times + two.times).values()) == {1}


async def test_a_limit_that_is_raised_while_it_is_reached_counts(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    ran = Ran(concurrency=20)
    async with ran.worker.running(client) as session:
        await eventually(lambda: session.running == CAP * len(TENANTS))
        config = {**client.topology.family(FAMILY).lane_config("t0", "normal"), "max_ack_pending": CAP + 3}
        request = {"stream_name": STREAM, "config": config, "action": "update"}
        name = f"{config['durable_name']}.{config['filter_subject']}"
        await client.connection.api(f"CONSUMER.CREATE.{STREAM}.{name}", request)
        await eventually(lambda: session.running == CAP * len(TENANTS) + 3)
        ran.release.set()
        await eventually(lambda: none_left(client))


async def test_a_worker_that_could_hold_more_jobs_than_the_server_may_owe_acks_goes_on(
    client: aiqueue.Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.session.prefetch", lambda _slots, _handler_s: 400)
    ran = Ran(concurrency=20)
    ran.release.set()
    async with ran.worker.running(client) as session:
        session.puller.acks.unconfirmed_max = 96
        await eventually(lambda: none_left(client))
    assert set(ran.times.values()) == {1}
