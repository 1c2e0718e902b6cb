"""A long catch-up after an outage: it is left soon, its ticks have one job each, and operators can end it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

import aiqueue
from aiqueue.payload import encode_message
from aiqueue.schedules import Every, Once, ScheduleDocument, Schedules, Tick

from ..support import Account, create_streams, eventually
from .chain import Task, jobs, make_late, schedules_of, spec, ticking
from .test_policies import Small

pytestmark = pytest.mark.families("agent.tasks")
MINE = {"body": None, "owner": "billing", "misfire": "all", "bound": 400}


async def begun(client: aiqueue.Client, late_s: float = 300) -> tuple[Schedules, ScheduleDocument]:
    """A schedule of a function with 300 missed ticks, which are all to be enqueued."""
    schedules = schedules_of(client)
    added = (await schedules.add(spec("mine", Every("1s"), **MINE))).document
    return schedules, await make_late(client, added, late_s)


async def test_a_worker_that_stops_leaves_a_catch_up_soon_and_another_one_goes_on_without_a_gap(
    client: aiqueue.Client, account: Account
) -> None:
    schedules, late = await begun(client)
    making, made = asyncio.Event(), list[float]()

    async def slow(tick: Tick) -> Task:
        made.append(tick.at)
        if len(made) == 5:
            making.set()
        await asyncio.sleep(0.02)
        return Task()

    async with ticking(account, owner="billing", makers={("acme", "mine"): slow}):
        await asyncio.wait_for(making.wait(), 20)
        began = time.monotonic()
    assert time.monotonic() - began < 2
    left = await schedules.get("acme", "mine")
    assert (left.next_ms, left.fired) == (round(made[-1] * 1000) + 1000, len(made))

    async with ticking(account, owner="billing", makers={("acme", "mine"): lambda tick: Task()}):

        async def caught_up() -> None:
            assert (await schedules.get("acme", "mine")).fired >= 301

        await eventually(caught_up)
    found, first = await jobs(client), (late.next_ms or 0) / 1000
    assert found == [("mine", first + n) for n in range(len(found))]
    document = await schedules.get("acme", "mine")
    assert document.missed is not None
    assert document.misfired == 0
    assert document.missed.from_ms == late.next_ms
    counted = (document.missed.to_ms - document.missed.from_ms) // 1000 + 1
    assert (document.missed.ticks, document.missed.fired) == (counted, counted), "one misfire, whose ticks have jobs"


@pytest.mark.parametrize("what", ["pause", "remove", "skip", "recurrence"])
async def test_a_pause_a_removal_or_a_change_ends_a_catch_up(
    client: aiqueue.Client, account: Account, what: str
) -> None:
    schedules, late = await begun(client)
    making, made, began_at = asyncio.Event(), list[float](), time.time()

    async def make(tick: Tick) -> Task:
        if tick.at < began_at:  # with `skip`, the schedule goes on
            made.append(tick.at)
        making.set()
        await asyncio.sleep(0.02)
        return Task()

    async with ticking(account, owner="billing", makers={("acme", "mine"): make}) as ticker:
        await asyncio.wait_for(making.wait(), 20)
        if what == "pause":
            await schedules.pause("acme", "mine")
        elif what == "remove":
            await schedules.remove("acme", "mine")
        elif what == "skip":
            await schedules.add(spec("mine", Every("1s"), **MINE | {"misfire": "skip"}))
        else:
            await schedules.add(spec("mine", Every("1h", starting=1_800.0 + time.time() % 3_600), **MINE))

        async def ended() -> None:
            assert not any(each.tasks for each in ticker._consumers)
            assert made

        await eventually(ended)
        assert len(made) < 100
    found = await jobs(client)
    assert found[: len(made)] == [("mine", (late.next_ms or 0) / 1000 + n) for n in range(len(made))]
    if what == "remove":
        assert await schedules.list() == []
        return
    document = await schedules.get("acme", "mine")
    if what == "pause":
        assert document.next_ms == round(made[-1] * 1000) + 1000
        document = await schedules.resume("acme", "mine")
    assert (document.next_ms or 0) / 1000 > time.time() - 2, "the rest is left out"


async def test_a_tick_that_waits_for_room_is_not_missed_though_its_message_is_parked_anew(
    account: Account, streams: Path
) -> None:
    """As by a repeated `add` or the reconciler, while a worker has the tick."""
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        schedules, tick = schedules_of(client), round(time.time() + 0.3, 3)
        for _ in range(3):
            await client.enqueue(Small(), tenant="acme")
        small = spec(
            "report", Once(tick), family="small.jobs", kind="small", body=encode_message(Small()), grace_s=0.3,
            misfire="skip",
        )  # fmt: skip
        added = (await schedules.add(small)).document
        async with ticking(account):

            async def tried() -> None:
                stored = await client.connection.last("AI_TICKS", f"ai.ticks.at.-.acme.report.{added.next_ms}")
                assert stored is not None
                assert stored.headers.get("Aiq-Waited") == "1"

            await eventually(tried)
            await eventually(lambda: time.time() > tick + 0.4)
            await client.connection.api("STREAM.PURGE.SMALL")
            await schedules.ticks.unpark(added)
            await schedules.add(small)

            async def ended() -> None:
                assert (await schedules.get("acme", "report")).next_ms is None

            await eventually(ended)
        document = await schedules.get("acme", "report")
        assert (document.fired, document.misfired) == (1, 0)
        assert await jobs(client, family="small.jobs") == [("report", tick)]
        changed = await schedules.store.put(replace(document, next_ms=(added.next_ms or 0) + 1))
        assert changed.waiting_ms != changed.next_ms, "a later tick is not meant"
