"""Spans of mail: from the sender to the handler, its retries, and its reply, in one trace."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

import aiqueue
from aiqueue.agent import Agent, Mail

from ..support import Account
from .recording import SAMPLED, TRACE_ID, Recorder, trace_ids

pytestmark = pytest.mark.families("agent.message")


class Ask(aiqueue.Message, kind="ask", family="agent.message"):
    text: str = ""


class Told(aiqueue.Message, kind="told", family="agent.message"):
    text: str = ""


async def test_a_mail_its_retry_and_its_reply_are_of_one_trace(client: aiqueue.Client, account: Account) -> None:
    recorder = Recorder()
    asker, teller = Agent("asker", tenant="acme"), Agent("teller", tenant="acme")

    @teller.handle(Ask, retry=aiqueue.Backoff(first="10ms", attempts=3))
    async def tell(mail: Mail[Ask]) -> None:
        if mail.attempt == 1:
            raise ValueError("not yet")
        await mail.reply(Told(text="seven"))

    async with recorder.connect(account) as traced, asker.running(traced), teller.running(traced):
        with recorder.tracer.start_as_current_span("work"):
            answer = await asker.request(Ask(), to="teller", reply=Told, timeout=20)
        assert answer.message.text == "seven"
        await recorder.ended(6)
    assert len(trace_ids(recorder)) == 1
    assert recorder.tree(("aiqueue.attempt", "aiqueue.outcome", "error.type")) == [
        "work INTERNAL",
        "  request ai.agent.message CLIENT",
        "    send ai.agent.message PRODUCER",
        "      process ai.agent.message CONSUMER aiqueue.attempt=1 aiqueue.outcome=raised error.type=ValueError ERROR",
        "      process ai.agent.message CONSUMER aiqueue.attempt=2 aiqueue.outcome=done",
        "        send ai.agent.message PRODUCER",
    ]
    sent = [each for each in recorder.spans if each.name == "send ai.agent.message"]
    assert {(each.attributes or {})["messaging.message.conversation_id"] for each in sent} == {answer.conversation}


async def test_a_mail_whose_handler_timed_out_says_so(client: aiqueue.Client, account: Account) -> None:
    recorder, agent = Recorder(), Agent("teller", tenant="acme")

    @agent.handle(Ask, timeout="50ms", retry=aiqueue.Backoff(attempts=1))
    async def tell(mail: Mail[Ask]) -> None:
        await asyncio.sleep(60)

    async with recorder.connect(account) as traced, agent.running(traced):
        await agent.send(Ask(), to="teller")
        await recorder.ended(2)
    assert recorder.attributes("process ai.agent.message")["error.type"] == "timeout"


async def test_a_plain_publisher_s_trace_continues_in_the_agent_that_it_names(
    client: aiqueue.Client, account: Account, plain: Any
) -> None:
    recorder, agent = Recorder(), Agent("teller", tenant="acme")

    @agent.handle_any()
    async def tell(mail: Mail[Any]) -> None: ...

    async with recorder.connect(account, trace_ratio=0) as traced, agent.running(traced):
        for headers in ({"traceparent": SAMPLED}, {}):
            await plain.jetstream().publish(
                "ai.agent.message.acme", b"{}", headers={"target_agent_id": "teller", **headers}
            )
        (span,) = await recorder.ended(1)
    assert span.name == "process ai.agent.message"
    assert trace_ids(recorder) == {TRACE_ID}
