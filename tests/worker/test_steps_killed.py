"""Steps of a worker that is killed -9 again and again: no finished step runs again."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue

from ..support import create_streams, wait_until
from .test_kill import WorkerPool

STEPS, KILLS = 300, 20

STREAM = """
    [family]
    name = "test.sleeps"
    default_kind = "sleep"
    [stream]
    name = "TEST_SLEEPS"
    [consumer]
    ack_wait = "1s"
    """

APP = """
    import asyncio, os, time
    import aiqueue

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    FORM = os.environ["FORM"]

    class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
        n: int

    def note(event, n):
        os.write(LOG, f"{event} {n} {os.getpid()}\\n".encode())

    async def step(n):
        note("start", n)
        await asyncio.sleep(0.01)
        return n

    def step_sync(n):
        note("start", n)
        time.sleep(0.01)
        return n

    async def on_loop(job):
        return await job.steps("s", range(job.message.n), step)

    def in_thread(job):
        return job.steps_sync("s", range(job.message.n), step_sync)

    worker = aiqueue.Worker(concurrency=4)
    worker.handle(Sleep, process="process" in FORM)(in_thread if "thread" in FORM else on_loop)
    """


class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
    n: int


@pytest.fixture(params=["loop", "thread", "process", "thread in process"])
def pool(request: pytest.FixtureRequest, tmp_path: Path, account: Any, monkeypatch: Any) -> Iterator[WorkerPool]:
    monkeypatch.setenv("FORM", request.param)
    pool = WorkerPool(tmp_path, account, APP, STREAM)
    yield pool
    for process in pool.alive:
        process.kill()
        process.wait()


def assert_no_finished_step_ran_again(starts: list[tuple[int, int]]) -> None:
    last_of = {pid: at for at, (_, pid) in enumerate(starts)}
    seen: dict[int, int] = {}
    for at, (n, _pid) in enumerate(starts):
        if n in seen:
            assert last_of[starts[seen[n]][1]] == seen[n], f"step {n} had ended, and ran again"
        seen[n] = at
    assert len(seen) == STEPS


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_job_of_300_steps_killed_20_times_repeats_only_steps_under_way(pool: WorkerPool, account: Any) -> None:
    """From the third delivery on the job is a suspect, and runs in a child process of its trial."""
    streams = pool.directory / "streams"
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        handle = await client.enqueue(Sleep(n=STEPS), tenant="acme")
        for kill in range(KILLS):
            pool.start()
            wanted = (kill + 1) * (STEPS - 40) // KILLS
            wait_until(lambda wanted=wanted: len({n for n, _ in pool.lines("start")}) >= wanted, within=60)
            time.sleep(random.uniform(0, 0.02))
            pool.kill(pool.alive[0])
        pool.start()
        assert await handle.result(timeout=60) == list(range(STEPS))
    starts = pool.lines("start")
    assert_no_finished_step_ran_again(starts)
    assert len(starts) <= STEPS + KILLS


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_an_attempt_that_was_stopped_over_its_lease_keeps_nothing(pool: WorkerPool, account: Any) -> None:
    streams = pool.directory / "streams"
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        handle = await client.enqueue(Sleep(n=100), tenant="acme")
        stopped = pool.start()
        wait_until(lambda: len(pool.lines("start")) >= 10, within=60)
        stopped.send_signal(signal.SIGSTOP)
        before = len(pool.lines("start"))
        pool.start()
        wait_until(lambda: len(pool.lines("start")) >= before + 20, within=60)
        stopped.send_signal(signal.SIGCONT)
        assert await handle.result(timeout=60) == list(range(100))
    starts = pool.lines("start")
    twice = len(starts) - len({n for n, _ in starts})
    assert twice <= 2, "the step under way, and the one that the stopped attempt began before it met the newer"
