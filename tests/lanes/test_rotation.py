"""Lanes in line on a real server: the limits are small, so that a few tenants are many."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue.inspect import stats
from aiqueue.lanes import discovery, line
from aiqueue.lanes.consumers import LaneConsumers
from aiqueue.lanes.puller import STEP_MAX

from ..support import Eventually, create_streams

STREAM, FAMILY = "AI_AGENT_TASKS", "agent.tasks"
JOBS, TENANTS = 30, [f"t{n}" for n in range(12)]


class Echo(aiqueue.Message, kind="echo"):
    n: int = 0


class Ran:
    """Which jobs a worker's handler began. The first `held_jobs` of each tenant in `held` wait for `release`."""

    def __init__(
        self, *, held: tuple[str, ...] = (), held_jobs: int = JOBS, handler_s: float = 0.0, concurrency: int = 8
    ) -> None:
        self.times: Counter[tuple[str, int]] = Counter()
        self.order: list[str] = []
        self.release = asyncio.Event()
        self.worker = aiqueue.Worker(concurrency=concurrency)

        @self.worker.handle(Echo, result=False, retry=aiqueue.Backoff(attempts=3, first=0.02, cap=0.05))
        async def echo(job: aiqueue.Job[Echo]) -> None:
            self.times[job.tenant, job.message.n] += 1
            self.order.append(job.tenant)
            if job.tenant in held and job.message.n < held_jobs:
                await self.release.wait()
            if handler_s:
                await asyncio.sleep(handler_s)
            if job.message.n < 0 and job.attempt == 1:
                raise ValueError


@pytest.fixture(params=["file", "memory"])
async def client(request: Any, account: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiqueue.Client]:
    """Two lanes have places, three are many, and each removal pays."""
    monkeypatch.setattr(line, "LIVE_MAX", 2)
    monkeypatch.setattr(line, "FEW_LANES", 3)
    monkeypatch.setattr(line, "AHEAD", 1)
    monkeypatch.setattr(line, "LEAVING_MAX", 1)
    monkeypatch.setattr(line, "NEW_PLACES", 1)
    monkeypatch.setattr(line, "AGED_PLACES", 1)
    monkeypatch.setattr(line, "REMOVAL_PAYS", 1)
    monkeypatch.setattr(line, "ROUND_S", 0.1)
    monkeypatch.setattr(discovery, "SETTLED_S", 0.01)
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        change(client, lane_storage=request.param)
        yield client


def change(client: aiqueue.Client, **changes: Any) -> None:
    family = dataclasses.replace(client.topology.families[FAMILY], **changes)
    client.topology = dataclasses.replace(client.topology, families={**client.topology.families, FAMILY: family})


async def fill(client: aiqueue.Client, *, first: int = 0, jobs: int = JOBS, tenants: list[str] = TENANTS) -> None:
    for tenant in tenants:
        for n in range(first, first + jobs):
            await client.enqueue(Echo(n=n), tenant=tenant)


async def lanes_of(client: aiqueue.Client) -> set[str]:
    return set((await client.connection.api(f"CONSUMER.NAMES.{STREAM}"))["consumers"] or ())


async def none_left(client: aiqueue.Client) -> bool:
    return not (await client.connection.api(f"STREAM.INFO.{STREAM}"))["state"]["messages"]


async def test_lanes_take_turns_and_each_job_runs_once(client: aiqueue.Client, eventually: Eventually) -> None:
    await fill(client)
    ran, most = Ran(handler_s=0.002), 0
    async with ran.worker.running(client):

        async def done() -> bool:
            nonlocal most
            most = max(most, len(await lanes_of(client)))
            return await none_left(client)

        await eventually(done)
    assert len(ran.times) == JOBS * len(TENANTS)
    assert set(ran.times.values()) == {1}
    assert most < len(TENANTS)
    turns = sum(one != other for one, other in zip(ran.order, ran.order[1:], strict=False))
    assert turns > len(TENANTS)  # nobody was served to the end at once


async def test_until_each_lane_had_a_turn_the_server_may_owe_few_acks(
    client: aiqueue.Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line, "DEEP_S", 0.0)
    monkeypatch.setattr(line, "LATE_S", 60.0)
    unconfirmed_max, owed = line.unconfirmed_max, []

    def note(*arguments: Any, **options: Any) -> int:
        owed.append(unconfirmed_max(*arguments, **options))
        return owed[-1]

    monkeypatch.setattr(line, "unconfirmed_max", note)
    await fill(client)
    ran = Ran(handler_s=0.01, concurrency=2)  # 1.8 s in all, of several rounds
    async with ran.worker.running(client):
        await eventually(lambda: none_left(client))
    first_round = owed.index(line.OWED_MAX)
    assert first_round > 0
    assert set(owed[:first_round]) == {line.OWED_MIN}
    assert set(owed[first_round:]) == {line.OWED_MAX}


async def test_lanes_are_given_steps_by_weight_only_while_some_stand_in_line(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    ran = Ran(held=tuple(TENANTS), held_jobs=2, concurrency=2)
    async with ran.worker.running(client) as session:
        assert session.puller.step_per_weight == 0.0
        await fill(client)
        await eventually(lambda: 0.0 < session.puller.step_per_weight <= STEP_MAX)
        ran.release.set()
        await eventually(lambda: none_left(client))
        await eventually(lambda: session.puller.step_per_weight == 0.0)


async def test_two_workers_serve_all_lanes_and_each_job_once(client: aiqueue.Client, eventually: Eventually) -> None:
    await fill(client)
    one, two = Ran(handler_s=0.002), Ran(handler_s=0.002)
    async with one.worker.running(client), two.worker.running(client):
        await eventually(lambda: none_left(client))
    assert len(one.times + two.times) == JOBS * len(TENANTS)
    assert set((one.times + two.times).values()) == {1}


async def test_beside_lanes_with_long_handlers_another_tenants_job_starts_at_once(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    held = tuple(TENANTS[:6])
    await fill(client, jobs=3, tenants=list(held))
    ran = Ran(held=held, concurrency=50)
    async with ran.worker.running(client):
        await eventually(lambda: len(ran.times) == 3 * len(held))
        began = asyncio.get_running_loop().time()
        await client.enqueue(Echo(), tenant="late")
        await eventually(lambda: ran.times["late", 0] == 1)
        assert asyncio.get_running_loop().time() - began < 1.5
        ran.release.set()
        await eventually(lambda: none_left(client))
    assert set(ran.times.values()) == {1}


async def test_lanes_with_as_many_jobs_in_flight_as_may_be_take_no_place(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    change(client, max_ack_pending=1)
    await fill(client, jobs=3)
    ran = Ran(held=tuple(TENANTS), concurrency=50)
    async with ran.worker.running(client) as session:
        await eventually(lambda: session.running == len(TENANTS))
        await eventually(lambda: not session.puller.busy and not session.discovery.in_line)
        assert session.puller.asked == len(TENANTS)
        await client.enqueue(Echo(), tenant="late")
        await eventually(lambda: ran.times["late", 0] == 1)
        ran.release.set()
        await eventually(lambda: none_left(client))
    assert set(ran.times.values()) == {1}
    assert len(ran.times) == 3 * len(TENANTS) + 1


async def test_a_lane_in_line_keeps_its_consumer_while_its_jobs_run(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    await fill(client)
    ran = Ran(held=("t0",), held_jobs=2)
    async with ran.worker.running(client):
        await eventually(lambda: len(ran.times) == JOBS * len(TENANTS))
        assert "t0-normal" in await lanes_of(client)
        ran.release.set()
        await eventually(lambda: none_left(client))
    assert set(ran.times.values()) == {1}


async def test_jobs_that_are_tried_again_are_tried_as_often_as_they_failed(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    await fill(client, first=-JOBS)
    ran = Ran()
    async with ran.worker.running(client):
        await eventually(lambda: none_left(client))
    assert len(ran.times) == JOBS * len(TENANTS)
    assert set(ran.times.values()) == {2}


async def test_where_jobs_are_delivered_once_only_no_lane_stands_in_line(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    change(client, max_deliver=1)
    await fill(client, jobs=5)
    ran = Ran(held=tuple(TENANTS), concurrency=4)
    async with ran.worker.running(client) as session:
        await eventually(lambda: len(list(session.puller.lanes)) == len(TENANTS))
        assert not session.discovery.in_line
        ran.release.set()
        await eventually(lambda: none_left(client))


async def test_a_paused_lane_has_no_place_and_goes_on_when_it_is_resumed(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    await fill(client)
    await client.pause(FAMILY, tenant="t0", reason="test")
    ran = Ran()
    async with ran.worker.running(client):
        await eventually(lambda: len(ran.times) == JOBS * (len(TENANTS) - 1))
        assert "t0" not in ran.order
        await client.resume(FAMILY, tenant="t0")
        await eventually(lambda: none_left(client))
    assert set(ran.times.values()) == {1}


async def test_lanes_in_line_are_no_stalled_and_no_unserved_lanes(
    client: aiqueue.Client, eventually: Eventually, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.announcer.EVERY_S", 0.1)
    await fill(client, jobs=2)
    ran = Ran(held=tuple(TENANTS), concurrency=1)
    with caplog.at_level(logging.WARNING):
        async with ran.worker.running(client) as session:
            await eventually(lambda: bool(session.discovery.in_line.get(FAMILY)))

            async def shown() -> bool:
                return any(each.waits_in_line for each in await stats.lanes(client.connection, client.topology, FAMILY))

            await eventually(shown)
            assert session.stalled_watch.stalled_since is None
            late = await client.explain((await client.enqueue(Echo(), tenant="late")).id)
            assert late.reason in ("turn", "slots_busy", "waits_in_worker")
            assert "no worker serves" not in str(late.evidence)
            assert all(each.is_held_back for each in session.puller.lanes if each.in_line)
            ran.release.set()
            await eventually(lambda: none_left(client))
    assert not caplog.records


async def test_a_lane_whose_consumer_is_being_removed_stays_in_line_over_a_poll(
    client: aiqueue.Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, forget = LaneConsumers.remove_if_unused, discovery.LaneDiscovery._forget_empty
    polls, stayed = 0, []

    def note_poll(self: discovery.LaneDiscovery, family: Any, asked_at: float) -> None:
        nonlocal polls
        removing = [lane for lane in self._removing if self.rotation.line.get(lane) is not None]
        forget(self, family, asked_at)
        stayed.extend(self.rotation.line.get(lane) is not None for lane in removing)
        polls += 1

    async def remove_after_polls(*args: Any, **options: Any) -> bool:
        until = polls + 3
        await eventually(lambda: polls >= until)
        return await remove(*args, **options)

    monkeypatch.setattr(discovery.LaneDiscovery, "_forget_empty", note_poll)
    monkeypatch.setattr(LaneConsumers, "remove_if_unused", remove_after_polls)
    monkeypatch.setattr(discovery, "POLL_S", 0.02)
    await fill(client)
    ran = Ran(handler_s=0.02, concurrency=4)
    async with ran.worker.running(client):
        await eventually(lambda: len(stayed) > 0)
        assert all(stayed)
