"""Jobs of one child do not meet each other, and what a handler forks does not meet its worker."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import JobFailed

from ..support import create_streams
from ..worker.test_kill import WorkerPool
from . import isolated
from .isolated import Do

pytestmark = pytest.mark.families("agent.tasks")
ONCE = aiqueue.Backoff(attempts=1)

FORKING = """
    import aiqueue
    from tests.processes import isolated

    class Fork(aiqueue.Message, kind="fork", family="test.forks"):
        n: int

    worker = aiqueue.Worker(lifespan=isolated.lifespan)

    @worker.handle(Fork)
    def fork(job):
        return isolated.fork_sync(job)
    """

STREAM = """
    [family]
    name = "test.forks"
    default_kind = "fork"
    [stream]
    name = "TEST_FORKS"
    """


class Fork(aiqueue.Message, kind="fork", family="test.forks"):
    n: int


async def run(client: aiqueue.Client, what: str = "") -> Any:
    return await (await client.enqueue(Do(what=what), tenant="acme")).result(25)


def one_child(handler: Callable[[Any], Any]) -> aiqueue.Worker:
    worker = aiqueue.Worker(processes=1, lifespan=isolated.lifespan)
    worker.handle(Do, process=True, retry=ONCE)(handler)
    return worker


async def test_a_background_task_that_a_job_leaves_in_a_child_cannot_cancel_the_next_job(
    client: aiqueue.Client,
) -> None:
    async with one_child(isolated.do_async).running(client):
        first = await run(client, "leave a task that cancels")
        second = await run(client, "wait for what is left")
    assert first["pid"] == second["pid"]


async def test_a_chunk_that_a_job_leaves_waiting_in_a_child_does_not_reach_the_next_jobs_journal(
    client: aiqueue.Client,
) -> None:
    async with one_child(isolated.do_async).running(client):
        for _ in range(5):
            first = await client.enqueue(Do(what="leave two chunks on their way"), tenant="acme")
            second = await client.enqueue(Do(what="chunk"), tenant="globex")
            await first.result(25)
            await second.result(25)
            chunks = [item.data async for item in second.stream() if item.event == "chunk"]
            assert chunks == [{"of": second.id}]


@pytest.mark.parametrize("handler", [isolated.do_async, isolated.do_sync])
async def test_each_job_in_a_child_starts_with_the_context_of_the_lifespan(
    client: aiqueue.Client, handler: Callable[[Any], Any]
) -> None:
    async with one_child(handler).running(client):
        results = [await run(client) for _ in range(3)]
    assert len({each["pid"] for each in results}) == 1
    assert [each["seen"] for each in results] == ["the lifespan's"] * 3


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("cancel itself and return", "cancelled from within"),
        ("cancel itself and wait", "cancelled from within"),
        ("cancel itself and raise", "ValueError: broken"),
        ("have a group fail", "broken|unhandled errors in a TaskGroup"),
        ("have a group fail, and cancel itself", "broken|unhandled errors in a TaskGroup|cancelled from within"),
    ],
)
async def test_a_handler_in_a_child_that_cancels_itself_has_failed_and_its_child_goes_on(
    client: aiqueue.Client, what: str, error: str
) -> None:
    async with one_child(isolated.do_async).running(client):
        before = await run(client)
        with pytest.raises(JobFailed, match=error):
            await run(client, what)
        after = await run(client)
    assert before["pid"] == after["pid"]


@pytest.mark.parametrize("process", [False, True], ids=["in the worker", "in a child"])
@pytest.mark.parametrize("handler", [isolated.fork_sync, isolated.fork_async])
async def test_a_process_that_a_handler_forks_takes_no_signal_for_its_parent_and_can_be_terminated(
    client: aiqueue.Client, handler: Callable[[Any], Any], process: bool
) -> None:
    told: list[int] = []
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, told.append, signal.SIGTERM)
    try:
        worker = aiqueue.Worker(processes=1)
        worker.handle(Do, process=process, retry=ONCE)(handler)
        async with worker.running(client):
            assert [await run(client) for _ in range(2)] == [-signal.SIGTERM] * 2
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
    assert told == []


async def test_a_worker_goes_on_when_its_handler_terminates_a_process_that_it_forked(
    tmp_path: Path, account: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(aiqueue.__file__).parent.parent))
    pool = WorkerPool(tmp_path, account, FORKING, STREAM)
    try:
        async with aiqueue.connect(
            account.url, user=account.user, password=account.password, streams=pool.directory / "streams"
        ) as client:
            await create_streams(client)
            worker = pool.start()
            for n in range(3):
                handle = await client.enqueue(Fork(n=n), tenant="acme")
                assert await handle.result(25) == -signal.SIGTERM
            assert worker.poll() is None
        assert pool.stop() == [0]
    finally:
        for process in pool.alive:
            process.kill()
            process.wait()
