"""Workers killed -9 while they work, as services: `aiqueue work` in processes of their own."""

from __future__ import annotations

import collections
import os
import re
import signal
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import aiqueue

from .. import forks
from ..support import create_streams, wait_until, whole_lines

STREAM = """
    [family]
    name = "test.sleeps"
    default_kind = "sleep"
    [stream]
    name = "TEST_SLEEPS"
    [consumer]
    ack_wait = "5s"
    """

APP = """
    import asyncio, os
    import aiqueue

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
        n: int

    worker = aiqueue.Worker(concurrency=20)

    @worker.handle(Sleep, timeout="30s")
    async def sleep(job: aiqueue.Job[Sleep]) -> None:
        os.write(LOG, f"start {job.message.n} {os.getpid()}\\n".encode())
        await asyncio.sleep(0.02)
        os.write(LOG, f"end {job.message.n} {os.getpid()}\\n".encode())
    """


class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
    n: int


class WorkerPool:
    """Worker processes on one application module, and what their handlers wrote."""

    def __init__(self, directory: Path, account: Any, app: str = APP, stream: str = STREAM) -> None:
        (directory / "streams").mkdir()
        (directory / "streams" / "test_sleeps.toml").write_text(textwrap.dedent(stream))
        (directory / "app.py").write_text(textwrap.dedent(app))
        self.directory = directory
        self.log = directory / "jobs.log"
        self.log.touch()
        self._environment = {
            **os.environ,
            "JOB_LOG": str(self.log),
            "AIQUEUE_URL": account.url,
            "AIQUEUE_USER": account.user,
            "AIQUEUE_PASSWORD": account.password,
            "AIQUEUE_STREAMS": str(directory / "streams"),
        }
        self.alive: list[forks.Program] = []
        self.killed: set[int] = set()

    def start(self) -> forks.Program:
        with (self.directory / "worker.err").open("ab") as errors:
            process = forks.start(
                "aiqueue", "work", "app:worker", cwd=self.directory, env=self._environment, stdout=errors, stderr=errors
            )
        self.alive.append(process)
        return process

    def kill(self, process: forks.Program) -> None:
        process.kill()
        process.wait()
        self.alive.remove(process)
        self.killed.add(process.pid)

    def lines(self, event: str) -> list[tuple[int, int]]:
        split = (line.split() for line in whole_lines(self.log))
        return [(int(n), int(pid)) for logged, n, pid in split if logged == event]

    def wait_for_ended(self, count: int, within_s: float) -> None:
        end = time.monotonic() + within_s
        while len({n for n, _ in self.lines("end")}) < count:
            assert time.monotonic() < end, (self.directory / "worker.err").read_text()[-3_000:]
            time.sleep(0.02)

    def works(self, process: forks.Program) -> bool:
        """Whether it has said so, or is gone: before, a signal ends it in the middle of its imports."""
        said = (self.directory / "worker.err").read_text(errors="replace")
        return process.poll() is not None or re.search(rf"^worker \S+-{process.pid}: ", said, re.MULTILINE) is not None

    def stop(self) -> list[int]:
        wait_until(lambda: all(map(self.works, self.alive)))
        for process in self.alive:
            process.send_signal(signal.SIGTERM)
        return [process.wait(timeout=40) for process in self.alive]


@pytest.fixture
def pool(tmp_path: Path, account: Any) -> Any:
    pool = WorkerPool(tmp_path, account)
    yield pool
    for process in pool.alive:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.timeout(120)
async def test_workers_killed_repeatedly_lose_no_job_and_repeat_only_what_was_in_flight(
    pool: WorkerPool, account: Any
) -> None:
    streams = pool.directory / "streams"
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        for n in range(2_300):
            await client.enqueue(Sleep(n=n), tenant=f"t{n % 3}")
        pool.start()
        pool.start()
        # 40 slots of 20 ms end 2,000 jobs a second: kills are placed by progress, so that each meets a busy worker
        for progress in (400, 1_100, 1_800):
            pool.wait_for_ended(progress, within_s=60)
            pool.kill(pool.alive[0])
            pool.start()
        pool.wait_for_ended(2_300, within_s=60)
        assert pool.stop() == [0, 0]
        info = await client.connection.api("STREAM.INFO.TEST_SLEEPS")
        assert info["state"]["messages"] == 0
        assert [letter async for letter in client.dead.find()] == []
    runs: dict[int, list[int]] = collections.defaultdict(list)
    for n, pid in pool.lines("start"):
        runs[n].append(pid)
    repeated = {n: pids for n, pids in runs.items() if len(pids) > 1}
    assert all(pid in pool.killed for pids in repeated.values() for pid in pids[:-1])
    assert len(repeated) <= len(pool.killed) * 20 * 2  # a kill meets 20 running jobs, and acks not yet sent
