"""Results of any size: stored as documents beside the journal, and read by everybody as if they were in it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from typing import Any

import cbor2
import nats
import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import codec, headers
from aiqueue.bus.message import to_result
from aiqueue.cli.app import app
from aiqueue.client.client import Client
from aiqueue.documents.collector import Collected, Collector
from aiqueue.documents.holds import RESULT
from aiqueue.job.children import ChildOutcome, GatheredChild, value_of_outcome
from aiqueue.processes import protocol
from aiqueue.worker import results

from ..connection.test_permissions import two, users
from ..support import Account, NatsProcess, create_streams, eventually

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


async def test_a_result_of_20_mb_is_equal_here_and_in_a_plain_client(client: Client, account: Account) -> None:
    size = 20 * MB
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


async def test_a_hold_of_a_result_outlives_the_entry_of_a_family_that_keeps_results_for_its_own_time(
    client: Client,
) -> None:
    await client.documents.hold_result("acme", b"x" * MB, 60)
    (hold,) = await holds(client)
    assert hold.headers["Nats-TTL"] == "3660s"


# -- what a reader gets where the document cannot be read


async def only_chunks(client: Client) -> list[Any]:
    return await stored(client, subject=f"$O.{BUCKET}.C.>")


@pytest.mark.parametrize("damage", ["missing", "other bytes", "a chunk less", "no result"])
async def test_a_result_whose_document_is_damaged_is_an_error_and_never_other_data(
    client: Client, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.documents.objects.MISSING_CHUNK_S", 0.2)
    expected: type[Exception] = aiqueue.errors.NotFound if damage == "missing" else aiqueue.errors.Corrupt
    async with worker_of().running(client):
        handle = await client.enqueue(Make(size=MB), tenant="acme")
        await handle.result(30)
    first, *_ = await only_chunks(client)
    if damage == "missing":
        await client.connection.api(f"STREAM.PURGE.{STREAM}")
    elif damage == "a chunk less":
        await client.connection.delete(STREAM, first.seq)
    elif damage == "other bytes":
        await client.connection.api(f"STREAM.PURGE.{STREAM}", {"filter": first.subject})
        for size in (512 * 1024, MB - 512 * 1024 + 7):
            await client.connection.store(first.subject, b"y" * size, {})
    else:  # a document that is what its hash says, and no CBOR
        held = await client.documents.hold_result("acme", b"\xff" * MB)
        fields = {"Aiq-Event": "result", "Aiq-Run": "1", "Aiq-Epoch": "2", "Aiq-Attempt": "1", "Nats-Msg-Id": "other"}
        subject = f"ai.agent.results.acme.{handle.id}"
        await client.connection.store(subject, codec.encode(held.entry), fields | held.headers)
        handle = await client.job(handle.id)
    with pytest.raises(expected) as caught:
        await handle.result(10)
    assert "\n" not in str(caught.value)
    with pytest.raises(expected):
        _ = [item async for item in handle.stream(timeout=10)]
    stats = await handle.status()
    assert (stats.state, stats.result) == ("done", None)
    assert "its result cannot be read" in stats.note


async def test_a_large_result_of_a_worker_without_the_right_to_documents_is_a_dead_letter_that_names_the_subject(
    own_server: Callable[..., NatsProcess],
) -> None:
    async with two(own_server(users(publish=[f"$O.{BUCKET}.C.>"]))) as (every, less):
        async with worker_of().running(less):
            handle = await every.enqueue(Make(size=MB), tenant="acme")
            said = (
                r"the result cannot be kept: 1,000,\d+ bytes .* \$O\.AI_DOCUMENTS\.C.*docs/operations/permissions\.md"
            )
            with pytest.raises(aiqueue.JobFailed, match=said) as failed:
                await handle.result(30)
        assert failed.value.reason == "result"
        assert await holds(every) == []
        async with worker_of().running(every):
            (letter,) = [each async for each in every.dead.find()]
            await every.dead.replay(letter)
            assert await (await every.job(handle.id)).result(30) == made(MB)


async def test_who_may_only_wait_for_results_reads_a_large_one(own_server: Callable[..., NatsProcess]) -> None:
    """The rows of docs/operations/permissions.md for a producer that waits for results."""
    rights = {
        "publish": ["ai.agent.tasks.acme", "ai.agent.tasks.acme.>", "aiq.hint.>", "$JS.API.STREAM.MSG.GET.>",
                    "$JS.API.DIRECT.GET.>"],
        "subscribe": ["_INBOX.>", "aiq.live.>", "$JS.ACK.>"],
    }  # fmt: skip
    own = json.dumps({"user": "reads", "password": "p", "permissions": rights})
    server = own_server(f"authorization {{ users: [ {{ user: all, password: p }}, {own} ] }}")
    async with aiqueue.connect(server.url, user="all", password="p") as every:
        await create_streams(every)
        async with worker_of().running(every), aiqueue.connect(server.url, user="reads", password="p") as reads:
            handle = await reads.enqueue(Make(size=MB), tenant="acme")
            assert await handle.result(30) == made(MB)


# -- sizes


@pytest.mark.parametrize("process", [False, True])
async def test_a_result_above_64_mib_has_no_limit_of_its_own(client: Client, process: bool) -> None:
    size = 65 << 20
    async with worker_of(process=process).running(client):
        handle = await client.enqueue(Make(size=size), tenant="acme")
        result = await handle.result(60)
    assert result.keys() == {"text"}
    assert len(result["text"]) == size


def test_an_encoded_result_above_64_mib_is_decoded_for_a_parent_a_child_process_and_the_guides_client() -> None:
    body = codec.encode(b"x" * (65 << 20))
    outcome = ChildOutcome("j", "result", body, "", "", 1)
    assert len(value_of_outcome(GatheredChild("c", None, "i", None), outcome)) == 65 << 20
    assert to_result(b"\x81" + body) == [b"x" * (65 << 20)], "what a callback of the guide's client returns"
    frame = b"".join(protocol.encode_frame(["answer", None, [False, [body]]]))
    assert protocol.read_frame_blocking(io.BytesIO(frame)) == ["answer", None, [False, [body]]]


async def test_a_large_result_is_in_memory_a_few_times_and_not_once_for_each_chunk(client: Client) -> None:
    """Worker and client are one process here: value, body and its copies on the way out, and the same on the way in."""
    size = 16 * MB

    async def blob(job: aiqueue.Job[Make]) -> bytes:
        return bytes(job.message.size)

    async with worker_of(blob).running(client):
        await (await client.enqueue(Make(size=10), tenant="acme")).result(30)
        tracemalloc.start()
        try:
            handle = await client.enqueue(Make(size=size), tenant="acme")
            assert len(await handle.result(60)) == size
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 5 * size, f"{peak / size:.1f} times the result"


# -- other readers


def test_the_client_without_asyncio_reads_a_large_result(account: Account) -> None:
    async def serve(ready: threading.Event, over: asyncio.Event) -> None:
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
            await create_streams(client)
            async with worker_of().running(client):
                ready.set()
                await over.wait()

    over, ready, loop = asyncio.Event(), threading.Event(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(ready, over),))
    thread.start()
    try:
        assert ready.wait(30)
        with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as client:
            handle = client.enqueue(Make(size=MB), tenant="acme")
            assert handle.result(30) == made(MB)
            assert client.job(handle.id).result(30) == made(MB)
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(30)
        loop.close()


async def test_the_command_line_shows_the_beginning_of_a_large_result(
    client: Client, account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"URL": account.url, "USER": account.user, "PASSWORD": account.password}.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)

    async def cli(*words: str) -> str:
        done = await asyncio.to_thread(CliRunner().invoke, app, list(words))
        assert done.exit_code == 0, done.output[:2_000]
        return done.output

    async with worker_of().running(client):
        handle = await client.enqueue(Make(size=20 * MB), tenant="acme")
        await handle.result(30)
    shown = await cli("inspect", handle.id)
    assert "19.1 MiB, stored as a document" in shown
    assert "the first 20,000 of 20,000,0" in shown
    assert len(shown) < 25_000
    tailed = await cli("tail", handle.id)
    assert "result" in tailed
    assert len(tailed) < 2_000
    whole = json.loads(await cli("inspect", handle.id, "--json"))
    assert whole["result"] == made(20 * MB)
    assert len(json.dumps(whole | {"result": None})) < 10_000, "the result is printed once"
