"""What a callback answers arrives as it was said: from an async or a plain function, responded or returned."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import pydantic_core
import pytest

import aiqueue
from aiqueue import codec
from aiqueue.bus import Msg, decode, encode
from aiqueue.errors import BadInput, TooLarge

from ..support import eventually

RESPONSES = "ai.gateway.responses"
ANSWERS: list[tuple[str, Any, Any]] = [
    ("respond", b"failure", "failure"),  # in CBOR a text of six bytes
    ("return", b"failure", "failure"),
    ("respond", encode(4), 4),
    ("respond", "4", "4"),
    ("return", "4", "4"),
    ("respond", "", ""),
    ("respond", encode([1, {"a": b"\xff"}], codec.CBOR), [1, {"a": b"\xff"}]),
    ("respond", '{"a": 1}', {"a": 1}),
    ("return", '{"a": 1}', '{"a": 1}'),
    ("return", bytearray(b"\xff\x00"), b"\xff\x00"),
]


class Task(aiqueue.Message, kind="agent.task"):
    text: str


class Note(aiqueue.Message, kind="agent.message", family="agent.message"):
    text: str


async def run_job(bus: aiqueue.NATSClient, tenant: str, callback: Callable[[Msg], Any]) -> Any:
    """Return the result of a job that the callback handles."""
    await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="q", callback=callback)
    return await (await bus.client.enqueue(Task(text="x"), tenant=tenant)).result(20)


async def ask(bus: aiqueue.NATSClient, tenant: str, callback: Callable[[Msg], Any]) -> Any:
    """Return the answer of a responder's callback."""
    await bus.subscribe(f"{RESPONSES}.{tenant}", callback=callback)
    return decode(await bus.request(f"{RESPONSES}.{tenant}", b'{"text": "x"}', timeout=20))


async def ask_plainly(bus: aiqueue.NATSClient, tenant: str, callback: Callable[[Msg], Any]) -> Any:
    """Return what the callback of a plain subject has responded."""
    await bus.subscribe(f"plain.{tenant}", callback=callback)
    return (await bus.request(f"plain.{tenant}", b"x", timeout=20)).data.decode()


async def exchange_mail(bus: aiqueue.NATSClient, tenant: str, callback: Callable[[Msg], Any]) -> Any:
    """Return the body of the mail that the callback of an inbox has responded."""
    got: asyncio.Queue[bytes] = asyncio.Queue()
    await bus.subscribe(f"ai.agent.message.{tenant}", "agent.writer", lambda msg: got.put_nowait(msg.data))
    await bus.subscribe(f"ai.agent.message.{tenant}", "agent.reader", callback)
    to = {"target_agent_id": "reader", "source_agent_id": "writer"}
    await bus.publish(f"ai.agent.message.{tenant}", b'{"text": "x"}', headers=to)
    return (await asyncio.wait_for(got.get(), 20)).decode()


WAYS = [run_job, ask, ask_plainly, exchange_mail]


@pytest.mark.parametrize(("how", "said", "result"), ANSWERS)
@pytest.mark.parametrize("way", [run_job, ask])
async def test_what_a_callback_says_is_the_result(
    bus: aiqueue.NATSClient, tenant: str, way: Any, how: str, said: Any, result: Any
) -> None:
    async def callback(msg: Msg) -> Any:
        return said if how == "return" else await msg.respond(said)

    if way is ask and isinstance(said, bytes | bytearray):
        result = json.loads(pydantic_core.to_json(result, bytes_mode="base64"))  # a request in JSON is answered so
    assert await way(bus, tenant, callback) == result


@pytest.mark.parametrize("way", WAYS)
async def test_a_plain_function_responds_as_an_async_one_does(bus: aiqueue.NATSClient, tenant: str, way: Any) -> None:
    problems: list[BadInput] = []

    def callback(msg: Msg) -> None:
        msg.respond("said")
        with pytest.raises(BadInput, match="answered already") as raised:
            msg.respond("again")
        problems.append(raised.value)

    assert await way(bus, tenant, callback) == "said"
    await eventually(lambda: problems)


async def answer(msg: Msg, said: str = "said") -> None:
    await asyncio.sleep(0)
    await msg.respond(said)


def decorated(msg: Msg) -> Any:
    return answer(msg)


class Service:
    def __call__(self, msg: Msg) -> Any:
        return answer(msg)


async def twice_async(msg: Msg) -> Any:
    return answer(msg)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "callback",
    [
        functools.partial(answer, said="said"), lambda msg: answer(msg, "said"), decorated, Service(), twice_async,
        lambda msg: msg.respond("said"), lambda msg: asyncio.run(answer(msg)),
    ],
    ids=["partial", "lambda", "decorated", "object", "async", "respond", "own loop"],
)  # fmt: skip
async def test_what_a_function_returns_is_awaited_before_its_message_counts_as_handled(
    bus: aiqueue.NATSClient, tenant: str, way: Any, callback: Any
) -> None:
    assert await way(bus, tenant, callback) == "said"


async def test_what_a_plain_function_returned_is_retried_if_it_fails(bus: aiqueue.NATSClient, tenant: str) -> None:
    runs: Counter[str] = Counter()

    async def fail_once(msg: Msg, times: int) -> bytes:
        runs[msg.subject] += 1
        if runs[msg.subject] <= times:
            raise ValueError("not yet")
        return b"failure"

    retry = aiqueue.Backoff(attempts=2, first="10ms")
    await bus.subscribe(f"ai.agent.tasks.{tenant}", "q", lambda msg: fail_once(msg, 1), retry=retry)
    assert await (await bus.client.enqueue(Task(text="x"), tenant=tenant)).result(20) == "failure"
    inbox = f"ai.agent.message.{tenant}"
    await bus.subscribe(inbox, "agent.reader", lambda msg: fail_once(msg, 1), retry=retry)
    await bus.publish(inbox, b"{}", headers={"target_agent_id": "reader"})
    await eventually(lambda: runs == {f"ai.agent.tasks.{tenant}": 2, inbox: 2})


async def test_a_handler_that_returns_a_coroutine_has_it_awaited(client: aiqueue.Client, tenant: str) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()
    worker, agent = aiqueue.Worker(tenants=[tenant]), aiqueue.Agent("reader", tenant=tenant)

    async def said(text: str) -> str:
        await heard.put(text)
        return text.upper()

    worker.handle(Task)(lambda job: said(job.message.text))
    agent.handle(Note)(lambda mail: said(mail.message.text))
    async with worker.running(client), agent.running(client):
        assert await (await client.enqueue(Task(text="job"), tenant=tenant)).result(20) == "JOB"
        await client.inboxes.send(Note(text="mail"), tenant=tenant, to="reader")
        assert [await asyncio.wait_for(heard.get(), 20) for _ in range(2)] == ["job", "mail"]


async def test_an_answer_that_could_not_be_sent_leaves_the_message_to_be_answered(
    bus: aiqueue.NATSClient, tenant: str
) -> None:
    async def callback(msg: Msg) -> None:
        with pytest.raises(TooLarge):
            await msg.respond(b"x" * 2_000_000)
        await msg.respond("short")

    assert await ask_plainly(bus, tenant, callback) == "short"


@pytest.mark.parametrize("way", [run_job, ask, ask_plainly])
async def test_of_many_answers_at_once_one_is_taken(bus: aiqueue.NATSClient, tenant: str, way: Any) -> None:
    async def callback(msg: Msg) -> None:
        answers = await asyncio.gather(*(try_to(msg, str(each)) for each in range(20)))
        assert sum(answers) == 1

    async def try_to(msg: Msg, text: str) -> bool:
        await asyncio.sleep(0)
        try:
            await msg.respond(f"said {text}")
        except BadInput:
            return False
        return True

    assert await way(bus, tenant, callback) == "said 0"


@pytest.mark.parametrize(
    "error", [asyncio.CancelledError(), SystemExit(3), KeyboardInterrupt(), ExceptionGroup("g", [ValueError("x")])]
)
@pytest.mark.parametrize("plain_function", [False, True])
async def test_a_plain_subscription_outlives_whatever_its_callback_raises(
    bus: aiqueue.NATSClient, tenant: str, error: BaseException, plain_function: bool, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[bytes] = []

    def note(msg: Msg) -> None:
        got.append(msg.data)
        if len(got) == 1:
            raise error

    async def note_async(msg: Msg) -> None:
        note(msg)

    with caplog.at_level(logging.ERROR):
        await bus.subscribe(f"plain.{tenant}", callback=note if plain_function else note_async)
        for body in (b"1", b"2"):
            await bus.publish(f"plain.{tenant}", body)
        await eventually(lambda: got == [b"1", b"2"])
    assert any(f"the callback of plain.{tenant} raised" in each.getMessage() for each in caplog.records)
