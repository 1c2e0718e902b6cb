"""Enqueueing, from both clients."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import codec
from aiqueue.client.client import Client
from aiqueue.connection import Stored
from aiqueue.errors import (
    BadInput,
    EncodeError,
    InvalidToken,
    NotFound,
    QueueFull,
    TooLarge,
    Unavailable,
    UnknownFamily,
)
from aiqueue.job import Message, untyped

from ..support import Account, Eventually, NatsProcess, create_streams

OwnServer = Callable[..., NatsProcess]


class Small(Message, kind="small", family="small.jobs"):
    n: int = 0
    ticket: Any = None
    blob: bytes = b""


class Task(Message, kind="task"):
    text: str = ""
    task_id: str | None = None


def where(server: Account | NatsProcess, streams: Path) -> dict[str, Any]:
    account = server.account if isinstance(server, NatsProcess) else server
    return {"url": account.url, "user": account.user, "password": account.password, "streams": streams}


@pytest.fixture
async def client(account: Account, streams: Path) -> AsyncIterator[Client]:
    async with aiqueue.connect(**where(account, streams)) as opened:
        await create_streams(opened)
        yield opened


async def stored(client: Client, stream: str = "SMALL") -> list[Stored]:
    return [each async for each in client.connection.read(stream, ">")]


# what is stored


async def test_a_job_is_stored_in_its_lane_with_what_a_worker_needs(client: Client) -> None:
    handle = await client.enqueue(Small(n=5), tenant="acme", priority="high", headers={"model": "m"}, deadline="1h")
    (job,) = await stored(client)
    assert job.subject == "ai.small.jobs.acme.high"
    assert codec.decode(job.data, job.headers["Content-Type"])["n"] == 5
    assert abs(int(job.headers.pop("Aiq-Deadline")) / 1000 - time.time() - 3600) < 30  # type: ignore[attr-defined]
    assert job.headers == {
        "Nats-Msg-Id": f"acme/small.jobs/{handle.id}", "Content-Type": "application/cbor", "Aiq-Kind": "small",
        "Aiq-Job-Id": handle.id, "priority": "high", "ticket": handle.id, "model": "m",
    }  # fmt: skip
    assert (handle.tenant, handle.family, handle.lane.priority, handle.duplicate) == (
        "acme",
        "small.jobs",
        "high",
        False,
    )


async def test_a_normal_job_is_seen_on_the_guides_bare_subject_and_stored_in_its_lane(
    client: Client, eventually: Eventually
) -> None:
    seen: list[str] = []

    def see(message: Any) -> None:
        seen.append(message.subject)

    await client.connection.subscribe("ai.agent.tasks.acme", see)
    await client.enqueue(Task(), tenant="acme")
    await eventually(lambda: seen == ["ai.agent.tasks.acme"])
    assert [each.subject for each in await stored(client, "AI_AGENT_TASKS")] == ["ai.agent.tasks.acme.normal"]


# one job or two


async def test_the_same_unique_key_of_one_tenant_is_one_job(client: Client) -> None:
    one = await client.enqueue(Small(n=1), tenant="acme", unique="k")
    two = await client.enqueue(Small(n=2), tenant="acme", unique="k")
    assert (one.id, one.duplicate, two.id, two.duplicate) == ("k", False, "k", True)
    assert one._enqueued.seq == two._enqueued.seq
    assert len(await stored(client)) == 1


async def test_the_same_unique_key_of_two_tenants_or_families_is_two_jobs(client: Client) -> None:
    handles = [await client.enqueue(Small(), tenant=tenant, unique="k") for tenant in ("acme", "globex")]
    handles.append(await client.enqueue(Task(), tenant="acme", unique="k"))
    assert [each.duplicate for each in handles] == [False] * 3
    assert len(await stored(client)) == 2


async def test_without_a_key_every_job_is_another_one(client: Client) -> None:
    handles = [await client.enqueue(Task(), tenant="acme") for _ in range(20)]
    assert len({each.id for each in handles}) == 20
    assert not any(each.duplicate for each in handles)


async def test_a_hundred_at_once_under_one_key_are_one_job(client: Client) -> None:
    handles = await asyncio.gather(*(client.enqueue(Small(), tenant="acme", unique="k") for _ in range(100)))
    assert [each.duplicate for each in handles].count(False) == 1
    assert len({each._enqueued.seq for each in handles}) == 1


@pytest.mark.parametrize(
    ("ticket", "meant"), [("t-1", "t-1"), (17, "17"), (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005")]
)
async def test_the_messages_own_key_is_the_jobs_id(client: Client, ticket: Any, meant: str) -> None:
    one = await client.enqueue(Small(ticket=ticket), tenant="acme")
    two = await client.enqueue(Small(ticket=ticket), tenant="acme")
    assert (one.id, one.duplicate, two.id, two.duplicate) == (meant, False, meant, True)


async def test_the_argument_goes_over_the_messages_own_key(client: Client) -> None:
    assert (await client.enqueue(Task(task_id="own"), tenant="acme", unique="given")).id == "given"


@pytest.mark.parametrize("nothing", [None, ""])
async def test_an_empty_own_key_counts_as_none(client: Client, nothing: str | None) -> None:
    assert len((await client.enqueue(Task(task_id=nothing), tenant="acme")).id) == 26


# what is refused, and then not stored


@pytest.mark.parametrize(
    ("message", "arguments", "kind", "problem"),
    [
        (Task(), {"tenant": "a.b"}, InvalidToken, "tenant"), (Task(), {"tenant": ""}, InvalidToken, "tenant"),
        (Task(), {"tenant": "*"}, InvalidToken, "tenant"), (Task(), {"tenant": None}, InvalidToken, "tenant"),
        (Task(), {"unique": b"a"}, BadInput, "unique key"), (Task(), {"unique": ""}, BadInput, "unique key"),
        (Task(), {"unique": 5}, BadInput, "unique key"), (Task(task_id="a.b"), {}, InvalidToken, "task_id"),
        (Small(ticket=1.5), {}, InvalidToken, "ticket"), (Small(ticket=["x"]), {}, InvalidToken, "ticket"),
        (Task(), {"priority": "urgent"}, BadInput, "high, normal, low"),
        (Task(), {"priority": "batch"}, BadInput, "high, normal, low"),
        (Task(), {"priority": ""}, BadInput, "priority"),
        (Task(), {"deadline": "soon"}, BadInput, "deadline"), (Task(), {"deadline": -1}, BadInput, "deadline"),
        (Task(), {"timeout": "soon"}, BadInput, "timeout"), (Task(), {"timeout": None}, BadInput, "timeout"),
        (Task(), {"headers": {"Nats-Msg-Id": "x"}}, BadInput, "Nats-Msg-Id"),
        (Task(), {"headers": {"nats-ttl": "1"}}, BadInput, "nats-ttl"),
        (Task(), {"headers": {"Aiq-Job-Id": "x"}}, BadInput, "Aiq-Job-Id"),
        (Task(), {"headers": {"content-type": "x"}}, BadInput, "content-type"),
        (Task(), {"headers": {"priority": "low"}}, BadInput, "priority"),
        (Task(), {"headers": {"task_id": "x"}}, BadInput, "unique"),
        (Task(), {"headers": {"m": "é"}}, BadInput, "header"),
        (Task(), {"headers": {"m": 5}}, BadInput, "header"), (Task(), {"headers": {5: "x"}}, BadInput, "header"),
        (untyped("x", "no.family")(), {}, UnknownFamily, "no.family"),
        (untyped("x", "agent.message")(), {}, BadInput, "takes no jobs"),
        (untyped("x", "agent.tasks")(a=object()), {}, EncodeError, "object"),
        (Task(), {"headers": {"m": "x" * 2_000_000}}, TooLarge, "65,535"),
        (Small(blob=bytes(200_000)), {}, BadInput, "max_msg_size"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_refused_naming_it_and_nothing_is_stored(
    client: Client, message: Message, arguments: dict[str, Any], kind: type[Exception], problem: str
) -> None:
    with pytest.raises(kind, match=problem):
        await client.enqueue(message, **({"tenant": "acme"} | arguments))
    assert await stored(client) == await stored(client, "AI_AGENT_TASKS") == []
    assert not (await client.enqueue(Task(), tenant="acme")).duplicate  # the connection lives


async def test_without_the_stream_it_is_not_found_and_says_what_to_do(account: Account, streams: Path) -> None:
    async with aiqueue.connect(**where(account, streams)) as client:
        started_at = time.monotonic()
        with pytest.raises(NotFound, match="aiqueue apply"):
            await client.enqueue(Task(), tenant="acme")
        assert time.monotonic() - started_at < 20


# full lanes


async def fill(client: Client, tenant: str = "acme") -> None:
    for n in range(3):
        await client.enqueue(Small(n=n), tenant=tenant, unique=f"fill-{n}")


async def test_a_full_lane_is_queue_full_with_its_limit_and_when_to_try_again(client: Client) -> None:
    await fill(client)
    with pytest.raises(QueueFull, match=r"small\.jobs acme/normal is full") as caught:
        await client.enqueue(Small(), tenant="acme")
    assert (caught.value.limit, caught.value.retryable) == (3, True)
    assert caught.value.retry_after_s > 0
    assert len(await stored(client)) == 3


async def test_a_full_lane_is_no_other_lanes_business(client: Client) -> None:
    await fill(client)
    await client.enqueue(Small(), tenant="globex")
    await client.enqueue(Small(), tenant="acme", priority="high")


async def test_a_job_that_is_in_the_full_lane_already_is_a_duplicate_and_no_error(client: Client) -> None:
    await fill(client)
    assert (await client.enqueue(Small(), tenant="acme", unique="fill-0")).duplicate


async def test_waiting_for_a_full_lane_gets_through_when_it_drains(client: Client) -> None:
    await fill(client)
    waiting = asyncio.create_task(client.enqueue(Small(n=99), tenant="acme", on_full="wait", timeout=20))
    with pytest.raises(QueueFull):
        await client.enqueue(Small(), tenant="acme")
    assert not waiting.done()
    await client.connection.api("STREAM.PURGE.SMALL", {"keep": 2})
    handle = await waiting
    assert not handle.duplicate
    assert len(await stored(client)) == 3


async def test_waiting_for_a_full_lane_ends_at_the_timeout_and_not_long_before(client: Client) -> None:
    await fill(client)
    started_at = time.monotonic()
    with pytest.raises(QueueFull):
        await client.enqueue(Small(), tenant="acme", on_full="wait", timeout=1.2)
    assert 1.1 < time.monotonic() - started_at < 20


# faults


async def test_what_is_enqueued_over_a_server_restart_is_stored_once(
    own_server: OwnServer, streams: Path, eventually: Eventually
) -> None:
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        handles: list[aiqueue.Handle] = []

        async def enqueue(n: int) -> None:
            handles.append(await client.enqueue(Task(text=str(n)), tenant="acme"))

        work = [asyncio.create_task(enqueue(n)) for n in range(500)]
        await eventually(lambda: len(handles) > 20)
        server.kill()
        await eventually(lambda: not client.connection.connected)
        work += [asyncio.create_task(enqueue(n)) for n in range(500, 550)]
        server.start()
        await asyncio.gather(*work)
        assert not any(each.duplicate for each in handles)  # nobody had enqueued these before
        texts = [codec.decode(each.data)["text"] for each in await stored(client, "AI_AGENT_TASKS")]
        assert sorted(map(int, texts)) == list(range(550))
        assert len({each._enqueued.seq for each in handles}) == 550


async def test_without_a_server_enqueue_ends_at_its_timeout(
    own_server: OwnServer, streams: Path, eventually: Eventually
) -> None:
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        server.kill()
        await eventually(lambda: not client.connection.connected)
        started_at = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await client.enqueue(Task(), tenant="acme", timeout=0.5)
        assert not caught.value.maybe_stored
        assert time.monotonic() - started_at < 20


@pytest.mark.parametrize("unique", [None, "own"])
@pytest.mark.parametrize("call", ["api", "store", "last"])
async def test_a_large_body_is_enqueued_over_a_server_restart(
    own_server: OwnServer, streams: Path, eventually: Eventually, monkeypatch: pytest.MonkeyPatch, call: str,
    unique: str | None,
) -> None:  # fmt: skip
    """The server dies at the first `call` of the enqueue."""
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        original, connection = getattr(client.connection, call), client.connection

        async def killing(*args: Any, **options: Any) -> Any:
            monkeypatch.setattr(connection, call, original)
            server.kill()
            return await original(*args, **options)

        monkeypatch.setattr(connection, call, killing)
        text = "x" * 300 * 1024
        enqueueing = asyncio.create_task(client.enqueue(Task(text=text), tenant="acme", unique=unique, timeout=60))
        await eventually(lambda: server.pid is None and not connection.connected)
        server.start()
        handle = await enqueueing
        assert not handle.duplicate
        (job,) = await stored(client, "AI_AGENT_TASKS")
        body = await client.documents.read_body("acme", job.headers)
        assert codec.decode(body)["text"] == text


@pytest.mark.parametrize("unique", [None, "own"])
async def test_a_large_body_whose_job_was_not_published_is_not_maybe_stored(
    own_server: OwnServer, streams: Path, unique: str | None
) -> None:
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        server.pause()
        started_at = time.monotonic()
        with pytest.raises(Unavailable, match="documents cannot be stored") as caught:
            await client.enqueue(Task(text="x" * 300 * 1024), tenant="acme", unique=unique, timeout=6)
        assert not caught.value.maybe_stored
        assert time.monotonic() - started_at > 5.9  # not at the end of a single request
        server.resume()


# clients


async def test_an_unopened_or_closed_client_says_how_to_open_it(account: Account, streams: Path) -> None:
    client = aiqueue.connect(**where(account, streams))
    with pytest.raises(BadInput, match="async with"):
        await client.enqueue(Task(), tenant="acme")
    await client.close()
    await client.open()
    await client.open()
    await client.close()
    await client.close()
    with pytest.raises(BadInput, match="async with"):
        await client.enqueue(Task(), tenant="acme")


def test_settings_and_single_arguments_are_not_mixed() -> None:
    with pytest.raises(BadInput, match="not both"):
        aiqueue.connect("nats://x", settings=aiqueue.Settings.load())


@pytest.fixture
async def arguments_of_connect(client: Client, account: Account, streams: Path) -> dict[str, Any]:
    """Where a sync client connects, the streams being there."""
    return where(account, streams)


def test_an_unopened_sync_client_says_how_to_open_it(account: Account, streams: Path) -> None:
    client = aiqueue.connect_sync(**where(account, streams))
    with pytest.raises(BadInput, match=r"with aiqueue\.connect_sync"):
        client.enqueue(Task(), tenant="acme")
    client.close()


async def test_the_sync_form_works_in_a_thread_of_a_program_with_a_loop(
    client: Client, arguments_of_connect: dict[str, Any]
) -> None:
    def script() -> list[bool]:
        with aiqueue.connect_sync(**arguments_of_connect) as sync:
            return [sync.enqueue(Small(), tenant="acme", unique="k").duplicate for _ in range(2)]

    assert await asyncio.to_thread(script) == [False, True]
    assert len(await stored(client)) == 1


async def test_threads_may_share_a_sync_client(client: Client, arguments_of_connect: dict[str, Any]) -> None:
    def script() -> set[str]:
        with aiqueue.connect_sync(**arguments_of_connect) as sync, ThreadPoolExecutor(8) as pool:
            return set(pool.map(lambda n: sync.enqueue(Task(text=str(n)), tenant="acme").id, range(200)))

    assert len(await asyncio.to_thread(script)) == 200
    assert len(await stored(client, "AI_AGENT_TASKS")) == 200


async def test_errors_come_out_of_the_sync_form_as_they_are(
    client: Client, arguments_of_connect: dict[str, Any]
) -> None:
    def script() -> None:
        with aiqueue.connect_sync(**arguments_of_connect) as sync:
            with pytest.raises(InvalidToken, match="tenant"):
                sync.enqueue(Task(), tenant="a.b")
            with pytest.raises(TimeoutError):
                sync.enqueue(Task(), tenant="acme").result(0.1)

    await asyncio.to_thread(script)


async def test_closing_a_sync_client_ends_the_calls_of_other_threads_and_its_own_thread(
    client: Client, arguments_of_connect: dict[str, Any], eventually: Eventually
) -> None:
    ended: list[BaseException] = []

    def wait(handle: Any) -> None:
        try:
            handle.result()
        except BaseException as error:  # noqa: BLE001
            ended.append(error)

    def script() -> None:
        with aiqueue.connect_sync(**arguments_of_connect) as sync:
            waiter = threading.Thread(target=wait, args=(sync.enqueue(Task(), tenant="acme"),))
            waiter.start()
            while not sync._client.connection._regained.all():  # the waiter is at work
                time.sleep(0.005)
        waiter.join(10)
        assert not waiter.is_alive()
        sync.close()
        with pytest.raises(BadInput):
            sync.enqueue(Task(), tenant="acme")

    await asyncio.to_thread(script)
    assert [type(each) for each in ended] == [Unavailable]
    assert not [each for each in threading.enumerate() if each.name == "aiqueue-client"]


async def test_a_sync_client_that_cannot_open_leaves_no_thread() -> None:
    with pytest.raises(Unavailable):
        aiqueue.connect_sync("nats://127.0.0.1:1", connect_timeout=0.3).open()
    assert not [each for each in threading.enumerate() if each.name == "aiqueue-client"]


async def test_a_plain_script_enqueues_and_ends(client: Client, account: Account, tmp_path: Path) -> None:
    script = (
        "import aiqueue\n"
        "class Task(aiqueue.Message, kind='task'):\n    text: str\n"
        "with aiqueue.connect_sync() as client:\n"
        "    print(client.enqueue(Task(text='hi'), tenant='acme', unique='s1').id)\n"
    )
    environment = {
        "NATS_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "PATH": "/usr/bin:/bin", "PYTHONPATH": str(Path(aiqueue.__file__).parent.parent),
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(30):
        out, err = await process.communicate()
    assert (out.decode().strip(), err.decode(), process.returncode) == ("s1", "", 0)
    assert len(await stored(client, "AI_AGENT_TASKS")) == 1
