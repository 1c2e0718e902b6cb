"""One tenant's slow documents hold up neither questions nor the documents of others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.rag import Rag, RagWorker, fetch_share
from aiqueue.rag.fetch_share import FetchShare, NoRoom

from ..support import eventually


class SlowHost:
    """A server that begins its answers, and ends them when it is told to. `open`: the requests under way."""

    def __init__(self) -> None:
        self.open = 0
        self.asked = 0
        self.go_on = asyncio.Event()
        self.address = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            self.open += 1
            self.asked += 1
            try:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n\r\n")
                await writer.drain()
                gone, told = asyncio.create_task(reader.read()), asyncio.create_task(self.go_on.wait())
                await asyncio.wait([gone, told], return_when=asyncio.FIRST_COMPLETED)
                for each in (gone, told):
                    each.cancel()
                writer.write(b"otters")
            finally:
                self.open -= 1
                writer.close()


@pytest.fixture
async def host() -> AsyncIterator[SlowHost]:
    host = SlowHost()
    server = await asyncio.start_server(host.answer, "127.0.0.1", 0)
    host.address = "{}:{}".format(*server.sockets[0].getsockname())
    yield host
    host.go_on.set()
    server.close()


@pytest.fixture
def worker(host: SlowHost, rag_file: Path) -> RagWorker:
    tenant = f'[[tenant]]\nname = "slow"\nprivate_hosts = ["{host.address}"]\n'
    rag_file.write_text(f"{rag_file.read_text()}{tenant}")
    return RagWorker(rag_file, concurrency=8)


async def ingest_slow(client: aiqueue.Client, host: SlowHost, count: int) -> list[Any]:
    rag = Rag(client)
    return [await rag.ingest(f"u{at}", tenant="slow", url=f"http://{host.address}/{at}") for at in range(count)]


async def test_a_question_does_not_wait_behind_documents(
    client: aiqueue.Client, worker: RagWorker, host: SlowHost
) -> None:
    async with worker.running(client):
        handles = await ingest_slow(client, host, 12)
        await eventually(lambda: host.open == 8)
        answer = await (await Rag(client).ask("otters", tenant="acme")).result(1.5)
        assert host.open == 8
        host.go_on.set()
        for each in handles:
            await each.result(20)
    assert answer["passages"] == []


async def test_slow_urls_of_a_tenant_hold_a_quarter_of_the_slots_and_none_fails(
    client: aiqueue.Client, worker: RagWorker, host: SlowHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch_share, "SLOW_S", 0.2)
    async with worker.running(client):
        handles = await ingest_slow(client, host, 20)
        await eventually(lambda: host.asked >= 8)
        found = await (await Rag(client).ingest("d", tenant="acme", content="Otters swim.")).result(5)
        await eventually(lambda: host.open == 2)
        host.go_on.set()
        results = [await each.result(20) for each in handles]
    assert found["outcome"] == "new"
    assert [each["outcome"] for each in results] == ["new"] * 20


async def test_a_worker_for_questions_or_documents_alone_takes_no_others(
    client: aiqueue.Client, worker: RagWorker
) -> None:
    worker.families = ("rag.queries",)
    question = await Rag(client).ask("otters", tenant="acme")
    document = await Rag(client).ingest("d", tenant="acme", content="Otters swim.")
    async with worker.running(client) as session:
        await question.result(10)
        assert list(session._families) == ["rag.queries"]
    worker.families = ("rag.ingest",)
    async with worker.running(client) as session:
        assert (await document.result(10))["outcome"] == "new"
        assert list(session._families) == ["rag.ingest"]


async def test_fast_fetches_are_not_bounded_and_what_waits_comes_back_one_after_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    share, gate = FetchShare(2), asyncio.Event()

    async def fetch() -> str:
        await gate.wait()
        return "fetched"

    fast = [asyncio.create_task(share.run("acme", fetch)) for _ in range(10)]
    await asyncio.sleep(0)
    gate.set()
    assert await asyncio.gather(*fast) == ["fetched"] * 10
    gate.clear()
    monkeypatch.setattr(fetch_share, "SLOW_S", 0.01)
    slow = [asyncio.create_task(share.run("acme", fetch)) for _ in range(5)]
    await eventually(lambda: sum(each.done() for each in slow) == 3)
    refused = [each for each in slow if each.done()]
    waits = []
    for _ in range(400):
        with pytest.raises(NoRoom) as error:
            await share.run("acme", fetch)
        waits.append(error.value.after_s or 0.0)
    assert waits[0] < waits[100] < waits[200] <= waits[-1] <= 300
    assert isinstance(refused[0].exception(), NoRoom)
    gate.set()
    assert await share.run("globex", fetch) == "fetched"
    assert sorted(type(each).__name__ for each in await asyncio.gather(*slow, return_exceptions=True)) == [
        "NoRoom", "NoRoom", "NoRoom", "str", "str",
    ]  # fmt: skip
    assert not share._tenants
