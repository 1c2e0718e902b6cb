"""Acts on all jobs that a filter selects: cancel, replay, purge, run now and move."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import testing
from aiqueue.client.job_plans import JobPlan
from aiqueue.errors import BadInput, JobCancelled, JobFailed
from aiqueue.testing.server import settings_of_account

from ..support import Account, Eventually

TENANT = "acme"


class Task(aiqueue.Message, kind="task"):
    n: int = 0


class Other(aiqueue.Message, kind="other"):
    n: int = 0


class Large(aiqueue.Message, kind="large"):
    text: str


@pytest.fixture
def families() -> Collection[str]:
    return ("agent.tasks",)


def counting(runs: Counter[int], *, hold_s: float = 0.0, concurrency: int = 50) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=concurrency)

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> int:
        runs[job.message.n] += 1
        await asyncio.sleep(hold_s)
        return job.message.n

    return worker


async def store(client: aiqueue.Client, count: int, **options: Any) -> list[aiqueue.Handle]:
    messages = [aiqueue.JobSpec(Task(n=n), tenant=TENANT, **options) for n in range(count)]
    found = [each async for each in client.enqueue_many(messages)]
    return [each for each in found if isinstance(each, aiqueue.Handle)]


async def stored(client: aiqueue.Client, **which: Any) -> int:
    return len([1 async for _ in client.jobs.list(**which)])


async def test_a_plan_counts_and_changes_nothing(client: aiqueue.Client) -> None:
    await store(client, 7)
    await client.enqueue(Other(), tenant=TENANT)
    searched: list[int] = []
    plan = await client.jobs.plan("cancel", kind="task", on_searched=searched.append)
    assert (plan.count, plan.searched, sum(searched)) == (7, 8, 8)
    assert plan.until.startswith("AI_PARKED.0,AI_AGENT_TASKS.8,@")
    assert await stored(client) == 8


async def test_jobs_that_wait_are_cancelled_and_later_ones_are_not_touched(client: aiqueue.Client) -> None:
    handles = await store(client, 600)
    delayed = await store(client, 40, delay="1h")
    plan = await client.jobs.plan("cancel", tenant=TENANT)
    later = await client.enqueue(Task(n=-1), tenant=TENANT)
    done: list[int] = []
    outcome = await client.jobs.act(plan, on_done=done.append)
    assert (outcome.matched, outcome.done, outcome.ended, outcome.failed) == (640, 640, [], [])
    assert sum(done) == 640
    for handle in (handles[0], handles[-1], delayed[0]):
        with pytest.raises(JobCancelled):
            await handle.result(5)
    runs: Counter[int] = Counter()
    async with counting(runs).running(client):
        await later.result(20)
    assert runs == {-1: 1}
    assert await stored(client) == 0


async def test_a_later_plan_can_be_kept_to_what_an_earlier_one_has_seen(client: aiqueue.Client) -> None:
    await store(client, 3)
    first = await client.jobs.plan("cancel")
    await store(client, 2)
    again = await client.jobs.plan("cancel", until=first.until)
    assert (again.count, again.until) == (3, first.until)


async def test_jobs_that_have_moved_since_a_dry_run_are_still_those_of_before(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=3, first=3600, cap=3600, jitter=0))
    async def task(job: aiqueue.Job[Task]) -> None:
        raise ValueError("try later")

    (retried,) = await store(client, 1)
    (due,) = await store(client, 1, delay=0.5)
    (rescheduled,) = await store(client, 1, delay="1h")
    first = await client.jobs.plan("cancel")
    assert first.count == 3
    await asyncio.sleep(0.01)  # the time of a dry run is in milliseconds
    later = [*await store(client, 1), *await store(client, 1, delay="1h")]
    await rescheduled.reschedule(delay="2h")
    async with worker.running(client):

        async def all_have_failed_once() -> None:
            assert await stored(client, state="retrying") == 3

        await eventually(all_have_failed_once)
    again = await client.jobs.plan("cancel", until=first.until)
    assert (again.count, again.until) == (3, first.until)
    outcome = await client.jobs.act(again)
    assert (outcome.done, outcome.ended, outcome.failed) == (3, [], [])
    for handle in (retried, due, rescheduled):
        with pytest.raises(JobCancelled):
            await handle.result(5)
    assert {each.job_id async for each in client.jobs.list()} == {each.id for each in later}


async def test_the_last_sequences_of_a_dry_run_with_another_filter_are_refused(client: aiqueue.Client) -> None:
    parked = await client.jobs.plan("run_now")
    with pytest.raises(BadInput, match="has not looked at AI_AGENT_TASKS"):
        await client.jobs.plan("cancel", until=parked.until)


async def test_cancelling_while_workers_run_each_job_is_cancelled_or_done_and_never_both(
    client: aiqueue.Client,
) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client, 1_500)
    async with counting(runs, hold_s=0.01).running(client):
        plan = await client.jobs.plan("cancel", tenant=TENANT)
        outcome = await client.jobs.act(plan)
        assert outcome.done + len(outcome.ended) == plan.count
        assert outcome.failed == []
        results = await asyncio.gather(*(each.result(20) for each in handles), return_exceptions=True)
    cancelled = [each for each in results if isinstance(each, JobCancelled)]
    succeeded = [each for each in results if isinstance(each, int)]
    assert len(cancelled) + len(succeeded) == len(handles)
    assert len(cancelled) == outcome.done
    assert max(runs.values()) == 1
    assert outcome.ended == [] or {why for _, why in outcome.ended} <= {"it has already ended"}


async def test_running_jobs_are_cancelled_too(client: aiqueue.Client, eventually: Eventually) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client, 3)
    async with counting(runs, hold_s=60).running(client):
        await eventually(lambda: len(runs) == 3)
        plan = await client.jobs.plan("cancel", state="in_flight")
        outcome = await client.jobs.act(plan)
        assert outcome.done == 3
        for handle in handles:
            with pytest.raises(JobCancelled):
                await handle.result(10)


async def test_dead_letters_are_replayed_once_and_later_ones_are_not(client: aiqueue.Client) -> None:
    runs: Counter[int] = Counter()
    broken = True
    worker = aiqueue.Worker(concurrency=50)

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> int:
        runs[job.message.n] += 1
        if broken or job.message.n == 7:
            raise ValueError("broken")
        return 0

    async with worker.running(client):
        for handle in await store(client, 300):
            with pytest.raises(JobFailed):
                await handle.result(20)
        broken = False
        plan = await client.jobs.plan("replay", kind="task")
        assert plan.count == 300
        outcome = await client.jobs.act(plan)
        assert (outcome.done, outcome.ended, outcome.failed) == (300, [], [])
        again = await client.jobs.act(plan)
        assert again.done == 0
        assert {why for _, why in again.ended} == {"its dead letter is gone: replayed or purged"}
    assert set(runs.values()) == {2}
    assert await stored(client, state="failed") == 1
    purge = await client.jobs.plan("purge")
    assert (await client.jobs.act(purge)).done == 1
    assert await stored(client) == 0


async def test_a_purge_leaves_what_somebody_else_has_replayed_meanwhile(client: aiqueue.Client) -> None:
    sizes: list[int] = []
    broken = True
    worker = aiqueue.Worker()

    @worker.handle(Large, retry=aiqueue.Backoff(attempts=1))
    async def large(job: aiqueue.Job[Large]) -> None:
        if broken:
            raise ValueError("broken")
        sizes.append(len(job.message.text))

    async with worker.running(client):
        handle = await client.enqueue(Large(text="x" * 2_000_000), tenant=TENANT)
        with pytest.raises(JobFailed):
            await handle.result(20)
    plan = await client.jobs.plan("purge")
    (letter,) = [each async for each in client.dead.find()]
    assert await client.dead.replay(letter)
    assert not await client.dead.purge(letter)  # as a process would that has read it before
    outcome = await client.jobs.act(plan)
    assert (outcome.done, len(outcome.ended)) == (0, 1)
    broken = False
    async with worker.running(client):
        await (await client.job(handle.id, family="agent.tasks", tenant=TENANT)).result(20)
    assert sizes == [2_000_000]


async def test_delayed_jobs_run_now_and_once(client: aiqueue.Client) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client, 300, delay="1h")
    async with counting(runs).running(client):
        plan = await client.jobs.plan("run_now", tenant=TENANT)
        outcome = await client.jobs.act(plan)
        assert (outcome.done, outcome.ended, outcome.failed) == (300, [], [])
        for handle in handles:
            await handle.result(20)
        again = await client.jobs.act(plan)
        assert (again.done, len(again.ended), again.failed) == (0, 300, [])
    assert Counter(runs.values()) == {1: 300}


async def test_moved_jobs_run_once_and_their_handles_get_the_results(client: aiqueue.Client) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client, 300, priority="low")
    plan = await client.jobs.plan("move", to="high", priority="low")
    outcome = await client.jobs.act(plan)
    assert (outcome.done, outcome.ended, outcome.failed) == (300, [], [])
    assert await stored(client, priority="high") == 300
    back = await client.jobs.act(await client.jobs.plan("move", to="low", tenant=TENANT))
    assert (back.done, back.failed) == (300, [])
    async with counting(runs).running(client):
        assert [await each.result(20) for each in handles] == list(range(300))
    assert Counter(runs.values()) == {1: 300}
    assert await stored(client) == 0


async def test_jobs_are_moved_while_a_worker_runs_them_each_once(client: aiqueue.Client) -> None:
    runs: Counter[int] = Counter()
    handles = await store(client, 1_000, priority="low")
    async with counting(runs, hold_s=0.01).running(client):
        plan = await client.jobs.plan("move", to="high", priority="low")
        outcome = await client.jobs.act(plan)
        assert outcome.done + len(outcome.ended) == plan.count
        assert outcome.failed == []
        assert outcome.done > 100
        assert [await each.result(20) for each in handles] == list(range(1_000))
    assert Counter(runs.values()) == {1: 1_000}


async def test_a_moved_delayed_job_is_still_its_handles(client: aiqueue.Client, eventually: Eventually) -> None:
    runs: Counter[int] = Counter()
    handle = await client.enqueue(Task(n=5), tenant=TENANT, priority="low", delay=0.2)
    helper = aiqueue.Worker(families=["agent.tasks"], tenants=["somebody-else"])

    @helper.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None: ...

    async with helper.running(client):
        await eventually(lambda: _is_queued(client))
    outcome = await client.jobs.act(await client.jobs.plan("move", to="high"))
    assert outcome.done == 1
    async with counting(runs).running(client):
        assert await handle.result(20) == 5
    assert runs == {5: 1}


async def _is_queued(client: aiqueue.Client) -> None:
    assert await stored(client, state="queued") == 1


async def test_a_moved_job_can_be_cancelled(client: aiqueue.Client) -> None:
    (handle,) = await store(client, 1, priority="low")
    await client.jobs.act(await client.jobs.plan("move", to="high"))
    assert await handle.cancel()
    with pytest.raises(JobCancelled):
        await handle.result(5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"act": "stop"},
        {"act": "replay", "state": "queued"},
        {"act": "move"},
        {"act": "move", "to": "urgent"},
        {"act": "cancel", "to": "high"},
        {"act": "cancel", "until": "AI_AGENT_TASKS"},
        {"act": "cancel", "until": "AI_PARKED.0,AI_AGENT_TASKS.8"},
        {"act": "cancel", "until": "@1796013528302"},
        {"act": "cancel", "older": "1h", "newer": "1m"},
        {"act": "cancel", "kind": ""},
    ],
)
async def test_what_no_act_is_for_is_refused(client: aiqueue.Client, wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        await client.jobs.plan(**wrong)


async def test_an_act_of_a_program_is_not_in_the_audit_and_an_operators_is(client: aiqueue.Client) -> None:
    await store(client, 3)
    await client.jobs.act(await client.jobs.plan("cancel", kind="other"))
    plan: JobPlan = await client.jobs.plan("cancel", kind="task")
    before = time.time()
    await client.jobs.act(plan, by="anna")
    (line,) = [each async for each in client.audit.find()]
    assert (line.act, line.os_user, line.count, line.error) == ("jobs.cancel", "anna", 3, "")
    assert line.target == {
        "kind": "task", "state": "queued,in_flight,parked,retrying,waiting", "matched": 3, "until": plan.until,
    }  # fmt: skip
    assert line.details == {"ended": 0, "failed": 0, "left": 0}
    assert line.nats_user == client.settings.user
    assert line.ended_at is not None
    assert abs(line.begun_at - before) < 5


SHARED = """
[family]
name = "shared.jobs"
default_kind = "shared"
priorities = ["high", "normal", "low"]
lanes = "shared"
[stream]
name = "SHARED_JOBS"
"""


class Shared(aiqueue.Message, kind="shared", family="shared.jobs"):
    n: int = 0


async def test_jobs_of_many_tenants_in_one_shared_lane_are_moved(account: Account, tmp_path: Path) -> None:
    (tmp_path / "shared.toml").write_text(SHARED)
    settings = settings_of_account(account).with_arguments(streams=tmp_path)
    runs: Counter[int] = Counter()
    worker = aiqueue.Worker(families=["shared.jobs"])

    @worker.handle(Shared)
    async def shared(job: aiqueue.Job[Shared]) -> int:
        runs[job.message.n] += 1
        await asyncio.sleep(0.02)
        return job.message.n

    async with testing.client(settings, families=["shared.jobs"]) as client, worker.running(client):
        handles = [await client.enqueue(Shared(n=n), tenant=f"t{n}", priority="low") for n in range(30)]
        outcome = await client.jobs.act(await client.jobs.plan("move", to="high", family="shared.jobs"))
        assert outcome.failed == []
        assert [await each.result(20) for each in handles] == list(range(30))
    assert Counter(runs.values()) == {1: 30}
