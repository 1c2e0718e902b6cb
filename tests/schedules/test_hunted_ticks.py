"""Ticks whose worker stands still, or that come again long after, have no second job."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.schedules import Every, Once, ScheduleDocument, Tick, Ticker, firing, tick_job_id
from aiqueue.schedules.jobs import TickJobs

from ..support import Account, eventually
from .chain import FAMILY, Task, hourly, jobs, make_late, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")


async def forget_ids_soon(client: aiqueue.Client) -> None:
    """As a stream does after 10 minutes."""
    config = (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["config"]
    await client.connection.api("STREAM.UPDATE.AI_AGENT_TASKS", {**config, "duplicate_window": 100_000_000})


async def end_job(client: aiqueue.Client, document: ScheduleDocument, job_id: str) -> None:
    fields = {headers.MSG_ID: "x", headers.EVENT: "result", headers.RUN: "7", headers.CONTENT_TYPE: codec.CBOR}
    journal = subjects.journal(client.topology.family(FAMILY).journal or "", document.tenant, job_id)
    await client.connection.store(journal, codec.encode(None), fields)


async def test_a_worker_that_stands_still_between_its_look_and_its_write_enqueues_no_second_job(
    client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose machine was suspended for an hour, and whose tick another worker has fired meanwhile."""
    monkeypatch.setattr(firing, "STILL_S", 0.3)
    await forget_ids_soon(client)
    schedules, calls, resumed, returned = schedules_of(client), list[Tick](), asyncio.Event(), asyncio.Event()

    async def make(tick: Tick) -> Task:
        calls.append(tick)
        if len(calls) == 1:
            await resumed.wait()
            asyncio.get_running_loop().call_later(0.2, returned.set)
        return Task()

    makers: Any = {("acme", "report"): make}
    tick = round(time.time() + 0.4, 3)
    added = (await schedules.add(spec("report", Once(tick), body=None, owner="billing"))).document
    async with ticking(account, owner="billing", makers=makers):
        await eventually(lambda: len(calls) == 1)
        await client.connection.store(  # as if the lease of the first one was over
            subjects.tick("billing", "acme", "report"), b"",
            {headers.MSG_ID: subjects.new_id(), headers.SCHEDULED_FOR: f"{tick:.3f}"},
        )  # fmt: skip

        async def fired() -> None:
            assert await jobs(client) == [("report", tick)]
            assert (await schedules.get("acme", "report")).fired == 1

        await eventually(fired)
        await end_job(client, added, tick_job_id("report", round(tick * 1000)))
        await eventually(lambda: time.time() > tick + 0.5)
        resumed.set()
        await returned.wait()

        async def none_left() -> None:
            assert await schedules.ticks.list_subjects() == set()

        await eventually(none_left)
    assert await jobs(client) == [("report", tick)]


async def test_a_job_that_was_asked_for_and_has_ended_is_not_enqueued_again_when_its_message_comes_again(
    client: aiqueue.Client, account: Account
) -> None:
    await forget_ids_soon(client)
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", hourly(), body=None, owner="billing"))).document
    asked = await schedules.run_now("acme", "report")
    await end_job(client, added, asked.job_id)
    makers: Any = {("acme", "report"): lambda tick: Task()}
    async with ticking(account, owner="billing", makers=makers):

        async def taken() -> None:
            assert await schedules.ticks.list_subjects() == {subjects.tick("billing", "acme", "report", added.next_ms)}

        await eventually(taken)
    assert await jobs(client) == []


@pytest.mark.parametrize("is_there", [True, False], ids=["the server has it", "it was removed"])
async def test_a_tick_whose_priority_this_worker_does_not_know_has_its_job_if_the_server_has_that_priority(
    client: aiqueue.Client, account: Account, is_there: bool
) -> None:
    """As in a deployment that has added the priority: the ticks that the former workers took were lost."""
    schedules, tick = schedules_of(client), round(time.time() + 0.3, 3)
    priority = "high" if is_there else "huge"
    document = ScheduleDocument.of_spec(spec("report", Once(tick), priority=priority), time.time())
    await schedules.ticks.park(await schedules.store.put(document))
    family = replace(client.topology.family(FAMILY), priorities=("normal",))
    older = replace(client.topology, families={**client.topology.families, FAMILY: family})
    ticker = Ticker(client.connection, older)
    await ticker.start()
    try:

        async def ended() -> None:
            found = await schedules.get("acme", "report")
            assert (found.fired, found.failed) == ((1, 0) if is_there else (0, 1))
            assert found.error == (
                "" if is_there else f"BadInput: family {FAMILY} has no priority 'huge': use one of normal"
            )

        await eventually(ended)
    finally:
        await ticker.stop()
    assert await jobs(client) == ([("report", tick)] if is_there else [])


async def test_ticks_within_a_long_grace_read_the_jobs_in_their_lane_once(
    client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each read them all: behind 20,000 jobs, a schedule that fires each second did not catch up any more."""
    schedules, reads, find = schedules_of(client), list[float](), TickJobs.find_in_lanes

    async def find_and_note(jobs: TickJobs, document: ScheduleDocument, since: float) -> dict[str, int]:
        reads.append(since)
        return await find(jobs, document, since)

    monkeypatch.setattr(TickJobs, "find_in_lanes", find_and_note)
    added = (await schedules.add(spec("report", Every("1m")))).document
    late = await make_late(client, added, 900, grace_s=7200.0)
    assert late.next_ms is not None
    async with ticking(account):

        async def caught_up() -> None:
            assert (await schedules.get("acme", "report")).fired >= 15

        await eventually(caught_up)
    assert reads == [late.next_ms / 1000]
    found = await jobs(client)
    assert len(found) == len(set(found))
