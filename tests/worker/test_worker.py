from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import nats
import pytest

import aiqueue
from aiqueue import headers, subjects
from aiqueue.config import Settings
from aiqueue.enqueue.deadletter import Filter
from aiqueue.errors import BadInput, JobFailed, NotFound, ResultDisabled, UnknownFamily

from ..support import create_streams, eventually


class Echo(aiqueue.Message, kind="echo"):
    text: str = ""


class Task(aiqueue.Message, kind="agent.task"):
    task_id: str = ""
    goal: str = ""


class Request(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    prompt: str
    request_id: str = ""


class Document(aiqueue.Message, kind="rag.document", family="rag.ingest"):
    content: str
    document_id: str = ""


FAST = aiqueue.Backoff(attempts=3, first=0.02, cap=0.05)


async def dead(client: aiqueue.Client, **wanted: Any) -> list[Any]:
    return [letter async for letter in client.dead.find(Filter(**wanted))]


async def test_async_and_sync_handlers_return_results(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    threads: list[str] = []

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> dict[str, Any]:
        return {"text": job.message.text, "tenant": job.tenant, "attempt": job.attempt}

    @worker.handle(Task)
    def task(job: aiqueue.Job[Task]) -> str:
        threads.append(threading.current_thread().name)
        return job.message.goal.upper()

    async with worker.running(client):
        first = await client.enqueue(Echo(text="héllo"), tenant="acme")
        second = await client.enqueue(Task(goal="win"), tenant="globex", priority="high")
        assert await first.result(25) == {"text": "héllo", "tenant": "acme", "attempt": 1}
        assert await second.result(25) == "WIN"
    assert threads[0].startswith("aiqueue-handler")


async def test_the_log_of_a_failed_attempt_says_whose_it_is_and_where_it_failed(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo, retry=aiqueue.Backoff(attempts=2, first=0))
    async def echo(job: aiqueue.Job[Echo]) -> None:
        raise ValueError("broken")

    caplog.set_level("INFO", "aiqueue")
    async with worker.running(client):
        handle = await client.enqueue(Echo(text=""), tenant="acme", priority="high")
        with pytest.raises(JobFailed):
            await handle.result(25)
    job = f"job {handle.id} (echo) of agent.tasks acme/high"
    logged = [each.getMessage() for each in caplog.records if handle.id in each.getMessage()]
    (retry,) = (each for each in logged if each.startswith(f"{job}: attempt 1 failed, retry in 0.0 s: "))
    (dead,) = (each for each in logged if each.startswith(f"{job} is a dead letter (attempts): "))
    for text in (retry, dead):
        assert "\nTraceback (most recent call last):" in text
        assert text.endswith("ValueError: broken")


async def test_a_plain_client_that_follows_the_guide_has_its_jobs_run(client: aiqueue.Client, account: Any) -> None:
    seen: list[tuple[str, str, str, str]] = []
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append((job.family, job.id, job.priority, job.message.goal))

    @worker.handle(Request)
    async def request(job: aiqueue.Job[Request]) -> None:
        seen.append((job.family, job.id, job.priority, job.message.prompt))

    @worker.handle(Document)
    async def document(job: aiqueue.Job[Document]) -> None:
        seen.append((job.family, job.message.document_id, job.priority, job.message.content))

    async with worker.running(client):
        plain = await nats.connect(account.url, user=account.user, password=account.password)
        await plain.publish("ai.agent.tasks.acme", b'{"task_id": "t-1", "goal": "plan"}')
        request_headers = {"request_id": "r-1", "model": "gpt", "priority": "normal"}
        await plain.publish("ai.gateway.requests.acme", b'{"prompt": "hi"}', headers=request_headers)
        nested = (
            b'{"schema_version": "1.0", "message_type": "llm_request", "data": {"request_id": "r-2", "prompt": "ho"}}'
        )
        await plain.publish("ai.gateway.requests.acme", nested)
        flat = b'{"schema_version": "1.0", "message_type": "rag_document", "document_id": "d-1", "content": "text"}'
        await plain.publish("ai.rag.ingest.acme", flat)
        await plain.publish("ai.gateway.requests.acme.batch", b'{"prompt": "later", "request_id": "not a token!"}')
        await plain.flush()
        async with asyncio.timeout(25):
            while len(seen) < 5:
                await asyncio.sleep(0.01)
        await plain.close()
    hashed = subjects.foreign_id("not a token!")
    assert sorted(seen) == sorted(
        [
            ("agent.tasks", "t-1", "normal", "plan"),
            ("gateway.requests", "r-1", "normal", "hi"),
            ("gateway.requests", "r-2", "normal", "ho"),
            ("rag.ingest", "d-1", "normal", "text"),
            ("gateway.requests", hashed, "batch", "later"),
        ]
    )


async def test_the_same_unique_key_of_two_tenants_is_two_jobs_and_of_one_is_one(client: aiqueue.Client) -> None:
    ran: list[str] = []
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        ran.append(job.tenant)
        return job.message.text

    one = await client.enqueue(Echo(text="first"), tenant="acme", unique="k")
    two = await client.enqueue(Echo(text="second"), tenant="acme", unique="k")
    other = await client.enqueue(Echo(text="other"), tenant="globex", unique="k")
    assert (one.duplicate, two.duplicate, other.duplicate) == (False, True, False)
    async with worker.running(client):
        results = [await handle.result(25) for handle in (one, two, other)]
    assert results == ["first", "first", "other"]
    assert sorted(ran) == ["acme", "globex"]


async def test_a_failing_job_is_retried_and_ends_as_a_dead_letter_with_its_history(client: aiqueue.Client) -> None:
    attempts: list[int] = []
    worker = aiqueue.Worker(name="w-1")

    @worker.handle(Echo, retry=FAST)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        attempts.append(job.attempt)
        raise ValueError("no gööd")

    async with worker.running(client):
        handle = await client.enqueue(Echo(text="x"), tenant="acme", unique="bad")
        with pytest.raises(JobFailed) as failed:
            await handle.result(25)
    assert attempts == [1, 2, 3]
    assert (failed.value.attempt, failed.value.reason) == (3, "attempts")
    assert "no gööd" in failed.value.error
    (letter,) = await dead(client)
    assert (letter.job_id, letter.kind, letter.reason, letter.attempt, letter.worker) == (
        "bad",
        "echo",
        "attempts",
        3,
        "w-1",
    )
    assert [each["attempt"] for each in letter.history] == [1, 2, 3]
    assert "ValueError" in letter.history[0]["traceback"]


async def test_a_replay_runs_the_job_again_and_keeps_the_history(client: aiqueue.Client) -> None:
    broken = True
    worker = aiqueue.Worker()

    @worker.handle(Echo, retry=aiqueue.Backoff(attempts=1))
    async def echo(job: aiqueue.Job[Echo]) -> str:
        if broken:
            raise RuntimeError(f"broken {len(job.headers)}")
        return job.message.text

    async with worker.running(client):
        handle = await client.enqueue(Echo(text="mended"), tenant="acme", priority="low", unique="k")
        with pytest.raises(JobFailed):
            await handle.result(25)
        (letter,) = await dead(client)
        await client.dead.replay(letter)
        async with asyncio.timeout(25):
            while not (replayed := [each for each in await dead(client) if each.seq != letter.seq]):
                await asyncio.sleep(0.01)
        assert [each["attempt"] for each in replayed[0].history] == [1, 1]
        assert replayed[0].replays == 1
        assert replayed[0].lane.priority == "low"
        broken = False
        await client.dead.replay(replayed[0])
        async with asyncio.timeout(25):
            while (head := await client.journal.head("ai.agent.results.acme.k")) is None or head.event != "result":
                await asyncio.sleep(0.01)
    assert head.data == "mended"
    assert await dead(client) == []
    assert await (await client.job("k")).result(25) == "mended"
    with pytest.raises(JobFailed, match="broken"):  # the end of its own run
        await handle.result(25)


async def test_a_job_enqueued_again_after_its_end_runs_again_under_the_same_id(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        return job.message.text

    config = (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["config"]
    await client.connection.api("STREAM.UPDATE.AI_AGENT_TASKS", {**config, "duplicate_window": 100_000_000})
    async with worker.running(client):
        first = await client.enqueue(Echo(text="one"), tenant="acme", unique="k")
        assert await first.result(25) == "one"
        async with asyncio.timeout(25):
            while (second := await client.enqueue(Echo(text="two"), tenant="acme", unique="k")).duplicate:
                await asyncio.sleep(0.05)
        assert await second.result(25) == "two"


async def test_retry_and_reject_are_obeyed(client: aiqueue.Client) -> None:
    times: list[float] = []
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        times.append(time.monotonic())
        if job.attempt == 1:
            raise aiqueue.Retry("busy", after=0.3)
        return "done"

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        raise aiqueue.Reject("never")

    async with worker.running(client):
        assert await (await client.enqueue(Echo(), tenant="acme")).result(25) == "done"
        with pytest.raises(JobFailed) as failed:
            await (await client.enqueue(Task(), tenant="acme")).result(25)
    assert times[1] - times[0] >= 0.29
    assert (failed.value.reason, failed.value.error, failed.value.attempt) == ("rejected", "never", 1)


@pytest.mark.parametrize("sync", [False, True])
async def test_a_handler_that_hangs_ends_at_its_timeout(client: aiqueue.Client, sync: bool) -> None:
    worker = aiqueue.Worker(concurrency=1)
    release = threading.Event()

    async def hang(job: aiqueue.Job[Echo]) -> None:
        await asyncio.sleep(3600)

    def block(job: aiqueue.Job[Echo]) -> None:
        release.wait(40)

    @worker.handle(Task)
    def task(job: aiqueue.Job[Task]) -> str:
        return "next"

    worker.handle(Echo, timeout=0.2, retry=aiqueue.Backoff(attempts=1))(block if sync else hang)
    try:
        async with worker.running(client):
            handle = await client.enqueue(Echo(), tenant="acme")
            with pytest.raises(JobFailed, match=r"timed out after 0\.2 s"):
                await handle.result(25)
            assert await (await client.enqueue(Task(), tenant="acme")).result(25) == "next"
    finally:
        release.set()


class Evil(BaseException):
    pass


@pytest.mark.parametrize(
    "error", [SystemExit(3), KeyboardInterrupt(), Evil("x"), asyncio.CancelledError(), StopIteration(), GeneratorExit()]
)
@pytest.mark.parametrize("sync", [False, True])
async def test_nothing_that_a_handler_raises_ends_the_worker(
    client: aiqueue.Client, error: BaseException, sync: bool
) -> None:
    worker = aiqueue.Worker(concurrency=2)

    async def raise_async(job: aiqueue.Job[Echo]) -> None:
        raise error

    def raise_sync(job: aiqueue.Job[Echo]) -> None:
        raise error

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> str:
        return "alive"

    worker.handle(Echo, retry=aiqueue.Backoff(attempts=1))(raise_sync if sync else raise_async)
    async with worker.running(client):
        with pytest.raises(JobFailed):
            await (await client.enqueue(Echo(), tenant="acme")).result(25)
        assert await (await client.enqueue(Task(), tenant="acme")).result(25) == "alive"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff\xff\xff", "undecodable"),
        (b"", "undecodable"),
        (b'{"text": ', "undecodable"),
        (b"[" * 5_000, "undecodable"),
        (b"\xa1\x64text", "undecodable"),
        (b"[1, 2]", "undecodable"),
        (b'{"text": {"not": "text"}}', "invalid"),
    ],
)
async def test_a_body_that_cannot_be_read_becomes_a_dead_letter_untouched(
    client: aiqueue.Client, account: Any, body: bytes, reason: str
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        return job.message.text

    async with worker.running(client):
        plain = await nats.connect(account.url, user=account.user, password=account.password)
        await plain.jetstream().publish("ai.agent.tasks.acme", body, headers={"Aiq-Kind": "echo", "X-Own": "kept"})
        await plain.close()
        async with asyncio.timeout(25):
            while not (letters := await dead(client)):
                await asyncio.sleep(0.01)
        assert await (await client.enqueue(Echo(text="alive"), tenant="acme")).result(25) == "alive"
    assert (letters[0].reason, letters[0].body, letters[0].headers["X-Own"]) == (reason, body, "kept")


async def test_an_unknown_schema_version_is_not_run(client: aiqueue.Client, account: Any) -> None:
    worker = aiqueue.Worker()
    ran: list[str] = []

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        ran.append(job.id)

    async with worker.running(client):
        plain = await nats.connect(account.url, user=account.user, password=account.password)
        for version in ("99", "1.0"):
            task = {"task_id": f"v{version[0]}"}
            body = {"schema_version": version, "message_type": "agent_task", "data": task}
            await plain.jetstream().publish("ai.agent.tasks.acme", json.dumps(body).encode())
        await plain.close()
        async with asyncio.timeout(25):
            while not ran:
                await asyncio.sleep(0.01)
        await eventually(lambda: _is_parked(client))  # it waits for a newer worker
    assert ran == ["v1"]


async def _is_parked(client: aiqueue.Client) -> bool:
    work, parked = [await client.connection.api(f"STREAM.INFO.{name}") for name in ("AI_AGENT_TASKS", "AI_PARKED")]
    return work["state"]["messages"] == 0 and parked["state"]["messages"] == 1


async def test_a_job_past_its_deadline_is_not_run(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        return "ran"

    handle = await client.enqueue(Echo(), tenant="acme", deadline=0)
    async with worker.running(client):
        with pytest.raises(JobFailed, match="deadline"):
            await handle.result(25)
        kept = await client.enqueue(Echo(), tenant="acme", deadline="1h")
        assert await kept.result(25) == "ran"


async def test_a_handler_without_results_says_so_at_once(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    entered, release = asyncio.Event(), asyncio.Event()

    @worker.handle(Echo, result=False)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        entered.set()
        await release.wait()
        return "dropped"

    async with worker.running(client):
        handle = await client.enqueue(Echo(), tenant="acme")
        waiting = asyncio.create_task(handle.result(25))
        await entered.wait()
        release.set()
        with pytest.raises(ResultDisabled):
            await waiting
        with pytest.raises(ResultDisabled):
            await handle.result(25)
    assert await client.journal.head(f"ai.agent.results.acme.{handle.id}") is None


async def test_a_result_that_cannot_be_kept_is_a_dead_letter_and_not_a_loop(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> object:
        deep: list[Any] = []
        for _ in range(100):
            deep = [deep]
        return object() if job.message.text == "odd" else deep

    async with worker.running(client):
        for text in ("odd", "deep"):
            with pytest.raises(JobFailed) as failed:
                await (await client.enqueue(Echo(text=text), tenant="acme")).result(25)
            assert failed.value.reason == "result"


async def test_progress_reaches_the_journal(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        await job.progress(0.5, "half")
        await job.progress(1, "whole")
        with pytest.raises(ValueError, match="fraction"):
            await job.progress(1.5)
        return "ok"

    async with worker.running(client):
        handle = await client.enqueue(Echo(), tenant="acme")
        assert await handle.result(25) == "ok"
    subject = f"ai.agent.results.acme.{handle.id}"
    entries = [each async for each in client.connection.read(client.journal.stream, subject)]
    assert [each.headers[headers.EVENT] for each in entries] == ["progress", "progress", "result"]
    assert {each.headers[headers.EPOCH] for each in entries} == {"1"}


async def test_the_lifespan_surrounds_the_jobs_and_its_value_reaches_them(client: aiqueue.Client) -> None:
    events: list[str] = []

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[dict[str, str]]:
        events.append("in")
        yield {"model": "m1"}
        events.append("out")

    worker = aiqueue.Worker(lifespan=lifespan)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        events.append("job")
        return str(job.state["model"])

    async with worker.running(client):
        assert await (await client.enqueue(Echo(), tenant="acme")).result(25) == "m1"
    assert events == ["in", "job", "out"]


async def test_a_lifespan_that_fails_fails_the_start_and_takes_no_job(client: aiqueue.Client) -> None:
    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    worker = aiqueue.Worker(lifespan=lifespan)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> None: ...

    with pytest.raises(RuntimeError, match="no database"):
        async with worker.running(client):
            pass


async def test_leases_hold_while_a_handler_runs_longer_than_ack_wait(client: aiqueue.Client) -> None:
    await shorten_leases(client, ack_wait_s=1)
    ran: list[str] = []
    worker = aiqueue.Worker(concurrency=1)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        ran.append(job.message.text)
        await asyncio.sleep(2.5 if job.message.text == "long" else 0)
        return "ok"

    async with worker.running(client):
        long = await client.enqueue(Echo(text="long"), tenant="acme")
        async with asyncio.timeout(25):
            while not ran:
                await asyncio.sleep(0.01)
        queued = await client.enqueue(Echo(text="queued"), tenant="globex")
        assert await long.result(25) == "ok"
        assert await queued.result(25) == "ok"
    assert ran == ["long", "queued"]


async def shorten_leases(client: aiqueue.Client, *, ack_wait_s: float) -> None:
    import dataclasses  # noqa: PLC0415

    topology = client.topology
    families = {name: dataclasses.replace(each, ack_wait_s=ack_wait_s) for name, each in topology.families.items()}
    client.topology = dataclasses.replace(topology, families=families)


async def test_a_drain_finishes_what_runs_and_returns_the_rest_to_the_queue(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.session.prefetch", lambda concurrency, handler_s: 2)  # two wait in the worker
    monkeypatch.setattr("aiqueue.worker.session.WAIT_HERE_MAX_S", 60.0)  # however busy the machine is
    entered: list[str] = []
    release = asyncio.Event()
    worker = aiqueue.Worker(concurrency=2)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        entered.append(job.message.text)
        await release.wait()
        return "ok"

    async with worker.running(client) as session:
        handles = [await client.enqueue(Echo(text=str(n)), tenant=f"t{n}") for n in range(6)]
        async with asyncio.timeout(25):
            while len(entered) < 2 or session.vitals()["waiting"] < 2:
                await asyncio.sleep(0.01)
        stop_discovery = session.discovery.stop

        async def stop_after_the_running_jobs() -> None:  # while two jobs wait
            release.set()
            while session.running:
                await asyncio.sleep(0.01)
            await stop_discovery()

        monkeypatch.setattr(session.discovery, "stop", stop_after_the_running_jobs)
        await session.drain()
        assert session.clean
    assert len(entered) == 2
    other = aiqueue.Worker()

    @other.handle(Echo)
    async def echo_again(job: aiqueue.Job[Echo]) -> str:
        return "again"

    started = time.monotonic()
    async with other.running(client):
        results = [await handle.result(25) for handle in handles]
    assert sorted(results) == ["again"] * 4 + ["ok"] * 2
    assert time.monotonic() - started < 25  # returned to the queue, not left to their leases of 30 s


async def test_a_worker_that_leaves_announces_the_job_that_it_returns(client: aiqueue.Client) -> None:
    notices: list[str] = []
    await client.connection.subscribe(
        f"{subjects.BACK}.agent.tasks", lambda message: notices.append(message.data.decode())
    )
    entered = asyncio.Event()
    worker = aiqueue.Worker(drain_timeout=0.1)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        entered.set()
        await asyncio.Event().wait()

    async with worker.running(client):
        await client.enqueue(Echo(), tenant="acme")
        async with asyncio.timeout(25):
            await entered.wait()
    async with asyncio.timeout(25):
        while not notices:
            await asyncio.sleep(0.01)
    assert [each.split()[1:] for each in notices] == [["AI_AGENT_TASKS", "1"]]  # without it, it becomes a suspect


async def test_a_drain_past_its_time_cancels_and_returns_jobs_to_the_queue(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(drain_timeout=0.1)
    entered = asyncio.Event()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        entered.set()
        await asyncio.sleep(3600)

    async with worker.running(client) as session:
        handle = await client.enqueue(Echo(), tenant="acme")
        await entered.wait()
    assert not session.clean
    other = aiqueue.Worker()

    @other.handle(Echo)
    async def echo_again(job: aiqueue.Job[Echo]) -> int:
        return job.attempt

    async with other.running(client):
        assert await handle.result(25) == 1  # leaving is no failed attempt


async def test_a_waiting_job_goes_to_an_idle_worker_and_not_behind_a_long_one(client: aiqueue.Client) -> None:
    release = asyncio.Event()
    busy, idle = aiqueue.Worker(concurrency=1), aiqueue.Worker(concurrency=1)

    async def echo(job: aiqueue.Job[Echo]) -> str:
        if job.message.text == "long":
            await release.wait()
        return "ok"

    busy.handle(Echo)(echo)
    idle.handle(Echo)(echo)
    async with busy.running(client):
        long = await client.enqueue(Echo(text="long"), tenant="acme")
        short = [await client.enqueue(Echo(text="short"), tenant=tenant) for tenant in ("acme", "globex", "initech")]
        async with idle.running(client):
            for handle in short:
                assert await handle.result(25) == "ok"
            release.set()
            assert await long.result(25) == "ok"


async def test_a_deleted_lane_consumer_is_recreated(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        return "ok"

    async with worker.running(client):
        assert await (await client.enqueue(Echo(), tenant="acme")).result(25) == "ok"
        await client.connection.api("CONSUMER.DELETE.AI_AGENT_TASKS.acme-normal")
        assert await (await client.enqueue(Echo(), tenant="acme")).result(25) == "ok"


async def test_tenants_limits_whose_jobs_are_taken(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(tenants=["acme"])
    ran: list[str] = []

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        ran.append(job.tenant)
        return "ok"

    async with worker.running(client):
        await client.enqueue(Echo(), tenant="globex")
        assert await (await client.enqueue(Echo(), tenant="acme")).result(25) == "ok"
    assert ran == ["acme"]


async def test_a_worker_with_a_mistake_is_refused(client: aiqueue.Client) -> None:
    with pytest.raises(BadInput, match="concurrency"):
        aiqueue.Worker(concurrency=0)
    with pytest.raises(BadInput, match="list of texts"):
        aiqueue.Worker(families="agent.tasks")
    with pytest.raises(BadInput, match="no handlers"):
        async with aiqueue.Worker().running(client):
            pass

    class Elsewhere(aiqueue.Message, kind="k", family="no.such"):
        pass

    stray = aiqueue.Worker()
    stray.handle(Elsewhere)(lambda job: None)
    with pytest.raises(UnknownFamily):
        async with stray.running(client):
            pass
    worker = aiqueue.Worker()
    worker.handle(Echo)(lambda job: None)
    with pytest.raises(BadInput, match="already"):
        worker.handle(Echo)(lambda job: None)
    with pytest.raises(BadInput, match="timeout"):
        worker.handle(Task, timeout=0)
    await client.connection.api("STREAM.DELETE.AI_AGENT_TASKS")
    with pytest.raises(NotFound, match="aiqueue apply"):
        async with worker.running(client):
            pass


async def test_jobs_go_on_after_the_server_was_killed_and_restarted(own_server: Any) -> None:
    server = own_server()
    worker = aiqueue.Worker(concurrency=5)
    ran: list[str] = []

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        await asyncio.sleep(0.02)
        ran.append(job.id)
        return "ok"

    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        async with worker.running(client):
            handles = [await client.enqueue(Echo(), tenant="acme") for _ in range(60)]
            server.kill()
            server.start()
            handles += [await client.enqueue(Echo(), tenant="globex") for _ in range(5)]
            assert [await handle.result(45) for handle in handles] == ["ok"] * 65
    assert set(ran) == {handle.id for handle in handles}


async def test_an_attempt_that_was_taken_over_does_not_end_the_newer_one(client: aiqueue.Client) -> None:
    """Two workers run the same job, as after a lost lease; the older one learns it and writes nothing."""
    older_entered, newer_entered, newer_may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
    older_errors: list[str] = []

    async def older(job: aiqueue.Job[Echo]) -> str:
        await job.progress(0.1)
        older_entered.set()
        await newer_entered.wait()
        try:
            await job.progress(0.2)
        except aiqueue.errors.Stale as stale:
            older_errors.append(f"stale {stale.ended}")
            raise
        return "older"

    async def newer(job: aiqueue.Job[Echo]) -> str:
        await job.progress(0.3)
        newer_entered.set()
        await newer_may_end.wait()
        raise aiqueue.Retry("not yet") if job.attempt == 1 else ValueError("never here")

    last = aiqueue.Worker()

    @last.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        return f"attempt {job.attempt}"

    first, second = aiqueue.Worker(name="older"), aiqueue.Worker(name="newer")
    first.handle(Echo)(older)
    second.handle(Echo, retry=aiqueue.Backoff(attempts=3, first=0.5, jitter=0))(newer)
    async with first.running(client) as session:
        handle = await client.enqueue(Echo(), tenant="acme")
        await older_entered.wait()
        # its lease ends and its pulls cease, as for a worker that hangs; the consumer gives the job to the next
        await session.leases.stop()
        session.puller.stop()
        await client.connection.api("CONSUMER.DELETE.AI_AGENT_TASKS.acme-normal")
        async with second.running(client):
            await newer_entered.wait()
            async with asyncio.timeout(25):
                while session.running:
                    await asyncio.sleep(0.01)
            assert older_errors == ["stale False"]
            newer_may_end.set()
            async with asyncio.timeout(25):
                while (head := await client.journal.head(f"ai.agent.results.acme.{handle.id}")) is None or (
                    head.event != "retry"
                ):
                    await asyncio.sleep(0.01)
    async with last.running(client):
        assert await handle.result(20) == "attempt 2"


async def test_attempts_are_counted_on_when_the_consumer_is_recreated(client: aiqueue.Client) -> None:
    attempts: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Echo, retry=aiqueue.Backoff(attempts=3, first=0.3, factor=1, jitter=0))
    async def echo(job: aiqueue.Job[Echo]) -> None:
        attempts.append(job.attempt)
        raise ValueError("always")

    async with worker.running(client):
        handle = await client.enqueue(Echo(), tenant="acme")
        async with asyncio.timeout(25):
            while len(attempts) < 2:
                await asyncio.sleep(0.01)
        await client.connection.api("CONSUMER.DELETE.AI_AGENT_TASKS.acme-normal")
        with pytest.raises(JobFailed) as failed:
            await handle.result(20)
    assert failed.value.attempt == 3
    assert len(attempts) == 3
    (letter,) = await dead(client)
    assert [each["attempt"] for each in letter.history] == [1, 2, 3]


async def test_a_job_that_was_retried_and_keeps_no_result_says_so_at_once(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo, retry=FAST, result=False)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        if job.attempt == 1:
            raise ValueError("once")

    async with worker.running(client):
        handle = await client.enqueue(Echo(), tenant="acme")
        with pytest.raises(ResultDisabled):
            await handle.result(25)


async def test_a_handler_that_blocks_the_event_loop_for_three_leases_runs_once(client: aiqueue.Client) -> None:
    await shorten_leases(client, ack_wait_s=1)
    ran: list[str] = []
    worker, other = aiqueue.Worker(concurrency=1), aiqueue.Worker(concurrency=1)

    async def echo(job: aiqueue.Job[Echo]) -> str:
        ran.append(job.message.text)
        if job.message.text == "block":
            await asyncio.to_thread(lambda: None)
            time.sleep(3.2)
        return "ok"

    worker.handle(Echo)(echo)
    async with worker.running(client):
        handle = await client.enqueue(Echo(text="block"), tenant="acme")
        other.handle(Echo)(echo)
        async with other.running(client):
            assert await handle.result(20) == "ok"
            assert await (await client.enqueue(Echo(text="next"), tenant="acme")).result(25) == "ok"
    assert ran == ["block", "next"]


async def test_a_job_that_hardly_fits_is_run_where_it_is_whatever_priority_its_header_wishes(
    client: aiqueue.Client, account: Any
) -> None:
    seen: list[str] = []
    worker = aiqueue.Worker()

    @worker.handle(Request)
    async def request(job: aiqueue.Job[Request]) -> None:
        seen.append(job.priority)

    plain = await nats.connect(account.url, user=account.user, password=account.password)
    body = json.dumps({"prompt": "x" * (plain.max_payload - 100)}).encode()
    await plain.jetstream().publish("ai.gateway.requests.acme", body, headers={"priority": "low"})
    await plain.close()
    async with worker.running(client), asyncio.timeout(25):
        while not seen:
            await asyncio.sleep(0.01)
    assert seen == ["normal"]


async def test_a_low_priority_header_on_the_bare_subject_moves_the_job_once(
    client: aiqueue.Client, account: Any
) -> None:
    seen: list[tuple[str, str]] = []
    worker = aiqueue.Worker()

    @worker.handle(Request)
    async def request(job: aiqueue.Job[Request]) -> str:
        seen.append((job.message.prompt, job.priority))
        return job.id

    plain = await nats.connect(account.url, user=account.user, password=account.password)
    for priority in ("batch", "low", "normal", "high", "urgent"):
        body = json.dumps({"prompt": priority}).encode()
        await plain.jetstream().publish("ai.gateway.requests.acme", body, headers={"priority": priority})
    await plain.close()
    async with worker.running(client):
        async with asyncio.timeout(25):
            while len(seen) < 5:
                await asyncio.sleep(0.01)
        async with asyncio.timeout(25):
            while (await client.connection.api("STREAM.INFO.AI_GATEWAY_REQUESTS"))["state"]["messages"]:
                await asyncio.sleep(0.01)
    assert sorted(seen) == [
        ("batch", "batch"),
        ("high", "normal"),  # upwards a header is not honoured
        ("low", "low"),
        ("normal", "normal"),
        ("urgent", "normal"),
    ]


async def test_a_plain_publishers_low_job_moves_in_a_family_that_claims_no_ids(
    client: aiqueue.Client, account: Any
) -> None:
    seen: list[str] = []
    worker = aiqueue.Worker()

    @worker.handle(Task, result=False)
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append(job.priority)

    plain = await nats.connect(account.url, user=account.user, password=account.password)
    for priority in ("low", "normal"):
        await plain.jetstream().publish("ai.agent.tasks.acme", b"{}", headers={"priority": priority})
    await plain.close()
    async with worker.running(client), asyncio.timeout(25):
        while len(seen) < 2:
            await asyncio.sleep(0.01)
    assert sorted(seen) == ["low", "normal"]


async def test_a_quiet_tenants_jobs_start_within_a_second_of_a_backlogs_work(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(concurrency=5)
    started: list[str] = []

    @worker.handle(Echo, result=False)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        started.append(job.tenant)
        await asyncio.sleep(0.01)

    await asyncio.gather(*(client.enqueue(Echo(), tenant="noisy") for _ in range(2_000)))
    async with worker.running(client):
        async with asyncio.timeout(25):
            while len(started) < 50:
                await asyncio.sleep(0.01)
        asked = len(started)
        await asyncio.gather(*(client.enqueue(Echo(), tenant="quiet") for _ in range(10)))
        async with asyncio.timeout(25):
            while started.count("quiet") < 10:
                await asyncio.sleep(0.01)
    tenth = [at for at, tenant in enumerate(started) if tenant == "quiet"][9]
    assert tenth - asked < 10 + 500  # five slots, 10 ms each


async def test_a_low_priority_job_starts_behind_an_endless_high_stream(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker(concurrency=2)
    started: list[str] = []

    @worker.handle(Echo, result=False)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        started.append(job.priority)
        await asyncio.sleep(0.01)

    await asyncio.gather(*(client.enqueue(Echo(), tenant="acme", priority="high") for _ in range(1_000)))
    async with worker.running(client):
        async with asyncio.timeout(25):
            while len(started) < 20:
                await asyncio.sleep(0.01)
        await client.enqueue(Echo(), tenant="acme", priority="low")
        async with asyncio.timeout(25):
            while "low" not in started:
                await asyncio.sleep(0.01)
    assert started.index("low") < 900  # long before the end of the high ones


async def test_short_jobs_do_not_wait_behind_long_ones_while_another_worker_idles(client: aiqueue.Client) -> None:
    """The worker has learnt from many short jobs, and then all its slots are in long ones."""
    release = asyncio.Event()
    busy, idle = aiqueue.Worker(concurrency=4), aiqueue.Worker(concurrency=4)
    short: list[str] = []

    async def echo(job: aiqueue.Job[Echo]) -> None:
        if job.message.text == "long":
            await release.wait()
        short.append(job.message.text)

    busy.handle(Echo, result=False)(echo)
    idle.handle(Echo, result=False)(echo)
    for text in ["first"] * 200 + ["long"] * 4 + ["last"] * 4:
        await client.enqueue(Echo(text=text), tenant="acme")
    async with busy.running(client) as session:
        async with asyncio.timeout(25):
            while short.count("first") < 200 or session.running < 4:
                await asyncio.sleep(0.01)
        async with idle.running(client):
            async with asyncio.timeout(25):
                while short.count("last") < 4:
                    await asyncio.sleep(0.02)
            release.set()


async def test_a_job_of_a_recreated_stream_is_not_taken_for_the_one_that_runs(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    entered, release = asyncio.Event(), asyncio.Event()

    @worker.handle(Echo, result=False)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        ran.append(job.message.text)
        if job.message.text == "old":
            entered.set()
            await release.wait()

    ran: list[str] = []
    await client.enqueue(Echo(text="old"), tenant="acme")
    async with worker.running(client) as session:
        await entered.wait()
        await client.connection.api("STREAM.DELETE.AI_AGENT_TASKS")
        await create_streams(client)
        await client.enqueue(Echo(text="new"), tenant="acme")
        async with asyncio.timeout(25):
            while "new" not in ran:
                await asyncio.sleep(0.02)
        release.set()
        async with asyncio.timeout(25):
            while session.running:
                await asyncio.sleep(0.02)
    assert ran == ["old", "new"]


async def test_a_drain_without_a_server_ends_in_its_time(own_server: Any) -> None:
    server = own_server()
    worker = aiqueue.Worker(concurrency=1, drain_timeout=0.2)

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        await asyncio.sleep(3600)

    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        async with worker.running(client) as session:
            for n in range(6):
                await client.enqueue(Echo(), tenant=f"t{n}")
            async with asyncio.timeout(25):
                while not session.running:
                    await asyncio.sleep(0.01)
            server.kill()
            start = time.monotonic()
            await session.drain()
            assert time.monotonic() - start < 25


async def test_a_handler_that_swallows_its_first_cancellation_still_ends_at_its_timeout(
    client: aiqueue.Client,
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo, timeout=0.1, retry=aiqueue.Backoff(attempts=1))
    async def echo(job: aiqueue.Job[Echo]) -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(3600)

    async with worker.running(client):
        with pytest.raises(JobFailed, match="timed out"):
            await (await client.enqueue(Echo(), tenant="acme")).result(25)


async def test_an_embedded_server_that_comes_back_on_another_port_is_found_by_jobs_and_leases(tmp_path: Any) -> None:
    opening = aiqueue.Client(Settings(directory=tmp_path).model_copy(update={"url": None, "context": None}))
    worker, ran = aiqueue.Worker(concurrency=2), []

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> str:
        ran.append(job.message.text)
        await asyncio.sleep(4 if job.message.text == "long" else 0)
        return "ok"

    async with opening as client:
        await shorten_leases(client, ack_wait_s=1.5)
        embedded = client._embedded
        assert embedded is not None
        port = embedded.port
        async with worker.running(client):
            assert await (await client.enqueue(Echo(text="before"), tenant="acme")).result(25) == "ok"
            os.kill(embedded.supervisor_pid, signal.SIGKILL)  # and with it the server
            with socket.socket() as other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                for _ in range(1_000):  # without a turn of the loop: nobody else is to be quicker
                    with contextlib.suppress(OSError):
                        other.bind(("127.0.0.1", port))
                        break
                    time.sleep(0.01)
                other.listen()
                long = await client.enqueue(Echo(text="long"), tenant="acme", timeout=30)
                assert await long.result(30) == "ok"
        assert embedded.port != port
        assert client.connection.server.endswith(f":{embedded.port}")
    assert ran == ["before", "long"]
