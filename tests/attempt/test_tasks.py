"""Progress and chunks that handlers report: from threads, from child processes, and too late."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.attempt import cancellation
from aiqueue.errors import BadInput, JobFailed
from aiqueue.journal.chunks import BUFFERED_MAX
from aiqueue.journal.entries import CANCELLED, CHUNK, PROGRESS, RESULT, RETRY, Entry, entry_from_stored
from aiqueue.journal.follower import StreamItem

from .. import suspects
from ..support import NatsProcess, create_streams, eventually
from ..suspects import Act

pytestmark = pytest.mark.families("agent.tasks")


class Task(aiqueue.Message, kind="task"):
    n: int = 0


async def journal_of(client: aiqueue.Client, job_id: str) -> list[Entry]:
    read = client.connection.read("AI_RESULTS", subjects.journal("ai.agent.results", "acme", job_id))
    return [entry_from_stored(each) async for each in read]


def progress_of(entries: list[Entry]) -> list[tuple[float, str]]:
    return [(each.data["fraction"], each.data["note"]) for each in entries if each.event == PROGRESS]


async def test_a_plain_function_reports_progress(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task)
    def task(job: aiqueue.Job[Task]) -> str:
        for n in range(5):
            job.progress_sync(n / 5, f"step {n}")
        return "done"

    async with worker.running(client):
        handle = await client.enqueue(Task(), tenant="acme")
        assert await handle.result(25) == "done"
        entries = await journal_of(client, handle.id)
    assert progress_of(entries) == [(n / 5, f"step {n}") for n in range(5)]
    assert entries[-1].event == RESULT


async def test_a_plain_function_in_a_child_process_reports_progress(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=True)(suspects.act_sync)
    async with worker.running(client):
        handle = await client.enqueue(Act(do="progress"), tenant="acme")
        await handle.result(20)
        assert progress_of(await journal_of(client, handle.id)) == [(0.5, "half"), (1, "whole")]


async def test_on_the_loop_itself_the_blocking_form_is_refused(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    errors: list[str] = []

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        with pytest.raises(BadInput) as refused:
            job.progress_sync(0.5)
        errors.append(str(refused.value))

    async with worker.running(client):
        await (await client.enqueue(Task(), tenant="acme")).result(25)
    assert errors == ["this blocks the event loop: in async code use `progress` and not `progress_sync`"]


@pytest.mark.parametrize("process", [False, True], ids=["here", "in a child"])
async def test_progress_that_a_handler_reports_after_its_end_is_refused(client: aiqueue.Client, process: bool) -> None:
    """In a child the parent would take it for the next job's."""
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=process)(suspects.act)
    async with worker.running(client):
        first = await client.enqueue(Act(do="leave behind"), tenant="acme")
        await first.result(20)
        second = await client.enqueue(Act(do="left behind", value=0.5), tenant="acme")
        assert await second.result(20) == "Stale"
        assert progress_of(await journal_of(client, first.id)) == []
        assert progress_of(await journal_of(client, second.id)) == []


def chunks(entries: list[Entry]) -> list[list[int]]:
    return [chunk for entry in entries if entry.event == CHUNK for chunk in entry.data]


@pytest.mark.parametrize("process", [False, True], ids=["thread", "child"])
async def test_a_plain_functions_chunks_are_stored_in_order_and_before_its_result(
    client: aiqueue.Client, *, process: bool
) -> None:
    """Given as fast as it can; those that are given while a write is under way share the next entry."""
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=process)(suspects.act_sync)
    async with worker.running(client):
        handle = await client.enqueue(Act(do="stream", value=2_000), tenant="acme")
        await handle.result(30)
        entries = await journal_of(client, handle.id)
    assert chunks(entries) == [[1, n] for n in range(2_000)]
    assert entries[-1].event == RESULT


async def test_a_killed_childs_chunks_end_where_the_next_attempts_begin(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=True, retry=aiqueue.Backoff(first=0.05))(suspects.act_sync)
    async with worker.running(client):
        handle = await client.enqueue(Act(do="stream, die once", value=100), tenant="acme")
        await handle.result(30)
        entries = await journal_of(client, handle.id)
    retry_index = [each.event for each in entries].index(RETRY)
    assert chunks(entries[:retry_index]) == [[1, n] for n in range(51)]
    assert chunks(entries[retry_index:]) == [[2, n] for n in range(100)]


async def test_a_child_that_streams_waits_while_the_journal_cannot_be_written(
    own_server: Callable[..., NatsProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has given is held by nobody but within the bounds of one job's chunks."""
    monkeypatch.setenv("STREAMED", str(log := tmp_path / "log"))
    server = own_server()

    def given() -> int:
        return log.stat().st_size if log.exists() else 0

    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        worker = aiqueue.Worker(processes=1)
        worker.handle(Act, process=True, timeout=None)(suspects.act_sync)
        async with worker.running(client):
            handle = await client.enqueue(Act(do="stream", value=1_500), tenant="acme")
            await eventually(lambda: given() > 100, within=40)
            server.pause()
            paused_at, waits_at = given(), -1
            while waits_at != (waits_at := given()):  # until it waits
                await asyncio.sleep(0.5)
            server.resume()
            assert waits_at < 1_500
            assert await handle.result(60)
            entries = await journal_of(client, handle.id)
    assert waits_at - paused_at <= 3 * BUFFERED_MAX  # held, in the write under way, in one whose answer was heard
    assert chunks(entries) == [[1, n] for n in range(1_500)]


@pytest.mark.parametrize("process", [False, True], ids=["thread", "child"])
async def test_a_streaming_plain_function_is_cancelled(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, *, process: bool
) -> None:
    """Its next chunk is refused, also where it never looks at `cancelled`. A child would be killed much later."""
    monkeypatch.setattr(cancellation, "GRACE_S", 60)
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=process)(suspects.act_sync)
    async with worker.running(client) as session:
        handle = await client.enqueue(Act(do="stream", value=1e9), tenant="acme")
        await eventually(lambda: entered(client, handle.id), within=40)
        assert await handle.cancel()
        await eventually(lambda: session.running == 0)
        with pytest.raises(JobFailed, match="cancelled"):
            await handle.result(25)
        entries = await journal_of(client, handle.id)
        await asyncio.sleep(0.2)
        assert await journal_of(client, handle.id) == entries
    assert [each.event for each in entries if each.final] == [CANCELLED]
    assert chunks(entries) == [[1, n] for n in range(len(chunks(entries)))]


async def entered(client: aiqueue.Client, job_id: str) -> bool:
    return bool(await journal_of(client, job_id))


async def test_who_follows_a_job_that_is_cancelled_gets_its_chunks_and_the_end(client: aiqueue.Client) -> None:
    """The cancellation is another writer's, and no other attempt."""
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        for n in range(1_000_000):
            await job.chunk(n)

    items: list[StreamItem] = []
    async with worker.running(client):
        handle = await client.enqueue(Task(), tenant="acme")
        async for item in handle.stream(timeout=20):
            items.append(item)
            if len(items) == 200:
                assert await handle.cancel()
    assert [each.event for each in items] == [CHUNK] * (len(items) - 1) + [CANCELLED]
    assert [each.data for each in items[:-1]] == list(range(len(items) - 1))
