"""Workers that are killed -9 between the writes of a large result or step: the document, then the entry."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.documents import Collector

from ..support import create_streams, eventually, wait_until
from .test_kill import WorkerPool

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
    import os, signal
    import aiqueue
    from aiqueue.documents import Documents
    from aiqueue.journal import Writer

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    FIRST = not os.path.exists("first")
    open("first", "w").close()

    def note(event):
        os.write(LOG, f"{event} 1 {os.getpid()}\\n".encode())

    async def die(*_, **__):
        note("killed")
        os.kill(os.getpid(), signal.SIGKILL)

    def die_after(name):
        act = getattr(Documents, name)
        async def act_and_die(self, *args):
            await act(self, *args)
            await die()
        setattr(Documents, name, act_and_die)

    if FIRST and os.environ["DIES"] == "before the step's entry":
        die_after("hold_step")
    elif FIRST and os.environ["DIES"] == "before the result's entry":
        die_after("hold_result")
    elif FIRST:
        from aiqueue.worker.replies import Replies
        Replies.ack_and_release = die

    class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
        n: int

    worker = aiqueue.Worker()

    def large(n):
        note("step")
        return {"n": n, "text": "x" * 1_000_000}

    @worker.handle(Sleep)
    async def sleep(job):
        return await job.step("large", large, job.message.n)
    """


class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
    n: int


@pytest.fixture(params=["before the step's entry", "before the result's entry", "before the ack"])
def pool(request: pytest.FixtureRequest, tmp_path: Path, account: Any, monkeypatch: Any) -> Iterator[WorkerPool]:
    monkeypatch.setenv("DIES", request.param)
    pool = WorkerPool(tmp_path, account, APP, STREAM)
    yield pool
    for process in pool.alive:
        process.kill()
        process.wait()


async def test_a_job_killed_between_document_and_entry_ends_once_and_doubles_nothing(
    pool: WorkerPool, account: Any, request: pytest.FixtureRequest
) -> None:
    streams = pool.directory / "streams"
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        handle = await client.enqueue(Sleep(n=7), tenant="acme")
        first = pool.start()
        wait_until(lambda: first.poll() is not None, within=30)
        assert len(pool.lines("killed")) == 1
        pool.start()
        assert await handle.result(timeout=30) == {"n": 7, "text": "x" * 1_000_000}
        dies = request.node.callspec.params["pool"]
        steps = len(pool.lines("step"))
        assert steps == (2 if dies == "before the step's entry" else 1), "a step that was kept is not called again"
        events = [each.headers["Aiq-Event"] async for each in client.connection.read("AI_RESULTS", ">")]
        assert events.count("result") == 1

        async def ended() -> bool:
            return (await client.connection.api("STREAM.INFO.TEST_SLEEPS"))["state"]["messages"] == 0

        await eventually(ended)

        async def released() -> bool:
            return sum([each.steps async for each in client.documents.find()]) == 0

        await eventually(released)
        await Collector(client.connection, client.topology).collect(grace_s=0.0)
        found = [each.results async for each in client.documents.find()]
        assert found == [2 if dies == "before the result's entry" else 1], "the hold of the killed attempt expires"
        assert await handle.result(timeout=10) == {"n": 7, "text": "x" * 1_000_000}
