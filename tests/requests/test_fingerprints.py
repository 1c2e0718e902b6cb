"""An id is of one body: another body under a known id is refused, and the first one's answer stays."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import cbor2
import pytest

import aiqueue
from aiqueue.enqueue import fingerprint_of, fingerprint_of_body, is_other_body
from aiqueue.errors import IdReused, JobFailed
from aiqueue.topology import Topology

from ..support import eventually

FAMILY = "gateway.requests"
BARE, ANSWERS = "ai.gateway.requests.acme", "ai.gateway.responses.acme"
PROBLEM = "job r-1 was stored with another body: use a new id"


class Ask(aiqueue.Message, kind="gateway.request", family=FAMILY):
    prompt: str
    model: str | None = None
    request_id: str = ""
    timestamp: float | None = None


def make_worker(*, hold: asyncio.Event | None = None) -> tuple[aiqueue.Worker, Counter[str]]:
    ran: Counter[str] = Counter()
    worker = aiqueue.Worker()

    @worker.handle(Ask, retry=aiqueue.Backoff(attempts=1))
    async def run(job: aiqueue.Job[Ask]) -> dict[str, Any]:
        ran[job.message.prompt] += 1
        if hold is not None:
            await hold.wait()
        if job.message.prompt == "fail":
            raise ValueError("failed")
        return {"request_id": job.id, "response": job.message.prompt.upper()}

    return worker, ran


async def letters(client: aiqueue.Client) -> list[Any]:
    return [each async for each in client.dead.find()]


async def publish(plain: Any, prompt: str, **more: Any) -> None:
    """As the guide says, without a Msg-Id."""
    body = json.dumps({"prompt": prompt, **more}).encode()
    await plain.publish(BARE, body, headers={"request_id": "r-1", "model": "m", "priority": "normal"})
    await plain.flush()


async def test_a_plain_publishers_second_body_is_a_dead_letter_and_the_first_answer_stays(
    client: aiqueue.Client, plain: Any
) -> None:
    worker, ran = make_worker()
    async with worker.running(client), aiqueue.Responder().running(client):
        await publish(plain, "one")
        first = await plain.request(ANSWERS, b"r-1", timeout=20)
        journal = [each.seq async for each in client.connection.read("AI_RESULTS", ">")]
        await publish(plain, "two")
        (letter,) = await eventually(lambda: letters(client))  # type: ignore[misc]
        assert (letter.job_id, letter.reason, json.loads(letter.body)["prompt"]) == ("r-1", "invalid", "two")
        assert PROBLEM in letter.error
        assert (await plain.request(ANSWERS, b"r-1", timeout=20)).data == first.data
        same = json.dumps({"prompt": "one", "model": "m", "timestamp": 7, "request_id": "r-1"}).encode()
        assert (await plain.request(ANSWERS, same, timeout=20)).data == first.data
        refused = await plain.request(ANSWERS, same.replace(b"one", b"two"), timeout=20)
        told = json.loads(refused.data)
        assert (refused.headers["Nats-Service-Error-Code"], told["error"], told["job_id"]) == ("409", "IdReused", "r-1")
        assert [each.seq async for each in client.connection.read("AI_RESULTS", ">")] == journal
    assert json.loads(first.data) == {"request_id": "r-1", "response": "ONE"}
    assert ran == {"one": 1}


async def test_clients_refuse_a_second_body_while_the_first_waits_runs_and_has_ended(client: aiqueue.Client) -> None:
    hold = asyncio.Event()
    worker, ran = make_worker(hold=hold)
    one, two = Ask(prompt="one", timestamp=1), Ask(prompt="two")
    options: dict[str, Any] = {"tenant": "acme", "unique": "r-1"}
    async with aiqueue.NATSClient(client=client) as bus:
        payload = {"prompt": "two", "request_id": "r-1"}

        async def all_refuse() -> None:
            with pytest.raises(IdReused, match=PROBLEM):
                await client.enqueue(two, **options)
            with pytest.raises(IdReused, match=PROBLEM):
                await client.enqueue(two, **options, on_duplicate="rerun_failed")
            many = [aiqueue.JobSpec(each, unique="r-1") for each in (two, one)]
            refused, again = [each async for each in client.enqueue_many(many, tenant="acme")]
            assert isinstance(refused, IdReused)
            assert isinstance(again, aiqueue.Handle)
            for given in (None, {"model": "m"}):
                with pytest.raises(IdReused, match=PROBLEM):
                    await bus.publish(BARE, json.dumps(payload).encode(), headers=given)
            assert (await client.enqueue(one.model_copy(update={"timestamp": 2.0}), **options)).duplicate

        handle = await client.enqueue(one, **options)
        await all_refuse()
        async with worker.running(client), aiqueue.Responder().running(client):
            await eventually(lambda: ran)
            await all_refuse()
            hold.set()
            answer = await handle.result(20)
            await all_refuse()
            with pytest.raises(IdReused, match=PROBLEM):
                await client.request(two, **options)
            assert await client.request(one, **options) == answer
    assert ran == {"one": 1}
    assert await letters(client) == []


async def test_a_handle_of_a_second_body_does_not_return_the_first_ones_answer(
    client: aiqueue.Client, plain: Any
) -> None:
    """The first is not begun when the second is stored, and has no Msg-Id by which the server would know it."""
    await publish(plain, "one", model=None)
    two = await client.enqueue(Ask(prompt="two"), tenant="acme", unique="r-1")
    assert not two.duplicate
    worker, ran = make_worker()
    async with worker.running(client):
        with pytest.raises(JobFailed, match="stored with another body"):
            await two.result(20)
        with pytest.raises(JobFailed, match="stored with another body"):
            [each async for each in two.stream(timeout=20)]
        assert (await (await client.job("r-1")).result(20))["response"] == "ONE"
    assert ran == {"one": 1}


async def test_an_id_whose_job_has_failed_takes_another_body(client: aiqueue.Client) -> None:
    worker, ran = make_worker()
    async with worker.running(client):
        with pytest.raises(JobFailed):
            await (await client.enqueue(Ask(prompt="fail"), tenant="acme", unique="r-1")).result(20)
        again = await client.enqueue(Ask(prompt="two"), tenant="acme", unique="r-1", on_duplicate="rerun_failed")
        assert (await again.result(20))["response"] == "TWO"
        with pytest.raises(IdReused):
            await client.enqueue(Ask(prompt="fail"), tenant="acme", unique="r-1")
    assert ran == {"fail": 1, "two": 1}


async def test_a_second_job_that_is_refused_before_it_claims_the_id_leaves_the_first_answer(
    client: aiqueue.Client, plain: Any
) -> None:
    """By a header that contradicts the body, a deadline that has passed, or a body that nobody can read."""
    worker, ran = make_worker()
    async with worker.running(client), aiqueue.Responder().running(client):
        await publish(plain, "one")
        first = await plain.request(ANSWERS, b"r-1", timeout=20)
        for told, body in (
            ({"model": "other"}, b'{"prompt": "one", "model": "m"}'),
            ({"model": "m", "Aiq-Deadline": "1"}, b'{"prompt": "one"}'),
            ({"model": "m"}, b"{broken"),
        ):
            await plain.publish(BARE, body, headers={"request_id": "r-1", **told})
        await eventually(lambda: has_letters(client, 3))
        assert (await plain.request(ANSWERS, b"r-1", timeout=20)).data == first.data
    assert sorted(each.reason for each in await letters(client)) == ["deadline", "invalid", "invalid"]
    assert ran == {"one": 1}


async def has_letters(client: aiqueue.Client, count: int) -> bool:
    return len(await letters(client)) == count


async def test_a_second_body_is_refused_after_ten_thousand_chunks_have_pushed_out_the_beginning(
    client: aiqueue.Client, plain: Any
) -> None:
    """By the entry that ends the first run."""
    worker, _ = make_worker()
    async with worker.running(client):
        await (await client.enqueue(Ask(prompt="one"), tenant="acme", unique="r-1")).result(20)
    subject = f"{ANSWERS}.r-1"
    started = await client.connection.first("AI_RESULTS", subject)
    assert started is not None
    await client.connection.delete("AI_RESULTS", started.seq)
    with pytest.raises(IdReused):
        await client.enqueue(Ask(prompt="two"), tenant="acme", unique="r-1")


def test_what_counts_in_a_body() -> None:
    family = Topology.load().family(FAMILY)
    body = {"model": "m", "prompt": "p", "parameters": {"b": [1, "é"], "a": None}}
    known = fingerprint_of(family, body, b"")
    assert len(known) == 32 + 1 + 16
    told = {"model": "m", "request_id": "r-1"}
    without = {name: value for name, value in body.items() if name != "model"}
    head = {"schema_version": "1.0", "message_type": "llm_request"}
    for same in (
        json.dumps({**body, "request_id": "r-1", "timestamp": 5}).encode(),
        json.dumps({"parameters": {"a": None, "b": [1, "é"]}, "prompt": "p", "tools": None}, indent=2).encode(),
        json.dumps({**head, "data": without}).encode(),
        json.dumps({**head, **without}).encode(),
        cbor2.dumps(body),
    ):
        assert fingerprint_of_body(family, same, told) == known
    for other in ({**body, "prompt": "q"}, {**body, "parameters": {"b": ["é", 1]}}, {**body, "n": 0}):
        assert is_other_body(fingerprint_of_body(family, json.dumps(other).encode(), told), known)
    silent = fingerprint_of_body(family, json.dumps(without).encode(), {})
    assert silent == known[:32]
    assert not is_other_body(silent, known)  # the guide's request has no headers
    assert is_other_body(fingerprint_of_body(family, json.dumps(without).encode(), {"model": "n"}), known)
    assert not is_other_body("", known)
    vector = fingerprint_of_body(family, b'{"prompt": "hi", "request_id": "r-1"}', {"model": "small"})
    assert vector == "14479f4e87d340fe0ca0d522d87a5b3a-8b7ca09a1e754719"  # in the wire contract
    mixed = {**body, "parameters": {1: "a", "b": b"\0"}}
    assert fingerprint_of(family, mixed, b"") == fingerprint_of(family, cbor2.loads(cbor2.dumps(mixed)), b"")
    assert fingerprint_of(Topology.load().family("rag.queries"), body, b"") == ""


async def test_no_other_tenant_meets_the_id(client: aiqueue.Client, plain: Any) -> None:
    worker, ran = make_worker()
    async with worker.running(client):
        for tenant, prompt in (("acme", "one"), ("globex", "two")):
            handle = await client.enqueue(Ask(prompt=prompt), tenant=tenant, unique="r-1")
            assert (await handle.result(20))["response"] == prompt.upper()
    assert ran == {"one": 1, "two": 1}
