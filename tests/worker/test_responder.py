"""Responders: requests on the bare responses and results subjects, by plain clients and ours."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import cbor2
import nats
import nats.errors
import pytest
from nats.aio.client import Client as Nats

import aiqueue
from aiqueue.errors import (
    BadInput,
    InvalidToken,
    JobCancelled,
    JobFailed,
    QueueFull,
    ResponderError,
    ResultTimeout,
    Unavailable,
)
from aiqueue.requests import caller

from ..support import Eventually

RESPONSES = "ai.gateway.responses.acme"


class Request(aiqueue.Message, kind="gateway.request", family="gateway.requests"):
    prompt: str
    request_id: str = ""


class Query(aiqueue.Message, kind="rag.query", family="rag.queries"):
    query: str
    query_id: str = ""


@contextlib.asynccontextmanager
async def working(client: aiqueue.Client) -> AsyncIterator[Counter[str]]:
    """A worker for both families; what it has run."""
    runs: Counter[str] = Counter()
    worker = aiqueue.Worker()

    @worker.handle(Request)
    async def request(job: aiqueue.Job[Request]) -> dict[str, Any]:
        runs[job.id] += 1
        if job.message.prompt == "reject":
            raise aiqueue.Reject("not this one")
        if job.message.prompt.startswith("slow"):
            await asyncio.sleep(0.5)
        if job.message.prompt == "big":
            return {"text": "x" * 1_048_150}
        return {"text": job.message.prompt, "request_id": job.id, "model": job.headers.get("model")}

    @worker.handle(Query)
    async def query(job: aiqueue.Job[Query]) -> list[str]:
        runs[job.id] += 1
        return [job.message.query]

    async with worker.running(client):
        yield runs


async def ask(nc: Nats, body: bytes, timeout: float = 10.0, **headers: str) -> tuple[Any, dict[str, str]]:
    answer = await nc.request(RESPONSES, body, timeout=timeout, headers=headers or None)
    answer_headers = {str(name): value for name, value in (answer.headers or {}).items()}
    read = json.loads if answer_headers["Content-Type"] == "application/json" else cbor2.loads
    return read(answer.data), answer_headers


async def test_the_guides_publish_then_request_runs_the_job_once(client: aiqueue.Client, plain: Nats) -> None:
    async with working(client) as runs, aiqueue.Responder().running(client):
        for n in range(100):
            request_headers = {"request_id": f"r{n}", "model": "small", "priority": "normal"}
            body = json.dumps({"request_id": f"r{n}", "prompt": f"p{n}"}).encode()
            await plain.publish("ai.gateway.requests.acme", body, headers=request_headers)
            answer, answer_headers = await ask(plain, body)
            assert (answer["text"], answer_headers["Aiq-Job-Id"]) == (f"p{n}", f"r{n}")
    assert runs == Counter(dict.fromkeys((f"r{n}" for n in range(100)), 1))


@pytest.mark.parametrize("form", ["header", "text", "json", "json text", "cbor", "cbor text"])
async def test_an_id_alone_is_answered_when_the_job_ends(client: aiqueue.Client, plain: Nats, form: str) -> None:
    bodies = {
        "header": b"", "text": b"req-1", "json": b'{"request_id": "req-1"}', "json text": b'"req-1"',
        "cbor": cbor2.dumps({"request_id": "req-1"}), "cbor text": cbor2.dumps("req-1"),
    }  # fmt: skip
    headers = {"header": {"request_id": "req-1"}, "cbor text": {"Content-Type": "application/cbor"}}.get(form, {})
    async with aiqueue.Responder().running(client):
        asking = asyncio.create_task(ask(plain, bodies[form], **headers))
        await client.enqueue(Request(prompt="hello", request_id="req-1"), tenant="acme")
        async with working(client):
            answer, answer_headers = await asking
    assert answer["text"] == "hello"
    assert answer_headers["Content-Type"] == ("application/cbor" if "cbor" in form else "application/json")


async def test_a_full_request_is_enqueued_once_and_its_answer_kept(client: aiqueue.Client, plain: Nats) -> None:
    body = json.dumps({"schema_version": "1.0", "message_type": "llm_request",
                       "data": {"request_id": "e-1", "prompt": "hi"}}).encode()  # fmt: skip
    async with working(client) as runs, aiqueue.Responder().running(client):
        answers = await asyncio.gather(*(ask(plain, body, model="small") for _ in range(20)))
        late, _ = await ask(plain, b"e-1")
    assert all(answer == {"text": "hi", "request_id": "e-1", "model": "small"} for answer, _ in answers)
    assert late == answers[0][0]
    assert runs == {"e-1": 1}


async def test_a_request_without_an_id_is_told_its_id(client: aiqueue.Client, plain: Nats) -> None:
    async with working(client) as runs, aiqueue.Responder().running(client):
        answer, answer_headers = await ask(plain, b'{"prompt": "hi"}')
    assert answer["request_id"] == answer_headers["Aiq-Job-Id"]
    assert runs == {answer_headers["Aiq-Job-Id"]: 1}


async def test_what_comes_too_late_is_there_for_the_next_request(client: aiqueue.Client, plain: Nats) -> None:
    body = json.dumps({"request_id": "late", "prompt": "slow"}).encode()
    async with working(client) as runs, aiqueue.Responder().running(client):
        soon = {"Aiq-Deadline": str(round((time.time() + 0.4) * 1000))}
        answer, answer_headers = await ask(plain, body, **soon)
        assert answer_headers["Nats-Service-Error-Code"] == "504"
        assert (answer["error"], answer["retryable"], answer["job_id"]) == ("ResultTimeout", True, "late")
        answer, answer_headers = await ask(plain, body)
    assert answer["text"] == "slow"
    assert runs == {"late": 1}


@pytest.mark.parametrize(
    ("body", "code", "kind"),
    [
        (b"", "400", "BadInput"),
        (b"{}", "400", "BadInput"),
        (b"not an id", "400", "BadInput"),
        (b"\x00\xff\x10", "400", "BadInput"),
        (b'{"request_id": "x1", "prompt": "reject"}', "422", "JobFailed"),
        (b'{"request_id": "x2", "prompt": 5}', "422", "JobFailed"),
    ],
)
async def test_errors_come_back_typed(client: aiqueue.Client, plain: Nats, body: bytes, code: str, kind: str) -> None:
    async with working(client), aiqueue.Responder().running(client):
        answer, answer_headers = await ask(plain, body)
    assert (answer_headers["Nats-Service-Error-Code"], answer["error"]) == (code, kind)
    assert answer_headers["Nats-Service-Error"]
    if kind == "JobFailed":
        assert answer["reason"] in ("rejected", "invalid")


async def test_a_result_that_fits_into_no_message_is_answered_by_a_reference(
    client: aiqueue.Client, plain: Nats
) -> None:
    async with working(client), aiqueue.Responder().running(client):
        answer, answer_headers = await ask(plain, b'{"request_id": "x3", "prompt": "big"}')
        whole = await client.request(Request(prompt="big"), tenant="acme", unique="x3")
    assert "Nats-Service-Error" not in answer_headers
    assert answer["sha256"] == answer_headers["Aiq-Document"]
    assert whole == {"text": "x" * 1_048_150}


async def test_a_cancelled_job_is_told_as_such(client: aiqueue.Client, plain: Nats) -> None:
    async with aiqueue.Responder().running(client):
        handle = await client.enqueue(Request(prompt="x", request_id="c1"), tenant="acme")
        assert await handle.cancel()
        answer, answer_headers = await ask(plain, b"c1")
        with pytest.raises(JobCancelled, match="job c1 was cancelled before it started"):
            await client.request(Request(prompt="x", request_id="c1"), tenant="acme")
    assert (answer_headers["Nats-Service-Error-Code"], answer["reason"]) == ("422", "cancelled")
    assert (answer["error"], answer["cause"]) == ("JobCancelled", "cancelled before it started")


async def test_it_is_found_and_counted_as_a_micro_service(client: aiqueue.Client, plain: Nats) -> None:
    async with working(client), aiqueue.Responder().running(client):
        pong = json.loads((await plain.request("$SRV.PING.aiqueue-responder", b"", timeout=20)).data)
        assert pong["type"] == "io.nats.micro.v1.ping_response"
        info = json.loads((await plain.request(f"$SRV.INFO.aiqueue-responder.{pong['id']}", b"", timeout=20)).data)
        await ask(plain, b'{"prompt": "hi"}')
        await ask(plain, b"{}")
        stats = json.loads((await plain.request("$SRV.STATS", b"", timeout=20)).data)
    found = {each["subject"]: each["queue_group"] for each in info["endpoints"]}
    assert found == {"ai.gateway.responses.*": "q", "ai.rag.results.*": "q"}
    gateway = next(each for each in stats["endpoints"] if each["subject"] == "ai.gateway.responses.*")
    assert (gateway["num_requests"], gateway["num_errors"]) == (2, 1)
    assert gateway["average_processing_time"] > 0


async def test_several_share_the_requests(client: aiqueue.Client, plain: Nats) -> None:
    async with (
        working(client) as runs,
        aiqueue.Responder().running(client) as one,
        aiqueue.Responder().running(client) as two,
    ):
        await asyncio.gather(*(ask(plain, json.dumps({"prompt": f"p{n}"}).encode()) for n in range(60)))
        counts = [sum(each.requests for each in service.endpoints) for service in (one, two)]
    assert sum(counts) == 60
    assert min(counts) > 0
    assert len(runs) == 60


async def test_more_than_it_may_hold_are_told_to_ask_again(client: aiqueue.Client, plain: Nats) -> None:
    async with aiqueue.Responder(concurrency=1).running(client) as service:
        first = asyncio.create_task(ask(plain, b"r1"))
        async with asyncio.timeout(25):
            while not service.running:
                await asyncio.sleep(0.01)
        answer, answer_headers = await ask(plain, b"r2")
        assert (answer_headers["Nats-Service-Error-Code"], answer["retryable"]) == ("503", True)
        await client.enqueue(Request(prompt="x", request_id="r1"), tenant="acme")
        async with working(client):
            assert (await first)[0]["text"] == "x"


async def test_one_that_leaves_answers_those_that_wait(client: aiqueue.Client, plain: Nats) -> None:
    async with aiqueue.Responder(drain_timeout=0.1).running(client) as service:
        asking = asyncio.create_task(ask(plain, b"never"))
        async with asyncio.timeout(25):
            while not service.running:
                await asyncio.sleep(0.01)
    answer, answer_headers = await asking
    assert (answer_headers["Nats-Service-Error-Code"], answer["retryable"]) == ("503", True)


async def test_it_answers_on_after_its_connection_was_replaced(client: aiqueue.Client, plain: Nats) -> None:
    async with working(client), aiqueue.Responder().running(client):
        client.connection.renew()
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(nats.errors.NoRespondersError, nats.errors.TimeoutError):
                    answer, _ = await ask(plain, b'{"request_id": "again", "prompt": "hi"}', timeout=2)
                    break
                await asyncio.sleep(0.05)
    assert answer["text"] == "hi"


class TestOurRequester:
    async def test_gets_what_the_handler_returned(self, client: aiqueue.Client) -> None:
        async with working(client) as runs, aiqueue.Responder().running(client):
            assert await client.request(Query(query="why"), tenant="acme") == ["why"]
            answer = await client.request(Request(prompt="hi"), tenant="acme", unique="u1", headers={"model": "big"})
            assert answer == {"text": "hi", "request_id": "u1", "model": "big"}
            assert await client.request(Request(prompt="hi"), tenant="acme", unique="u1") == answer
        assert runs["u1"] == 1

    async def test_waits_for_a_responder_that_is_away_for_a_moment(self, client: aiqueue.Client, plain: Nats) -> None:
        asking = asyncio.create_task(client.request(Request(prompt="hi"), tenant="acme", timeout=60))
        for _ in range(20):
            with pytest.raises(nats.errors.NoRespondersError):
                await plain.request(RESPONSES, b"{}")
        async with working(client), aiqueue.Responder().running(client):
            assert (await asking)["text"] == "hi"

    @pytest.mark.parametrize("timeout_s", [0.3, 60])
    async def test_without_a_responder_says_so_and_not_that_time_is_over(
        self, client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, timeout_s: float
    ) -> None:
        assert caller.ABSENT_MAX_S == 5.0
        monkeypatch.setattr(caller, "ABSENT_MAX_S", 0.5)
        with pytest.raises(Unavailable, match="run `aiqueue respond`"):
            async with asyncio.timeout(10):
                await client.request(Request(prompt="x"), tenant="acme", timeout=timeout_s)

    async def test_gets_typed_errors(self, client: aiqueue.Client) -> None:
        with pytest.raises(InvalidToken):
            await client.request(Request(prompt="x"), tenant="acme.>")
        with pytest.raises(BadInput):
            await client.request(Request(prompt="x"), tenant="acme", unique="")
        async with aiqueue.Responder().running(client):
            with pytest.raises(ResultTimeout, match="repeat the request with unique='t1'"):
                await client.request(Request(prompt="x"), tenant="acme", unique="t1", timeout=0.5)
            async with working(client):
                with pytest.raises(JobFailed, match="not this one") as failed:
                    await client.request(Request(prompt="reject"), tenant="acme")
                assert (failed.value.reason, failed.value.attempt) == ("rejected", 1)

    async def test_a_full_lane_is_told(self, client: aiqueue.Client) -> None:
        config = (await client.connection.api("STREAM.INFO.AI_GATEWAY_REQUESTS"))["config"]
        await client.connection.api("STREAM.UPDATE.AI_GATEWAY_REQUESTS", {**config, "max_msgs_per_subject": 1})
        await client.enqueue(Request(prompt="x"), tenant="acme")
        async with aiqueue.Responder().running(client):
            with pytest.raises(QueueFull, match=r"gateway\.requests acme/normal"):
                await client.request(Request(prompt="y"), tenant="acme")

    async def test_asks_a_plain_responder(self, client: aiqueue.Client, plain: Nats) -> None:
        async def respond(message: Any) -> None:
            fields = {"id": message.headers["request_id"], **cbor2.loads(message.data)}
            await message.respond(json.dumps(fields).encode())  # with our own headers, so its content type is CBOR

        await plain.subscribe(RESPONSES, cb=respond)
        await plain.flush()
        answer = await client.request(Request(prompt="hi"), tenant="acme", unique="p1")
        assert (answer["id"], answer["prompt"]) == ("p1", "hi")

    @pytest.mark.parametrize("value", [4, 12, True, None, "text", 1.5, [1]])
    async def test_reads_any_value_in_json_although_a_plain_responder_sends_our_content_type(
        self, client: aiqueue.Client, plain: Nats, value: Any
    ) -> None:
        async def respond(message: Any) -> None:
            await message.respond(json.dumps(value).encode())

        await plain.subscribe(RESPONSES, cb=respond)
        await plain.flush()
        assert await client.request(Request(prompt="hi"), tenant="acme") == value

    async def test_a_plain_responders_error_is_not_the_servers(self, client: aiqueue.Client, plain: Nats) -> None:
        async def respond(message: Any) -> None:
            headers = {"Nats-Service-Error": "out of tokens", "Nats-Service-Error-Code": "507"}
            await plain.publish(message.reply, b"", headers=headers)

        await plain.subscribe(RESPONSES, cb=respond)
        await plain.flush()
        with pytest.raises(ResponderError, match="out of tokens") as raised:
            await client.request(Request(prompt="hi"), tenant="acme", unique="r-1")
        assert (raised.value.job_id, raised.value.error, raised.value.code) == ("r-1", "out of tokens", 507)

    @pytest.mark.parametrize("form", ["async", "partial", "lambda"])
    async def test_is_answered_by_any_function_that_can_be_awaited(self, client: aiqueue.Client, form: str) -> None:
        async def answer(request: Any, said: str = "said") -> str:
            return f"{said} {request.id}"

        functions = {
            "async": answer,
            "partial": functools.partial(answer, said="said"),
            "lambda": lambda each: answer(each, "said"),
        }
        async with aiqueue.Responder(answer=functions[form]).running(client):
            assert await client.request(Request(prompt="hi"), tenant="acme", unique="r-1") == "said r-1"

    async def test_a_family_without_answers_is_refused_at_once(self, client: aiqueue.Client) -> None:
        class Task(aiqueue.Message, kind="agent.task"):
            pass

        with pytest.raises(BadInput, match="answers no requests"):
            await client.request(Task(), tenant="acme")
        with pytest.raises(BadInput, match=r"answers no requests: set reply_within in aiqueue\.toml"):
            async with aiqueue.Responder(families=["agent.tasks"]).running(client):
                pass


async def test_a_responder_that_dies_is_asked_again_elsewhere(
    client: aiqueue.Client, account: Any, eventually: Eventually
) -> None:
    async with working(client) as runs:
        async with aiqueue.connect(account.url, user=account.user, password=account.password) as other:
            dying = aiqueue.Responder(drain_timeout=0)
            async with dying.running(other) as service:
                asking = asyncio.create_task(client.request(Request(prompt="slow"), tenant="acme", unique="d1"))
                await eventually(lambda: service.running)
                await other.connection.close()  # without a notice to anybody
        async with aiqueue.Responder().running(client):
            assert (await asking)["text"] == "slow"
    assert runs == {"d1": 1}
