"""Calls on schedules at their limits: a full bucket, times that are none, two programs at once."""

from __future__ import annotations

import functools
import time
from typing import Any

import pytest

import aiqueue
from aiqueue import Every, Once
from aiqueue.errors import BadInput, NotFound, StreamFull, TooLarge
from aiqueue.schedules import ScheduleDocument, Tick

from ..support import Account, eventually
from .chain import Task, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")


async def test_what_no_room_is_left_for_is_refused_and_the_other_schedules_fire_on(
    client: aiqueue.Client, account: Account
) -> None:
    """A bucket that is filled to the last byte refuses what ticks write, and no schedule fires any more."""
    schedules, stream = schedules_of(client), "KV_AI_SCHEDULES"
    config = (await client.connection.api(f"STREAM.INFO.{stream}"))["config"]
    await client.connection.api(f"STREAM.UPDATE.{stream}", {**config, "max_bytes": 8 * 1024})
    await schedules.add(spec("each-second", Every("1s")))
    added = 1

    async def fill() -> None:
        nonlocal added
        while True:
            await schedules.add(spec(f"s{added}", Every("100h")))
            added += 1

    with pytest.raises(StreamFull, match=r"no room is left for schedule acme\.s.*max_bytes"):
        await fill()
    assert added > 2
    with pytest.raises(StreamFull, match="no room is left"):
        await schedules.add(spec("each-second", Every("1s"), body=b"\x60" * 6_000))
    async with ticking(account):

        async def fires() -> None:
            assert (await schedules.get("acme", "each-second")).fired >= 2

        await eventually(fires)


async def test_a_change_to_what_never_fires_is_refused_and_leaves_the_schedule_as_it_was(
    client: aiqueue.Client,
) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", Every("1h")))).document
    with pytest.raises(BadInput, match="schedule report never fires: once at"):
        await schedules.add(spec("report", Once(time.time() - 60)))
    assert await schedules.get("acme", "report") == added


@pytest.mark.parametrize("start", [-1e300, -1e11, -1.0, 0.0])
async def test_a_backfill_from_before_1970_begins_there(client: aiqueue.Client, start: float) -> None:
    await schedules_of(client).add(spec("report", Every("1h")))
    found = await client.schedules.backfill("report", start, 7_300.0, tenant="acme")
    assert [each.tick_ms for each in found] == [0, 3_600_000, 7_200_000]


@pytest.mark.parametrize("what", ["changes", "removes"])
async def test_a_schedule_that_is_put_back_while_another_program_changes_or_removes_it_keeps_its_tick(
    client: aiqueue.Client, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tick is still parked then, and the other program is about to remove it from there."""
    one, another, hourly = schedules_of(client), schedules_of(client), spec("report", Every("1h"))
    await one.add(hourly)
    unpark = one.ticks.unpark

    async def unpark_late(former: ScheduleDocument) -> None:
        await another.add(hourly)
        await unpark(former)

    monkeypatch.setattr(one.ticks, "unpark", unpark_late)
    await (one.remove("acme", "report") if what == "removes" else one.add(spec("report", Every("2h", starting=1.0))))
    stored = await one.get("acme", "report")
    assert stored.recurrence == hourly.recurrence
    assert await one.ticks.has(stored), "else it does not fire before a worker has looked for missing ticks"


async def test_a_schedule_whose_tick_cannot_be_parked_for_want_of_the_stream_is_not_there(
    client: aiqueue.Client,
) -> None:
    schedules = schedules_of(client)
    await client.connection.api("STREAM.DELETE.AI_TICKS")
    with pytest.raises(NotFound, match="run `aiqueue apply`"):
        await schedules.add(spec("report", Every("1h")))
    assert await schedules.list() == []


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ({"priority": None}, BadInput, "priority must be a text, not None"),
        ({"headers": {f"h{n}": "x" * 900 for n in range(40)}}, TooLarge, "headers"),
    ],
    ids=["priority", "headers"],
)
async def test_a_schedule_whose_jobs_could_not_be_stored_is_refused(
    client: aiqueue.Client, wrong: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        await client.schedules.add("report", Every("1h"), Task(), tenant="acme", **wrong)
    assert await client.schedules.list() == []


def test_a_function_without_a_name_needs_an_id_and_says_what_it_makes() -> None:
    def report(day: str, tick: Tick) -> Task:
        return Task()

    worker, nameless = aiqueue.Worker(owner="billing"), functools.partial(report, "today")
    with pytest.raises(BadInput, match=r"the schedule of functools\.partial.* needs an id"):
        worker.schedule("1h", tenant="acme", makes=Task)(nameless)
    with pytest.raises(BadInput, match=r"does not say which message it makes.* makes=Report"):
        worker.schedule("1h", tenant="acme", id="daily")(nameless)
    worker.schedule("1h", tenant="acme", id="daily", makes=Task)(nameless)
