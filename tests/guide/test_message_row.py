"""The guide's row of agent messages: a plain publisher and our agent, our agent and plain subscribers."""

from __future__ import annotations

import json

import aiqueue
from aiqueue.agent import Mail

from ..support import eventually
from .clients import Plain
from .messages import Note


def agent_of(name: str, tenant: str, got: list[Mail[Note]]) -> aiqueue.Agent:
    agent = aiqueue.Agent(name, tenant=tenant)

    @agent.handle(Note)
    async def note(mail: Mail[Note]) -> None:
        got.append(mail)

    return agent


async def test_plain_publisher_to_our_agent(plain: Plain, client: aiqueue.Client, tenant: str) -> None:
    """Bare, nested and flat bodies; the first before the agent has ever run. What is for another agent is not its."""
    head = {"schema_version": "1.0", "message_type": "agent_message"}

    async def publish(body: object, target: str = "reader") -> None:
        await plain.run(
            "Publishing agent message", tenant_id=tenant, target_agent_id=target, source_agent_id="plain-one",
            encoded_message=json.dumps(body),
        )  # fmt: skip

    await publish({"text": "bare"})
    got: list[Mail[Note]] = []
    async with agent_of("reader", tenant, got).running(client):
        await publish({"text": "not yours"}, target="writer")
        await publish({**head, "data": {"text": "nested"}})
        await publish({**head, "text": "flat"})
        await eventually(lambda: len(got) >= 3, within=40)
    assert sorted(mail.message.text for mail in got) == ["bare", "flat", "nested"]
    assert {(mail.sender, mail.to, mail.tenant) for mail in got} == {("plain-one", "reader", tenant)}


async def test_our_agent_to_plain_subscribers(plain: Plain, client: aiqueue.Client, tenant: str) -> None:
    """Two in the queue group of one agent: each message reaches one of them, and the agent's inbox as well."""
    subs = [f"{tenant}-a", f"{tenant}-b"]
    for sub in subs:
        await plain.run("Subscribing to agent messages", tenant_id=tenant, agent_id="reader", sub=sub)
    writer = agent_of("writer", tenant, [])
    async with writer.running(client):
        sent = [await writer.send(Note(text=f"n{at}"), to="reader") for at in range(10)]
    heard = await plain.hears(*subs, count=len(sent))
    assert sorted(each["data"]["text"] for each in heard) == [f"n{at}" for at in range(10)]
    assert sorted(each["headers"]["Aiq-Job-Id"] for each in heard) == sorted(each.mail_id for each in sent)
    for each in heard:
        assert each["subject"] == f"ai.agent.message.{tenant}"
        assert each["headers"]["target_agent_id"] == "reader"
        assert each["headers"]["source_agent_id"] == "writer"
    got: list[Mail[Note]] = []
    async with agent_of("reader", tenant, got).running(client):
        await eventually(lambda: len(got) == 10, within=40)
    assert sorted(mail.message.text for mail in got) == [f"n{at}" for at in range(10)]
