"""What is said of a schedule's jobs; and doctor: a broken chain, a zone that is unknown, ticks that no worker takes."""

from __future__ import annotations

from dataclasses import replace

import aiqueue
from aiqueue import Cron, Every
from aiqueue.inspect import Finding, Subject, stats
from aiqueue.inspect.schedule_checks import check_schedules

from ..schedules.chain import Task, schedules_of, spec, ticking
from ..support import Eventually


async def found(client: aiqueue.Client) -> dict[str, Finding]:
    """What the check says, by code; "" for what is in order."""
    return {each.code: each async for each in check_schedules(Subject(client.connection, client.topology))}


async def test_without_schedules_there_is_nothing_to_say(client: aiqueue.Client) -> None:
    assert await found(client) == {}


async def test_with_a_worker_all_is_in_order(client: aiqueue.Client, eventually: Eventually) -> None:
    await client.schedules.add("report", Every("1h"), Task(), tenant="acme")
    async with ticking(None, client):

        async def is_in_order() -> bool:
            return list(await found(client)) == [""]

        await eventually(is_in_order)


async def test_a_job_names_its_schedule_and_tick_while_it_waits_and_when_it_has_ended(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    schedules, worker = schedules_of(client), aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> None:
        if job.schedule == "bad":
            raise ValueError("bad")

    await schedules.add(spec("good"))
    await schedules.add(spec("bad"))
    asked = {each: await schedules.run_now("acme", each) for each in ("good", "bad")}

    async def states(*expected: str) -> None:
        found = [await stats.job(client.connection, client.topology, each.job_id) for each in asked.values()]
        assert tuple(each.state for each in found) == expected
        for (schedule, job), each in zip(asked.items(), found, strict=True):
            assert (each.schedule, each.scheduled_for) == (schedule, job.tick_ms / 1000)

    await states("queued", "queued")
    async with worker.running(client):
        await eventually(lambda: states("done", "failed"))
    other = await client.enqueue(Task(), tenant="acme")
    found = await stats.job(client.connection, client.topology, other.id)
    assert (found.schedule, found.scheduled_for) == ("", None)


async def test_without_a_worker_nobody_takes_ticks(client: aiqueue.Client) -> None:
    await client.schedules.add("report", Every("1h"), Task(), tenant="acme")
    said = await found(client)
    assert list(said) == ["", "schedule-unserved"]
    assert said["schedule-unserved"].level == "fail"
    assert said["schedule-unserved"].text == "no worker takes the ticks of 1 schedule"


async def test_a_missing_tick_is_a_broken_chain_which_resume_mends(client: aiqueue.Client) -> None:
    added = await client.schedules.add("report", Every("1h"), Task(), tenant="acme")
    await client.schedules.engine.ticks.unpark(added.document)
    broken = (await found(client))["schedule-chain"]
    assert "acme.report is neither parked nor due" in broken.text
    assert "`aiqueue schedule resume report --tenant acme`" in broken.remedy
    await client.schedules.resume("report", tenant="acme")
    assert "schedule-chain" not in await found(client)


async def test_a_paused_schedule_needs_no_tick_and_no_worker(client: aiqueue.Client) -> None:
    added = await client.schedules.add("report", Every("1h"), Task(), tenant="acme")
    await client.schedules.pause("report", tenant="acme")
    await client.schedules.engine.ticks.unpark(added.document)
    assert list(await found(client)) == [""]


async def test_a_zone_that_this_host_lacks_is_named(client: aiqueue.Client) -> None:
    added = await client.schedules.add("report", Cron("@daily", tz="Europe/Berlin"), Task(), tenant="acme")
    recurrence = {**added.document.recurrence_document, "tz": "Mars/Olympus"}
    await client.schedules.engine.store.put(replace(added.document, recurrence_document=recurrence))
    said = (await found(client))["schedule-zone"]
    assert "acme.report: tz: this host has no time zone 'Mars/Olympus'" in said.text
    assert "tzdata" in said.remedy


async def test_an_owner_without_a_worker_is_named(client: aiqueue.Client) -> None:
    await client.schedules.engine.add(spec("bill", body=None, owner="billing"))
    said = (await found(client))["schedule-owner"]
    assert said.text == "no worker of owner billing runs, which makes the messages of 1 schedule"


async def test_a_damaged_document_is_told(client: aiqueue.Client) -> None:
    store = client.schedules.engine.store
    await store.write(store.key("acme", "damaged"), 0, b"no CBOR", {}, 5)
    said = await found(client)
    assert "`aiqueue schedule rm damaged --tenant acme`" in said["schedule-unreadable"].remedy
