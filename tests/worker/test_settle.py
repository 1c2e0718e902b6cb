"""What a handler says that it has used reaches its attempt in the worker, wherever the handler runs."""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.attempt import Threads
from aiqueue.errors import JobFailed, Stale
from aiqueue.processes.child import _ChildContext
from aiqueue.processes.protocol import read_frame_blocking
from aiqueue.processes.worker_pipe import WorkerPipe
from aiqueue.worker.context import JobContext

from ..processes.test_quarantine import lose
from ..support import Account, eventually
from .settling import WRONG, Use, use, use_sync

pytestmark = pytest.mark.families("agent.tasks")
ONCE = aiqueue.Backoff(attempts=1)
PLACES = [
    pytest.param(use, False, id="on the loop"),
    pytest.param(use_sync, False, id="in a thread"),
    pytest.param(use, True, id="in a child, async"),
    pytest.param(use_sync, True, id="in a child, plain"),
]
everywhere = pytest.mark.parametrize(("handler", "process"), PLACES)


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[JobContext]]:
    """The attempts of the workers of a test, in the order in which they began."""
    made: list[JobContext] = []
    create = JobContext.__init__

    def note(context: JobContext, *given: Any) -> None:
        create(context, *given)
        made.append(context)

    monkeypatch.setattr(JobContext, "__init__", note)
    return made


def worker_of(handler: Any, process: bool, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Use, process=process, **{"retry": ONCE, **options})(handler)
    return worker


async def run(client: aiqueue.Client, do: str) -> Any:
    return await (await client.enqueue(Use(do=do), tenant="acme")).result(25)


@everywhere
async def test_what_a_handler_settles_last_counts_however_the_handler_ends(
    client: aiqueue.Client, attempts: list[JobContext], handler: Any, process: bool
) -> None:
    expected = {"settle": 70.0, "settle twice": 12.5, "settle nothing used": 0.0}
    if handler is use_sync:
        expected["settle in a step"] = 70.0
    async with worker_of(handler, process).running(client):
        for do in expected:
            assert (await run(client, do) == os.getpid()) is not process
        await run(client, "nothing")
        with pytest.raises(JobFailed, match="used, and failed"):
            await run(client, "settle and raise")
    assert [each.settled for each in attempts] == [*expected.values(), None, 70.0]


@everywhere
async def test_what_was_settled_counts_if_the_handler_runs_out_of_time(
    client: aiqueue.Client, attempts: list[JobContext], handler: Any, process: bool
) -> None:
    async with worker_of(handler, process, timeout=1).running(client):
        with pytest.raises(JobFailed, match="timed out after 1 s"):
            await run(client, "settle and hang")
    assert [each.settled for each in attempts] == [70.0]


async def test_what_was_settled_counts_if_the_child_process_dies(
    client: aiqueue.Client, attempts: list[JobContext]
) -> None:
    async with worker_of(use, True).running(client):
        with pytest.raises(JobFailed, match="exit code 9"):
            await run(client, "settle and die")
    assert [each.settled for each in attempts] == [70.0]


@pytest.mark.parametrize(("handler", "process"), [each for each in PLACES if each.id != "in a thread"])
async def test_what_a_handler_settles_after_its_job_was_cancelled_counts(
    client: aiqueue.Client, attempts: list[JobContext], handler: Any, process: bool, tmp_path: Path
) -> None:
    started = tmp_path / "started"
    async with worker_of(handler, process).running(client) as session:
        handle = await client.enqueue(Use(do="settle when cancelled", path=str(started)), tenant="acme")
        await eventually(started.exists)
        await handle.cancel()
        await eventually(lambda: session.running == 0)
    assert [each.settled for each in attempts] == [9.0]


@everywhere
async def test_what_is_no_cost_is_refused_in_the_handler_and_not_settled(
    client: aiqueue.Client, attempts: list[JobContext], handler: Any, process: bool
) -> None:
    async with worker_of(handler, process).running(client):
        for name, value in WRONG.items():
            with pytest.raises(JobFailed) as failed:
                await run(client, name)
            assert failed.value.error == f"BadInput: cost must be a number from 0 to 1e+15, not {value!r}"
    assert [each.settled for each in attempts] == [None] * len(WRONG)


async def test_what_an_abandoned_thread_settles_is_refused(
    client: aiqueue.Client, attempts: list[JobContext], tmp_path: Path
) -> None:
    """Its slot was free at once, so the limit has counted all that was reserved."""
    started, refused = tmp_path / "started", tmp_path / "refused"
    worker = aiqueue.Worker()

    @worker.handle(Use)
    def settle_late(job: aiqueue.Job[Use]) -> None:
        started.touch()
        while not job.cancelled:
            time.sleep(0.005)
        while not attempts[0].is_over:
            time.sleep(0.005)
        with pytest.raises(Stale, match="this attempt is over"):
            job.settle(9)
        refused.touch()

    async with worker.running(client):
        handle = await client.enqueue(Use(do=""), tenant="acme")
        await eventually(started.exists)
        await handle.cancel()
        await eventually(refused.exists)
    assert [each.settled for each in attempts] == [None]


@everywhere
async def test_a_thread_that_a_job_left_behind_settles_neither_its_own_ended_job_nor_the_next_one(
    client: aiqueue.Client, attempts: list[JobContext], handler: Any, process: bool
) -> None:
    async with worker_of(handler, process).running(client):
        for _ in range(5):
            await run(client, "leave a thread that settles")
            assert "this attempt is over" in await run(client, "settle what is left")
    assert [each.settled for each in attempts[1::2]] == [None] * 5


def test_an_attempt_in_a_child_is_not_over_while_a_thread_of_it_tells_what_it_has_used() -> None:
    """Else the worker would take what the thread tells for the next job's."""
    telling, told = threading.Event(), threading.Event()

    class SlowWriter(io.BytesIO):
        def write(self, piece: Any) -> int:
            telling.set()
            assert told.wait(20)
            return super().write(piece)

    pipe = SlowWriter()
    context = _ChildContext(WorkerPipe(io.BytesIO(), pipe), Threads("test"), None)
    settling = threading.Thread(target=context.settle, args=(70.0,))
    settling.start()
    assert telling.wait(20)
    ending = threading.Thread(target=asyncio.run, args=(context.end(),))
    ending.start()
    ending.join(0.1)
    assert not context.is_over
    told.set()
    settling.join(20)
    ending.join(20)
    assert context.is_over
    pipe.seek(0)
    assert read_frame_blocking(pipe) == ["settle", 70.0]
    with pytest.raises(Stale):
        context.settle(71.0)


@pytest.mark.parametrize("handler", [use, use_sync])
async def test_what_a_suspect_settles_in_its_trial_counts(
    client: aiqueue.Client, account: Account, attempts: list[JobContext], handler: Any
) -> None:
    handle = await client.enqueue(Use(do="settle twice"), tenant="acme")
    await lose(client, account)
    async with worker_of(handler, False).running(client):
        assert await handle.result(25) != os.getpid()
    assert [each.settled for each in attempts] == [12.5]


async def test_what_a_suspect_settles_counts_where_no_child_can_run_it(
    client: aiqueue.Client, account: Account, attempts: list[JobContext]
) -> None:
    async def closure(job: aiqueue.Job[Use]) -> Any:
        return await use(job)

    handle = await client.enqueue(Use(do="settle twice"), tenant="acme")
    await lose(client, account)
    async with worker_of(closure, False).running(client):
        assert await handle.result(25) == os.getpid()
    assert [each.settled for each in attempts] == [12.5]
