"""The guide's rows of work, in both directions: a plain publisher and our worker, our sender and a plain subscriber.

Every test runs with nats-py and with the Node.js client, in processes that have never heard of aiqueue.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import pytest

import aiqueue

from ..support import eventually
from .clients import GUIDE, HERE, Plain, Refused
from .messages import Ask, Ingest, Query, Task


@dataclass(frozen=True)
class Row:
    """A row of the guide's table. `body`: the name that the snippet has for what it publishes."""

    family: str
    title: str
    body: str
    key: str
    alias: str
    journal: str
    message: type[Any]

    def __str__(self) -> str:
        return self.family


ROWS = [
    Row("agent.tasks", "Publishing task", "encoded_task", "task_id", "agent_task", "ai.agent.results", Task),
    Row("gateway.requests", "Publishing LLM request", "encoded_request", "request_id", "llm_request",
        "ai.gateway.responses", Ask),
    Row("rag.ingest", "Publishing document for ingestion", "encoded_document", "document_id", "rag_document",
        "ai.rag.status", Ingest),
    Row("rag.queries", "Publishing query", "encoded_query", "query_id", "rag_query", "ai.rag.results", Query),
]  # fmt: skip


@pytest.fixture(params=ROWS, ids=str)
def row(request: pytest.FixtureRequest) -> Row:
    return request.param  # type: ignore[no-any-return]


def worker_of(row: Row, ids: dict[str, str] | None = None) -> aiqueue.Worker:
    """`ids`: gets the job's id of each text."""
    worker = aiqueue.Worker(concurrency=8)

    async def handle(job: aiqueue.Job[Any]) -> dict[str, Any]:
        if ids is not None:
            ids.setdefault(job.message.text, job.id)
        await job.progress(0.5, "half")
        if job.message.text == "no":
            raise aiqueue.Reject("not wanted")
        return {"said": job.message.text.upper(), "model": job.headers.get("model", ""), "tenant": job.tenant}

    handle.__annotations__["job"] = aiqueue.Job[row.message]
    worker.handle(row.message)(handle)
    return worker


async def publish(plain: Plain, row: Row, tenant: str, body: dict[str, Any], job_id: str) -> None:
    """The row's snippet."""
    told = {"request_id": job_id, "model": "small"} if row.family == "gateway.requests" else {}
    await plain.run(row.title, tenant_id=tenant, **{row.body: json.dumps(body)}, **told)


def test_no_plain_client_has_aiqueue(plain: Plain) -> None:
    assert plain.modules == []


def test_the_lock_file_names_no_registry() -> None:
    text = (HERE / "package-lock.json").read_text()
    assert "integrity" in text
    assert "resolved" not in text
    assert "://" not in text


async def test_both_have_every_snippet_of_the_guide(plain: Plain) -> None:
    told = re.findall(r"^# ([A-Z].+)\n(?:await|\w+ = await) ", GUIDE.read_text(), re.MULTILINE)
    assert len(told) == 9
    assert await plain.do("titles") == told


async def test_plain_publisher_to_our_worker(plain: Plain, client: aiqueue.Client, tenant: str, row: Row) -> None:
    """Bare, nested and flat bodies. The first is published before any worker is there. Answers are read by the same
    plain client, from the journal.
    """
    bare = {row.key: "job-1", "text": "bare"}
    head = {"schema_version": "1.0", "message_type": row.alias}
    await publish(plain, row, tenant, bare, "job-1")
    ids: dict[str, str] = {}
    async with worker_of(row, ids).running(client):
        await publish(plain, row, tenant, {**head, "data": {row.key: "job-2", "text": "nested"}}, "job-2")
        await publish(plain, row, tenant, {**head, row.key: "job-3", "text": "flat"}, "job-3")
        await publish(plain, row, tenant, {row.key: "job-4", "text": "no"}, "job-4")
        texts = ("bare", "nested", "flat", "no")  # the worker also gets the jobs of other tests
        await eventually(lambda: ids.keys() >= set(texts))
        in_order = [ids[text] for text in texts]
        if row.family == "rag.ingest":  # each version of a document is a job of its own
            assert len({*in_order, *(f"job-{at}" for at in range(1, 5))}) == 8
        else:
            assert in_order == [f"job-{at}" for at in range(1, 5)]
        told = [await plain.do("outcome", subject=f"{row.journal}.{tenant}.{each}", run=0) for each in in_order]
    model = "small" if row.family == "gateway.requests" else ""
    assert [each["data"] for each in told[:3]] == [
        {"said": said, "model": model, "tenant": tenant} for said in ("BARE", "NESTED", "FLAT")
    ]
    assert told[3]["headers"]["Aiq-Event"] == "failed"
    assert told[3]["data"]["reason"] == "rejected"
    entries = await plain.do("journal", subject=f"{row.journal}.{tenant}.{ids['nested']}")
    claimed = ["started"] if row.family in ("gateway.requests", "rag.queries") else []
    assert [each["headers"]["Aiq-Event"] for each in entries] == [*claimed, "progress", "result"]
    assert entries[-2]["data"] == {"fraction": 0.5, "note": "half"}


async def test_our_sender_to_plain_subscribers(plain: Plain, client: aiqueue.Client, tenant: str, row: Row) -> None:
    """Two in one queue group, `agent.workers` for tasks: each message reaches one of them, and our worker as well."""
    subs = [f"{tenant}-a", f"{tenant}-b"]
    for sub in subs:
        if row.family == "agent.tasks":
            await plain.run("Subscribing to tasks", tenant_id=tenant, sub=sub)
        else:
            await plain.do("listen", subject=f"ai.{row.family}.{tenant}", queue="plain.workers", sub=sub)
    handles = [await client.enqueue(row.message(text=f"n{at}"), tenant=tenant) for at in range(10)]
    heard = await plain.hears(*subs, count=len(handles))
    assert sorted(each["headers"]["Aiq-Job-Id"] for each in heard) == sorted(handle.id for handle in handles)
    assert {each["subject"] for each in heard} == {f"ai.{row.family}.{tenant}"}
    assert sorted(each["data"]["text"] for each in heard) == [f"n{at}" for at in range(10)]
    for each in heard:
        assert each["headers"]["Content-Type"] == "application/cbor"
        assert each["headers"]["Aiq-Kind"] == row.message.aiq_kind
        assert row.family == "rag.ingest" or each["headers"][row.key] == each["headers"]["Aiq-Job-Id"]
    async with worker_of(row).running(client):
        assert (await handles[-1].result(20))["said"] == "N9"


async def test_a_publish_with_a_msg_id_is_stored_once(plain: Plain, tenant: str, row: Row) -> None:
    """What the page tells plain publishers to do; and the answer that there is no such lane."""
    order = {"subject": f"ai.{row.family}.{tenant}", "body": json.dumps({"text": "x"})}
    told = {"Nats-Msg-Id": f"{tenant}/{row.family}/job-1", row.key: "job-1"}
    first, second = [await plain.do("store", headers=told, **order) for _ in range(2)]
    assert (first["duplicate"], second["duplicate"]) == (False, True)
    assert first["seq"] == second["seq"]
    high = await plain.do("store", **order | {"subject": f"ai.{row.family}.{tenant}.high"})
    assert high["seq"] > first["seq"]
    with pytest.raises(Refused, match=r"NoStreamResponse|JetStreamNotEnabled"):  # "no responders"
        await plain.do("store", **order | {"subject": f"ai.{row.family}.{tenant}.urgent"})
