"""A handler of an agent for mail of every kind: which mail it gets, in which form, and what it does not get."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

import aiqueue
from aiqueue import codec
from aiqueue.agent import Bounce, Mail
from aiqueue.cli.worker_process import _describe_start
from aiqueue.errors import BadInput, DecodeError, MailBounced, ReplyTimeout

from ..support import eventually

INBOX = "ai.agent.message.acme.ada"
ONCE = aiqueue.Backoff(attempts=1)
SOON = aiqueue.Backoff(attempts=3, first=0.02, jitter=0)


class Step(aiqueue.Message, kind="step"):
    n: int = 0


class Note(aiqueue.Message, kind="note"):
    text: str = ""


class Seen(asyncio.Queue[Mail[aiqueue.RawMessage]]):
    async def next(self) -> Mail[aiqueue.RawMessage]:
        return await asyncio.wait_for(self.get(), 25)


def agent_of(seen: Seen, steps: list[int], name: str = "ada") -> aiqueue.Agent:
    """An agent with a handler for the kind `step`, and one for every kind."""
    agent = aiqueue.Agent(name, tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        steps.append(mail.message.n)

    @agent.handle_any(retry=ONCE)
    async def every_kind(mail: Mail[aiqueue.RawMessage]) -> None:
        seen.put_nowait(mail)

    return agent


async def letters(client: aiqueue.Client) -> list[Any]:
    return [each async for each in client.dead.find()]


async def test_a_typed_handler_goes_first_and_mail_of_every_other_kind_goes_to_the_handler_of_every_kind(
    client: aiqueue.Client,
) -> None:
    seen, steps = Seen(), list[int]()
    async with agent_of(seen, steps).running(client):
        options: Any = {"tenant": "acme", "to": "ada", "sender": "bob", "conversation": "c"}
        await client.inboxes.send(Step(n=1), **options)
        sent = await client.inboxes.send(Note(text="hi"), extra={"X-Own": "kept"}, **options)
        mail = await seen.next()
    assert steps == [1]
    assert (mail.id, mail.kind, mail.sender, mail.conversation) == (sent.mail_id, "note", "bob", "c")
    assert mail.headers["X-Own"] == "kept"
    message = mail.message
    assert (message.kind, message.content_type, message.schema_version) == ("note", "application/cbor", None)
    assert (message.body, message.decode()) == (codec.encode({"text": "hi"}), {"text": "hi"})


@pytest.mark.parametrize(
    ("body", "kind", "version", "data"),
    [
        (b'{ "n": 3 }', "agent.message", None, {"n": 3}),
        (b'{"schema_version": "1.0", "message_type": "greet", "data": {"n": 3}}', "greet", "1.0", {"n": 3}),
        (b'{"schema_version": "9", "message_type": "step", "data": {"n": 3}}', "step", "9", {"n": 3}),
        (b"\xff\xff", "agent.message", None, None),
    ],
    ids=["bare", "envelope", "a known kind of another version", "undecodable"],
)
async def test_a_plain_clients_mail_arrives_with_its_bytes(
    client: aiqueue.Client, plain: Any, body: bytes, kind: str, version: str | None, data: Any
) -> None:
    seen, steps = Seen(), list[int]()
    async with agent_of(seen, steps).running(client):
        await plain.jetstream().publish(INBOX, body, headers={"source_agent_id": "bob"})
        mail = await seen.next()
    assert (mail.kind, mail.message.kind, mail.message.schema_version) == (kind, kind, version)
    assert (mail.message.body, mail.sender, steps) == (body, "bob", [])
    if data is None:
        with pytest.raises(DecodeError):
            mail.message.decode()
    else:
        assert mail.message.decode() == data
    assert await letters(client) == []


async def test_a_broadcast_and_a_request_of_any_kind_reach_the_handler_and_it_can_reply(client: aiqueue.Client) -> None:
    ada, bob = aiqueue.Agent("ada", tenant="acme"), aiqueue.Agent("bob", tenant="acme")
    kinds: list[str] = []

    @ada.handle_any()
    async def echo(mail: Mail[aiqueue.RawMessage]) -> None:
        kinds.append(mail.kind)
        if "Aiq-Broadcast" not in mail.headers:
            await mail.reply(Note(**mail.message.decode()))

    async with ada.running(client), bob.running(client):
        await bob.broadcast(Step(n=1))
        reply = await bob.request(Note(text="hi"), to="ada", reply=Note, timeout=25)
        await eventually(lambda: sorted(kinds) == ["note", "step"])
    assert reply.message == Note(text="hi")


async def test_a_reply_that_no_request_waits_for_goes_to_the_handler_of_every_kind(client: aiqueue.Client) -> None:
    seen, free = Seen(), asyncio.Event()
    ada, bob = agent_of(seen, []), aiqueue.Agent("bob", tenant="acme")

    @bob.handle(Step)
    async def reply(mail: Mail[Step]) -> None:
        if mail.message.n:
            await free.wait()
        await mail.reply(Note(text=f"to {mail.message.n}"))

    async with ada.running(client), bob.running(client):
        sent = await ada.send(Step(n=0), to="bob")
        mail = await seen.next()
        assert (mail.correlation, mail.message.decode()) == (sent.mail_id, {"text": "to 0"})
        with pytest.raises(ReplyTimeout):
            await ada.request(Step(n=1), to="bob", timeout=1)
        free.set()
        late = await seen.next()
    assert late.correlation is not None
    assert late.message.decode() == {"text": "to 1"}
    assert await letters(client) == []


@pytest.mark.parametrize("handled", [False, True], ids=["no handler for bounces", "a handler for bounces"])
async def test_a_bounce_goes_to_its_own_handler_or_is_logged_and_never_to_that_of_every_kind(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture, *, handled: bool
) -> None:
    seen, reasons = Seen(), list[str]()
    ada, bob = agent_of(seen, []), aiqueue.Agent("bob", tenant="acme")
    if handled:

        @ada.handle(Bounce)
        async def bounce(mail: Mail[Bounce]) -> None:
            reasons.append(mail.message.reason)

    async with ada.running(client) as inbox_worker, bob.running(client):
        await ada.send(Note(), to="bob")
        await eventually(lambda: inbox_worker.done == 1)
    assert reasons == (["unknown_kind"] if handled else [])
    assert ("got a bounce and has no handler for it" in caplog.text) is not handled
    assert seen.empty()


async def test_mail_that_fails_is_retried_then_dead_lettered_bounced_and_replayed(client: aiqueue.Client) -> None:
    ada, bob = aiqueue.Agent("ada", tenant="acme"), aiqueue.Agent("bob", tenant="acme")
    attempts: list[int] = []
    threads: list[str] = []

    @ada.handle_any(retry=SOON, on={KeyError: aiqueue.Reject})
    def fail(mail: Mail[aiqueue.RawMessage]) -> None:
        attempts.append(mail.attempt)
        threads.append(threading.current_thread().name)
        if len(attempts) <= 3:
            raise ValueError("broken")
        if len(attempts) == 4:
            raise KeyError("never")

    async with ada.running(client), bob.running(client):
        for reason in ("attempts", "rejected"):
            with pytest.raises(MailBounced) as bounced:
                await bob.request(Note(), to="ada", timeout=25)
            assert bounced.value.reason == reason
        found = {each.reason: each for each in await letters(client)}
        assert {reason: each.kind for reason, each in found.items()} == {"attempts": "note", "rejected": "note"}
        await client.dead.replay(found["rejected"])
        await eventually(lambda: len(attempts) == 5)
    assert attempts == [1, 2, 3, 1, 1]
    assert all(each.startswith("aiqueue-agent-ada") for each in threads)


async def test_an_error_repeats_no_line_of_an_undecodable_mail_with_secrets(client: aiqueue.Client, plain: Any) -> None:
    ada = aiqueue.Agent("ada", tenant="acme")

    @ada.handle_any(retry=ONCE)
    async def fail(mail: Mail[aiqueue.RawMessage]) -> None:
        raise ValueError(f"cannot read {mail.message.body!r}")

    async with ada.running(client):
        await plain.jetstream().publish(INBOX, b"swordfish", headers={"Aiq-Secret": "/key"})
        await eventually(lambda: letters(client))
    (letter,) = await letters(client)
    assert "swordfish" not in f"{letter.error} {letter.history}"
    assert letter.body == b"swordfish"


async def test_the_card_lists_a_star(client: aiqueue.Client) -> None:
    ada = agent_of(Seen(), [])
    assert ada.kinds == ("step", "*")
    async with ada.running(client):
        (stats,) = await client.inboxes.stats("acme")
    assert stats.card is not None
    assert stats.card.kinds == ("*", "step")


def test_an_agent_has_one_handler_for_every_kind_and_its_options_are_checked() -> None:
    agent: Any = aiqueue.Agent("ada", tenant="acme")
    agent.handle_any()(_take)
    with pytest.raises(BadInput, match=r"^agent ada has a handler for every kind already$"):
        agent.handle_any()(_take)
    with pytest.raises(BadInput, match="must take one argument"):
        aiqueue.Agent("bob", tenant="acme").handle_any()(lambda: None)  # type: ignore[arg-type, misc]
    with pytest.raises(BadInput, match="timeout must be above 0"):
        agent.handle_any(timeout=0)
    with pytest.raises(BadInput, match="retry must be a Backoff"):
        agent.handle_any(retry=1)
    with pytest.raises(BadInput, match="use handle_any"):
        agent.handle(aiqueue.RawMessage)


async def _take(mail: Mail[aiqueue.RawMessage]) -> None: ...


async def test_the_start_of_an_agent_says_that_it_takes_every_kind(client: aiqueue.Client) -> None:
    assert "8 conversations at once, every kind, step, at" in _describe_start(agent_of(Seen(), []), client)
