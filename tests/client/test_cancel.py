from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import headers, subjects
from aiqueue.errors import JobCancelled, NotFound
from aiqueue.inspect import stats
from aiqueue.journal import RETRY
from aiqueue.subjects import Lane
from aiqueue.topology import provision

from ..support import eventually

STREAM = "AI_AGENT_TASKS"


class Task(aiqueue.Message, kind="task"):
    n: int = 0


def taking(seen: list[str], *, takes_s: float = 0.0, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(**options)

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=3, first=60, cap=60))
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append(job.id)
        if job.message.n < 0:
            raise aiqueue.Retry(after=1)
        await asyncio.sleep(takes_s)

    return worker


async def stored(client: aiqueue.Client, stream: str) -> int:
    info = await client.connection.api(f"STREAM.INFO.{stream}")
    return int(info["state"]["messages"])


async def cancelled(handle: aiqueue.Handle) -> bool:
    with pytest.raises(JobCancelled) as failed:
        await handle.result(25)
    return failed.value.reason == "cancelled"


async def test_a_delayed_job_that_is_cancelled_never_runs(client: aiqueue.Client) -> None:
    seen: list[str] = []
    handle = await client.enqueue(Task(), tenant="acme", delay=1, unique="a")
    other = await client.enqueue(Task(), tenant="acme", delay=1, unique="b")
    assert await handle.cancel()
    assert await handle.cancel()  # again
    assert await stored(client, "AI_PARKED") == 1
    assert await cancelled(handle)
    async with taking(seen).running(client):
        await other.result(25)
        assert not await other.cancel()
    assert seen == ["b"]


@pytest.mark.parametrize("delay", [None, 60])
async def test_a_job_that_is_cancelled_again_is_still_cancelled_and_says_so(
    client: aiqueue.Client, delay: float | None
) -> None:
    handle = await client.enqueue(Task(), tenant="acme", delay=delay)
    assert (await handle.verdict()).cancelled
    by_id = await client.cancels.cancel_by_id(handle.id)
    assert await handle.verdict() == by_id == (True, "it was cancelled before")


async def test_a_cancelled_key_can_be_delayed_again_at_once(client: aiqueue.Client) -> None:
    seen: list[str] = []
    for _ in range(3):
        handle = await client.enqueue(Task(), tenant="acme", delay=0.5, unique="a")
        assert not handle.duplicate
        assert await handle.cancel()
    handle = await client.enqueue(Task(), tenant="acme", delay=0.5, unique="a")
    assert not handle.duplicate
    async with taking(seen).running(client):
        await handle.result(25)
    assert seen == ["a"]


async def test_a_job_that_is_due_and_not_forwarded_is_cancelled(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Task(), tenant="acme", delay=0.1, unique="a")

    async def due() -> bool:
        found = await client.parking.find_all(Lane("agent.tasks", "acme", "*"), "a")
        return bool(found) and found[0].subject.is_due

    await eventually(due)
    assert await handle.cancel()
    assert await stored(client, "AI_PARKED") == 0
    assert await cancelled(handle)


async def test_a_message_already_in_a_forwarders_hands_does_not_run(client: aiqueue.Client) -> None:
    """It is stored in its lane after the cancellation: its attempt finds the final entry in the journal."""
    seen: list[str] = []
    handle = await client.enqueue(Task(), tenant="acme", delay=3600, unique="a")
    (there,) = await client.parking.find_all(handle.lane, "a")
    assert await handle.cancel()
    job_headers = headers.carried(there.stored.headers, ours=True) | {headers.MSG_ID: "acme/agent.tasks/a/due"}
    await client.connection.store(subjects.work(*handle.lane), there.stored.data, job_headers)
    last = await client.enqueue(Task(), tenant="acme", unique="b")
    async with taking(seen).running(client):
        await last.result(25)
        await eventually(lambda: empty(client))
    assert seen == ["b"]


async def empty(client: aiqueue.Client) -> bool:
    return await stored(client, STREAM) == 0


async def test_a_queued_job_is_taken_out_of_its_lane(client: aiqueue.Client) -> None:
    seen: list[str] = []
    handles = [await client.enqueue(Task(n=n), tenant="acme", unique=f"j{n}") for n in range(4)]
    assert await handles[1].cancel()
    assert await client.cancel("j2")
    assert await stored(client, STREAM) == 2
    assert await stored(client, "AI_PARKED") == 0
    assert await cancelled(handles[1])
    assert await cancelled(handles[2])
    async with taking(seen).running(client):
        await handles[0].result(25)
        await handles[3].result(25)
    assert sorted(seen) == ["j0", "j3"]
    assert (await stats.job(client.connection, client.topology, "j2")).state == "cancelled"


async def test_a_delayed_job_that_waits_in_its_lane_is_cancelled(client: aiqueue.Client) -> None:
    """Forwarded, and no worker of its family is there."""

    class Query(aiqueue.Message, kind="rag.query", family="rag.queries"):
        pass

    seen: list[str] = []
    elsewhere = aiqueue.Worker()

    @elsewhere.handle(Query)
    async def query(job: aiqueue.Job[Query]) -> None: ...

    handle = await client.enqueue(Task(), tenant="acme", delay=0.1, unique="a")
    async with elsewhere.running(client):
        await eventually(lambda: stored(client, STREAM))
    assert await client.cancel("a")
    assert await handle.cancel()
    assert await empty(client)
    async with taking(seen).running(client):
        await (await client.enqueue(Task(), tenant="acme", unique="b")).result(25)
    assert seen == ["b"]


async def test_a_job_that_has_ended_is_not_cancelled(client: aiqueue.Client) -> None:
    seen: list[str] = []
    handle = await client.enqueue(Task(), tenant="acme", unique="a")
    delayed = await client.enqueue(Task(), tenant="acme", unique="b", delay=0.1)
    async with taking(seen).running(client):
        assert await handle.result(25) is None
        assert await delayed.result(25) is None
        for each in (handle, delayed):
            assert not await each.cancel()
            assert not await client.cancel(each.id)
        assert await handle.result(25) is None


async def test_a_job_between_two_attempts_is_cancelled(client: aiqueue.Client) -> None:
    seen: list[str] = []
    handle = await client.enqueue(Task(n=-1), tenant="acme", unique="a")
    async with taking(seen).running(client):

        async def failed_once() -> bool:
            head = await client.journal.head(subjects.journal("ai.agent.results", "acme", "a"))
            return head is not None and head.event == RETRY

        await eventually(failed_once)
        assert await handle.cancel()
        assert await cancelled(handle)
        await (await client.enqueue(Task(), tenant="acme", delay=1.5)).result(25)
    assert seen.count("a") == 1
    assert await empty(client)


async def test_an_unknown_job_is_not_found(client: aiqueue.Client) -> None:
    with pytest.raises(NotFound, match="no trace"):
        await client.cancel("nowhere")


@pytest.mark.timeout(120)
async def test_around_its_time_a_job_is_either_cancelled_or_done(client: aiqueue.Client) -> None:
    """500 jobs that become due while they are cancelled: some are parked, some with a forwarder, some in their lane,
    and a few have just started: those end as cancelled too. The first five are left alone, the next cancelled early.
    """
    seen: list[str] = []
    due = time.time() + 3
    specs = [aiqueue.JobSpec(Task(n=n), unique=f"j{n}", at=due + random.random()) for n in range(500)]
    handles = [each async for each in client.enqueue_many(specs, tenant="acme")]
    verdicts: dict[str, bool] = {}

    async def cancel(n: int, handle: Any) -> None:
        if n < 5:
            await handle.result(25)
        elif n >= 10:
            await asyncio.sleep(max(0.0, handle.due - time.time() + random.uniform(-0.1, 0.4)))
        verdicts[handle.id] = await handle.cancel()

    async with taking(seen, concurrency=50).running(client):
        await asyncio.gather(*(cancel(n, each) for n, each in enumerate(handles)))
        assert len(verdicts) == 500
        left = [each for each in handles if isinstance(each, aiqueue.Handle) and not verdicts[each.id]]
        for each in left:
            await each.result(20)
        await eventually(lambda: empty(client), within=40)
        assert await stored(client, "AI_PARKED") == 0
        for each in handles:
            assert not isinstance(each, aiqueue.Handle) or not verdicts[each.id] or await cancelled(each)
    assert {each.id for each in left} <= set(seen)
    assert len(set(seen)) == len(seen) < 500
    assert 0 < len(left) < 500


SHORT = """
[family]
name = "x.y"
default_kind = "x.y"
[stream]
name = "X_Y"
[consumer]
ack_wait = "1s"
"""


@pytest.mark.timeout(120)
async def test_while_a_lane_is_served_its_jobs_are_either_cancelled_or_done(account: Any, tmp_path: Path) -> None:
    """One that a worker got meanwhile is stopped, and ends as cancelled or with its result, never as both."""
    (tmp_path / "x.toml").write_text(SHORT)
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=tmp_path) as client:
        await provision.apply(client.connection, client.topology)
        await cancel_while_served(client)


async def cancel_while_served(client: aiqueue.Client) -> None:
    class Step(aiqueue.Message, kind="step", family="x.y"):
        n: int = 0

    started: list[str] = []
    done: list[str] = []
    worker = aiqueue.Worker(concurrency=5)

    @worker.handle(Step)
    async def step(job: aiqueue.Job[Step]) -> None:
        started.append(job.id)
        await asyncio.sleep(0.02)
        done.append(job.id)

    messages = (aiqueue.JobSpec(Step(n=n), unique=f"j{n}") for n in range(600))
    handles = [each async for each in client.enqueue_many(messages, tenant="acme") if isinstance(each, aiqueue.Handle)]
    random.shuffle(handles)
    verdicts: dict[str, bool] = {}
    async with worker.running(client):
        await eventually(lambda: done)
        for each in handles:
            verdicts[each.id] = await each.cancel()
        left = [each for each in handles if not verdicts[each.id]]
        for each in left:
            await each.result(60)
        for each in handles:
            assert not verdicts[each.id] or await cancelled(each)
    assert {each.id for each in left} <= set(done)
    assert len(set(started)) == len(started) < 600
    assert 0 < len(left) < 600


@pytest.mark.parametrize("delay", [None, "1h"], ids=["queued", "delayed"])
async def test_a_cancelled_job_holds_its_documents_no_longer(client: aiqueue.Client, delay: str | None) -> None:
    class Big(aiqueue.Message, kind="big"):
        blob: bytes

    handle = await client.enqueue(Big(blob=bytes(400_000)), tenant="acme", delay=delay)
    assert [each.jobs async for each in client.documents.find()] == [1]
    assert await handle.cancel()
    assert [each.jobs async for each in client.documents.find()] == []
