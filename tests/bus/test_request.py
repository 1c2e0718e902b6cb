"""`request`, and callbacks that answer requests: on the answer subjects of families, and on plain subjects."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest

import aiqueue
from aiqueue.bus import Msg, decode
from aiqueue.errors import BadInput, JobFailed, QueueFull, ReplyTimeout, ResponderError, ResultTimeout, Unavailable
from aiqueue.requests import caller

from ..support import eventually

RESPONSES = "ai.gateway.responses"


class Ask(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    text: str


def ask(text: str, request_id: str | None = None) -> bytes:
    return json.dumps({"text": text} | ({"request_id": request_id} if request_id else {})).encode()


def worker_of(tenant: str, runs: Counter[str]) -> aiqueue.Worker:
    worker = aiqueue.Worker(tenants=[tenant])

    @worker.handle(Ask)
    async def handle(job: aiqueue.Job[Ask]) -> dict[str, str]:
        runs[job.id] += 1
        if job.message.text == "no":
            raise aiqueue.Reject("not wanted")
        return {"said": job.message.text.upper()}

    return worker


# -- asking


async def test_an_id_asked_again_is_answered_from_the_journal(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    """The guide's sequence: publish, then request with the same payload. The job runs once."""
    runs: Counter[str] = Counter()
    async with worker_of(tenant, runs).running(client), aiqueue.Responder(tenants=[tenant]).running(client):
        await bus.publish(f"ai.gateway.requests.{tenant}", ask("hello", "r-1"), headers={"request_id": "r-1"})
        for payload in (ask("hello", "r-1"), ask("hello", "r-1"), b"r-1"):
            answer = await bus.request(subject=f"{RESPONSES}.{tenant}", payload=payload, timeout=20)
            assert decode(answer) == {"said": "HELLO"}
            assert answer.headers["Aiq-Job-Id"] == "r-1"
    assert runs == {"r-1": 1}


async def test_a_request_without_an_id_gets_one(bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str) -> None:
    runs: Counter[str] = Counter()
    async with worker_of(tenant, runs).running(client), aiqueue.Responder(tenants=[tenant]).running(client):
        answers = [await bus.request(f"{RESPONSES}.{tenant}", ask("hello")) for _ in range(2)]
    assert [decode(each) for each in answers] == [{"said": "HELLO"}] * 2
    assert sorted(runs.values()) == [1, 1]
    assert {each.headers["Aiq-Job-Id"] for each in answers} == set(runs)


async def test_a_failed_job_is_raised(bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str) -> None:
    async with worker_of(tenant, Counter()).running(client), aiqueue.Responder(tenants=[tenant]).running(client):
        with pytest.raises(JobFailed, match="not wanted") as raised:
            await bus.request(f"{RESPONSES}.{tenant}", ask("no", "r-1"), headers={"Content-Type": "application/json"})
    assert (raised.value.job_id, raised.value.reason) == ("r-1", "rejected")


async def test_a_job_that_does_not_end_in_time_is_a_timeout_that_names_the_id(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    async with aiqueue.Responder(tenants=[tenant]).running(client):
        with pytest.raises(ResultTimeout, match=r"repeat the request with the header request_id: r-1") as raised:
            await bus.request(f"{RESPONSES}.{tenant}", ask("hello", "r-1"), timeout=0.5)
    assert isinstance(raised.value, TimeoutError)


async def test_without_a_responder_a_request_is_unavailable(
    bus: aiqueue.NATSClient, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "ABSENT_MAX_S", 0.2)
    with pytest.raises(Unavailable, match="run `aiqueue respond`"):
        await bus.request(f"{RESPONSES}.{tenant}", ask("hello"), timeout=5)


@pytest.mark.parametrize(
    ("subject", "says"),
    [
        (
            "ai.agent.tasks.{t}",
            r'publish the job, .*client\.job\(published\.id, family="agent\.tasks", tenant="t\w+"\)',
        ),
        ("ai.gateway.requests.{t}.high", r"or request ai\.gateway\.responses\.t\w+$"),
        ("ai.agent.message.{t}", r"takes mail.*: publish to it, or await the reply with `Agent\.request`"),
        ("ai.agent.message.{t}.bob", "takes mail"),
        ("ai.rag.results.{t}.q-1", "is written by workers, and answers no requests: subscribe to it to observe"),
        ("ai.dead.agent.tasks.{t}.t-1", "is written by workers"),
        ("ai.gateway.request.{t}", r"did you mean ai\.gateway\.requests"),
    ],
)
async def test_a_request_that_the_servers_ack_would_answer_says_what_to_call_and_stores_nothing(
    bus: aiqueue.NATSClient, tenant: str, subject: str, says: str
) -> None:
    seen: list[Msg] = []
    await bus.subscribe(f"ai.*.*.{tenant}.>", callback=seen.append)
    await bus.subscribe(f"ai.*.*.{tenant}", callback=seen.append)
    with pytest.raises(BadInput, match=says):
        await bus.request(subject.format(t=tenant), b'{"text": "x"}')
    if "request." not in subject:
        with pytest.raises(BadInput, match=r"has no reply subject.*leave out reply="):
            await bus.publish(subject.format(t=tenant), b"{}", reply="answers")
    await bus.client.connection.flush()
    assert not seen


# -- answering with a callback


async def test_a_callback_answers_new_requests_and_its_answer_is_stored_once(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    calls: list[Msg] = []

    async def answer(msg: Msg) -> None:
        calls.append(msg)
        await msg.respond(json.dumps({"said": decode(msg)["text"].upper()}))

    await bus.subscribe(subject=f"{RESPONSES}.{tenant}", callback=answer, queue="gateway.responders")
    for _ in range(3):
        reply = await bus.request(f"{RESPONSES}.{tenant}", ask("hello", "r-1"), timeout=20)
        assert decode(reply) == {"said": "HELLO"}
    assert [each.subject for each in calls] == [f"{RESPONSES}.{tenant}"]
    handle = await client.job("r-1", family="gateway.requests", tenant=tenant)
    assert await handle.result(5) == {"said": "HELLO"}
    assert await client.request(Ask(text="hello"), tenant=tenant, unique="r-1") == {"said": "HELLO"}
    assert len(calls) == 1


async def test_requests_of_one_id_at_once_share_one_call(bus: aiqueue.NATSClient, tenant: str) -> None:
    calls, go = [], asyncio.Event()

    async def answer(msg: Msg) -> dict[str, int]:
        calls.append(msg)
        await go.wait()
        return {"n": len(calls)}

    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    asking = [asyncio.create_task(bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20)) for _ in range(5)]
    await eventually(lambda: calls)
    go.set()
    assert [decode(each) for each in await asyncio.gather(*asking)] == [{"n": 1}] * 5


async def test_an_answer_that_comes_after_the_callback_has_returned_counts(
    bus: aiqueue.NATSClient, tenant: str
) -> None:
    kept: list[Msg] = []

    async def answer(msg: Msg) -> None:
        kept.append(msg)

    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    asking = asyncio.create_task(bus.request(f"{RESPONSES}.{tenant}", ask("x"), timeout=20))
    await eventually(lambda: kept)
    await kept[0].respond(b'"late"')
    assert decode(await asking) == "late"


async def test_a_request_that_is_answered_too_late_finds_the_answer_when_it_is_repeated(
    bus: aiqueue.NATSClient, tenant: str
) -> None:
    calls, go = [], asyncio.Event()

    async def answer(msg: Msg) -> str:
        calls.append(msg)
        await go.wait()
        return "done"

    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    with pytest.raises(ResultTimeout):
        await bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=0.5)
    go.set()
    assert decode(await bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20)) == "done"
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (ValueError("broken"), "ValueError: broken"),
        (BadInput("nobody waits"), "BadInput: nobody waits"),  # not that of the request
        (QueueFull("a lane", "full"), "QueueFull: "),
        (asyncio.CancelledError(), "cancelled from within"),
        (SystemExit(3), "raised SystemExit: 3"),
        (StopIteration(), "StopIteration"),
        (ExceptionGroup("g", [ValueError("broken")]), "ExceptionGroup: ValueError: broken"),
        (BaseExceptionGroup("g", [KeyboardInterrupt()]), "BaseExceptionGroup"),
        (object(), "a object cannot be encoded|object"),
        (aiqueue.Reject, "returned Reject: it must raise it"),
        ((each for each in "ab"), "whose code has not run"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@pytest.mark.parametrize("plain_function", [False, True])
async def test_errors_of_a_callback_reach_the_requester_and_nothing_is_stored(
    bus: aiqueue.NATSClient, tenant: str, outcome: Any, says: str, plain_function: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    failing = True

    def fail() -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    async def answer(msg: Msg) -> Any:
        return fail() if failing else "done"

    def answer_in_thread(msg: Msg) -> Any:
        return fail() if failing else "done"

    subject = f"{RESPONSES}.{tenant}"
    subscription = await bus.subscribe(subject, callback=answer_in_thread if plain_function else answer)
    with caplog.at_level(logging.ERROR), pytest.raises(ResponderError, match=says) as raised:
        await bus.request(subject, ask("x", "r-1"), timeout=20)
    assert (raised.value.job_id, raised.value.code) == ("r-1", 500)
    name = "answer_in_thread" if plain_function else "answer"
    assert any(name in each.getMessage() and "r-1" in each.getMessage() for each in caplog.records)
    failing = False
    assert decode(await bus.request(subject, ask("x", "r-1"), timeout=20)) == "done"
    assert not subscription.closed


@pytest.mark.parametrize("error", [aiqueue.Reject("not wanted"), ExceptionGroup("g", [aiqueue.Reject("not wanted")])])
async def test_a_rejected_request_has_failed_and_is_not_stored(
    bus: aiqueue.NATSClient, tenant: str, error: Exception
) -> None:
    errors = [error]

    async def answer(msg: Msg) -> str:
        if errors:
            raise errors.pop()
        return "done"

    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    with pytest.raises(JobFailed, match="not wanted") as raised:
        await bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20)
    assert (raised.value.job_id, raised.value.reason) == ("r-1", "rejected")
    assert decode(await bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20)) == "done"


async def test_a_callback_that_asks_for_a_retry_is_asked_again_until_the_timeout(
    bus: aiqueue.NATSClient, tenant: str
) -> None:
    calls: Counter[str] = Counter()

    async def answer(msg: Msg) -> str:
        text = decode(msg)["text"]
        calls[text] += 1
        if text == "never" or calls[text] < 3:
            raise aiqueue.Retry("the model is busy")
        return "done"

    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    assert decode(await bus.request(f"{RESPONSES}.{tenant}", ask("later"), timeout=20)) == "done"
    assert calls["later"] == 3
    with pytest.raises(ResultTimeout, match="the model is busy"):
        await bus.request(f"{RESPONSES}.{tenant}", ask("never"), timeout=0.5)


async def test_a_retry_of_a_request_that_pauses_a_key_is_a_retry_and_is_logged(
    bus: aiqueue.NATSClient, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    calls: list[Msg] = []

    async def answer(msg: Msg) -> str:
        calls.append(msg)
        if len(calls) == 1:
            raise aiqueue.Retry("429", after="10ms", pause="key")
        return "done"

    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    assert decode(await bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20)) == "done"
    assert caplog.text.count('request r-1: the handler raised Retry(pause="key"), which pauses nothing: a request') == 1


async def test_a_request_without_an_answer_counts_as_a_call_that_runs(bus: aiqueue.NATSClient, tenant: str) -> None:
    kept: list[Msg] = []
    subject = f"{RESPONSES}.{tenant}"
    await bus.subscribe(subject, callback=kept.append, concurrency=1)
    with pytest.raises(ResultTimeout):
        await bus.request(subject, ask("x", "r-1"), timeout=0.4)
    with pytest.raises(ResultTimeout, match="1 answers are being made here already"):
        await bus.request(subject, ask("x", "r-2"), timeout=0.4)
    await kept[0].respond("late")
    assert decode(await bus.request(subject, b"r-1", timeout=20)) == "late"
    assert len(kept) == 1


@pytest.mark.parametrize("delay", [None, "10m"])
async def test_a_job_of_the_id_that_waits_for_its_start_answers_in_place_of_the_callback(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, delay: str | None
) -> None:
    calls: list[Msg] = []
    subject = f"{RESPONSES}.{tenant}"
    await bus.subscribe(subject, callback=calls.append)
    if delay is None:
        await bus.publish(f"ai.gateway.requests.{tenant}.high", ask("x", "r-1"))
    else:
        handle = await client.enqueue(Ask(text="x"), tenant=tenant, unique="r-1", delay=delay)
    with pytest.raises(ResultTimeout):
        await bus.request(subject, ask("x", "r-1"), timeout=0.5)
    asking = asyncio.create_task(bus.request(subject, ask("x", "r-1"), timeout=20))
    await bus.subscribe(f"ai.gateway.requests.{tenant}", queue="q", callback=lambda msg: "by the job")
    if delay is not None:
        await handle.run_now()
    assert decode(await asking) == "by the job"
    assert not calls


async def test_a_job_of_the_id_that_was_purged_leaves_the_request_to_the_callback(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    published = await bus.publish(f"ai.gateway.requests.{tenant}", ask("x", "r-1"))
    assert published is not None
    assert await client.connection.delete(published.stream, published.seq)
    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=lambda msg: "by the callback")
    assert decode(await bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20)) == "by the callback"


async def test_a_callback_beside_a_process_of_aiqueue_respond_answers_each_id_once(
    bus: aiqueue.NATSClient, client: aiqueue.Client, shared: Any, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller, "ABSENT_MAX_S", 25.0)  # the process takes its time to start
    runs: Counter[str] = Counter()
    ids = [f"r-{at}" for at in range(24)]
    worker = aiqueue.Worker(tenants=[tenant])

    @worker.handle(Ask)
    async def handle(job: aiqueue.Job[Ask]) -> dict[str, str]:
        runs[job.id] += 1
        return {"by": "worker", "id": job.id}

    async def answer(msg: Msg) -> None:
        fields = decode(msg)
        runs[fields["request_id"]] += 1
        await msg.respond(json.dumps({"by": "callback", "id": fields["request_id"]}))

    async def request_all() -> list[Any]:
        asked = (bus.request(f"{RESPONSES}.{tenant}", ask("x", each), timeout=25) for each in ids)
        return [decode(each) for each in await asyncio.gather(*asked)]

    env = {"AIQUEUE_URL": shared.url, "AIQUEUE_USER": shared.user, "AIQUEUE_PASSWORD": shared.password}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "aiqueue", "respond", env=os.environ | env, stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with worker.running(client):
            assert decode(await bus.request(f"{RESPONSES}.{tenant}", ask("x", "first"), timeout=25))["by"] == "worker"
            await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
            found = await request_all()
            assert await request_all() == found
    finally:
        process.terminate()
        await process.wait()
    assert [each["id"] for each in found] == ids
    assert {each["by"] for each in found} == {"callback", "worker"}
    assert runs == dict.fromkeys([*ids, "first"], 1)
    for each in found:
        handle_of = await client.job(each["id"], family="gateway.requests", tenant=tenant)
        assert await handle_of.result(5) == each


async def test_a_callback_beside_aiqueue_respond_gives_each_id_one_result(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    """Both are in one queue group: whoever gets a request answers it, and repeats get the same answer."""

    async def answer(msg: Msg) -> dict[str, str]:
        return {"by": "callback"}

    worker = aiqueue.Worker(tenants=[tenant])

    @worker.handle(Ask)
    async def handle(job: aiqueue.Job[Ask]) -> dict[str, str]:
        return {"by": "worker"}

    ids = [f"r-{at}" for at in range(20)]

    async def request_all() -> list[str]:
        asked = (bus.request(f"{RESPONSES}.{tenant}", ask("x", each), timeout=20) for each in ids)
        return [decode(each)["by"] for each in await asyncio.gather(*asked)]

    async with worker.running(client), aiqueue.Responder(tenants=[tenant]).running(client):
        await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
        first = await request_all()
        assert await request_all() == first
    assert set(first) == {"callback", "worker"}


async def test_a_job_of_the_id_that_runs_already_answers_in_place_of_the_callback(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    calls, running, go = [], asyncio.Event(), asyncio.Event()

    async def work(msg: Msg) -> str:
        running.set()
        await go.wait()
        return "by the job"

    await bus.subscribe(f"ai.gateway.requests.{tenant}", queue="q", callback=work)
    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=calls.append)
    await bus.publish(f"ai.gateway.requests.{tenant}", ask("x", "r-1"))
    await running.wait()
    asking = asyncio.create_task(bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20))
    go.set()
    assert decode(await asking) == "by the job"
    assert not calls


async def test_a_job_of_the_id_that_starts_meanwhile_decides_the_result(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    asked, answered = asyncio.Event(), asyncio.Event()

    async def answer(msg: Msg) -> str:
        asked.set()
        await answered.wait()
        return "by the callback"

    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    asking = asyncio.create_task(bus.request(f"{RESPONSES}.{tenant}", ask("x", "r-1"), timeout=20))
    await asked.wait()
    handle = await client.enqueue(Ask(text="x"), tenant=tenant, unique="r-1")
    await bus.subscribe(f"ai.gateway.requests.{tenant}", queue="q", callback=lambda msg: "by the job")
    assert await handle.result(20) == "by the job"
    answered.set()
    assert decode(await asking) == "by the job"


async def test_a_bare_id_waits_for_its_job_and_does_not_reach_the_callback(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    calls: list[Msg] = []
    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=calls.append)
    asking = asyncio.create_task(bus.request(f"{RESPONSES}.{tenant}", b"r-1", timeout=20))
    await client.enqueue(Ask(text="x"), tenant=tenant, unique="r-1")
    await bus.subscribe(f"ai.gateway.requests.{tenant}", queue="q", callback=lambda msg: "done")
    assert decode(await asking) == "done"
    assert not calls


async def test_a_responder_that_stops_ends_the_calls_that_nobody_waits_for(
    bus: aiqueue.NATSClient, tenant: str
) -> None:
    cancelled = asyncio.Event()

    async def answer(msg: Msg) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    subscription = await bus.subscribe(f"{RESPONSES}.{tenant}", callback=answer)
    with pytest.raises(ResultTimeout):
        await bus.request(f"{RESPONSES}.{tenant}", ask("x"), timeout=0.4)
    await subscription.unsubscribe()
    assert cancelled.is_set()


def test_an_answer_function_must_be_callable() -> None:
    with pytest.raises(BadInput, match="answer must be an async function of one request"):
        aiqueue.Responder(answer="f")  # type: ignore[arg-type]


# -- plain NATS


async def test_a_plain_request_is_answered_by_the_subscriber(bus: aiqueue.NATSClient, tenant: str) -> None:
    async def answer(msg: Msg) -> None:
        await msg.respond(msg.data + msg.headers["n"].encode())

    await bus.subscribe(f"plain.{tenant}", queue="q", callback=answer)
    reply = await bus.request(f"plain.{tenant}", b"hello ", headers={"n": "7"})
    assert reply.data == b"hello 7"


async def test_a_plain_request_without_a_service_or_in_vain_says_what_to_do(
    bus: aiqueue.NATSClient, tenant: str
) -> None:
    with pytest.raises(Unavailable, match="no responders: start a service"):
        await bus.request(f"plain.{tenant}", b"")
    await bus.subscribe(f"plain.{tenant}", callback=lambda msg: None)
    with pytest.raises(ReplyTimeout, match=r"no reply within 0\.2 s.*raise the timeout") as raised:
        await bus.request(f"plain.{tenant}", b"", timeout=0.2)
    assert isinstance(raised.value, TimeoutError)
    with pytest.raises(BadInput, match="payload must be bytes or text"):
        await bus.request(f"plain.{tenant}", {"a": 1})  # type: ignore[arg-type]


async def test_a_request_whose_connection_is_closed_ends(shared: Any, tenant: str) -> None:
    bus = await aiqueue.NATSClient(shared.url, user=shared.user, password=shared.password).connect()
    await bus.subscribe(f"plain.{tenant}", callback=lambda msg: None)
    asking = asyncio.create_task(bus.request(f"plain.{tenant}", b"", timeout=20))
    await asyncio.sleep(0)
    await bus.disconnect()
    with contextlib.suppress(TimeoutError), pytest.raises((Unavailable, BadInput)):
        await asyncio.wait_for(asking, 5)
    assert asking.done()
