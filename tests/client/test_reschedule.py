"""Another time for a parked job: `reschedule` and `run_now`."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, JobFailed, NotParked
from aiqueue.topology import provision

from ..support import create_streams

TENANT = "acme"


class Task(aiqueue.Message, kind="task"):
    n: int = 0


@pytest.fixture
async def client(account: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


def noting(seen: list[tuple[int, float]]) -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> int:
        seen.append((job.message.n, time.time()))
        return job.message.n

    return worker


async def test_a_parked_job_starts_at_its_new_time_and_once(client: aiqueue.Client) -> None:
    seen: list[tuple[int, float]] = []
    async with noting(seen).running(client):
        soon = await client.enqueue(Task(n=1), tenant=TENANT, delay="1h")
        at = datetime.now(UTC) + timedelta(seconds=1)
        await soon.reschedule(at=at)
        assert soon.due == pytest.approx(at.timestamp(), abs=0.002)
        late = await client.enqueue(Task(n=2), tenant=TENANT, unique="late", delay=0.6)
        await late.reschedule(delay=timedelta(hours=1))
        assert await soon.result(25) == 1
        assert seen[0][1] >= at.timestamp()
        assert (await late.status()).state == "parked"
        await (await client.job("late")).run_now()
        assert await late.result(25) == 2
    assert Counter(n for n, _ in seen) == {1: 1, 2: 1}


async def test_run_now_starts_a_delayed_job_at_once_and_is_safe_twice(client: aiqueue.Client) -> None:
    seen: list[tuple[int, float]] = []
    handle = await client.enqueue(Task(n=1), tenant=TENANT, delay="1h")
    for _ in range(2):
        await handle.run_now()
    assert handle.due == pytest.approx(time.time(), abs=5)
    async with noting(seen).running(client):
        assert await handle.result(25) == 1
    assert len(seen) == 1


async def test_run_now_ends_the_wait_for_the_next_attempt(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=2, first="1h", cap="1h"))
    async def task(job: aiqueue.Job[Task]) -> int:
        if job.attempt == 1:
            raise ValueError("not yet")
        return job.attempt

    async with worker.running(client):
        for delay in (None, 0.2):
            handle = await client.enqueue(Task(), tenant=TENANT, delay=delay)
            async with asyncio.timeout(25):
                while (await handle.status()).state != "retrying":
                    await asyncio.sleep(0.02)
            await handle.run_now()
            assert await handle.result(25) == 2


async def test_a_job_that_is_not_parked_says_what_it_does(client: aiqueue.Client) -> None:
    go, began = asyncio.Event(), asyncio.Event()
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        began.set()
        await go.wait()

    handle = await client.enqueue(Task(), tenant=TENANT)
    with pytest.raises(NotParked, match=r"is not parked \(queued\), so it cannot be rescheduled"):
        await handle.run_now()
    async with worker.running(client):
        await began.wait()
        with pytest.raises(NotParked) as raised:
            await handle.reschedule(delay="1h")
        assert raised.value.state == "in_flight"
        go.set()
        await handle.result(25)
        with pytest.raises(NotParked, match="done"):
            await handle.run_now()
    cancelled = await client.enqueue(Task(), tenant=TENANT, delay="1h")
    await cancelled.cancel()
    with pytest.raises(NotParked, match="cancelled"):
        await cancelled.run_now()
    with pytest.raises(BadInput, match="pass delay= or at="):
        await cancelled.reschedule()
    with pytest.raises(BadInput, match="only one of them"):
        await cancelled.reschedule(delay=1, at=datetime.now(UTC))
    with pytest.raises(BadInput, match="has no time zone"):
        await cancelled.reschedule(at=datetime(2030, 1, 1))  # noqa: DTZ001  (what is refused)


async def test_a_job_that_is_moved_at_its_moment_runs_once_whoever_wins(client: aiqueue.Client) -> None:
    """Moved too late, it starts at its old time, and the caller is told so; never twice, never not at all."""
    seen: list[tuple[int, float]] = []
    async with noting(seen).running(client):
        start = client.connection.clock.now() + 2.0

        async def move(n: int) -> float | None:
            handle = await client.enqueue(Task(n=n), tenant=TENANT, at=start)
            await asyncio.sleep(start - client.connection.clock.now() - 0.3 + (n % 60) * 0.01)
            try:
                await handle.reschedule(delay=2)
            except NotParked:
                return None
            return handle.due

        dues = await asyncio.gather(*(move(n) for n in range(120)))
        async with asyncio.timeout(60):
            while len(seen) < 120:
                await asyncio.sleep(0.05)
    assert set(Counter(n for n, _ in seen).values()) == {1}
    assert all(due is None or at >= due for (n, at) in seen for due in [dues[n]])
    assert 0 < sum(due is None for due in dues) < 120  # so that the moment was hit from both sides


async def test_a_rescheduled_job_is_still_cancelled_by_its_handle(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Task(), tenant=TENANT, delay="1h")
    await handle.reschedule(delay="2h")
    assert await handle.cancel()
    with pytest.raises(JobFailed, match="cancelled"):
        await handle.result(25)
    info = await client.connection.api("STREAM.INFO.AI_PARKED")
    assert info["state"]["messages"] == 0


def test_the_sync_client_reschedules_too(account: Any) -> None:
    with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as client:
        client._run_on_loop(provision.apply(client._client.connection, client._client.topology))
        handle = client.enqueue(Task(), tenant=TENANT, unique="k", delay=timedelta(hours=1))
        first = handle.due
        handle.reschedule(delay="2h")
        assert first is not None
        assert handle.due == pytest.approx(first + 3600, abs=5)
        handle.run_now()
        again = client.enqueue(Task(), tenant=TENANT, unique="k", on_duplicate="replace", delay="1h")
        assert again.id == "k"
