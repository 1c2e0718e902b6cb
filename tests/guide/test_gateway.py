"""The guide's gateway by its own words: a plain client's request, with its three headers, and its answer by request and
reply in the guide's shape. With nats-py and with the Node.js client.
"""

from __future__ import annotations

import json
from typing import Any

import aiqueue

from ..support import eventually
from .clients import Plain

FAMILY = "gateway.requests"


class Request(aiqueue.Message, kind="gateway.request", family=FAMILY):
    """The guide's short form."""

    request_id: str = ""
    prompt: str
    model: str = ""
    parameters: dict[str, Any] = {}  # noqa: RUF012
    tenant_id: str = ""
    timestamp: str | None = None


def make_worker() -> tuple[aiqueue.Worker, list[tuple[str, str, str, str]]]:
    """A worker that answers in the guide's shape, and what it has run: id, prompt, model and priority."""
    ran: list[tuple[str, str, str, str]] = []
    worker = aiqueue.Worker()

    @worker.handle(Request)
    async def answer(job: aiqueue.Job[Request]) -> dict[str, Any]:
        message = job.message
        ran.append((job.id, message.prompt, message.model, job.priority))
        return {"request_id": job.id, "response": message.prompt.upper(), "tokens": 5, "cost": 0.25}

    return worker, ran


async def publish(plain: Plain, tenant: str, body: dict[str, Any], **told: str) -> None:
    await plain.do("store", subject=f"ai.gateway.requests.{tenant}", body=json.dumps(body), headers=told)


async def request(plain: Plain, tenant: str, body: dict[str, Any]) -> dict[str, Any]:
    """The guide's snippet, which has no headers."""
    answer: dict[str, Any] = await plain.run("Requesting response", tenant_id=tenant, encoded_request=json.dumps(body))
    return answer


async def test_a_request_is_published_and_answered_as_the_guide_says(
    plain: Plain, client: aiqueue.Client, tenant: str
) -> None:
    """The model stands in the header alone, the priority there too, and the payloads differ in their time."""
    worker, ran = make_worker()
    body = {"request_id": "r-1", "prompt": "hello", "parameters": {"temperature": 1}, "tenant_id": tenant}
    async with worker.running(client), aiqueue.Responder().running(client):
        await publish(plain, tenant, {**body, "timestamp": "1"}, request_id="r-1", model="small", priority="batch")
        answer = await request(plain, tenant, {"request_id": "r-1"})
        again = [await request(plain, tenant, {**body, "timestamp": "2", **more}) for more in ({}, {"model": "small"})]
        asked_first = await request(plain, tenant, {**body, "request_id": "r-2", "model": "small"})
    assert answer["data"] == {"request_id": "r-1", "response": "HELLO", "tokens": 5, "cost": 0.25}
    assert answer["headers"]["Content-Type"] == "application/json"
    assert [each["data"] for each in again] == [answer["data"]] * 2
    assert asked_first["data"]["request_id"] == "r-2"
    assert ran == [("r-1", "hello", "small", "batch"), ("r-2", "hello", "small", "normal")]


async def test_another_body_under_a_known_id_is_refused_and_the_first_answer_stays(
    plain: Plain, client: aiqueue.Client, tenant: str
) -> None:
    worker, ran = make_worker()
    one, two = ({"request_id": "r-1", "prompt": each} for each in ("one", "two"))
    async with worker.running(client), aiqueue.Responder().running(client):
        await publish(plain, tenant, one, request_id="r-1", model="small")
        first = await request(plain, tenant, one)
        await publish(plain, tenant, two, request_id="r-1", model="small")
        (letter,) = await letters(client, tenant)
        refused = await request(plain, tenant, two)
        still = await plain.do("request", subject=f"ai.gateway.responses.{tenant}", body="r-1")
    assert (letter.job_id, letter.reason, json.loads(letter.body)) == ("r-1", "invalid", two)
    assert refused["headers"]["Nats-Service-Error-Code"] == "409"
    assert refused["data"]["error"] == "IdReused"
    assert still["data"] == first["data"] == {"request_id": "r-1", "response": "ONE", "tokens": 5, "cost": 0.25}
    assert [each[1] for each in ran] == ["one"]


async def test_a_request_whose_header_and_body_name_different_models_is_a_dead_letter_and_an_answer(
    plain: Plain, client: aiqueue.Client, tenant: str
) -> None:
    worker, ran = make_worker()
    async with worker.running(client), aiqueue.Responder().running(client):
        body = {"request_id": "r-1", "prompt": "p", "model": "dear"}
        await publish(plain, tenant, body, request_id="r-1", model="cheap")
        answer = await request(plain, tenant, {"request_id": "r-1"})
        (letter,) = await letters(client, tenant)
    assert answer["headers"]["Nats-Service-Error-Code"] == "422"
    assert (answer["data"]["error"], answer["data"]["reason"]) == ("JobFailed", "invalid")
    assert (letter.reason, ran) == ("invalid", [])


async def letters(client: aiqueue.Client, tenant: str) -> Any:
    async def find() -> list[Any]:
        return [each async for each in client.dead.find() if each.lane.tenant == tenant]

    return await eventually(find)
