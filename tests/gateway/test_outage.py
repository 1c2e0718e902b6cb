"""The queue's server is away while a call is under way: the call is not made again, and nothing is lost of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import Backoff
from aiqueue.errors import NotFound, Unavailable
from aiqueue.gateway import UsageLedger, UsageRecord, handler
from aiqueue.gateway.runtime import Runtime
from aiqueue.gateway.standin import Behaviour, Fault, StandIn
from aiqueue.gateway.stored_chunks import ChunkWriter, read_chunks
from aiqueue.topology import provision

from ..support import Eventually
from .running import KEY, KEY_VARIABLE, ask, billed, records, running, write_config


@pytest.fixture
def config(tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return write_config(tmp_path, standin.url, more='[[budget]]\ntenant = "acme"\nmonth = 1\n')


@pytest.fixture
async def server(own_server: Any) -> Any:
    return own_server()


@pytest.fixture
async def client(server: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await provision.apply(client.connection, client.topology)
        yield client


@pytest.mark.parametrize("stream", [False, True])
async def test_a_call_outlives_a_restart_of_the_server_and_is_made_once(
    client: aiqueue.Client, server: Any, config: Path, standin: StandIn, eventually: Eventually, *, stream: bool
) -> None:
    standin.behaviour = Behaviour(token_s=0.15)
    standin.order(Fault(delay_s=0.3))
    async with running(client, config):
        handle = await client.enqueue(ask(stream=stream), tenant="acme")
        await eventually(lambda: len(standin.calls) == 1)
        server.kill()
        await asyncio.sleep(0.8)  # so that chunks come, and the answer, while no server is there
        await asyncio.to_thread(server.start)
        answer: Any = await handle.result(timeout=40)
    assert len(standin.calls) == 1
    assert answer["choices"][0]["message"]["content"] == "one two three one two"
    assert answer["aiqueue"]["possibly_billed"] == 0
    (record,) = await records(client)
    assert (record.outcome, record.cost_micros) == ("ok", billed(standin))
    if stream:
        text = ""
        async with aclosing(handle.stream(timeout=10)) as items:
            async for item in items:
                if item.event == "chunk":
                    text += "".join(each["delta"].get("content") or "" for each in item.data["choices"])
        assert text == "one two three one two"


async def test_chunks_with_a_hole_are_not_taken_for_an_answer(client: aiqueue.Client) -> None:
    """An image may be too large for a message."""
    found: dict[str, list[dict[str, Any]]] = {}
    worker = aiqueue.Worker()

    @worker.handle(type(ask()))
    async def write(job: aiqueue.Job[Any]) -> dict[str, Any]:
        for call in ("whole", "cut"):
            on_chunk = ChunkWriter(job, call)
            for content in ("a", "x" * 2_000_000 if call == "cut" else "b", "c"):
                await on_chunk({"choices": [{"index": 0, "delta": {"content": content}}]})
        found.update(await read_chunks(client, job))
        return {}

    async with worker.running(client):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=20)
    assert {call: len(chunks) for call, chunks in found.items()} == {"whole": 3}
    assert all("aiqueue" not in chunk for chunk in found["whole"])


async def test_a_first_chunk_without_a_text_shares_an_entry_with_the_second_or_comes_alone_soon(
    client: aiqueue.Client,
) -> None:
    """So the text does not wait until the first chunk is stored."""
    worker = aiqueue.Worker()
    silent = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    goes_on = asyncio.Event()

    @worker.handle(type(ask()))
    async def write(job: aiqueue.Job[Any]) -> dict[str, Any]:
        quick, slow = ChunkWriter(job, "quick"), ChunkWriter(job, "slow")
        for content in ("a", "b"):
            await quick(silent if content == "a" else {"choices": [{"index": 0, "delta": {"content": content}}]})
        await slow(silent)
        await goes_on.wait()
        await slow({"choices": [{"index": 0, "delta": {"content": "c"}}]})
        return {}

    async with worker.running(client):
        handle = await client.enqueue(ask(), tenant="acme")
        said = []
        async with aclosing(handle.stream(timeout=20)) as items:
            async for item in items:
                if item.event == "chunk":
                    call = item.data.get("aiqueue", {}).get("call_id")
                    said.append((call, item.data["choices"][0]["delta"]["content"], item.cursor.split("-")[3]))
                    if call == "slow":
                        goes_on.set()
    assert [each[:2] for each in said] == [("quick", ""), (None, "b"), ("slow", ""), (None, "c")]
    assert said[0][2] == said[1][2], "two entries"
    assert said[2][2] != said[3][2], "one entry"


async def test_without_a_stream_of_usage_the_worker_says_so_and_does_not_start(
    client: aiqueue.Client, config: Path
) -> None:
    await client.connection.api(f"STREAM.DELETE.{client.topology.usage_stream.name}", {})
    with pytest.raises(NotFound, match="aiqueue apply"):
        async with running(client, config):
            pass


async def test_calls_that_were_refused_do_not_use_up_the_attempts_of_an_outage(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "UNANSWERED_MAX", 3)
    monkeypatch.setattr(handler, "BACKOFF", Backoff(first="10ms", cap="10ms"))
    standin.order(Fault(429, count=5))
    begin, failing = UsageLedger.begin, [Unavailable("away"), Unavailable("away")]

    async def begin_after_the_outage(ledger: UsageLedger, record: UsageRecord) -> int:
        if len(standin.calls) == 5 and failing:
            raise failing.pop()
        return await begin(ledger, record)

    monkeypatch.setattr(UsageLedger, "begin", begin_after_the_outage)
    async with running(client, config):
        answer: Any = await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    assert (failing, answer["aiqueue"]["attempts"]) == ([], 6)


async def test_calls_that_were_refused_do_not_let_a_limited_call_begin_late(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "LATE_MAX", 3)
    monkeypatch.setattr(handler, "BACKOFF", Backoff(first="10ms", cap="10ms"))
    standin.order(Fault(429, count=5))
    slow = [handler.START_WITHIN_S]
    now = Runtime.now

    async def late(runtime: Runtime) -> float:
        await asyncio.sleep(slow.pop() if slow and len(standin.calls) == 5 else 0)
        return await now(runtime)

    await client.set_limit("gateway.requests", "*", requests=100)
    async with running(client, config):
        monkeypatch.setattr(Runtime, "now", late)
        await (await client.enqueue(ask(), tenant="globex")).result(timeout=10)
    assert [each.attempt for each in await records(client)][-2:] == [0, 6]


async def test_a_call_of_a_limited_model_that_would_begin_late_is_made_by_the_next_attempt(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handler, "START_WITHIN_S", 0.1)
    slow = [0.3]
    now = Runtime.now

    async def late(runtime: Runtime) -> float:
        await asyncio.sleep(slow.pop() if slow else 0)
        return await now(runtime)

    await client.set_limit("gateway.requests", "*", requests=100)
    async with running(client, config):
        monkeypatch.setattr(Runtime, "now", late)
        answer: Any = await (await client.enqueue(ask(), tenant="globex")).result(timeout=10)
    assert len(standin.calls) == 1
    assert (answer["aiqueue"]["possibly_billed"], answer["aiqueue"]["attempts"]) == (0, 1)
    assert [each.outcome for each in await records(client)] == ["failed", "ok"]
