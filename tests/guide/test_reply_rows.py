"""The guide's request/reply rows: a plain requester and our responder, our requester and a plain responder."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

import aiqueue

from .clients import Plain
from .messages import Ask, Query


@dataclass(frozen=True)
class Row:
    """`publish`, `request`: the snippets' titles; `body`: what they call what is sent."""

    subject: str
    family: str
    publish: str
    request: str
    body: str
    key: str
    alias: str
    message: type[Any]

    def __str__(self) -> str:
        return self.subject.removeprefix("ai.")


ROWS = [
    Row("ai.gateway.responses", "gateway.requests", "Publishing LLM request", "Requesting response", "encoded_request",
        "request_id", "llm_request", Ask),
    Row("ai.rag.results", "rag.queries", "Publishing query", "Requesting results", "encoded_query", "query_id",
        "rag_query", Query),
]  # fmt: skip


@pytest.fixture(params=ROWS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param  # type: ignore[no-any-return]


def worker_of(row: Row, runs: Counter[str]) -> aiqueue.Worker:
    worker = aiqueue.Worker()

    async def handle(job: aiqueue.Job[Any]) -> dict[str, Any]:
        runs[job.id] += 1
        if job.message.text == "no":
            raise aiqueue.Reject("not wanted")
        return {"said": job.message.text.upper()}

    handle.__annotations__["job"] = aiqueue.Job[row.message]
    worker.handle(row.message)(handle)
    return worker


async def test_plain_requester_to_our_responder(plain: Plain, client: aiqueue.Client, tenant: str, row: Row) -> None:
    """The guide's sequence, publish and then request with the same payload, bare and in both envelopes: each runs once.
    An id alone gets the same answer; errors come with the headers of micro services.
    """
    runs: Counter[str] = Counter()
    head = {"schema_version": "1.0", "message_type": row.alias}
    bodies = [
        {row.key: "j1", "text": "bare"},
        {**head, "data": {row.key: "j2", "text": "nested"}},
        {**head, row.key: "j3", "text": "flat"},
    ]
    async with worker_of(row, runs).running(client), aiqueue.Responder().running(client):
        for at, body in enumerate(bodies, 1):
            encoded = {row.body: json.dumps(body)}
            told = {"request_id": f"j{at}", "model": "small"} if row.family == "gateway.requests" else {}
            await plain.run(row.publish, tenant_id=tenant, **encoded, **told)
            answer = await plain.run(row.request, tenant_id=tenant, **encoded)
            assert answer["data"] == {"said": ("BARE", "NESTED", "FLAT")[at - 1]}
            assert answer["headers"]["Aiq-Job-Id"] == f"j{at}"
        subject = f"{row.subject}.{tenant}"
        assert (await plain.do("request", subject=subject, body="j2"))["data"] == {"said": "NESTED"}
        asked = await plain.do("request", subject=subject, body="", headers={row.key: "j3"})
        assert asked["data"] == {"said": "FLAT"}
        refused = await plain.do("request", subject=subject, body=json.dumps({row.key: "j4", "text": "no"}))
    assert refused["headers"]["Nats-Service-Error-Code"] == "422"
    assert (refused["data"]["error"], refused["data"]["reason"]) == ("JobFailed", "rejected")
    assert runs == {"j1": 1, "j2": 1, "j3": 1, "j4": 1}


async def test_our_requester_to_a_plain_responder(plain: Plain, client: aiqueue.Client, tenant: str, row: Row) -> None:
    answer = json.dumps({"said": "by a plain one"})
    await plain.do("respond", subject=f"{row.subject}.{tenant}", queue="q", answer=answer, sub=tenant)
    said = await client.request(row.message(text="hello"), tenant=tenant, unique="r1")
    assert said == {"said": "by a plain one"}
    (heard,) = await plain.hears(tenant, count=1)
    assert heard["data"]["text"] == "hello"
    assert heard["headers"][row.key] == "r1"
    assert heard["headers"]["Aiq-Kind"] == row.message.aiq_kind


async def test_a_plain_requester_finds_our_responder_as_a_micro_service(plain: Plain, client: aiqueue.Client) -> None:
    async with aiqueue.Responder().running(client):
        info = (await plain.do("request", subject="$SRV.INFO.aiqueue-responder", body=""))["data"]
    assert {each["subject"] for each in info["endpoints"]} == {"ai.gateway.responses.*", "ai.rag.results.*"}
