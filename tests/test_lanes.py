from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue import lanes, provision, subjects
from aiqueue.connection import timestamp

from .support import Eventually

STREAM, FAMILY = "AI_AGENT_TASKS", "agent.tasks"
JOBS, TENANTS = 12, [f"t{n}" for n in range(6)]


class Echo(aiqueue.Message, kind="echo"):
    n: int = 0


class Ran:
    """Which jobs a worker's handler began, and how often. `held`: those of this tenant wait for `release`."""

    def __init__(self, *, held: str = "", concurrency: int = 20) -> None:
        self.times: Counter[tuple[str, int]] = Counter()
        self.release = asyncio.Event()
        self.worker = aiqueue.Worker(concurrency=concurrency)

        @self.worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            self.times[job.tenant, job.message.n] += 1
            if job.tenant == held:
                await self.release.wait()


@pytest.fixture
async def client(account: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiqueue.Client]:
    """Its lanes are in memory, two are many, one job is a backlog, and a lane is hinted at once."""
    monkeypatch.setattr("aiqueue.producer.HINT_EVERY_S", 1e9)
    monkeypatch.setattr(lanes, "FEW", 2)
    monkeypatch.setattr(lanes, "BACKLOG_MIN", 1)
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        family = dataclasses.replace(client.topology.families[FAMILY], lane_storage="memory")
        client.topology = dataclasses.replace(client.topology, families={**client.topology.families, FAMILY: family})
        yield client


async def fill(client: aiqueue.Client, first: int = 0) -> None:
    for tenant in TENANTS:
        for n in range(first, first + JOBS):
            await client.enqueue(Echo(n=n), tenant=tenant)


async def consumers(client: aiqueue.Client) -> set[str]:
    return set((await client.connection.api(f"CONSUMER.NAMES.{STREAM}"))["consumers"] or ())


async def left(client: aiqueue.Client) -> int:
    return int((await client.connection.api(f"STREAM.INFO.{STREAM}"))["state"]["messages"])


async def test_of_many_lanes_those_whose_backlog_is_done_go_and_come_back(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    await fill(client)
    ran = Ran()

    async def few_left() -> bool:
        return not await left(client) and len(await consumers(client)) <= lanes.FEW

    async with ran.worker.running(client):
        await eventually(few_left, within=10)
        await fill(client, first=JOBS)
        await eventually(lambda: len(ran.times) == 2 * JOBS * len(TENANTS), within=10)
    assert set(ran.times.values()) == {1}


async def test_a_lane_with_a_job_in_flight_stays(client: aiqueue.Client, eventually: Eventually) -> None:
    await fill(client)
    ran = Ran(held="t0")

    async def others_gone() -> bool:
        return await left(client) == JOBS and len(await consumers(client)) <= lanes.FEW

    async with ran.worker.running(client):
        await eventually(others_gone, within=10)
        assert "t0-normal" in await consumers(client)
        ran.release.set()
        await eventually(lambda: _none_left(client), within=10)
    assert set(ran.times.values()) == {1}


async def _none_left(client: aiqueue.Client) -> bool:
    return not await left(client)


async def test_a_lane_at_which_another_worker_waits_is_not_removed(client: aiqueue.Client) -> None:
    async with Ran().worker.running(client) as session:
        lane = session._lanes
        await client.enqueue(Echo(), tenant="acme")
        async with asyncio.timeout(10):
            while not any(pull.standing for pull in session._puller.lanes):
                await asyncio.sleep(0.01)
        assert not await lane._removed(f"{STREAM}.acme-normal")
        info = await client.connection.api(f"CONSUMER.INFO.{STREAM}.acme-normal")
    assert not info.get("paused")


async def test_workers_that_let_lanes_go_under_each_other_run_each_job_once(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    one, two = Ran(), Ran()

    async def some_gone() -> bool:
        return len(await consumers(client)) < len(TENANTS)

    await fill(client)
    async with one.worker.running(client), two.worker.running(client):
        await eventually(some_gone, within=10)
        await fill(client, first=JOBS)  # in the midst of it
        await eventually(lambda: len(one.times + two.times) == 2 * JOBS * len(TENANTS), within=20)
        await eventually(lambda: _none_left(client), within=10)
    assert set((one.times + two.times).values()) == {1}


async def test_a_redelivery_knows_the_consumer_that_another_worker_has_made_anew(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo, retry=aiqueue.Backoff(attempts=3, first=0.02, cap=0.05))
    async def echo(job: aiqueue.Job[Echo]) -> str:
        if job.attempt == 1:
            raise ValueError
        return "ok"

    async with worker.running(client) as session:
        assert await (await client.enqueue(Echo(), tenant="acme")).result(10) == "ok"
        (pull,) = session._puller.lanes
        pull.created -= 100.0  # as after another worker has let the lane go and made it anew
        handle = await client.enqueue(Echo(n=1), tenant="acme")
        assert await handle.result(10) == "ok"
        info = await client.connection.api(f"CONSUMER.INFO.{STREAM}.acme-normal")
        assert pull.created == timestamp(info["created"])
    assert pull.key == subjects.Lane(FAMILY, "acme", "normal")
