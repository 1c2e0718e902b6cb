"""Each tick has one job, however many workers there are, and wherever they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from typing import Any

import pytest

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.errors import NotFound, Unavailable
from aiqueue.schedules import Every, Once, ScheduleDocument, Tick, tick_job_id
from aiqueue.schedules.jobs import TickJobs
from aiqueue.schedules.ticker import ACK_WAIT_S

from ..connection.test_permissions import two, users
from ..support import Account, create_streams, eventually
from .chain import BODY, FAMILY, Task, hourly, jobs, make_late, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")


async def test_of_several_workers_one_enqueues_each_tick(client: aiqueue.Client, account: Account) -> None:
    schedules, now = schedules_of(client), time.time()
    names = [f"s{n}" for n in range(8)]
    for n, each in enumerate(names):
        await schedules.add(spec(each, Every("1s", starting=now + n * 0.07)))
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(ticking(account))

        async def twice() -> None:
            assert all(each.fired >= 2 for each in await schedules.list())

        await eventually(twice)
    found = await jobs(client)
    assert len(found) == len(set(found)), "a tick has two jobs"
    for document in await schedules.list():
        ticks = [tick for schedule, tick in found if schedule == document.id]
        assert len(ticks) == document.fired
        assert ticks == [ticks[0] + n for n in range(len(ticks))], "a tick is missing"
        assert document.last is not None
        assert document.last.tick_ms == round(ticks[-1] * 1000)


async def test_a_handler_knows_its_schedule_and_tick_also_after_a_retry_and_a_replay(client: aiqueue.Client) -> None:
    schedules, seen = schedules_of(client), []
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=2, first="5ms"))
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append((job.id, job.schedule, job.scheduled_for))
        if len(seen) <= 2:
            raise ValueError("again")

    tick = round(time.time() + 0.4, 3)
    await schedules.add(spec("report", Once(tick)))
    async with worker.running(client):
        await eventually(lambda: len(seen) == 2)

        async def replayed() -> None:
            letters = [each async for each in client.dead.find()]
            assert len(letters) == 1
            await client.dead.replay(letters[0])

        await eventually(replayed)
        await eventually(lambda: len(seen) == 3)
    assert len(set(seen)) == 1
    assert seen[0][1:] == ("report", tick)


async def test_a_job_without_a_schedule_says_so(client: aiqueue.Client) -> None:
    worker, seen = aiqueue.Worker(), []

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append((job.schedule, job.scheduled_for))

    async with worker.running(client):
        await (await client.enqueue(Task(), tenant="acme")).result(timeout=20)
    assert seen == [(None, None)]


async def test_an_owners_function_makes_the_message_of_each_tick(client: aiqueue.Client, account: Account) -> None:
    """And only its workers take such ticks."""
    schedules = schedules_of(client)
    tick = round(time.time() + 0.3, 3)
    await schedules.add(spec("mine", Once(tick), body=None, owner="billing"))

    async def make(tick: Tick) -> Task:
        return Task(n=round(tick.at))

    async with ticking(account), ticking(account, owner="billing", makers={("acme", "mine"): make}):

        async def stored() -> None:
            assert await jobs(client) == [("mine", tick)]

        await eventually(stored)
    message = await client.connection.last("AI_AGENT_TASKS", "ai.agent.tasks.acme.normal")
    assert message is not None
    assert codec.decode(message.data) == {"n": round(tick)}


async def test_a_function_that_fails_costs_one_tick_and_says_why_until_a_later_one_has_a_job(
    client: aiqueue.Client, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    schedules = schedules_of(client)
    added = (await schedules.add(spec("mine", hourly(), body=None, owner="billing"))).document
    late = await make_late(client, added, 0, grace_s=7200.0)

    missing = ["today", "the first of two"]

    def make(tick: Tick) -> Task:
        if missing:
            raise ZeroDivisionError(f"no rate for {missing.pop(0)}")
        return Task()

    async with ticking(account, owner="billing", makers={("acme", "mine"): make}):

        async def failed() -> None:
            document = await schedules.get("acme", "mine")
            assert (document.failed, document.error) == (1, "ZeroDivisionError: no rate for today")
            assert document.next_ms == (late.next_ms or 0) + 3_600_000

        await eventually(failed)
        assert await jobs(client) == []
        await make_late(client, await schedules.get("acme", "mine"), 3_600, misfire="all", grace_s=1.0)

        async def fired() -> None:
            document = await schedules.get("acme", "mine")
            assert (document.failed, document.error) == (2, ""), "a later tick has a job"
            assert document.fired

        await eventually(fired)


POINTS = ["before the job", "after the job", "after the document", "after the next tick"]
VICTIMS = textwrap.dedent("""
    import asyncio, os, signal, sys
    import aiqueue
    from aiqueue.schedules import Ticker
    from aiqueue.schedules.jobs import TickJobs
    from aiqueue.schedules.store import ScheduleStore
    from aiqueue.schedules.ticks import Ticks

    url, user, password, *points = sys.argv[1:]
    AFTER = {
        "before the job": (TickJobs, "make"), "after the job": (TickJobs, "store"),
        "after the document": (ScheduleStore, "put"), "after the next tick": (Ticks, "park"),
    }

    class Task(aiqueue.Message, kind="task"):
        n: int = 0

    def die_after(kind, name):
        called = getattr(kind, name)
        async def call(*args, **more):
            await called(*args, **more)
            os.kill(os.getpid(), signal.SIGKILL)
        setattr(kind, name, call)

    async def main(owner):
        async with aiqueue.connect(url, user=user, password=password) as client:
            makers = {("acme", owner): lambda tick: Task(n=1)}
            await Ticker(client.connection, client.topology, owner=owner, makers=makers).start()
            os.write(1, b"ready\\n")  # one write, of several processes
            await asyncio.sleep(60)

    for n, point in enumerate(points):
        if not os.fork():
            die_after(*AFTER[point])
            asyncio.run(main(f"owner{n}"))
    for _ in points:
        os.write(1, b"%d\\n" % os.wait()[1])
""")


async def test_a_worker_killed_between_any_two_writes_of_a_tick_costs_no_tick_and_repeats_none(
    client: aiqueue.Client, account: Account
) -> None:
    schedules, owners = schedules_of(client), [f"owner{n}" for n in range(len(POINTS))]
    words = [sys.executable, "-c", VICTIMS, account.url, account.user, account.password, *POINTS]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as victims:
        try:
            assert victims.stdout is not None
            said = [await asyncio.to_thread(victims.stdout.readline) for _ in owners]
            assert said == ["ready\n"] * len(owners)
            start = round(time.time() + 0.4, 3)
            for owner in owners:
                await schedules.add(spec(owner, Every("1s", starting=start), body=None, owner=owner))
            said = [await asyncio.to_thread(victims.stdout.readline) for _ in owners]
            assert said == ["9\n"] * len(owners), "each was killed"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(victims.pid, signal.SIGKILL)
    async with contextlib.AsyncExitStack() as stack:
        for owner in owners:
            makers: Any = {("acme", owner): lambda tick: Task(n=2)}
            await stack.enter_async_context(ticking(account, owner=owner, makers=makers))

        async def went_on() -> None:
            assert all(each.fired >= 2 for each in await schedules.list())

        await eventually(went_on)
    found = await jobs(client)
    assert len(found) == len(set(found)), "a tick has two jobs"
    for owner in owners:
        assert [tick for schedule, tick in found if schedule == owner][:2] == [start, start + 1]


async def test_a_tick_whose_job_has_ended_is_not_enqueued_again_when_the_stream_has_forgotten_its_id(
    client: aiqueue.Client, account: Account
) -> None:
    """As after a worker's death behind the job, and a restart of the server: the journal knows."""
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", hourly()))).document
    late = await make_late(client, added, 2, grace_s=7200.0)
    job_id = tick_job_id("report", late.next_ms or 0)
    fields = {headers.MSG_ID: "x", headers.EVENT: "result", headers.RUN: "7", headers.CONTENT_TYPE: codec.CBOR}
    journal = subjects.journal(client.topology.family(FAMILY).journal or "", "acme", job_id)
    await client.connection.store(journal, codec.encode(None), fields)
    async with ticking(account):

        async def noted() -> None:
            document = await schedules.get("acme", "report")
            assert document.last is not None
            assert (document.last.job_id, document.last.seq) == (job_id, 7)

        await eventually(noted)
    assert await jobs(client) == []


async def test_a_tick_whose_job_still_waits_after_the_memory_of_ids_is_not_enqueued_again(
    client: aiqueue.Client, account: Account
) -> None:
    """All workers died behind the job, and come back after more than the 10 minutes of the duplicate window."""
    schedules = schedules_of(client)
    added = (await schedules.add(spec("report", hourly()))).document
    late = await make_late(client, added, 700, grace_s=7 * 86_400.0)
    job_id = tick_job_id("report", late.next_ms or 0)
    fields = {
        headers.MSG_ID: "forgotten",
        headers.JOB_ID: job_id,
        headers.KIND: "task",
        headers.SCHEDULED_BY: "report",
        headers.SCHEDULED_FOR: str((late.next_ms or 0) / 1000),
    }
    await client.connection.store("ai.agent.tasks.acme", BODY, fields)
    async with ticking(account):

        async def noted() -> None:
            document = await schedules.get("acme", "report")
            assert document.last is not None
            assert document.last.job_id == job_id

        await eventually(noted)
    assert len(await jobs(client)) == 1


async def test_the_jobs_since_a_long_outage_are_read_through_once_for_all_missed_ticks(
    client: aiqueue.Client, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each of them, 10,000 missed ticks would read 50 million jobs."""
    schedules, read = schedules_of(client), []
    find_in_lanes = TickJobs.find_in_lanes

    async def find(self: TickJobs, document: ScheduleDocument, since: float) -> dict[str, int]:
        read.append(since)
        return await find_in_lanes(self, document, since)

    monkeypatch.setattr(TickJobs, "find_in_lanes", find)
    added = (await schedules.add(spec("report", Every("1m"), misfire="all"))).document
    late = await make_late(client, added, 1200)
    async with ticking(account):

        async def went_on() -> None:
            assert (await schedules.get("acme", "report")).fired >= 20

        await eventually(went_on)
    assert read == [(late.next_ms or 0) / 1000]


async def test_the_chain_goes_on_after_the_server_was_killed(own_server: Any) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        schedules = schedules_of(client)
        start = round(time.time(), 3)
        await schedules.add(spec("report", Every("1s", starting=start)))
        async with ticking(None, client), ticking(None, client):

            async def fired(count: int) -> bool:
                with contextlib.suppress(Unavailable):
                    return (await schedules.get("acme", "report")).fired >= count
                return False

            await eventually(lambda: fired(1))
            server.kill()
            server.start()
            await eventually(lambda: fired(4))
        ticks = [tick for _, tick in await jobs(client)]
        assert len(ticks) == len(set(ticks))
        assert sorted(ticks) == [min(ticks) + n for n in range(len(ticks))]


async def test_a_worker_that_stops_gives_the_ticks_that_it_holds_to_others_at_once(
    client: aiqueue.Client, account: Account
) -> None:
    schedules = schedules_of(client)
    async with ticking(account):
        async with ticking(account) as stopped:
            tick = round(time.time() + 0.7, 3)
            for n in range(6):
                await schedules.add(spec(f"s{n}", Once(tick)))

            async def holds() -> None:
                assert any(each.tasks for each in stopped._consumers)

            await eventually(holds)

        async def all_there() -> None:
            assert len(await jobs(client)) == 6

        await eventually(all_there)
    assert time.time() - tick < ACK_WAIT_S - 0.4, "they had to wait for the end of a lease"


async def test_a_worker_that_stops_leaves_the_ticks_behind_the_one_that_it_fires_to_others(
    client: aiqueue.Client, account: Account
) -> None:
    """Else a schedule whose function takes longer than its interval would keep a worker from stopping."""
    schedules = schedules_of(client)
    added = (await schedules.add(spec("mine", Every("1s"), body=None, owner="billing", grace_s=3600.0))).document
    await make_late(client, added, 60)
    making = asyncio.Event()

    async def make(tick: Tick) -> Task:
        making.set()
        await asyncio.sleep(0.05)
        return Task()

    async with ticking(account, owner="billing", makers={("acme", "mine"): make}):
        await asyncio.wait_for(making.wait(), 20)
    left = await schedules.get("acme", "mine")
    assert left.fired == 1
    assert await schedules.ticks.has(left), "the next one is there for others"


@pytest.mark.parametrize("skew_s", [-3600, 3600])
async def test_a_worker_whose_clock_is_an_hour_off_fires_in_time(client: aiqueue.Client, skew_s: int) -> None:
    client.connection.clock._wall = lambda: time.time() + skew_s
    await client.connection.clock.ensure("KV_AI_SCHEDULES")
    schedules, tick = schedules_of(client), round(time.time() + 0.5, 3)
    await schedules.add(spec("report", Once(tick)))
    async with ticking(None, client):

        async def in_time() -> None:
            stored = await client.connection.last("AI_AGENT_TASKS", "ai.agent.tasks.acme.normal")
            assert stored is not None
            assert -0.1 < stored.time - tick < 0.5

        await eventually(in_time)


async def test_a_worker_without_the_rights_serves_jobs_and_says_once_that_it_fires_no_schedules(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async with two(own_server(users(publish=["$JS.API.CONSUMER.CREATE.AI_TICKS.>"]))) as (every, less):
        worker = aiqueue.Worker()

        @worker.handle(Task)
        async def task(job: aiqueue.Job[Task]) -> str:
            return "done"

        async with worker.running(less):
            assert await (await every.enqueue(Task(), tenant="acme")).result(timeout=20) == "done"

            async def said() -> None:
                said = [each for each in caplog.messages if "fires no schedules" in each]
                assert len(said) == 1

            await eventually(said)
        tick = round(time.time() + 0.4, 3)
        await schedules_of(every).add(spec("report", Once(tick)))
        async with ticking(None, every):

            async def stored() -> None:
                assert await jobs(every) == [("report", tick)]

            await eventually(stored)


async def test_a_worker_that_may_not_write_schedules_enqueues_none_of_their_jobs(
    own_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """As with the permissions of a former version. It would store the job of one tick again and again."""
    async with two(own_server(users(publish=["$KV.AI_SCHEDULES.>"]))) as (every, less):
        tick = round(time.time() + 0.3, 3)
        async with ticking(None, less):
            await schedules_of(every).add(spec("report", Once(tick)))

            async def said() -> None:
                assert "schedule acme.report: this worker cannot fire it: " in caplog.text

            await eventually(said)
            assert await jobs(every) == []
            async with ticking(None, every):

                async def stored() -> None:
                    assert await jobs(every) == [("report", tick)]

                await eventually(stored)


@pytest.mark.parametrize("is_measured", [True, False])
async def test_a_worker_whose_measured_clock_is_behind_fires_in_time_and_parks_no_tick_again(
    client: aiqueue.Client, is_measured: bool
) -> None:
    """As behind a pause of its host, or of a user who may not ask for the time. A tick that comes tells the time."""
    clock, schedules = client.connection.clock, schedules_of(client)
    async with ticking(None, client) as ticker:
        await ticker.reconciler.stop()
        tick = round(time.time() + 0.6, 3)
        added = (await schedules.add(spec("report", Every("1h", starting=tick)))).document
        assert added.next_ms == round(tick * 1000)
        clock._wall = lambda: time.time() - 20.0
        clock._ahead_s -= 20.0
        if not is_measured:
            clock._measured_at = None

        async def fired() -> None:
            assert (await schedules.get("acme", "report")).fired == 1

        await eventually(fired)
        info = await client.connection.api("STREAM.INFO.AI_TICKS")
        assert info["state"]["last_seq"] == 3, "the first tick parked and due, and the next one parked"
        stored = await client.connection.last("AI_AGENT_TASKS", "ai.agent.tasks.acme.normal")
        assert stored is not None
        assert -0.01 < stored.time - tick < 0.3


async def test_a_server_without_the_streams_of_schedules_has_workers_that_do_not_mention_them(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for stream in ("AI_TICKS", "KV_AI_SCHEDULES"):
        await client.connection.api(f"STREAM.DELETE.{stream}")
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> str:
        return "done"

    async with worker.running(client):
        assert await (await client.enqueue(Task(), tenant="acme")).result(timeout=20) == "done"
    assert not [each for each in caplog.messages if "schedule" in each.lower() or "TICKS" in each]
    with pytest.raises(NotFound, match="run `aiqueue apply` first"):
        await schedules_of(client).add(spec())
