"""Results of any size: stored as documents beside the journal, and read by everybody as if they were in it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import cbor2
import nats
import pytest

import aiqueue
from aiqueue import codec, headers
from aiqueue.client.client import Client
from aiqueue.documents.collector import Collected, Collector
from aiqueue.documents.store import RESULT
from aiqueue.worker import results

from ..support import Account, create_streams, eventually

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
        await create_streams(client)
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


# -- what cannot be stored, and what is left behind


async def test_a_result_without_space_makes_a_dead_letter_that_says_what_to_do(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "NO_ROOM_S", 0.1)
    config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
    await client.connection.api(f"STREAM.UPDATE.{STREAM}", config | {"max_bytes": MB})
    async with worker_of().running(client):
        handle = await client.enqueue(Make(size=3 * MB), tenant="acme")
        with pytest.raises(aiqueue.JobFailed, match=r"free space in OBJ_AI_DOCUMENTS .*then replay this job") as failed:
            await handle.result(30)
    assert failed.value.reason == "result"
    assert await holds(client) == [], "no hold is left of a document that was not stored"


async def test_the_document_of_a_result_that_was_not_written_is_released(client: Client) -> None:
    started = asyncio.Event()
    proceed = asyncio.Event()

    async def wait(job: aiqueue.Job[Make]) -> Any:
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            await proceed.wait()
        return made(job.message.size)

    async with worker_of(wait).running(client):
        handle = await client.enqueue(Make(size=MB), tenant="acme")
        await started.wait()
        subject = f"ai.agent.results.acme.{handle.id}"
        fields = {
            "Aiq-Event": "cancelled",
            "Aiq-Run": "1",
            "Aiq-Epoch": "9",
            "Aiq-Attempt": "1",
            "Nats-Msg-Id": "other",
        }
        await client.connection.store(subject, codec.encode({"reason": "cancelled", "error": "x"}), fields)
        proceed.set()  # the attempt returns, and its entry is refused

        async def released() -> bool:
            return await holds(client) == []

        await eventually(released)
        with pytest.raises(aiqueue.JobFailed):
            await handle.result(10)


async def test_a_hold_of_a_result_expires_after_its_entry(client: Client) -> None:
    async with worker_of().running(client):
        handle = await client.enqueue(Make(size=MB), tenant="acme")
        await handle.result(30)
    (hold,) = await holds(client)
    ttl_s = int(hold.headers["Nats-TTL"].removesuffix("s"))
    assert 86_400 + 3_000 < ttl_s < 86_400 + 4_000
    await collect(client)
    assert await (await client.job(handle.id)).result(10) == made(MB), "a result that is held is not collected"
