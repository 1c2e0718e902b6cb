"""What handlers say of their jobs while they run: from threads, from child processes, and too late."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue import provision, subjects
from aiqueue.errors import BadInput
from aiqueue.journal import PROGRESS, RESULT, Entry, entry_of

from . import suspects
from .suspects import Act


class Task(aiqueue.Message, kind="task"):
    n: int = 0


@pytest.fixture
async def client(account: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        yield client


async def journal_of(client: aiqueue.Client, job_id: str) -> list[Entry]:
    read = client.connection.read("AI_RESULTS", subjects.journal("ai.agent.results", "acme", job_id))
    return [entry_of(each) async for each in read]


def told(entries: list[Entry]) -> list[tuple[float, str]]:
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
        assert await handle.result(10) == "done"
        entries = await journal_of(client, handle.id)
    assert told(entries) == [(n / 5, f"step {n}") for n in range(5)]
    assert entries[-1].event == RESULT


async def test_a_plain_function_in_a_child_process_reports_progress(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=True)(suspects.act_sync)
    async with worker.running(client):
        handle = await client.enqueue(Act(do="progress"), tenant="acme")
        await handle.result(20)
        assert told(await journal_of(client, handle.id)) == [(0.5, "half"), (1, "whole")]


async def test_on_the_loop_itself_the_blocking_form_is_refused(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    said: list[str] = []

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        with pytest.raises(BadInput) as refused:
            job.progress_sync(0.5)
        said.append(str(refused.value))

    async with worker.running(client):
        await (await client.enqueue(Task(), tenant="acme")).result(10)
    assert said == ["this blocks the event loop: in async code use `progress` and not `progress_sync`"]


@pytest.mark.parametrize("process", [False, True], ids=["here", "in a child"])
async def test_what_a_handler_left_behind_says_after_its_end_is_refused(client: aiqueue.Client, process: bool) -> None:
    """In a child the parent would take it for the next job's."""
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=process)(suspects.act)
    async with worker.running(client):
        first = await client.enqueue(Act(do="leave behind"), tenant="acme")
        await first.result(20)
        second = await client.enqueue(Act(do="left behind", value=0.5), tenant="acme")
        assert await second.result(20) == "Stale"
        assert told(await journal_of(client, first.id)) == []
        assert told(await journal_of(client, second.id)) == []
