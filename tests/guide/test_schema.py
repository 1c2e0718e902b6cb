"""A plain publisher that has only the document of `aiqueue schema` and a NATS client enqueues jobs that run, and reads
their results. Nothing of the wire is stated here.
"""

from __future__ import annotations

import json
import secrets
from typing import Any

import pytest

import aiqueue

from ..schema.documents import find, print_schema, problems, sample
from .clients import Plain

worker = aiqueue.Worker(name="of-schema")


class Item(aiqueue.Message, kind="unused"):
    name: str
    count: int


class Order(aiqueue.Message[dict[str, int]], kind="shop:order"):
    customer: str
    items: list[Item] | None = None
    first: Item
    express: bool


class Question(aiqueue.Message[str], kind="gateway.request", family="gateway.requests"):
    model: str
    question: str


@worker.handle(Order)
async def order(job: aiqueue.Job[Order]) -> dict[str, int]:
    return {job.message.first.name: job.message.first.count}


@worker.handle(Question)
async def answer(job: aiqueue.Job[Question]) -> str:
    if job.message.question == "hello" and job.priority == "low":
        raise aiqueue.Reject("no")
    return job.message.question.upper()


@pytest.fixture(scope="module")
def document() -> Any:
    return print_schema("tests.guide.test_schema:worker")


def fill(channel: Any, values: dict[str, str]) -> str:
    """The address of a channel, with values for its parameters, or else the first that a parameter may have."""
    address: str = channel["address"]
    for name, parameter in channel["parameters"].items():
        address = address.replace(f"{{{name}}}", values.get(name) or parameter["enum"][0])
    return address


def compose(document: Any, operation: Any, job_id: str, tenant: str) -> tuple[Any, dict[str, str]]:
    """The payload and the headers that an operation asks for, and those headers by which the result is found."""
    message = find(document, find(document, operation["messages"][0]["$ref"])["$ref"])
    payload, headers = sample(document, message["payload"]), sample(document, message["headers"])
    channel = find(document, operation["channel"]["$ref"])
    where = message["correlationId"]["location"].removeprefix("$message.header#/")
    headers |= {where: job_id, "Nats-Msg-Id": f"{tenant}/{channel['x-aiqueue']['family']}/{job_id}"}
    headers["Content-Type"] = message["contentType"]
    assert problems(document, message["headers"], headers) == []
    assert problems(document, message["payload"], payload) == []
    return payload, headers


@pytest.mark.parametrize("action", ["send", "send-priority"])
@pytest.mark.parametrize("kind", ["agent.tasks.shop_order", "gateway.requests.gateway.request"])
async def test_a_job_that_is_made_of_the_document_runs_and_its_result_is_where_the_document_says(
    plain: Plain, client: aiqueue.Client, document: Any, tenant: str, action: str, kind: str
) -> None:
    operation, job_id = document["operations"][f"{action}.{kind}"], secrets.token_hex(8)
    payload, headers = compose(document, operation, job_id, tenant)
    subject = fill(find(document, operation["channel"]["$ref"]), {"tenant": tenant})
    async with worker.running(client):
        order = {"subject": subject, "body": json.dumps(payload), "headers": headers}
        stored = await plain.do("store", **order)
        assert not stored["duplicate"]
        assert (await plain.do("store", **order))["duplicate"]
        journal = fill(find(document, operation["reply"]["channel"]["$ref"]), {"tenant": tenant, "job_id": job_id})
        told = await plain.do("outcome", subject=journal, run=stored["seq"])
    replies = [find(document, find(document, each["$ref"])["$ref"]) for each in operation["reply"]["messages"]]
    (reply,) = (
        each
        for each in replies
        if not problems(document, each["headers"], told["headers"]) and each["name"] == told["headers"]["Aiq-Event"]
    )
    assert problems(document, reply["payload"], told["data"]) == []
    assert reply["name"] == "result"
    assert told["data"] == ({"hello": 1} if "order" in kind else "HELLO")


async def test_an_error_is_where_the_document_says(
    plain: Plain, client: aiqueue.Client, document: Any, tenant: str
) -> None:
    operation, job_id = document["operations"]["send-priority.gateway.requests.gateway.request"], secrets.token_hex(8)
    payload, headers = compose(document, operation, job_id, tenant)
    channel = find(document, operation["channel"]["$ref"])
    subject = fill(channel, {"tenant": tenant, "priority": channel["parameters"]["priority"]["enum"][-2]})
    async with worker.running(client):
        stored = await plain.do("store", subject=subject, body=json.dumps(payload), headers=headers)
        journal = fill(find(document, operation["reply"]["channel"]["$ref"]), {"tenant": tenant, "job_id": job_id})
        told = await plain.do("outcome", subject=journal, run=stored["seq"])
    failed = document["components"]["messages"]["entry.failed"]
    assert problems(document, failed["headers"], told["headers"]) == []
    assert problems(document, failed["payload"], told["data"]) == []
    assert told["data"]["reason"] == "rejected"


async def test_a_request_that_is_made_of_the_document_is_answered_as_it_says(
    plain: Plain, client: aiqueue.Client, document: Any, tenant: str
) -> None:
    operation = document["operations"]["request.gateway.requests.gateway.request"]
    message = find(document, find(document, operation["messages"][0]["$ref"])["$ref"])
    payload, headers = sample(document, message["payload"]), sample(document, message["headers"])
    subject = fill(find(document, operation["channel"]["$ref"]), {"tenant": tenant})
    headers["Content-Type"] = message["contentType"]
    async with worker.running(client), aiqueue.Responder().running(client):
        told = await plain.do("request", subject=subject, body=json.dumps(payload), headers=headers)
    replies = [find(document, find(document, each["$ref"])["$ref"]) for each in operation["reply"]["messages"]]
    assert [each["name"] for each in replies if not problems(document, each["headers"], told["headers"])] == ["result"]
    assert problems(document, replies[0]["payload"], told["data"]) == []
    assert told["data"] == "HELLO"
