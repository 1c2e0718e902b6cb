"""Large bytes beside the jobs: stored once, read verified, kept for as long as somebody needs them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import stat
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import nats
import pytest
from typer.testing import CliRunner, Result

import aiqueue
from aiqueue import codec, headers
from aiqueue.cli.app import app
from aiqueue.client.client import Client
from aiqueue.documents.collector import Collected, Collector
from aiqueue.documents.objects import CHUNK_BYTES, ObjectInfo, ObjectStore
from aiqueue.documents.store import JOB, PUT
from aiqueue.enqueue.bulk import TURN_ITEMS
from aiqueue.enqueue.deadletter import Filter
from aiqueue.errors import BadInput, Corrupt, EncodeError, JobFailed, NotFound, QueueFull, TooLarge, Unavailable
from aiqueue.job import JobSpec
from aiqueue.payload.document_ref import Document, find_documents, may_contain_documents
from aiqueue.topology import provision

from ..support import Account, Eventually, NatsProcess, create_streams

pytestmark = pytest.mark.families("agent.tasks")
OwnServer = Callable[..., NatsProcess]
STREAM = "OBJ_AI_DOCUMENTS"
BUCKET = "AI_DOCUMENTS"


class Text(aiqueue.Message, kind="text"):
    text: str = ""


class Scan(aiqueue.Message, kind="scan"):
    file: aiqueue.Document
    more: tuple[aiqueue.Document, ...] = ()


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


LARGE = "x" * 300_000  # above the default of claim_check
FAST = aiqueue.Backoff(attempts=2, first=0.02, cap=0.02)


async def stored(client: Client, stream: str = STREAM, subject: str = ">") -> list[Any]:
    return [each async for each in client.connection.read(stream, subject)]


async def holds(client: Client, by: str = JOB) -> list[tuple[str, str]]:
    return [(hold.tenant, hold.sha256) async for hold, _, _ in client.documents.list_holds() if hold.by == by]


async def documents(client: Client) -> list[str]:
    return [each.document.sha256 async for each in client.documents.find()]


async def chunk_subjects(client: Client) -> int:
    info = await client.connection.api(f"STREAM.INFO.{STREAM}", {"subjects_filter": f"$O.{BUCKET}.C.*"})
    return len(info["state"].get("subjects") or {})


async def collect(client: Client, **ages: float) -> Collected:
    return await Collector(client.connection, client.topology).collect(**{"grace_s": 0.0, **ages})


async def stock(client: Client, account: Account) -> tuple[Any, Any]:
    raw = await nats.connect(account.url, user=account.user, password=account.password)
    return raw, await raw.jetstream().object_store(BUCKET)


# -- in and out


async def test_what_is_put_comes_back_whatever_it_is_put_from(client: Client, tmp_path: Path) -> None:
    data = noise(3 * CHUNK_BYTES + 17)
    (tmp_path / "file").write_bytes(data)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(data), 100_001):
            yield data[start : start + 100_001]

    def blocks() -> Iterator[bytes]:
        yield data[:5]
        yield b""
        yield data[5:]

    sources: list[Any] = [
        data, bytearray(data), tmp_path / "file", str(tmp_path / "file"), io.BytesIO(data), pieces(), blocks(),
    ]  # fmt: skip
    for source in sources:
        document = await client.documents.put(source, tenant="acme", name="a.bin", content_type="application/x")
        assert document == Document(
            tenant="acme", sha256=sha(data), size=len(data), name="a.bin", content_type="application/x"
        )
        assert await client.documents.open(document).read() == data
    assert len(await documents(client)) == 1
    assert await chunk_subjects(client) == 1, "the same bytes are stored once"
    assert await client.documents.get(sha(data), tenant="acme") == document


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1])
async def test_every_size_can_be_put_and_saved(client: Client, tmp_path: Path, size: int) -> None:
    data = noise(size)
    document = await client.documents.put(io.BytesIO(data), tenant="acme")
    saved = await client.documents.open(document).save(tmp_path / "copy")
    assert saved.read_bytes() == data
    assert [each.name for each in tmp_path.iterdir()] == ["copy"]


async def test_stock_clients_read_what_is_put_and_the_library_reads_what_they_put(
    client: Client, account: Account
) -> None:
    data = noise(2 * CHUNK_BYTES + 5)
    document = await client.documents.put(data, tenant="acme", name="report.pdf")
    raw, store = await stock(client, account)
    try:
        found = await store.get(f"acme/{document.sha256}")
        assert found.data == data
        assert (found.info.size, found.info.description) == (len(data), "report.pdf")
        other = noise(300_000, seed=2)
        await store.put(f"globex/{sha(other)}", other)
        theirs = await client.documents.get(sha(other), tenant="globex")
        assert await client.documents.open(theirs).read() == other
        assert await client.documents.forget(document)
        assert [each.name for each in await store.list()] == [f"globex/{sha(other)}"]
    finally:
        await raw.close()


async def test_a_small_max_payload_only_makes_smaller_chunks(own_server: OwnServer) -> None:
    server = own_server("max_payload: 4000")
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        data = noise(50_000)
        document = await client.documents.put(data, tenant="acme")
        assert await client.documents.open(document).read() == data


async def test_a_document_that_is_not_there_any_more_is_not_found(client: Client) -> None:
    document = await client.documents.put(b"abc", tenant="acme")
    with pytest.raises(NotFound, match="not stored"):
        await client.documents.get(document.sha256, tenant="globex")
    assert await client.documents.forget(document)
    assert await stored(client) == [], "nothing is left of it"
    with pytest.raises(NotFound, match="not stored"):
        await client.documents.open(document).read()
    assert not await client.documents.forget(document)


async def test_what_is_read_is_verified_before_its_last_chunk_is_handed_out(client: Client, tmp_path: Path) -> None:
    data = noise(3 * CHUNK_BYTES)
    document = await client.documents.put(data, tenant="acme")
    chunks = await stored(client, subject=f"$O.{BUCKET}.C.*")
    await client.connection.api(f"STREAM.MSG.DELETE.{STREAM}", {"seq": chunks[1].seq})
    forged = {headers.MSG_ID: "forged"}
    await client.connection.store(chunks[1].subject, noise(CHUNK_BYTES, seed=3), forged)
    got = b""
    with pytest.raises(Corrupt, match="SHA-256"):  # noqa: PT012  (the loop is what raises)
        async for chunk in client.documents.open(document):
            got += chunk
    assert len(got) == 2 * CHUNK_BYTES
    (tmp_path / "old").write_text("as it was")
    with pytest.raises(Corrupt):
        await client.documents.open(document).save(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "as it was"
    assert [each.name for each in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("kind", ["here", "directory", "device"])
async def test_a_document_is_not_saved_in_place_of_a_directory_or_a_device(
    client: Client, tmp_path: Path, kind: str
) -> None:
    document = await client.documents.put(b"data", tenant="acme")
    places = {"here": Path(), "directory": tmp_path / "a", "device": tmp_path / "pipe"}
    places["directory"].mkdir()
    os.mkfifo(places["device"])
    reader = client.documents.open(document)
    with pytest.raises(OSError, match=r"Is a directory|not a regular file"):
        await reader.save(places[kind])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a", "pipe"]
    assert stat.S_ISFIFO(places["device"].stat().st_mode)


async def test_a_missing_chunk_is_an_error_and_not_waited_for_without_end(client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr("aiqueue.documents.objects.MISSING_CHUNK_S", 0.3)
    document = await client.documents.put(noise(2 * CHUNK_BYTES), tenant="acme")
    chunks = await stored(client, subject=f"$O.{BUCKET}.C.*")
    await client.connection.api(f"STREAM.MSG.DELETE.{STREAM}", {"seq": chunks[1].seq})
    with pytest.raises(Corrupt, match="1 of its 2 chunks"):
        await client.documents.open(document).read()


async def test_reading_at_once_has_a_limit(client: Client) -> None:
    document = await client.documents.put(b"x" * 101, tenant="acme")
    with pytest.raises(BadInput, match="limit of 100"):
        await client.documents.open(document).read(limit=100)


@pytest.mark.parametrize(
    ("source", "said"),
    [(42, "an iterable"), (io.StringIO("text"), "open the file as binary"), ("/nowhere/at/all", "cannot read"),
     (["a"], "made of bytes")],
)  # fmt: skip
async def test_what_cannot_be_put_is_refused_with_a_line_and_leaves_nothing(
    client: Client, source: Any, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        await client.documents.put(source, tenant="acme")
    assert await stored(client) == []


async def test_a_source_that_fails_leaves_nothing(client: Client) -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield noise(4 * CHUNK_BYTES)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await client.documents.put(failing(), tenant="acme")
    assert await stored(client) == []


async def test_a_full_store_refuses_the_document_and_keeps_the_others(client: Client) -> None:
    first = await client.documents.put(noise(CHUNK_BYTES), tenant="acme")
    config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
    await client.connection.api(f"STREAM.UPDATE.{STREAM}", config | {"max_bytes": 3 * CHUNK_BYTES})
    before = await stored(client)
    for source in (noise(5 * CHUNK_BYTES, seed=2), io.BytesIO(noise(5 * CHUNK_BYTES, seed=2))):
        with pytest.raises(QueueFull):
            await client.documents.put(source, tenant="acme")
        with pytest.raises(QueueFull):
            await client.enqueue(Text(text="x" * (5 * CHUNK_BYTES)), tenant="acme")
        assert await stored(client) == before
    assert len(await client.documents.open(first).read()) == CHUNK_BYTES


async def test_a_chunk_that_was_stored_late_is_put_in_its_place(client: Client) -> None:
    objects = client.documents.objects
    connection = client.connection
    where = objects.subject("C", "upload")

    async def late(number: int) -> Any:
        return await connection.store(where, b"%d" % number, {headers.MSG_ID: f"upload/{number}"})

    acks = {number: await late(number) for number in (1, 3, 2)}  # as after a try that was lost
    last = 0
    for number in (1, 2, 3):
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        done.set_result(acks[number])
        last = await objects._ensure_order(where, b"%d" % number, done, last)  # type: ignore[arg-type]
    assert [each.data for each in await stored(client, subject=where)] == [b"1", b"2", b"3"]


async def test_reading_goes_on_after_the_server_was_killed(own_server: OwnServer) -> None:
    server = own_server()
    data = noise(40 * CHUNK_BYTES)
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        document = await client.documents.put(data, tenant="acme")
        got = hashlib.sha256()
        count = 0
        async for chunk in client.documents.open(document):
            got.update(chunk)
            count += 1
            if count == 4:
                server.kill()
                server.start()
        assert got.hexdigest() == document.sha256


# -- bodies that are too large for a message


def worker_of(function: Callable[[aiqueue.Job[Any]], Any], model: Any = Text, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(**{k: options.pop(k) for k in ("processes", "concurrency") if k in options})
    worker.handle(model, **{"retry": FAST, **options})(function)
    return worker


def length(job: aiqueue.Job[Text]) -> list[Any]:
    return [len(job.message.text), job.attempt, headers.DOCUMENT in job.headers]


@pytest.mark.parametrize("process", [False, True])
async def test_a_large_body_travels_as_a_document_and_goes_with_its_job(
    client: Client, process: bool, eventually: Eventually
) -> None:
    handle = await client.enqueue(Text(text=LARGE * 10), tenant="acme")
    (job,) = await stored(client, "AI_AGENT_TASKS")
    assert job.data == b""
    assert job.headers[headers.DOCUMENT_SIZE] == str(len(codec.encode(Text(text=LARGE * 10))))
    assert await holds(client) == [("acme", job.headers[headers.DOCUMENT])]
    async with worker_of(length, process=process).running(client):
        assert await handle.result(30) == [3_000_000, 1, True]
        await eventually(lambda: _empty(client))


async def _empty(client: Client) -> bool:
    return not await stored(client)


async def test_a_small_body_costs_no_document(client: Client) -> None:
    await client.enqueue(Text(text="x" * 200_000), tenant="acme")
    assert await stored(client) == []


async def test_the_threshold_is_a_setting_and_0_means_never(account: Account) -> None:
    where: dict[str, Any] = {"url": account.url, "user": account.user, "password": account.password}
    async with aiqueue.connect(**where, claim_check="1KiB") as client:
        await create_streams(client)
        await client.enqueue(Text(text="x" * 2_000), tenant="acme")
        assert len(await documents(client)) == 1
    async with aiqueue.connect(**where, claim_check=0) as client:
        await client.enqueue(Text(text=LARGE), tenant="acme")
        with pytest.raises(TooLarge, match="max_payload"):
            await client.enqueue(Text(text=LARGE * 10), tenant="acme")
        assert len(await documents(client)) == 1


async def test_a_body_above_what_may_be_held_in_memory_is_refused(client: Client) -> None:
    with pytest.raises(TooLarge, match=r"documents\.put"):
        await client.enqueue(Text(text="x" * (codec.MAX_BYTES + 1)), tenant="acme")
    assert await stored(client) == []


async def test_many_large_and_small_bodies_go_through_one_window(client: Client, eventually: Eventually) -> None:
    items = [Text(text=f"{number} " * (200_000 if number % 3 == 0 else 1)) for number in range(2 * TURN_ITEMS)]
    handles = [outcome async for outcome in client.enqueue_many(items, tenant="acme", window=20)]
    assert all(isinstance(each, aiqueue.Handle) for each in handles)
    async with worker_of(length, concurrency=8).running(client):
        for item, handle in zip(items, handles, strict=True):
            assert isinstance(handle, aiqueue.Handle)
            assert (await handle.result(30))[0] == len(item.text)
        await eventually(lambda: _empty(client))


async def test_enqueue_many_reports_each_item_that_cannot_be_attached(client: Client) -> None:
    items = [Text(text="x" * (codec.MAX_BYTES + 1)), Text(text=LARGE), Text(text="small")]
    outcomes = [outcome async for outcome in client.enqueue_many(items, tenant="acme")]
    assert [type(each) for each in outcomes] == [TooLarge, aiqueue.Handle, aiqueue.Handle]
    assert outcomes[0].item is items[0]  # type: ignore[union-attr]


class Unreadable(dict[str, Any]):
    def values(self) -> Any:
        raise ZeroDivisionError


class Extended(Scan, kind="extended"):
    extra: Any = None


@pytest.mark.parametrize("delay", [None, "1h"])
async def test_a_message_whose_documents_cannot_be_read_is_refused(client: Client, delay: str | None) -> None:
    document = await client.documents.put(b"bytes", tenant="acme")
    unreadable = Extended(file=document, extra=Unreadable(a=1))
    with pytest.raises(EncodeError, match="ZeroDivisionError"):
        await client.enqueue(unreadable, tenant="acme", delay=delay)
    items = [unreadable, Extended(file=document)]
    async with asyncio.timeout(20):
        bad, good = [each async for each in client.enqueue_many(items, tenant="acme", delay=delay)]
    assert isinstance(bad, EncodeError)
    assert "ZeroDivisionError" in str(bad)
    assert isinstance(good, aiqueue.Handle)
    assert len(await holds(client)) == 1


async def test_retries_and_dead_letters_and_replays_keep_the_body(client: Client, eventually: Eventually) -> None:
    failing = True

    async def fail(job: aiqueue.Job[Text]) -> list[Any]:
        if failing:
            raise RuntimeError("not yet")
        return length(job)

    handle = await client.enqueue(Text(text=LARGE), tenant="acme")
    async with worker_of(fail).running(client):
        with pytest.raises(JobFailed, match="not yet"):
            await handle.result(30)
        (letter,) = [each async for each in client.dead.find(Filter())]
        assert letter.attempt == 2
        assert codec.decode(await client.dead.body(letter), codec.CBOR) == {"text": LARGE}
        assert await collect(client) == Collected(), "the dead letter holds it"
        failing = False
        await client.dead.replay(letter)
        await eventually(lambda: _empty(client))
        assert not [each async for each in client.dead.find(Filter())]


async def test_a_purged_dead_letter_lets_its_body_go(client: Client) -> None:
    async def fail(job: aiqueue.Job[Text]) -> None:
        raise aiqueue.Reject("never")

    handle = await client.enqueue(Text(text=LARGE), tenant="acme")
    async with worker_of(fail).running(client):
        with pytest.raises(JobFailed):
            await handle.result(30)
    (letter,) = [each async for each in client.dead.find(Filter())]
    assert len(await documents(client)) == 1
    await client.dead.purge(letter)
    assert await stored(client) == []


@pytest.mark.parametrize("harm", ["missing", "corrupt", "nonsense"])
async def test_a_body_that_cannot_be_had_any_more_makes_a_dead_letter_and_no_loop(client: Client, harm: str) -> None:
    handle = await client.enqueue(Text(text=LARGE), tenant="acme")
    if harm == "missing":
        await client.connection.api(f"STREAM.PURGE.{STREAM}")
    elif harm == "corrupt":
        (chunk,) = await stored(client, subject=f"$O.{BUCKET}.C.*")
        await client.connection.api(f"STREAM.MSG.DELETE.{STREAM}", {"seq": chunk.seq})
        await client.connection.store(chunk.subject, chunk.data[:-1] + b"?", {headers.MSG_ID: "forged"})
    else:
        job_headers = {headers.MSG_ID: "n", headers.DOCUMENT: "*", headers.DOCUMENT_REF: "*", headers.KIND: "text"}
        await client.connection.store("ai.agent.tasks.acme", b"", job_headers)
    async with worker_of(length).running(client):
        if harm == "nonsense":
            assert (await handle.result(30))[0] == len(LARGE)
            letters: list[Any] = []
            while not letters:
                letters = [each async for each in client.dead.find(Filter())]
        else:
            with pytest.raises(JobFailed, match="document"):
                await handle.result(30)
            letters = [each async for each in client.dead.find(Filter())]
    assert [each.reason for each in letters] == ["document"]


async def test_a_suspects_body_is_read_in_its_child(client: Client) -> None:
    """Its third delivery, nobody knows of the first two: as after two deaths."""
    handle = await client.enqueue(Text(text=LARGE), tenant="acme")
    family = client.topology.family("agent.tasks")
    config = family.lane_config("acme", "normal") | {"ack_wait": 50_000_000}
    name = config["durable_name"]
    subject = f"CONSUMER.CREATE.AI_AGENT_TASKS.{name}.{config['filter_subject']}"
    await client.connection.api(subject, {"stream_name": "AI_AGENT_TASKS", "config": config})
    raw = await nats.connect(client.settings.servers, user=client.settings.user, password=_password(client))
    pull = await raw.jetstream().pull_subscribe_bind(name, "AI_AGENT_TASKS")
    for _ in range(2):
        assert len(await pull.fetch(1, timeout=25)) == 1
    await raw.close()
    async with worker_of(process_id).running(client):
        size, pid = await handle.result(30)
    assert size == len(LARGE)
    assert pid != os.getpid()


def _password(client: Client) -> str:
    assert client.settings.password is not None
    return client.settings.password.get_secret_value()


async def process_id(job: aiqueue.Job[Text]) -> list[int]:
    return [len(job.message.text), os.getpid()]


# -- documents in messages


async def iterating(job: aiqueue.Job[Scan]) -> str:
    digest = hashlib.sha256()
    async for chunk in job.open(job.message.file):
        digest.update(chunk)
    return digest.hexdigest()


def blocking(job: aiqueue.Job[Scan]) -> str:
    digest = hashlib.sha256()
    for chunk in job.open_sync(job.message.file):
        digest.update(chunk)
    assert job.open_sync(job.message.file).read() == noise(job.message.file.size)
    return digest.hexdigest()


async def missing(job: aiqueue.Job[Scan]) -> str:
    try:
        await job.open(job.message.file.model_copy(update={"sha256": "0" * 64})).read()
    except NotFound as error:
        return str(error)
    return ""


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("handler", [iterating, blocking])
async def test_handlers_read_documents_in_loop_thread_and_child(
    client: Client, handler: Callable[..., Any], process: bool
) -> None:
    data = noise(3 * CHUNK_BYTES + 1)
    document = await client.documents.put(data, tenant="acme")
    handle = await client.enqueue(Scan(file=document), tenant="acme")
    async with worker_of(handler, Scan, process=process).running(client):
        assert await handle.result(30) == sha(data)


@pytest.mark.parametrize("process", [False, True])
async def test_a_handler_learns_what_is_missing(client: Client, process: bool) -> None:
    document = await client.documents.put(b"abc", tenant="acme")
    handle = await client.enqueue(Scan(file=document), tenant="acme")
    async with worker_of(missing, Scan, process=process).running(client):
        assert "is not stored" in await handle.result(30)


async def test_a_job_reads_its_own_tenants_documents_only(client: Client) -> None:
    theirs = await client.documents.put(b"secret", tenant="globex")
    with pytest.raises(BadInput, match="globex"):
        await client.enqueue(Scan(file=theirs), tenant="acme")
    assert await holds(client) == []
    mine = await client.documents.put(b"abc", tenant="acme")
    seen: list[str] = []

    async def peek(job: aiqueue.Job[Scan]) -> None:
        for document in (theirs, theirs.model_copy(update={"tenant": "acme"})):
            try:
                await job.open(document).read()
            except (BadInput, NotFound) as error:
                seen.append(type(error).__name__)

    handle = await client.enqueue(Scan(file=mine), tenant="acme")
    async with worker_of(peek, Scan).running(client):
        await handle.result(30)
    assert seen == ["BadInput", "NotFound"]


async def test_a_blocking_read_on_the_event_loop_is_refused(client: Client) -> None:
    async def wrong(job: aiqueue.Job[Scan]) -> str:
        try:
            job.open_sync(job.message.file).read()
        except BadInput as error:
            return str(error)
        return ""

    document = await client.documents.put(b"abc", tenant="acme")
    handle = await client.enqueue(Scan(file=document), tenant="acme")
    async with worker_of(wrong, Scan).running(client):
        assert "use `open`" in await handle.result(30)


async def test_a_document_that_is_not_stored_cannot_be_enqueued(client: Client) -> None:
    gone = Document(tenant="acme", sha256="0" * 64, size=1)
    with pytest.raises(NotFound, match="put it"):
        await client.enqueue(Scan(file=gone), tenant="acme")
    assert await stored(client, "AI_AGENT_TASKS") == []
    assert await holds(client) == []


async def test_a_plain_publishers_document_is_a_body_too(
    client: Client, account: Account, eventually: Eventually
) -> None:
    body = json.dumps({"text": LARGE}).encode()
    raw, store = await stock(client, account)
    try:
        js = raw.jetstream()
        await js.publish(f"$O.{BUCKET}.R.acme.{sha(body)}.job.plain-1", b"")
        await store.put(f"acme/{sha(body)}", body)
        assert await collect(client) == Collected()
        job_headers = {headers.DOCUMENT: sha(body), headers.DOCUMENT_SIZE: str(len(body)), headers.KIND: "text",
                headers.DOCUMENT_REF: "plain-1",
                headers.CONTENT_TYPE: "application/json", headers.JOB_ID: "plain-1"}  # fmt: skip
        await js.publish("ai.agent.tasks.acme", b"", headers=job_headers)
    finally:
        await raw.close()
    done = asyncio.Event()

    async def take(job: aiqueue.Job[Text]) -> None:
        assert job.message.text == LARGE
        done.set()

    async with worker_of(take).running(client), asyncio.timeout(30):
        await done.wait()
        await eventually(lambda: _empty(client))


def test_which_messages_may_hold_documents() -> None:
    class Inner(aiqueue.Message, kind="inner"):
        parts: dict[str, tuple[Scan, ...]] | None = None

    class Loop(aiqueue.Message, kind="loop"):
        next: Loop | None = None

    assert Scan.aiq_documents
    assert Inner.aiq_documents
    assert not Text.aiq_documents
    assert not may_contain_documents(Loop)
    one, two = (Document(tenant="acme", sha256=digit * 64, size=1) for digit in "12")
    assert set(find_documents(Inner(parts={"a": (Scan(file=one, more=(two, one)),)}))) == {one, two}


@pytest.mark.parametrize(
    "annotation",
    [list[Annotated[int, {"a": 1}]], Annotated[int, "a text"], Literal["a text"], Callable[[int], int] | None],
)
def test_what_is_no_type_in_an_annotation_is_no_document(annotation: Any) -> None:
    assert not may_contain_documents(annotation)
    assert may_contain_documents(Annotated[list[Document], {"a": 1}])


# -- kept while they are needed


async def test_the_same_body_of_two_jobs_goes_with_the_second(client: Client, eventually: Eventually) -> None:
    go = asyncio.Event()

    async def wait(job: aiqueue.Job[Text]) -> None:
        if job.id == "two":
            await go.wait()

    one = await client.enqueue(Text(text=LARGE), tenant="acme", unique="one")
    two = await client.enqueue(Text(text=LARGE), tenant="acme", unique="two")
    assert len(await documents(client)) == 1
    assert len(await holds(client)) == 2
    async with worker_of(wait).running(client):
        await one.result(30)

        async def released() -> bool:
            return len(await holds(client)) == 1

        await eventually(released)
        assert len(await documents(client)) == 1
        go.set()
        await two.result(30)
        await eventually(lambda: _empty(client))


async def test_a_duplicate_holds_nothing_and_takes_nothing_away(client: Client, eventually: Eventually) -> None:
    first = await client.enqueue(Text(text=LARGE), tenant="acme", unique="u")
    again = await client.enqueue(Text(text=LARGE), tenant="acme", unique="u")
    other = await client.enqueue(Text(text=LARGE + "!"), tenant="acme", unique="u")
    (third,) = [each async for each in client.enqueue_many([JobSpec(Text(text=LARGE), unique="u")], tenant="acme")]
    assert isinstance(third, aiqueue.Handle)
    assert [each.duplicate for each in (first, again, other, third)] == [False, True, True, True]
    assert len(await holds(client)) == 1
    assert len(await documents(client)) == 1
    async with worker_of(length).running(client):
        assert (await first.result(30))[0] == len(LARGE)
        await eventually(lambda: _empty(client))
    late = await client.enqueue(Text(text=LARGE), tenant="acme", unique="u")
    assert late.duplicate
    assert await stored(client) == [], "its job has ended: nobody will end this hold"


@pytest.fixture
def lose_acks(client: Client, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[bytes]]:
    """Drops the server's replies to what is stored in a stream, up to the first one that says "duplicate".

    The message is sent again meanwhile. Returns the list of the dropped replies.
    """

    def lose(stream: str) -> list[bytes]:
        window, dropped = client.connection.window, list[bytes]()
        on_reply, of_stream = window.on_reply, b'"stream":"%s"' % stream.encode()

        def losing(token: bytes, data: bytes, block: bytes | None) -> bool:
            if of_stream in data and b'"duplicate"' not in data:
                dropped.append(data)
                return True
            return on_reply(token, data, block)

        monkeypatch.setattr(window, "on_reply", losing)
        monkeypatch.setattr("aiqueue.connection.publish_window.ASK_S", 0.1)
        monkeypatch.setattr("aiqueue.connection.publish_window.TRY_S", 0.2)
        return dropped

    return lose


@pytest.mark.parametrize("unique", [None, "u"])
@pytest.mark.parametrize("delay", [None, "1s"])
@pytest.mark.parametrize("many", [False, True])
async def test_a_job_whose_puback_was_lost_keeps_its_body(
    client: Client, lose_acks: Callable[[str], list[bytes]], many: bool, delay: str | None, unique: str | None
) -> None:
    """A parked job of a caller's id is answered as a duplicate once it is due, and no job of its id is parked."""
    for _ in range(5):  # so that the work stream's sequence is above that of the parked jobs
        await client.enqueue(Text(text="small"), tenant="globex")
    dropped = lose_acks("AI_AGENT_TASKS" if delay is None else "AI_PARKED")
    if many:
        items = [JobSpec(Text(text=LARGE), unique=unique, delay=delay)]
        (handle,) = [each async for each in client.enqueue_many(items, tenant="acme")]
    else:
        handle = await client.enqueue(Text(text=LARGE), tenant="acme", unique=unique, delay=delay)
    assert dropped
    assert isinstance(handle, aiqueue.Handle)
    assert [tenant for tenant, _ in await holds(client)] == ["acme"]
    async with worker_of(length).running(client):
        assert (await handle.result(30))[0] == len(LARGE)


async def test_a_delayed_duplicate_holds_nothing_and_takes_nothing_away(client: Client) -> None:
    for work in range(2):  # before and after the work stream's sequence is above that of the parked jobs
        unique = f"u-{work}"
        first = await client.enqueue(Text(text=LARGE), tenant="acme", unique=unique, delay="1h")
        again = await client.enqueue(Text(text=LARGE), tenant="acme", unique=unique, delay="1h")
        items = [JobSpec(Text(text=text), unique=unique, delay="1h") for text in (LARGE, LARGE + "!")]
        many = [each async for each in client.enqueue_many(items, tenant="acme")]
        duplicates = [each.duplicate for each in (first, again, *many) if isinstance(each, aiqueue.Handle)]
        assert duplicates == [False, True, True, True]
        assert len(await holds(client)) == work + 1
        assert len(await documents(client)) == 1
        for _ in range(20):
            await client.enqueue(Text(text="small"), tenant="globex")


async def test_what_a_job_holds_outlives_its_keep(client: Client, eventually: Eventually) -> None:
    document = await client.documents.put(noise(1_000), tenant="acme", keep="1s")
    handle = await client.enqueue(Scan(file=document), tenant="acme")

    async def over() -> bool:
        return not await holds(client, PUT)

    await eventually(over)
    assert await collect(client) == Collected()
    async with worker_of(iterating, Scan).running(client):
        assert await handle.result(30) == document.sha256

        async def released() -> bool:
            return not await holds(client)

        await eventually(released)
    assert await documents(client) == [document.sha256]
    assert await collect(client) == Collected(documents=1, size_bytes=1_000)
    assert await stored(client) == []


async def test_a_job_without_a_result_lets_its_document_go_too(client: Client, eventually: Eventually) -> None:
    document = await client.documents.put(noise(1_000), tenant="acme")
    await client.enqueue(Scan(file=document), tenant="acme")
    assert await holds(client) == [("acme", document.sha256)]
    worker = aiqueue.Worker()
    worker.handle(Scan, result=False)(iterating)

    async def released() -> bool:
        return not await holds(client)

    async with worker.running(client):
        await eventually(released)


async def test_the_collector_leaves_what_was_touched_lately_and_what_is_not_ours(
    client: Client, account: Account
) -> None:
    document = await client.documents.put(b"abc", tenant="acme")
    await client.documents.objects.purge(f"$O.{BUCKET}.R.acme.{document.sha256}.put.*")
    raw, store = await stock(client, account)
    try:
        await store.put("somebody/elses", b"x")
    finally:
        await raw.close()
    assert await collect(client, grace_s=600.0) == Collected()
    assert await collect(client) == Collected(documents=1, size_bytes=3)
    assert await chunk_subjects(client) == 1


async def test_an_upload_that_died_is_collected_once_it_is_old(client: Client) -> None:
    await client.documents.objects.upload(noise(2 * CHUNK_BYTES))  # and its process is killed
    assert await collect(client) == Collected()
    assert await collect(client, orphan_s=0.0) == Collected(uploads=1)
    assert await stored(client) == []


async def test_a_hold_of_a_job_that_is_no_more_ends_when_it_is_aged(client: Client) -> None:
    """A worker died after its last ack, or somebody purged the stream."""
    for name in ("one", "two"):
        await client.enqueue(Text(text=LARGE + name), tenant="acme", unique=name)
    (first, _) = await stored(client, "AI_AGENT_TASKS")
    await client.connection.api("STREAM.MSG.DELETE.AI_AGENT_TASKS", {"seq": first.seq})
    assert await collect(client) == Collected()
    done = await collect(client, aged_s=0.0)
    assert (done.holds, done.documents) == (1, 1)
    assert len(await holds(client)) == 1
    assert len(await documents(client)) == 1


async def test_a_delete_and_an_enqueue_at_once_never_lose_a_document(client: Client) -> None:
    """Each round one job comes for bytes that another side deletes at that moment, in all orders of their requests."""
    text, failed = Text(text=LARGE), 0
    body = codec.encode(text)
    for round_ in range(30):
        enqueueing = asyncio.create_task(client.documents.attach("acme", (), body))
        for _ in range(round_ % 7):
            await asyncio.sleep(0.0005)
        await asyncio.gather(*(client.documents.delete_if_unheld("acme", sha(body)) for _ in range(3)))
        job_headers = await enqueueing
        await client.documents.delete_if_unheld("acme", sha(body))
        failed += await client.documents.read_body("acme", job_headers) != body
        await client.documents.end_holds("acme", job_headers)
    assert failed == 0
    assert await stored(client) == []


@pytest.mark.parametrize("step", ["hold", "upload", "say"])
async def test_a_crash_anywhere_on_the_way_in_leaves_what_the_collector_finds(
    client: Client, step: str, monkeypatch: Any
) -> None:
    documents_ = client.documents
    hold_headers = {headers.MSG_ID: "h"}
    if step != "upload":  # the hold comes first, then the chunks, then what is said of them
        await client.connection.store(f"$O.{BUCKET}.R.acme.{'0' * 64}.job.dead", b"", hold_headers)
    if step != "hold":
        info = await documents_.objects.upload(noise(100))
        if step == "say":
            named = ObjectInfo(**{**vars(info), "name": f"acme/{'0' * 64}"})
            await documents_.objects.write_info(named, expected_seq=0)
    assert await collect(client) == Collected(), "it could be under way"
    done = await collect(client, aged_s=0.0, orphan_s=0.0)
    assert (done.holds, done.uploads, done.documents) == (step != "upload", step == "upload", step == "say")
    assert await stored(client) == []


async def test_a_deletion_that_was_cut_off_is_finished(client: Client, monkeypatch: Any) -> None:
    document = await client.documents.put(noise(CHUNK_BYTES), tenant="acme")
    objects = client.documents.objects
    info = await objects.read_info(f"acme/{document.sha256}")
    assert info is not None
    gone = ObjectInfo(**{**vars(info), "deleted": True, "size": 0, "chunks": 0})
    await objects.write_info(gone, expected_seq=info.seq)
    await client.documents.objects.purge(f"$O.{BUCKET}.R.>")
    assert await collect(client) == Collected()
    assert await stored(client) == []


def test_the_names_are_those_of_the_object_stores_format() -> None:
    name = base64.urlsafe_b64encode(b"acme/x").decode()
    assert ObjectStore(None, STREAM)._info_subject("acme/x") == f"$O.{BUCKET}.M.{name}"  # type: ignore[arg-type]


# -- without a loop, and on the command line


def test_code_without_a_loop_puts_and_reads(account: Account, tmp_path: Path) -> None:
    data = noise(2 * CHUNK_BYTES + 3)
    (tmp_path / "file").write_bytes(data)
    closed = aiqueue.connect_sync(account.url, user=account.user, password=account.password)
    with pytest.raises(BadInput, match="not open"):
        closed.documents.put(b"x", tenant="acme")
    with closed as client:
        client._run_on_loop(provision.apply(client._client.connection, client._client.topology))
        document = client.documents.put(tmp_path / "file", tenant="acme", name="n")
        assert client.documents.get(document.sha256, tenant="acme") == document
        assert b"".join(client.documents.open(document)) == data
        assert client.documents.open(document).save(tmp_path / "copy").read_bytes() == data
        for _ in client.documents.open(document):
            break  # leaving early is fine
        client.enqueue(Scan(file=document), tenant="acme")


def test_the_command_line_puts_lists_gets_deletes_and_collects(
    account: Account, tmp_path: Path, monkeypatch: Any
) -> None:
    for name, value in {"URL": account.url, "USER": account.user, "PASSWORD": account.password}.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)

    def run(*words: str, code: int = 0, text: bytes | None = None) -> Result:
        done = CliRunner().invoke(app, words, input=text)
        assert done.exit_code == code, done.output
        return done

    data = noise(CHUNK_BYTES + 1)
    (tmp_path / "report.pdf").write_bytes(data)
    run("apply")
    assert "no documents" in run("documents", "ls").output
    put = run("documents", "put", str(tmp_path / "report.pdf"), "--tenant", "acme", "--json").output
    assert json.loads(put)["name"] == "report.pdf"
    assert sha(b"typed") in run("documents", "put", "-", "--tenant", "globex", text=b"typed").output
    (listed,) = json.loads(run("documents", "ls", "--tenant", "acme", "--json").output)
    assert (listed["sha256"], listed["size"], listed["jobs"], listed["puts"]) == (sha(data), len(data), 0, 1)
    assert "rep" in run("documents", "ls").output, "cut where the terminal is narrow"
    run("documents", "get", sha(data), "--tenant", "acme", "-o", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == data
    assert run("documents", "get", sha(b"typed"), "--tenant", "globex").output_bytes == b"typed"
    assert "not stored" in run("documents", "get", sha(data), "--tenant", "globex", code=1).output
    assert "64 hexadecimal digits" in run("documents", "get", "abc", "--tenant", "globex", code=2).output
    run("enqueue", "text", json.dumps({"text": LARGE}), "--tenant", "acme")
    assert "deleted" in run("documents", "rm", sha(data), "--tenant", "acme").output
    (body,) = json.loads(run("documents", "ls", "--tenant", "acme", "--json").output)
    assert (
        "a job, a result or a step still needs it" in run("documents", "rm", body["sha256"], "--tenant", "acme").output
    )
    assert json.loads(run("documents", "collect", "--grace", "0s", "--json").output)["documents"] == 0


def test_a_dead_letters_large_body_is_shown(account: Account, monkeypatch: Any) -> None:
    async def fail(job: aiqueue.Job[Text]) -> None:
        raise aiqueue.Reject("never")

    async def die() -> None:
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
            await create_streams(client)
            handle = await client.enqueue(Text(text=LARGE + "the end"), tenant="acme")
            async with worker_of(fail).running(client):
                with pytest.raises(JobFailed):
                    await handle.result(30)

    asyncio.run(die())
    for name, value in {"URL": account.url, "USER": account.user, "PASSWORD": account.password}.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)
    shown = CliRunner().invoke(app, ["dead", "show", "1"])
    assert "the end" in shown.output
    assert shown.exit_code == 0


# -- workers collect by themselves


async def test_one_of_several_workers_collects(client: Client, monkeypatch: Any, eventually: Eventually) -> None:
    document = await client.documents.put(b"abc", tenant="acme")
    await client.documents.objects.purge(f"$O.{BUCKET}.R.acme.{document.sha256}.put.*")
    collectors = [Collector(client.connection, client.topology) for _ in range(3)]
    assert [await each._try_claim_turn() for each in collectors] == [True, False, False]
    monkeypatch.setattr("aiqueue.documents.collector.INTERVAL_S", 0.02)
    for each in collectors:
        each.start()
        each.start()

    async def gone() -> bool:
        return not await documents(client)

    monkeypatch.setattr(Collector.collect, "__kwdefaults__", {**Collector.collect.__kwdefaults__, "grace_s": 0.0})
    await eventually(gone)
    for each in collectors:
        await each.stop()
        await each.stop()


async def test_another_applications_jobs_keep_their_documents_too(client: Client) -> None:
    """Its families are not declared here; its documents are in the same store."""
    config = {"name": "THEIRS", "subjects": ["ai.their.jobs.*"], "allow_direct": True, "storage": "memory"}
    await client.connection.api("STREAM.CREATE.THEIRS", config)
    job_headers = await client.documents.attach("acme", (), b"body")
    await client.connection.store("ai.their.jobs.acme", b"", {headers.MSG_ID: "theirs", **job_headers})
    assert await collect(client, aged_s=0.0) == Collected()
    await client.connection.api("STREAM.PURGE.THEIRS")
    assert await collect(client, aged_s=0.0) == Collected(documents=1, size_bytes=4, holds=1)


async def test_a_stream_that_cannot_be_read_stops_no_other_collecting(
    client: Client, monkeypatch: Any, caplog: Any
) -> None:
    monkeypatch.setattr("aiqueue.connection.reading.ANSWER_S", 0.2)
    await client.connection.api("STREAM.CREATE.THEIRS", {"name": "THEIRS", "subjects": ["ai.their.jobs.*"]})
    await client.documents.attach("acme", (), b"held")
    document = await client.documents.put(b"free", tenant="acme")
    await client.documents.objects.purge(f"$O.{BUCKET}.R.acme.{document.sha256}.put.*")
    done = await collect(client, aged_s=0.0)
    assert (done.documents, done.holds) == (1, 0)
    assert "old holds on documents are kept" in caplog.text


async def test_metadata_whose_ack_was_lost_costs_no_document(client: Client) -> None:
    """The server stored it, the second try meets a conflict with oneself."""
    uploaded = await client.documents.objects.upload(noise(1_000))
    named = ObjectInfo(**{**vars(uploaded), "name": f"acme/{uploaded.sha256}"})
    await client.documents.objects.write_info(named, expected_seq=0)
    await client.documents._touch_or_store("acme", uploaded.sha256, uploaded)
    document = await client.documents.get(uploaded.sha256, tenant="acme")
    assert await client.documents.open(document).read() == noise(1_000)
    again = await client.documents.objects.upload(noise(1_000))
    await client.documents._touch_or_store("acme", again.sha256, again)
    assert await client.documents.open(document).read() == noise(1_000)
    assert await chunk_subjects(client) == 1


async def test_a_caller_that_leaves_on_the_way_in_leaves_nothing(client: Client) -> None:
    for step in range(20):
        attaching = asyncio.create_task(client.documents.attach("acme", (), noise(3 * CHUNK_BYTES, seed=step)))
        await asyncio.sleep(step / 1_000)
        attaching.cancel()
        await asyncio.wait([attaching])
        if not attaching.cancelled():
            await client.documents.end_holds("acme", attaching.result())
    assert await stored(client) == []


async def test_a_job_whose_body_cannot_be_asked_for_now_comes_back(client: Client, monkeypatch: Any) -> None:
    monkeypatch.setattr("aiqueue.worker.settlement.SETTLE_RETRY_S", 0.1)
    text = Text(text=LARGE)
    handle = await client.enqueue(text, tenant="acme")
    await client.connection.api(f"STREAM.DELETE.{STREAM}")
    worker = worker_of(length)
    async with worker.running(client) as session, asyncio.timeout(20):
        while session.done < 2:
            await asyncio.sleep(0.01)
    assert [each async for each in client.dead.find(Filter())] == []
    await create_streams(client)
    await client.documents.put(codec.encode(text), tenant="acme")
    async with worker.running(client):
        assert (await handle.result(30))[0] == len(LARGE)


async def test_memory_does_not_grow_with_the_size(client: Client) -> None:
    block = noise(1_000_000)

    async def blocks() -> AsyncIterator[bytes]:
        for _ in range(64):
            yield block

    tracemalloc.start()
    try:
        document = await client.documents.put(blocks(), tenant="acme")
        put = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        async for _ in client.documents.open(document):
            pass
        read = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert document.size == 64_000_000
    assert max(put, read) < 32_000_000


async def test_an_ack_that_is_not_confirmed_leaves_a_job_its_body(client: Client, monkeypatch: Any) -> None:
    request, tried = client.connection.request, asyncio.Event()

    async def lost(subject: str, *args: Any, **options: Any) -> Any:
        if subject.startswith("$JS.ACK."):
            tried.set()
            raise Unavailable("no answer")
        return await request(subject, *args, **options)

    monkeypatch.setattr(client.connection, "request", lost)
    await client.enqueue(Text(text=LARGE), tenant="acme")
    async with worker_of(length).running(client):
        await asyncio.wait_for(tried.wait(), 25)
    assert [each.jobs async for each in client.documents.find()] == [1]
