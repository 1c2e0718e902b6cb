"""Results of any size: stored as documents beside the journal, and read by everybody as if they were in it."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import cbor2
import nats
import pytest

import aiqueue
from aiqueue import headers
from aiqueue.client.client import Client
from aiqueue.documents.collector import Collected, Collector
from aiqueue.documents.store import RESULT
from aiqueue.topology import provision

from ..support import Account

STREAM, BUCKET = "OBJ_AI_DOCUMENTS", "AI_DOCUMENTS"
MB = 1_000_000


class Make(aiqueue.Message, kind="make"):
    size: int
    fill: str = "x"


class Ask(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    size: int
    request_id: str = ""


async def make(job: aiqueue.Job[Make]) -> Any:
    return {"text": job.message.fill * job.message.size}


def made(size: int, fill: str = "x") -> Any:
    return {"text": fill * size}


def worker_of(function: Callable[[aiqueue.Job[Any]], Any] = make, model: Any = Make, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=options.pop("concurrency", 4))
    worker.handle(model, **options)(function)
    return worker


@pytest.fixture
async def client(account: Account) -> AsyncIterator[Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        yield client


async def stored(client: Client, stream: str = STREAM, subject: str = ">") -> list[Any]:
    return [each async for each in client.connection.read(stream, subject)]


async def entry_of(client: Client, job_id: str) -> Any:
    return (await stored(client, "AI_RESULTS", f"ai.agent.results.acme.{job_id}"))[-1]


async def holds(client: Client) -> list[Any]:
    return [each async for each in stored_holds(client)]


async def stored_holds(client: Client) -> AsyncIterator[Any]:
    for each in await stored(client, subject=f"$O.{BUCKET}.R.>"):
        if each.subject.split(".")[-2] == RESULT:
            yield each


async def collect(client: Client, **ages: float) -> Collected:
    return await Collector(client.connection, client.topology).collect(**{"grace_s": 0.0, **ages})


# -- read by everybody


@pytest.mark.parametrize("size", [10, 300_000, 3 * MB])
@pytest.mark.parametrize("process", [False, True])
async def test_a_result_of_every_size_comes_back_equal(client: Client, size: int, process: bool) -> None:
    async with worker_of(process=process).running(client):
        handle = await client.enqueue(Make(size=size), tenant="acme")
        assert await handle.result(30) == made(size)
        assert (await handle.status()).result == made(size)
        items = [item async for item in handle.stream(timeout=30)]
        assert [(item.event, item.data) for item in items] == [("result", made(size))]
        looked_up = await client.job(handle.id)
        assert await looked_up.result(30) == made(size)


async def test_a_result_of_50_mb_is_equal_here_and_in_a_plain_client(client: Client, account: Account) -> None:
    size = 50 * MB
    async with worker_of().running(client):
        handle = await client.enqueue(Make(size=size), tenant="acme")
        assert await handle.result(60) == made(size)
    raw = await nats.connect(account.url, user=account.user, password=account.password)
    try:
        entry = await raw.jetstream().get_last_msg("AI_RESULTS", f"ai.agent.results.acme.{handle.id}")
        assert entry.headers is not None
        digest = hashlib.sha256()
        chunks = await raw.jetstream().object_store(BUCKET)
        got = await chunks.get(f"acme/{entry.headers[headers.DOCUMENT]}")
        digest.update(got.data or b"")
        assert digest.hexdigest() == entry.headers[headers.DOCUMENT]
        assert cbor2.loads(got.data or b"") == made(size)
    finally:
        await raw.close()
