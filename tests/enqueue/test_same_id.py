"""Two live jobs of one tenant, family and id: past the duplicate window, or published without a Msg-Id."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest

import aiqueue
from aiqueue.errors import JobFailed

from ..support import create_streams


class Request(aiqueue.Message, kind="agent.task"):
    prompt: str
    task_id: str = ""


@pytest.fixture
async def client(account: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        config = (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["config"]
        await client.connection.api("STREAM.UPDATE.AI_AGENT_TASKS", {**config, "duplicate_window": 100_000_000})
        yield client


async def twice(client: aiqueue.Client, first: str, second: str) -> list[aiqueue.Handle]:
    one = await client.enqueue(Request(prompt=first, task_id="r"), tenant="acme")
    async with asyncio.timeout(25):
        while (two := await client.enqueue(Request(prompt=second, task_id="r"), tenant="acme")).duplicate:
            await asyncio.sleep(0.05)
    return [one, two]


async def test_both_are_run_and_counted_by_themselves_to_their_end(client: aiqueue.Client) -> None:
    runs: Counter[tuple[str, int]] = Counter()
    worker = aiqueue.Worker()

    @worker.handle(Request, retry=aiqueue.Backoff(attempts=3, first=0.05, cap=0.1))
    async def request(job: aiqueue.Job[Request]) -> None:
        runs[job.message.prompt, job.attempt] += 1
        raise ValueError(job.message.prompt)

    await twice(client, "one", "two")
    async with worker.running(client):
        async with asyncio.timeout(25):
            while len([each async for each in client.dead.find()]) < 2:
                await asyncio.sleep(0.05)
    assert runs == {(prompt, attempt): 1 for prompt in ("one", "two") for attempt in (1, 2, 3)}
    letters = [each async for each in client.dead.find()]
    assert sorted(each.error for each in letters) == ["ValueError: one", "ValueError: two"]
    assert all(len(each.history) == 3 for each in letters)
    info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
    assert info["state"]["messages"] == 0


async def test_the_later_ones_result_is_found_although_the_earlier_one_writes_after_it(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    second_done = asyncio.Event()

    @worker.handle(Request, retry=aiqueue.Backoff(attempts=2, first=0.05))
    async def request(job: aiqueue.Job[Request]) -> str:
        if job.message.prompt == "one":
            await second_done.wait()
            raise ValueError("one fails")
        return "two done"

    one, two = await twice(client, "one", "two")
    async with worker.running(client):
        assert await two.result(25) == "two done"
        second_done.set()
        async with asyncio.timeout(25):
            while not [each async for each in client.dead.find()]:
                await asyncio.sleep(0.05)
        assert await two.result(25) == "two done"
        with pytest.raises(JobFailed, match="one fails"):
            await one.result(25)


async def test_the_guides_snippet_published_twice_runs_each_once(client: aiqueue.Client, account: Any) -> None:
    ran: list[str] = []
    worker = aiqueue.Worker()

    @worker.handle(Request, retry=aiqueue.Backoff(attempts=2, first=0.05))
    async def request(job: aiqueue.Job[Request]) -> None:
        ran.append(job.message.prompt)
        if job.attempt == 1:
            raise ValueError("once")

    plain = await nats.connect(account.url, user=account.user, password=account.password)
    job_headers = {"task_id": "r-9", "model": "m", "priority": "normal"}
    for prompt in (b"1", b"2"):
        await plain.publish("ai.agent.tasks.acme", b'{"prompt": "%b"}' % prompt, headers=job_headers)
    await plain.flush()
    await plain.close()
    async with worker.running(client):
        async with asyncio.timeout(25):
            while (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["state"]["messages"]:
                await asyncio.sleep(0.05)
    assert sorted(ran) == ["1", "1", "2", "2"]


async def test_a_recreated_stream_does_not_give_the_old_result(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Request)
    async def request(job: aiqueue.Job[Request]) -> str:
        return job.message.prompt

    async with worker.running(client):
        for n in range(3):
            await (await client.enqueue(Request(prompt=f"fill {n}"), tenant="acme")).result(25)
        handle = await client.enqueue(Request(prompt="old", task_id="r"), tenant="acme")
        assert await handle.result(25) == "old"
    await client.connection.api("STREAM.DELETE.AI_AGENT_TASKS")
    await create_streams(client)
    handle = await client.enqueue(Request(prompt="new", task_id="r"), tenant="acme")
    with pytest.raises(aiqueue.errors.ResultTimeout):
        await handle.result(0.3)
    async with worker.running(client):
        assert await handle.result(25) == "new"
