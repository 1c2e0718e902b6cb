"""Acts on a filter that names states or a priority: they hold when a job is acted on, not only when it was found."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection
from typing import Any

import pytest

import aiqueue
from aiqueue import testing
from aiqueue.client import cancel_many, move_many
from aiqueue.errors import JobCancelled
from aiqueue.testing.server import settings_of_account

from ..support import Account, Eventually

TENANT = "acme"
LOW = "AI_AGENT_TASKS.acme-low"


class Task(aiqueue.Message, kind="task"):
    n: int = 0


@pytest.fixture
def families() -> Collection[str]:
    return ("agent.tasks",)


class Running:
    """A worker whose jobs run until they are told to end."""

    def __init__(self, concurrency: int, *, hold_s: float | None = None) -> None:
        self.runs: Counter[int] = Counter()
        self.stopped: list[int] = []
        self.release = asyncio.Event()
        self.worker = aiqueue.Worker(concurrency=concurrency)

        @self.worker.handle(Task)
        async def task(job: aiqueue.Job[Task]) -> int:
            self.runs[job.message.n] += 1
            try:
                await (self.release.wait() if hold_s is None else asyncio.sleep(hold_s))
            except asyncio.CancelledError:
                self.stopped.append(job.message.n)
                raise
            return job.message.n


async def store(client: aiqueue.Client, count: int, **options: Any) -> list[aiqueue.Handle]:
    specs = [aiqueue.JobSpec(Task(n=n), tenant=TENANT, **options) for n in range(count)]
    found = [each async for each in client.enqueue_many(specs)]
    return [each for each in found if isinstance(each, aiqueue.Handle)]


async def test_a_queued_job_that_has_started_since_the_plan_is_named_and_runs_on(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    handles = await store(client, 40)
    plan = await client.jobs.plan("cancel", state="queued")
    assert plan.count == 40
    running = Running(5)
    async with running.worker.running(client):
        await eventually(lambda: len(running.runs) == 5)
        outcome = await client.jobs.act(plan)
        assert (outcome.done + len(outcome.ended), outcome.failed) == (40, [])
        assert {why for _, why in outcome.ended} == {"it has started meanwhile, and runs on"}
        running.release.set()
        named = {job_id for job_id, _ in outcome.ended}
        for n, handle in enumerate(handles):
            if handle.id in named:
                assert await handle.result(20) == n
            else:
                with pytest.raises(JobCancelled):
                    await handle.result(20)
    assert set(running.runs) == {n for n, handle in enumerate(handles) if handle.id in named}
    assert running.stopped == []


async def test_each_queued_job_is_either_cancelled_before_its_start_or_ends_while_workers_run_them(
    client: aiqueue.Client,
) -> None:
    handles = await store(client, 1_000)
    running = Running(50, hold_s=0.02)
    async with running.worker.running(client):
        outcome = await client.jobs.act(await client.jobs.plan("cancel", state="queued"))
        assert outcome.done > 100
        assert outcome.failed == []
        ends = await asyncio.gather(*(each.result(20) for each in handles), return_exceptions=True)
    cancelled = {n for n, end in enumerate(ends) if isinstance(end, JobCancelled)}
    assert {n for n, end in enumerate(ends) if end == n} == set(range(1_000)) - cancelled
    assert len(cancelled) == outcome.done
    assert cancelled.isdisjoint(running.runs)
    assert running.stopped == []


async def test_a_parked_job_that_has_become_due_since_the_plan_is_named_and_runs_on(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    handles = await store(client, 3, delay="1h")
    plan = await client.jobs.plan("cancel", state="parked")
    running = Running(5)
    async with running.worker.running(client):
        assert (await client.jobs.act(await client.jobs.plan("run_now"))).done == 3
        await eventually(lambda: len(running.runs) == 3)
        outcome = await client.jobs.act(plan)
        assert (outcome.done, len(outcome.ended), outcome.failed) == (0, 3, [])
        running.release.set()
        assert [await each.result(20) for each in handles] == [0, 1, 2]


async def test_a_running_job_that_waits_for_its_next_attempt_since_the_plan_is_named(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    worker, fails = aiqueue.Worker(), asyncio.Event()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=2, first="1h", cap="1h"))
    async def task(job: aiqueue.Job[Task]) -> None:
        await fails.wait()
        raise ValueError("not yet")

    async def states() -> list[str]:
        return [each.state async for each in client.jobs.list()]

    (handle,) = await store(client, 1)
    async with worker.running(client):
        await eventually(lambda: _equals(states(), ["in_flight"]))
        plan = await client.jobs.plan("cancel", state="in_flight")
        fails.set()
        await eventually(lambda: _equals(states(), ["retrying"]))
        outcome = await client.jobs.act(plan)
        assert (plan.count, outcome.done, [job_id for job_id, _ in outcome.ended]) == (1, 0, [handle.id])
        assert await states() == ["retrying"]

        parked = await client.jobs.plan("run_now", state="retrying")
        assert (await client.jobs.act(parked)).done == 1
        await eventually(lambda: _equals(states(), ["failed"]))


async def _equals(asked: Any, wanted: Any) -> bool:
    return bool(await asked == wanted)


async def test_a_delayed_job_that_has_failed_since_the_plan_is_not_started_once_more(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=3, first="1h", cap="1h"))
    async def task(job: aiqueue.Job[Task]) -> None:
        raise ValueError("not yet")

    async def states() -> list[str]:
        return [each.state async for each in client.jobs.list()]

    await store(client, 1, delay="1h")
    plan = await client.jobs.plan("run_now", state="parked")
    async with worker.running(client):
        assert (await client.jobs.act(await client.jobs.plan("run_now"))).done == 1
        await eventually(lambda: _equals(states(), ["retrying"]))
        outcome = await client.jobs.act(plan)
        assert (outcome.done, len(outcome.ended), outcome.failed) == (0, 1, [])
        assert await states() == ["retrying"]


async def test_a_job_that_was_moved_since_the_plan_is_not_one_of_its_former_priority(client: aiqueue.Client) -> None:
    (handle,) = await store(client, 1, priority="low")
    plan = await client.jobs.plan("cancel", priority="low")
    assert (await client.jobs.act(await client.jobs.plan("move", to="high"))).done == 1
    outcome = await client.jobs.act(plan)
    assert (outcome.done, [job_id for job_id, _ in outcome.ended]) == (0, [handle.id])
    assert [each.priority async for each in client.jobs.list()] == ["high"]


@pytest.mark.parametrize("act", ["move", "cancel"])
async def test_a_long_job_runs_once_whose_lane_was_resumed_while_it_was_taken_out(
    account: Account, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, act: Any
) -> None:
    running = Running(5)
    settings = settings_of_account(account)
    async with (
        testing.client(settings, families=["agent.tasks"], ack_wait=1) as client,
        running.worker.running(client),
    ):
        await client.enqueue(Task(n=-1), tenant=TENANT, priority="low")
        await eventually(lambda: running.runs == {-1: 1})
        until = {"pause_until": "2200-01-01T00:00:00Z"}
        await client.connection.api(f"CONSUMER.PAUSE.{LOW}", until)
        handle = await client.enqueue(Task(n=7), tenant=TENANT, priority="low")
        which = {"to": "high"} if act == "move" else {"state": "queued"}
        plan = await client.jobs.plan(act, priority="low", **which)
        module: Any = move_many if act == "move" else cancel_many
        park_copy = module.park_copy

        async def resume_and_park_copy(*args: Any) -> Any:
            await client.connection.api(f"CONSUMER.PAUSE.{LOW}", {})
            await eventually(lambda: running.runs[7] == 1)
            return await park_copy(*args)

        monkeypatch.setattr(module, "park_copy", resume_and_park_copy)
        outcome = await client.jobs.act(plan)
        assert (outcome.done, outcome.failed) == (0, [])
        assert [job_id for job_id, _ in outcome.ended] == [handle.id]
        await eventually(lambda: _was_parked_again(client, handle.id))  # its copy was due, and not stored
        running.release.set()
        assert await handle.result(20) == 7
        await eventually(lambda: _is_empty(client))
    assert running.runs == {-1: 1, 7: 1}


async def _was_parked_again(client: aiqueue.Client, job_id: str) -> bool:
    found = client.connection.read("AI_PARKED", ">")
    return max([int(each.headers.get("Aiq-Waited", "0")) async for each in found], default=0) >= 2


async def _is_empty(client: aiqueue.Client) -> bool:
    return not [each async for each in client.jobs.list()]
