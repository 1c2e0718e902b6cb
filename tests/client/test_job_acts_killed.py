"""Acts on a filter whose process is killed amid them: no job is lost, and none runs twice."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import testing
from aiqueue.enqueue import ParkedCopy, park_copy
from aiqueue.errors import JobCancelled, JobFailed, ResultTimeout
from aiqueue.subjects import Lane
from aiqueue.testing.server import settings_of_account

from .. import forks
from ..support import Account, Eventually

TENANT = "acme"
JOBS = 600
SHORT_LEASE: dict[str, Any] = {"agent.tasks": {"consumer": {"ack_wait": "2s"}}}


class Task(aiqueue.Message, kind="task"):
    n: int = 0


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    settings = settings_of_account(account).with_arguments(overlay=SHORT_LEASE)
    async with testing.client(settings, families=["agent.tasks"]) as client:
        yield client


@pytest.fixture
def start(account: Account, tmp_path: Path) -> Callable[..., forks.Program]:
    """Start `aiqueue jobs` as a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AIQUEUE_", "NATS_"))}
    ours = {"URL": account.url, "USER": account.user, "PASSWORD": account.password, "FAMILIES": "agent.tasks"}
    overlay = "'agent.tasks'.consumer.ack_wait = '2s'"
    environment = {**kept, **{f"AIQUEUE_{name}": value for name, value in ours.items()}, "AIQUEUE_OVERLAY": overlay}

    def run(*arguments: str) -> forks.Program:
        with (tmp_path / "out").open("a") as out:
            return forks.start("aiqueue", "jobs", *arguments, cwd=tmp_path, env=environment, stdout=out, stderr=out)

    return run


async def store(client: aiqueue.Client, **options: Any) -> list[aiqueue.Handle]:
    specs = [aiqueue.JobSpec(Task(n=n), tenant=TENANT, **options) for n in range(JOBS)]
    found = [each async for each in client.enqueue_many(specs)]
    return [each for each in found if isinstance(each, aiqueue.Handle)]


async def count(client: aiqueue.Client, stream: str) -> int:
    info = await client.connection.api(f"STREAM.INFO.{stream}")
    return int(info["state"]["messages"])


async def kill_amid(process: forks.Program, is_amid: Callable[[], Awaitable[bool]]) -> bool:
    """Kill a process once it is amid its work. Return False if it has ended before."""
    while process.poll() is None and not await is_amid():
        await asyncio.sleep(0.002)
    amid = process.poll() is None
    process.kill()
    await asyncio.to_thread(process.wait, 30)
    return amid


async def end(process: forks.Program) -> None:
    assert await asyncio.to_thread(process.wait, 90) == 0


async def park_copy_of(client: aiqueue.Client, handle: aiqueue.Handle, to: str) -> ParkedCopy:
    """Leave behind what an act leaves that is killed before it has deleted the job in its lane."""
    found = [each async for each in client.connection.read("AI_AGENT_TASKS", "ai.>")]
    stored = next(each for each in found if each.headers["Aiq-Job-Id"] == handle.id)
    family, lane = client.topology.family("agent.tasks"), Lane("agent.tasks", TENANT, to)
    await client.connection.clock.ensure("AI_PARKED")
    return await park_copy(client.connection, client.parking, family, lane, handle.id, stored)


@contextlib.asynccontextmanager
async def forwarding(client: aiqueue.Client) -> AsyncIterator[None]:
    """Run a worker that forwards parked jobs of all tenants, and runs none of them."""
    worker = aiqueue.Worker(tenants=["somebody-else"])

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None: ...

    async with worker.running(client):
        yield


@contextlib.asynccontextmanager
async def working(client: aiqueue.Client, runs: Counter[int], hold_s: float = 0.01) -> AsyncIterator[None]:
    worker = aiqueue.Worker(concurrency=20)

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> int:
        runs[job.message.n] += 1
        await asyncio.sleep(hold_s)
        return job.message.n

    async with worker.running(client):
        yield


async def test_a_mover_that_is_killed_loses_no_job_and_none_runs_twice(
    client: aiqueue.Client, start: Callable[..., forks.Program], eventually: Eventually
) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client, priority="low")
    process = start("move", "high", "--tenant", TENANT, "--yes")

    async def is_amid() -> bool:
        return await count(client, "AI_PARKED") > 0

    assert await kill_amid(process, is_amid)
    async with working(client, runs):
        await end(start("move", "high", "--tenant", TENANT, "--yes"))
        assert await asyncio.gather(*(each.result(60) for each in handles)) == list(range(JOBS))

        async def nothing_is_left() -> None:
            assert (await count(client, "AI_PARKED"), await count(client, "AI_AGENT_TASKS")) == (0, 0)

        await eventually(nothing_is_left)
    assert Counter(runs.values()) == {1: JOBS}


async def test_a_canceller_that_is_killed_leaves_each_job_cancelled_or_done_and_never_both(
    client: aiqueue.Client, start: Callable[..., forks.Program], eventually: Eventually
) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client)
    process = start("cancel", "--tenant", TENANT, "--yes")

    async def is_amid() -> bool:
        return await count(client, "AI_RESULTS") > 50

    assert await kill_amid(process, is_amid)
    async with working(client, runs):
        results = await asyncio.gather(*(each.result(60) for each in handles), return_exceptions=True)

        async def nothing_is_left() -> None:
            assert (await count(client, "AI_PARKED"), await count(client, "AI_AGENT_TASKS")) == (0, 0)

        await eventually(nothing_is_left)
    done = [each for each in results if isinstance(each, int)]
    cancelled = [each for each in results if isinstance(each, JobCancelled)]
    assert [each for each in results if not isinstance(each, int | JobCancelled)] == []
    assert len(cancelled) >= 50
    assert runs == Counter(done)


async def test_a_process_that_is_killed_as_it_makes_jobs_due_has_each_run_once(
    client: aiqueue.Client, start: Callable[..., forks.Program]
) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client, delay="1h")
    process = start("run-now", "--tenant", TENANT, "--yes")

    async def is_amid() -> bool:
        return await count(client, "AI_AGENT_TASKS") > 0 or bool(runs)

    async with working(client, runs):
        await kill_amid(process, is_amid)
        await end(start("run-now", "--tenant", TENANT, "--yes"))
        assert await asyncio.gather(*(each.result(60) for each in handles)) == list(range(JOBS))
    assert Counter(runs.values()) == {1: JOBS}


async def test_a_process_that_is_killed_as_it_replays_has_each_job_run_once_more(
    client: aiqueue.Client, start: Callable[..., forks.Program]
) -> None:
    runs: Counter[int] = Counter()
    failing = aiqueue.Worker(concurrency=50)

    @failing.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> None:
        raise aiqueue.Reject("broken")

    handles = await store(client)
    async with failing.running(client):
        failed = await asyncio.gather(*(each.result(60) for each in handles), return_exceptions=True)
        assert all(isinstance(each, JobFailed) for each in failed)
    process = start("replay", "--tenant", TENANT, "--yes")

    async def is_amid() -> bool:
        return await count(client, "AI_DEAD") < JOBS

    assert await kill_amid(process, is_amid)
    async with working(client, runs):
        await end(start("replay", "--tenant", TENANT, "--yes"))
        again = [await client.job(each.id, family="agent.tasks", tenant=TENANT) for each in handles]
        assert await asyncio.gather(*(each.result(60) for each in again)) == list(range(JOBS))
    assert Counter(runs.values()) == {1: JOBS}
    assert await count(client, "AI_DEAD") == 0


async def test_the_copy_of_a_job_that_is_still_in_its_lane_waits_until_it_has_run(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    runs: Counter[int] = Counter()
    handle = await client.enqueue(Task(n=3), tenant=TENANT)
    await park_copy_of(client, handle, "low")
    async with forwarding(client):  # the forwarder takes the copy, which is due after 2 s

        async def waits_for_the_original() -> None:
            parked = await client.connection.last("AI_PARKED", "ai.parked.at.>")
            assert parked is not None
            assert int(parked.headers.get("Aiq-Waited", "0")) >= 1

        await eventually(waits_for_the_original)
    async with working(client, runs):
        assert await handle.result(20) == 3

        async def nothing_is_left() -> None:
            assert (await count(client, "AI_PARKED"), await count(client, "AI_AGENT_TASKS")) == (0, 0)

        await eventually(nothing_is_left)
    assert runs == {3: 1}


async def test_an_act_that_goes_on_cancels_the_job_that_the_killed_one_has_left_in_its_lane(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    runs: Counter[int] = Counter()
    handle = await client.enqueue(Task(n=3), tenant=TENANT)
    await park_copy_of(client, handle, "normal")
    plan = await client.jobs.plan("cancel")
    outcome = await client.jobs.act(plan)
    assert (plan.count, outcome.done) == (1, 1)
    assert (await count(client, "AI_PARKED"), await count(client, "AI_AGENT_TASKS")) == (0, 0)
    async with working(client, runs):
        later = await client.enqueue(Task(n=4), tenant=TENANT)
        assert await later.result(20) == 4
    with pytest.raises(JobCancelled):
        await handle.result(5)
    assert runs == {4: 1}


@pytest.mark.parametrize("times", [1, 2])
async def test_an_act_that_goes_on_moves_a_job_once_whatever_killed_ones_have_left(
    client: aiqueue.Client, eventually: Eventually, times: int
) -> None:
    runs: Counter[int] = Counter()
    handles = [await client.enqueue(Task(n=n), tenant=TENANT, priority="low") for n in range(10)]
    for handle in handles * times:
        await park_copy_of(client, handle, "high")
    outcome = await client.jobs.act(await client.jobs.plan("move", to="high"))
    assert (outcome.done, await count(client, "AI_PARKED"), await count(client, "AI_AGENT_TASKS")) == (10, 0, 10)
    async with working(client, runs, hold_s=4):  # longer than a lease, after which copies come
        assert await asyncio.gather(*(each.result(60) for each in handles)) == list(range(10))
    assert runs == dict.fromkeys(range(10), 1)


async def test_of_two_copies_of_a_job_its_new_lane_takes_one(client: aiqueue.Client, eventually: Eventually) -> None:
    handle = await client.enqueue(Task(n=3), tenant=TENANT, priority="low")
    await park_copy_of(client, handle, "high")
    await park_copy_of(client, handle, "normal")
    await client.connection.delete("AI_AGENT_TASKS", 1)
    async with forwarding(client):

        async def copies_have_come() -> None:
            assert (await count(client, "AI_PARKED"), await count(client, "AI_AGENT_TASKS")) == (0, 1)

        await eventually(copies_have_come)


async def test_a_job_whose_mover_was_killed_is_not_gone_for_its_handle(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    runs: Counter[int] = Counter()
    handle = await client.enqueue(Task(n=3), tenant=TENANT, priority="low")
    await park_copy_of(client, handle, "high")
    await client.connection.delete("AI_AGENT_TASKS", 1)
    with pytest.raises(ResultTimeout):  # while the copy is parked for another lane
        await handle.result(1)
    async with forwarding(client):

        async def is_in_its_new_lane() -> None:
            assert (await count(client, "AI_PARKED"), await count(client, "AI_AGENT_TASKS")) == (0, 1)

        await eventually(is_in_its_new_lane)
        with pytest.raises(ResultTimeout):  # while it waits there
            await handle.result(1)
    async with working(client, runs):
        assert await handle.result(20) == 3
    assert runs == {3: 1}


async def test_a_job_whose_mover_was_killed_is_cancelled_by_its_handle(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Task(n=3), tenant=TENANT, priority="low")
    await park_copy_of(client, handle, "high")
    await client.connection.delete("AI_AGENT_TASKS", 1)
    assert await handle.cancel()
    assert await count(client, "AI_PARKED") == 0
