"""Trees of jobs whose workers are killed -9 again and again: each child ends once, and each gathering gets all."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest

import aiqueue

from ..support import create_streams
from .test_kill import WorkerPool

CONCURRENCY, WORKERS = 4, 2

STREAM = """
    [family]
    name = "test.sleeps"
    default_kind = "sleep"
    [stream]
    name = "TEST_SLEEPS"
    max_bytes = "256MiB"
    [consumer]
    ack_wait = "2s"
    """

APP = """
    import asyncio, os
    import aiqueue

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
        n: int
        levels: int = 1
        width: int = 20
        fails: int = -1
        ms: int = 2

    worker = aiqueue.Worker(concurrency=4)

    @worker.handle(Sleep, retry=aiqueue.Backoff(attempts=5, first=0.05, cap=0.2))
    async def sleep(job):
        message = job.message
        if not message.levels:
            os.write(LOG, f"start {message.n} {os.getpid()}\\n".encode())
            await asyncio.sleep(message.ms / 1000)
            if message.n == message.fails:
                raise aiqueue.Reject("broken")
            return message.n
        children = [
            (f"c-{n}", message.model_copy(update={"n": message.n * message.width + n, "levels": message.levels - 1}))
            for n in range(message.width)
        ]
        results = await job.gather(children)
        return results if message.levels == 1 else sum(results, [])
    """


class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
    """A leaf (`levels` 0), or a job of `width` children. `fails`: the leaf that is rejected. `ms`: how long."""

    n: int
    levels: int = 1
    width: int = 20
    fails: int = -1
    ms: int = 2


@pytest.fixture
def pool(tmp_path: Path, account: Any) -> Iterator[WorkerPool]:
    pool = WorkerPool(tmp_path, account, APP, STREAM)
    yield pool
    for process in pool.alive:
        process.kill()
        process.wait()


class Killer:
    """Kills one of the workers each `every_s` and starts another. `kills`: how many so far."""

    def __init__(self, pool: WorkerPool, every_s: float = 1.0) -> None:
        self.pool = pool
        self.every_s = every_s
        self.kills = 0

    async def __aenter__(self) -> Self:
        for _ in range(WORKERS):
            self.pool.start()
        self._task = asyncio.create_task(self._kill())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _kill(self) -> None:
        while True:
            await asyncio.sleep(self.every_s * random.uniform(0.8, 1.2))
            working = [each for each in self.pool.alive if self.pool.works(each)]
            if working:
                self.pool.start()
                self.pool.kill(random.choice(working))
                self.kills += 1


def connect(pool: WorkerPool, account: Any) -> aiqueue.Client:
    streams = pool.directory / "streams"
    return aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams)


async def final_entries(client: aiqueue.Client) -> dict[str, list[str]]:
    """The final entries of all jobs, by id."""
    found: dict[str, list[str]] = {}
    async for stored in client.connection.read("AI_RESULTS", ">"):
        if (event := stored.headers["Aiq-Event"]) in ("result", "failed", "cancelled"):
            found.setdefault(stored.subject.rpartition(".")[2], []).append(event)
    return found


async def drained(client: aiqueue.Client, within: float) -> None:
    """Wait until no job is stored."""
    end = asyncio.get_running_loop().time() + within
    while True:
        infos = [await client.connection.api(f"STREAM.INFO.{name}") for name in ("TEST_SLEEPS", "AI_PARKED")]
        left = sum(info["state"]["messages"] for info in infos)
        if not left:
            return
        assert asyncio.get_running_loop().time() < end, f"{left} jobs are left"
        await asyncio.sleep(0.5)


async def run_parents(pool: WorkerPool, account: Any, parents: int, width: int, within: float) -> None:
    async with connect(pool, account) as client:
        await create_streams(client)
        handles: list[aiqueue.Handle] = []
        async with Killer(pool) as killer:
            async for each in client.enqueue_many([Sleep(n=n, width=width) for n in range(parents)], tenant="acme"):
                assert isinstance(each, aiqueue.Handle)
                handles.append(each)
            results = await asyncio.gather(*(each.result(timeout=within) for each in handles))
            await drained(client, within=60)
        assert results == [[n * width + k for k in range(width)] for n in range(parents)]
        finals = await final_entries(client)  # each message that was stored has written one by now
        children = {job_id for job_id in finals if "_c-" in job_id}
        assert len(children) == parents * width
        assert all(each == ["result"] for each in finals.values())
        starts = Counter(n for n, _ in pool.lines("start"))
        assert len(starts) == parents * width
        assert starts.total() <= parents * width + killer.kills * CONCURRENCY, "more than was under way at the kills"


@pytest.mark.slow
@pytest.mark.timeout(1_500)
async def test_a_thousand_parents_of_20_children_each_get_all_results_and_no_child_is_stored_twice(
    pool: WorkerPool, account: Any
) -> None:
    await run_parents(pool, account, 1_000, 20, within=1_300)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_three_levels_of_jobs_get_all_results(pool: WorkerPool, account: Any) -> None:
    async with connect(pool, account) as client:
        await create_streams(client)
        async with Killer(pool):
            handles = [await client.enqueue(Sleep(n=n, levels=3, width=5), tenant="acme") for n in range(4)]
            results = await asyncio.gather(*(each.result(timeout=250) for each in handles))
        assert results == [list(range(n * 125, n * 125 + 125)) for n in range(4)]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_failed_child_wakes_its_parent_while_workers_are_killed(pool: WorkerPool, account: Any) -> None:
    async with connect(pool, account) as client:
        await create_streams(client)
        async with Killer(pool):
            handles = [await client.enqueue(Sleep(n=n, width=5, fails=n * 5 + 3), tenant="acme") for n in range(20)]
            outcomes = await asyncio.gather(*(each.result(timeout=250) for each in handles), return_exceptions=True)
        assert all("child 'c-3'" in str(each) and "broken" in str(each) for each in outcomes), outcomes


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_cancelled_tree_ends_cancelled_or_done_and_never_both(pool: WorkerPool, account: Any) -> None:
    async with connect(pool, account) as client:
        await create_streams(client)
        async with Killer(pool):
            handles = [await client.enqueue(Sleep(n=n, levels=3, width=4, ms=200), tenant="acme") for n in range(5)]
            for handle in handles:
                await asyncio.sleep(random.uniform(0, 2))
                assert await handle.cancel()
            await drained(client, within=200)
        finals = await final_entries(client)
        assert all(len(each) == 1 and each[0] in ("result", "cancelled") for each in finals.values()), finals
        assert all(finals[handle.id] == ["cancelled"] for handle in handles)
        starts = len(pool.lines("start"))
        await asyncio.sleep(3)
        assert len(pool.lines("start")) == starts
