"""Results of plain first attempts: sent without waiting, and in every case what a writer would have stored."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aiqueue
from aiqueue import headers
from aiqueue.errors import JobFailed
from aiqueue.journal import Writer
from aiqueue.worker.pipelined import ResultPipeline

from ..support import create_streams, eventually

pytestmark = pytest.mark.families("agent.tasks")


class Add(aiqueue.Message, kind="add"):
    n: int = 0


def worker_of(ran: list[int], **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=20, **options)

    @worker.handle(Add)
    async def add(job: aiqueue.Job[Add]) -> dict[str, int]:
        ran.append(job.message.n)
        return {"n": job.message.n + 1}

    return worker


async def journal_of(client: aiqueue.Client, job_id: str) -> list[Any]:
    stream = client.topology.journal_stream.name
    subject = f"{client.topology.family('agent.tasks').journal}.acme.{job_id}"
    return [stored async for stored in client.connection.read(stream, subject)]


async def no_jobs(client: aiqueue.Client) -> bool:
    state = (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["state"]
    return bool(state["messages"] == 0)


async def test_the_entry_is_the_one_that_a_writer_stores(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = []
    async with worker_of([]).running(client):
        for way in ("pipelined", "written"):
            if way == "written":
                monkeypatch.setattr(ResultPipeline, "try_send", lambda *_: False)
            handle = await client.enqueue(Add(n=1), tenant="acme")
            assert await handle.result(25) == {"n": 2}
            (entry,) = await journal_of(client, handle.id)
            stored.append((handle.id, entry))
    (_, one), (_, other) = stored
    assert one.data == other.data
    assert [*one.headers] == [*other.headers]
    own = {headers.MSG_ID, headers.ENQUEUED, headers.STARTED_AT, headers.RUN}
    assert {n: v for n, v in one.headers.items() if n not in own} == {
        n: v for n, v in other.headers.items() if n not in own
    }
    for job_id, entry in stored:
        subject, _, epoch, number = entry.headers[headers.MSG_ID].rsplit("/", 3)
        assert subject.endswith(f".acme.{job_id}")
        assert (epoch, number) == ("1", "1")


def held_worker(value: str, **options: Any) -> tuple[aiqueue.Worker, asyncio.Event, asyncio.Event]:
    """A worker whose handler sets the first event, and returns `value` once the second one is set."""
    running, go = asyncio.Event(), asyncio.Event()
    worker = aiqueue.Worker(**options)

    @worker.handle(Add)
    async def add(job: aiqueue.Job[Add]) -> str:
        running.set()
        await go.wait()
        return value

    return worker, running, go


async def test_a_result_is_refused_when_another_attempt_has_ended_the_job(client: aiqueue.Client) -> None:
    """The handler is still running when somebody else writes the result: nothing is overwritten, and the job ends."""
    worker, running, go = held_worker("late")
    handle = await client.enqueue(Add(), tenant="acme")
    async with worker.running(client):
        await running.wait()
        subject = f"{client.topology.family('agent.tasks').journal}.acme.{handle.id}"
        before = await client.journal.read_run(subject, 1, 0.0)
        other = Writer(client.journal, subject, run=1, enqueued_at=0.0, attempt=1, record=before)
        await other.write("result", "first")
        go.set()
        await eventually(lambda: no_jobs(client))
    assert await handle.result(5) == "first"
    assert len(await journal_of(client, handle.id)) == 1


async def test_a_drain_waits_for_results_under_way(own_server: Any) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        ran: list[int] = []
        worker = worker_of(ran, drain_timeout=20)
        async with worker.running(client) as session:
            handles = [await client.enqueue(Add(n=n), tenant="acme") for n in range(20)]
            await eventually(lambda: ran)
            server.pause()
            try:
                draining = asyncio.create_task(session.drain())
                await eventually(lambda: not session.running or session.vitals()["state"] == "draining")
            finally:
                server.resume()
            await draining
            assert session.clean
        done = set(ran)
        for handle in handles[: len(done)]:
            assert await handle.result(20) == {"n": handles.index(handle) + 1}
    assert len(ran) == len(done), "none ran twice"


async def test_a_drain_that_runs_out_returns_the_jobs_whose_results_are_under_way(own_server: Any) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        worker, running, go = held_worker("done", drain_timeout=0.3)
        handle = await client.enqueue(Add(), tenant="acme")
        async with worker.running(client) as session:
            await running.wait()
            server.pause()
            try:
                go.set()
                draining = asyncio.create_task(session.drain())
                await eventually(lambda: not session.running)
                assert not session.clean
            finally:
                server.resume()
            await draining
        async with worker.running(client):
            assert await handle.result(20) == "done"
            await eventually(lambda: no_jobs(client), within=20)  # before its lease of 30 s has expired


async def test_results_in_flight_when_the_connection_is_lost_are_stored_once(own_server: Any) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        ran: list[int] = []
        handles = [await client.enqueue(Add(n=n), tenant="acme") for n in range(50)]
        async with worker_of(ran).running(client):
            await eventually(lambda: len(ran) >= 10)
            server.kill()
            await eventually(lambda: not client.connection.connected)
            server.start()
            for number, handle in enumerate(handles):
                assert await handle.result(60) == {"n": number + 1}
        for handle in handles:
            results = [each for each in await journal_of(client, handle.id) if each.headers[headers.EVENT] == "result"]
            assert len(results) == 1


@pytest.mark.parametrize("value", [{1, 2}, object(), "x" * 3_000_000], ids=["a set", "not encodable", "large"])
async def test_what_cannot_be_sent_is_settled_as_before(client: aiqueue.Client, value: Any) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Add)
    async def add(job: aiqueue.Job[Add]) -> Any:
        return value

    handle = await client.enqueue(Add(), tenant="acme")
    async with worker.running(client):
        if isinstance(value, set | str):
            assert await handle.result(25) == ([1, 2] if isinstance(value, set) else value)
        else:
            with pytest.raises(JobFailed, match="the result cannot be kept") as failed:
                await handle.result(25)
            assert failed.value.reason == "result"
