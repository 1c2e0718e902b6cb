"""Every Python block of the integration guide, byte for byte, on NATSClient: with typed workers and agents, and with
plain clients of both kinds, on the other side. The tests give the names that the blocks use.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import inspect
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

import aiqueue
from aiqueue.agent import Mail
from aiqueue.bus import Msg, create_envelope, decode, encode

from ..support import ROOT, eventually
from .clients import GUIDE, Plain
from .messages import Ask, Ingest, Note, Query, Task

GUIDE_SHA256 = "aecf5e9481ff14053b13def7bfc10347a9c5ab5c6460eba0d717c8778dbdd2ca"
MESSAGES, TASKS, PUBLISH_REQUEST, REQUEST_RESPONSE, INGEST, QUERIES = range(6)


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", GUIDE.read_bytes().decode(), re.DOTALL)


async def run(bus: aiqueue.NATSClient, block: int, **names: Any) -> dict[str, Any]:
    """Run a block of the guide. Returns its names, those that it has set too."""
    place = {"nats_client": bus, **names}
    code = compile(blocks()[block], f"{GUIDE.name}, block {block}", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    done = eval(code, place)
    if inspect.isawaitable(done):
        await done
    return place


def body(alias: str, text: str, form: str = "bare", **more: str) -> bytes:
    data = {"text": text, **more}
    return encode(data if form == "bare" else create_envelope(alias, data, flat=form == "flat"))


def keep(got: list[Msg]) -> Callable[[Msg], Any]:
    async def handler(msg: Msg) -> None:
        got.append(msg)

    return handler


def typed_worker(tenant: str, got: list[str]) -> aiqueue.Worker:
    """A worker of ours for all families of the guide."""
    worker = aiqueue.Worker(tenants=[tenant])
    for model in (Task, Ask, Ingest, Query):

        async def handle(job: aiqueue.Job[Any]) -> dict[str, str]:
            got.append(f"{job.family} {job.message.text}")
            return {"said": job.message.text.upper(), "model": job.headers.get("model", "")}

        worker.handle(model)(handle)
    return worker


def test_the_guide_is_the_one_that_users_have() -> None:
    """No formatter has touched it, and none of its blocks is left out here."""
    assert hashlib.sha256(GUIDE.read_bytes()).hexdigest() == GUIDE_SHA256
    assert len(blocks()) == 6
    assert sum(block.count("await nats_client.") for block in blocks()) == 9


def test_the_pages_of_the_guide_show_every_block_as_it_stands() -> None:
    names = ("integration-guide", "integration-messages", "integration-requests")
    page = "".join((ROOT / f"docs/guides/{name}.md").read_text() for name in names)
    guide, service, rest = page.partition("## Run as a service")
    assert service
    guide += rest.partition("\n## ")[2]  # the program of that section is ours: see tests/bus/test_service.py
    assert re.findall(r"```python fragment\n(.*?)```", guide, re.DOTALL) == blocks()


async def test_the_whole_guide_runs_as_it_stands(bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str) -> None:
    """All blocks in the guide's order, in one namespace. Their own subscribers get what they publish; what they request
    is answered by a typed worker.
    """
    mails, tasks, worked = [], [], []
    names: dict[str, Any] = {
        "tenant_id": tenant, "target_agent_id": "reader", "source_agent_id": "writer", "agent_id": "reader",
        "encoded_message": body("agent_message", "mail"), "message_handler": keep(mails),
        "encoded_task": body("agent_task", "task"), "task_handler": keep(tasks),
        "encoded_request": body("llm_request", "request", request_id="r-1"), "request_id": "r-1", "model": "small",
        "encoded_document": body("rag_document", "document"),
        "encoded_query": body("rag_query", "query", query_id="q-1"),
    }  # fmt: skip
    worker = aiqueue.Worker(tenants=[tenant])
    for model in (Ask, Ingest, Query):

        async def handle(job: aiqueue.Job[Any]) -> dict[str, str]:
            worked.append(f"{job.family} {job.message.text} {job.headers.get('model', '')}".strip())
            return {"said": job.message.text.upper()}

        worker.handle(model)(handle)
    async with worker.running(client), aiqueue.Responder(tenants=[tenant]).running(client):
        for block in range(6):
            names |= await run(bus, block, **names)
        await eventually(lambda: (len(mails), len(tasks), len(worked)) == (1, 1, 3))
    assert [(decode(each), each.headers["source_agent_id"], each.subject) for each in mails] == [
        ({"text": "mail"}, "writer", f"ai.agent.message.{tenant}")
    ]
    assert [(decode(each), each.subject) for each in tasks] == [({"text": "task"}, f"ai.agent.tasks.{tenant}")]
    assert sorted(worked) == ["gateway.requests request small", "rag.ingest document", "rag.queries query"]
    assert decode(names["response"]) == {"said": "REQUEST"}
    assert decode(names["results"]) == {"said": "QUERY"}


# -- the guide's client and ours


@pytest.mark.parametrize("form", ["bare", "nested", "flat"])
async def test_what_the_guide_publishes_is_handled_by_typed_workers(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, form: str
) -> None:
    got: list[str] = []
    async with typed_worker(tenant, got).running(client), aiqueue.Responder(tenants=[tenant]).running(client):
        await bus.publish(f"ai.agent.tasks.{tenant}", body("agent_task", "task", form))
        encoded = body("llm_request", "request", form, request_id="r-1")
        await run(bus, PUBLISH_REQUEST, tenant_id=tenant, encoded_request=encoded, request_id="r-1", model="small")
        place = await run(bus, REQUEST_RESPONSE, tenant_id=tenant, encoded_request=encoded)
        assert decode(place["response"]) == {"said": "REQUEST", "model": "small"}
        await run(bus, INGEST, tenant_id=tenant, encoded_document=body("rag_document", "document", form))
        place = await run(
            bus, QUERIES, tenant_id=tenant, encoded_query=body("rag_query", "query", form, query_id="q-1")
        )
        assert decode(place["results"]) == {"said": "QUERY", "model": ""}
        await eventually(lambda: len(got) == 4)
    assert sorted(got) == [
        "agent.tasks task", "gateway.requests request", "rag.ingest document", "rag.queries query"
    ]  # fmt: skip


async def test_a_mail_of_the_guide_is_handled_by_a_typed_agent(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    got: list[tuple[str, str | None]] = []
    agent = aiqueue.Agent("reader", tenant=tenant)

    @agent.handle(Note)
    async def note(mail: Mail[Note]) -> None:
        got.append((mail.message.text, mail.sender))

    for form in ("bare", "nested", "flat"):
        headers = {"target_agent_id": "reader", "source_agent_id": "writer"}
        await bus.publish(f"ai.agent.message.{tenant}", body("agent_message", form, form), headers=headers)
    async with agent.running(client):
        await eventually(lambda: len(got) == 3)
    assert got == [(form, "writer") for form in ("bare", "nested", "flat")]


async def test_the_guides_subscribers_get_what_typed_clients_send(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    mails, tasks = [], []
    names = {
        "tenant_id": tenant, "target_agent_id": "other", "source_agent_id": "reader", "agent_id": "reader",
        "encoded_message": b"{}", "encoded_task": b"{}",
        "message_handler": keep(mails), "task_handler": keep(tasks),
    }  # fmt: skip
    await run(bus, MESSAGES, **names)
    await run(bus, TASKS, **names)
    texts = [f"n{at}" for at in range(10)]
    writer = aiqueue.Agent("writer", tenant=tenant)
    async with writer.running(client):
        for text in texts:
            await writer.send(Note(text=text), to="reader")
    handles = [await client.enqueue(Task(text=text), tenant=tenant) for text in texts]
    for handle in handles:
        assert await handle.result(20) is None
    await eventually(lambda: len(mails) == 10)
    assert [decode(each)["text"] for each in mails] == texts
    assert {each.headers["source_agent_id"] for each in mails} == {"writer"}
    assert sorted(decode(each).get("text", "") for each in tasks) == ["", *texts]


# -- the guide's client and plain clients


async def test_plain_publishers_reach_the_guides_subscribers(
    plain: Plain, bus: aiqueue.NATSClient, tenant: str
) -> None:
    """The guide's publishing snippets by nats-py and Node.js; its subscriptions by NATSClient."""
    mails, tasks = [], []
    await bus.subscribe(f"ai.agent.message.{tenant}", queue="agent.reader", callback=keep(mails))
    await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="agent.workers", callback=keep(tasks))
    await plain.run(
        "Publishing agent message", tenant_id=tenant, target_agent_id="reader", source_agent_id="plain-one",
        encoded_message=json.dumps({"text": "mail"}),
    )  # fmt: skip
    await plain.run("Publishing task", tenant_id=tenant, encoded_task=json.dumps({"text": "task"}))
    await eventually(lambda: mails and tasks, within=40)
    assert [(decode(each), each.headers["source_agent_id"]) for each in mails] == [({"text": "mail"}, "plain-one")]
    assert [decode(each) for each in tasks] == [{"text": "task"}]


async def test_the_guides_publishers_reach_plain_subscribers(
    plain: Plain, bus: aiqueue.NATSClient, tenant: str
) -> None:
    await plain.run("Subscribing to agent messages", tenant_id=tenant, agent_id="reader", sub=f"{tenant}-mail")
    await plain.run("Subscribing to tasks", tenant_id=tenant, sub=f"{tenant}-task")
    names = {
        "tenant_id": tenant, "target_agent_id": "reader", "source_agent_id": "writer", "agent_id": "another",
        "encoded_message": b'{"text": "mail"}', "encoded_task": b'{"text": "task"}',
        "message_handler": keep([]), "task_handler": keep([]),
    }  # fmt: skip
    await run(bus, MESSAGES, **names)
    await run(bus, TASKS, **names)
    (mail,) = await plain.hears(f"{tenant}-mail", count=1)
    (task,) = await plain.hears(f"{tenant}-task", count=1)
    assert (mail["data"], mail["headers"]["target_agent_id"]) == ({"text": "mail"}, "reader")
    assert task["data"] == {"text": "task"}


async def test_plain_requesters_are_answered_by_a_callback_and_the_guides_requests_by_plain_responders(
    plain: Plain, bus: aiqueue.NATSClient, tenant: str
) -> None:
    calls: list[Msg] = []

    async def answer(msg: Msg) -> None:
        calls.append(msg)
        await msg.respond(json.dumps({"said": decode(msg)["text"].upper()}))

    subscription = await bus.subscribe(f"ai.gateway.responses.{tenant}", callback=answer)
    for _ in range(2):
        encoded = json.dumps({"text": "hello", "request_id": "r-1"})
        reply = await plain.run("Requesting response", tenant_id=tenant, encoded_request=encoded)
        assert reply["data"] == {"said": "HELLO"}
    assert len(calls) == 1
    await subscription.unsubscribe()

    said = json.dumps({"said": "by a plain one"})
    await plain.do("respond", subject=f"ai.rag.results.{tenant}", queue="q", answer=said, sub=tenant)
    place = await run(bus, QUERIES, tenant_id=tenant, encoded_query=b'{"text": "hello"}')
    assert decode(place["results"]) == {"said": "by a plain one"}
    (heard,) = await plain.hears(tenant, count=1)
    assert heard["data"] == {"text": "hello"}


async def test_a_job_that_the_guide_publishes_is_read_by_a_plain_client_from_its_journal(
    plain: Plain, bus: aiqueue.NATSClient, tenant: str
) -> None:
    await bus.subscribe(f"ai.gateway.requests.{tenant}", queue="workers", callback=decode)
    encoded = body("llm_request", "hello")
    await run(bus, PUBLISH_REQUEST, tenant_id=tenant, encoded_request=encoded, request_id="r-1", model="small")
    outcome = await plain.do("outcome", subject=f"ai.gateway.responses.{tenant}.r-1", run=0)
    assert outcome["data"] == {"text": "hello"}


async def test_many_at_once_are_each_handled_once(bus: aiqueue.NATSClient, tenant: str) -> None:
    got: list[str] = []
    await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="agent.workers", callback=lambda msg: got.append(msg.job.id))
    published = await asyncio.gather(*(bus.publish(f"ai.agent.tasks.{tenant}", b"{}") for _ in range(500)))
    await eventually(lambda: len(got) >= 500, within=40)
    assert sorted(got) == sorted(each.id for each in published)
