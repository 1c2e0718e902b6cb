"""Ticks that wait for their turn behind others are fired late; those that waited for a worker are missed."""

from __future__ import annotations

import asyncio
import time

import pytest

import aiqueue
from aiqueue.lanes import shared_consumer
from aiqueue.schedules import Once, Tick, attendance, ticker
from aiqueue.schedules.attendance import BREAK_S, NOTE_S, Attendance

from ..support import Account, eventually
from .chain import Task, jobs, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in a tenth of the time."""
    for name, value in {"LATE_S": 0.1, "NOTE_S": 0.05, "BREAK_S": 0.9}.items():
        monkeypatch.setattr(attendance, name, value)
    monkeypatch.setattr(ticker, "EXTEND_S", 0.05)


@pytest.mark.usefixtures("quick")
async def test_ticks_that_wait_for_their_turn_longer_than_the_grace_are_not_missed(
    client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As more than 10,000 of one second do. Some are fired by a second worker, which came too late for them."""
    monkeypatch.setattr(attendance, "BREAK_S", 2.5)  # a busy machine may stand still for a second
    monkeypatch.setattr(ticker, "HELD_MAX", 1)
    monkeypatch.setattr(shared_consumer, "STANDING_MAX", 2)
    schedules, tick, count = schedules_of(client), round(time.time() + 1.0, 3), 26
    for n in range(count):
        await schedules.add(spec(f"s{n}", Once(tick), body=None, owner="billing", misfire="skip", grace_s=2.6))
    late = list[float]()

    async def make(tick: Tick) -> Task:
        late.append(time.time() - tick.at)
        await asyncio.sleep(0.45 if late[-1] < 2.9 else 0.0)
        return Task()

    makers = {("acme", f"s{n}"): make for n in range(count)}
    async with ticking(account, owner="billing", makers=makers) as first:
        await eventually(lambda: time.time() > tick + 2.8)
        async with ticking(account, owner="billing", makers=makers):
            await asyncio.gather(*(each.stop() for each in first._consumers))

            async def fired() -> None:
                assert all(each.next_ms is None for each in await schedules.list())

            await eventually(fired)
    assert max(late) > 2.6, "some waited for longer than the grace"
    assert len(await jobs(client)) == count
    assert not any(each.misfired for each in await schedules.list())


@pytest.mark.usefixtures("quick")
async def test_ticks_that_were_due_in_time_while_no_worker_was_there_are_missed(
    client: aiqueue.Client, account: Account
) -> None:
    schedules, tick = schedules_of(client), round(time.time() + 0.4, 3)
    for n in range(5):
        await schedules.add(spec(f"s{n}", Once(tick), misfire="skip", grace_s=1.0))
    await eventually(lambda: time.time() > tick + 1.1)
    info = await client.connection.api("STREAM.INFO.AI_TICKS", {"subjects_filter": "ai.ticks.due.>"})
    assert len(info["state"]["subjects"]) == 5
    async with ticking(account):

        async def ended() -> None:
            assert [each.misfired for each in await schedules.list()] == [1] * 5

        await eventually(ended)
    assert await jobs(client) == []


class Clock:
    """A time that goes on by hand."""

    at = 1_000.0

    def now(self) -> float:
        return self.at


async def test_workers_know_of_each_other_since_when_ticks_are_taken(client: aiqueue.Client) -> None:
    one, other = (Attendance(client.connection, client.topology) for _ in range(2))
    one._clock = other._clock = clock = Clock()  # type: ignore[assignment]
    assert await one.since("-") == 1_000.0
    clock.at += NOTE_S + 0.5
    assert await other.since("-") == 1_000.0, "the other worker was there before"
    for _ in range(3):
        clock.at += BREAK_S - 0.5
        assert await other.since("-") == 1_000.0
    clock.at += NOTE_S / 2
    assert await one.since("-") == 1_000.0, "it was there meanwhile"
    assert await one.since("billing") == clock.at, "an owner's workers are others"
    clock.at += BREAK_S + 0.5
    since = await asyncio.gather(one.since("-"), other.since("-"))
    assert since == [clock.at, clock.at], "nobody was there"
    assert await schedules_of(client).list() == []


async def test_what_workers_have_noted_before_the_servers_clock_was_set_back_counts_for_nothing(
    client: aiqueue.Client,
) -> None:
    """Ticks that wait for their turn counted as missed until the clock had caught up."""
    one, other = (Attendance(client.connection, client.topology) for _ in range(2))
    one._clock = other._clock = clock = Clock()  # type: ignore[assignment]
    assert await one.since("-") == 1_000.0
    clock.at -= 600
    assert await one.since("-") == 400.0
    clock.at += NOTE_S + 0.5
    assert await other.since("-") == 400.0
