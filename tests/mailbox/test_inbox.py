"""Mail in its inboxes: sending, the roster, presence, what plain clients see and send."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import AsyncExitStack
from typing import Any

import cbor2
import nats
import pytest
from nats.aio.client import Client as Raw

import aiqueue
from aiqueue import headers
from aiqueue.agent import Bounce, Mail
from aiqueue.agent.router import MailRouter
from aiqueue.errors import BadInput, InboxFull, InvalidToken
from aiqueue.lanes.puller import Puller
from aiqueue.mailbox.inbox import Sent, Unread
from aiqueue.mailbox.presence import Presence

from ..support import eventually

pytestmark = pytest.mark.families("agent.tasks", "agent.message")
STREAM = "AI_AGENT_MESSAGE"
BAD_TOKENS = ["a.b", "*", ">", "a b", "", "ä", "acme.bob", "x" * 65, "a\r\nb", "other.*", None]


class Note(aiqueue.Message, kind="note"):
    text: str


async def unread(client: aiqueue.Client, agent: str, tenant: str = "acme") -> list[Unread]:
    return [each async for each in client.inboxes.read(agent, tenant=tenant)]


async def bounces(client: aiqueue.Client, agent: str) -> list[dict[str, Any]]:
    return [cbor2.loads(each.body) for each in await unread(client, agent) if each.envelope.kind == "agent.bounce"]


def router(client: aiqueue.Client) -> MailRouter:
    puller = Puller(client.connection, deliver=lambda _: None, gone=lambda _: None, changed=lambda: None)
    return MailRouter(client.inboxes, client.dead, puller)


async def test_mail_is_stored_for_an_unknown_agent(client: aiqueue.Client) -> None:
    sent = await client.inboxes.send(Note(text="hi"), tenant="acme", to="bob", sender="alice")
    (mail,) = await unread(client, "bob")
    assert (mail.envelope.mail_id, mail.envelope.sender, mail.envelope.kind) == (sent.mail_id, "alice", "note")
    assert mail.envelope.conversation == sent.conversation == sent.mail_id


async def test_reading_an_inbox_removes_nothing(client: aiqueue.Client) -> None:
    await client.inboxes.send(Note(text="hi"), tenant="acme", to="bob")
    assert len(await unread(client, "bob")) == len(await unread(client, "bob")) == 1


async def test_the_same_unique_key_is_one_mail_for_each_agent(client: aiqueue.Client) -> None:
    send = client.inboxes.send
    first = await send(Note(text="1"), tenant="acme", to="bob", unique="k")
    repeated = await send(Note(text="2"), tenant="acme", to="bob", unique="k")
    other = await send(Note(text="3"), tenant="acme", to="eve", unique="k")
    foreign = await send(Note(text="4"), tenant="globex", to="bob", unique="k")
    assert [each.duplicate for each in (first, repeated, other, foreign)] == [False, True, False, False]
    assert len(await unread(client, "bob")) == 1


@pytest.mark.parametrize("token", BAD_TOKENS)
async def test_an_invalid_token_is_refused_before_anything_is_published(
    client: aiqueue.Client, plain: Raw, token: Any
) -> None:
    published: list[str] = []

    async def record(message: Any) -> None:
        published.append(message.subject)

    await plain.subscribe("ai.agent.>", cb=record)
    await plain.subscribe("$KV.>", cb=record)
    await plain.flush()
    inboxes, note = client.inboxes, Note(text="x")
    calls = [
        inboxes.send(note, tenant="acme", to=token),
        inboxes.send(note, tenant=token, to="bob"),
        inboxes.broadcast(note, tenant=token),
        inboxes.create(token, tenant="acme"),
        inboxes.create("bob", tenant=token),
        inboxes.remove(token, tenant="acme"),
    ]
    if token is not None:
        calls.append(inboxes.send(note, tenant="acme", to="bob", sender=token))
    for call in calls:
        with pytest.raises(InvalidToken):
            await call
    with pytest.raises(InvalidToken):
        aiqueue.Agent(token, tenant="acme")
    with pytest.raises(InvalidToken):
        aiqueue.Agent("bob", tenant=token)
    await client.connection.flush()
    await plain.flush()
    assert published == []


async def test_a_full_inbox_refuses_the_mail_and_names_agent_and_limit(client: aiqueue.Client) -> None:
    await client.connection.api(
        f"STREAM.UPDATE.{STREAM}", {**client.topology.streams[STREAM].config, "max_msgs_per_subject": 2}
    )
    for n in range(2):
        await client.inboxes.send(Note(text=str(n)), tenant="acme", to="bob")
    with pytest.raises(InboxFull) as full:
        await client.inboxes.send(Note(text="2"), tenant="acme", to="bob")
    assert (full.value.agent, full.value.limit, full.value.retryable) == ("bob", 10_000, True)
    await client.inboxes.create("bob", tenant="acme")
    await client.inboxes.create("eve", tenant="acme")
    outcomes = await client.inboxes.broadcast(Note(text="all"), tenant="acme")
    assert isinstance(outcomes["bob"], InboxFull)
    assert isinstance(outcomes["eve"], Sent)


async def test_a_refused_mail_is_not_copied_to_plain_subscribers(client: aiqueue.Client, plain: Raw) -> None:
    await client.connection.api(
        f"STREAM.UPDATE.{STREAM}", {**client.topology.streams[STREAM].config, "max_msgs_per_subject": 1}
    )
    copies = await plain.subscribe("ai.agent.message.acme")
    await plain.flush()
    await client.inboxes.send(Note(text="1"), tenant="acme", to="bob", sender="alice")
    with pytest.raises(InboxFull):
        await client.inboxes.send(Note(text="2"), tenant="acme", to="bob")
    await client.connection.flush()
    await plain.flush()
    copy = await copies.next_msg(timeout=20)
    assert copy.headers["target_agent_id"] == "bob"
    assert copy.headers["source_agent_id"] == "alice"
    assert copies.pending_msgs == 0
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    assert info["state"]["messages"] == 1  # the copy was dropped


async def test_a_broadcast_reaches_the_whole_roster_except_its_sender(client: aiqueue.Client, plain: Raw) -> None:
    copies = await plain.subscribe("ai.agent.message.acme")
    await plain.flush()
    for agent in ("alice", "bob", "eve"):
        await client.inboxes.create(agent, tenant="acme")
    await client.inboxes.create("mallory", tenant="globex")
    outcomes = await client.inboxes.broadcast(Note(text="all"), tenant="acme", sender="alice")
    assert sorted(outcomes) == ["bob", "eve"]
    assert [len(await unread(client, each)) for each in ("alice", "bob", "eve")] == [0, 1, 1]
    assert await unread(client, "mallory", "globex") == []
    copy = await copies.next_msg(timeout=20)
    assert "target_agent_id" not in copy.headers
    await plain.flush()
    assert copies.pending_msgs == 0  # one copy, not one for each agent


async def test_a_removed_agent_gets_no_more_broadcasts_and_its_mail_is_deleted(client: aiqueue.Client) -> None:
    await client.inboxes.create("bob", tenant="acme")
    await client.inboxes.broadcast(Note(text="1"), tenant="acme")
    assert await client.inboxes.remove("bob", tenant="acme") == 1
    assert await client.inboxes.broadcast(Note(text="2"), tenant="acme") == {}
    assert await unread(client, "bob") == []
    assert await client.inboxes.presence.roster("acme") == []


async def test_a_plain_client_reads_cards_and_presence_as_a_bucket(client: aiqueue.Client, plain: Raw) -> None:
    agent = aiqueue.Agent("bob", tenant="acme", capabilities=["summaries"], description="reads")

    @agent.handle(Note)
    async def note(mail: Mail[Note]) -> None: ...

    bucket = await plain.jetstream().key_value("AI_PRESENCE")
    async with agent.running(client):
        card = json.loads((await bucket.get("agent.acme.bob")).value or b"")
        assert (card["name"], card["kinds"], card["capabilities"]) == ("bob", ["note"], ["summaries"])
        live = json.loads((await bucket.get("live.acme.bob")).value or b"")
        assert abs(live["since"] - time.time()) < 60
    with pytest.raises(nats.js.errors.KeyNotFoundError):
        await bucket.get("live.acme.bob")
    assert await bucket.get("agent.acme.bob")


async def test_a_lock_is_held_by_one_process_at_a_time_and_expires_by_its_ttl(client: aiqueue.Client) -> None:
    presence = Presence(client.connection, client.topology)
    first, second = presence.inbox_lock("acme", "bob", 1), presence.inbox_lock("acme", "bob", 30)
    assert await first.acquire()
    assert not await second.acquire()
    assert await first.renew()
    await eventually(second.acquire)  # the first one's TTL has passed
    assert not await first.renew()
    await second.release()
    assert await first.renew()  # `second` released the lock
    assert set(await presence.online("acme")) == {("acme", "bob")}


async def test_stats_show_registered_online_and_unknown_agents_with_their_mail(client: aiqueue.Client) -> None:
    await client.inboxes.create("idle", tenant="acme")
    await client.inboxes.send(Note(text="1"), tenant="acme", to="unknown")
    await client.inboxes.send(Note(text="1"), tenant="globex", to="other")
    agent = aiqueue.Agent("busy", tenant="acme")

    @agent.handle(Note)
    async def note(mail: Mail[Note]) -> None: ...

    async with agent.running(client):
        found = {each.agent: each for each in await client.inboxes.stats("acme")}
    assert sorted(found) == ["busy", "idle", "unknown"]
    assert found["busy"].online_since is not None
    assert found["idle"].card is not None
    assert found["idle"].online_since is None
    assert found["unknown"].card is None
    assert found["unknown"].unread == 1
    assert found["unknown"].oldest_at is not None


# -- the bare subject


async def routing(client: aiqueue.Client) -> aiqueue.Agent:
    """An agent whose process routes."""
    agent = aiqueue.Agent("postmaster", tenant="acme")

    @agent.handle(Note)
    async def note(mail: Mail[Note]) -> None: ...

    return agent


async def test_plain_mail_on_the_bare_subject_is_stored_in_the_inbox_that_it_names(
    client: aiqueue.Client, plain: Raw
) -> None:
    body = json.dumps({"text": "hi"}).encode()
    for n in range(20):
        await plain.publish(
            "ai.agent.message.acme", body, headers={"target_agent_id": "bob", "source_agent_id": "p", "X-N": str(n)}
        )
    agent = await routing(client)
    async with agent.running(client):
        await eventually(lambda: _has(client, "bob", 20))
    mails = await unread(client, "bob")
    assert [each.headers["X-N"] for each in mails] == [str(n) for n in range(20)]  # in order
    assert mails[0].envelope.sender == "p"
    assert mails[0].envelope.kind == "agent.message"


async def test_plain_mail_without_a_target_is_stored_in_every_inbox_of_the_roster(
    client: aiqueue.Client, plain: Raw
) -> None:
    for each in ("bob", "eve"):
        await client.inboxes.create(each, tenant="acme")
    await plain.publish("ai.agent.message.acme", b'{"text": "all"}', headers={"source_agent_id": "eve"})
    agent = await routing(client)
    async with agent.running(client):
        await eventually(lambda: _has(client, "bob", 1))
    assert await unread(client, "eve") == []


@pytest.mark.parametrize("target", ["a.b", "*", ">", "../other", "b b"])
async def test_plain_mail_to_an_invalid_agent_id_is_bounced_to_its_sender(
    client: aiqueue.Client, plain: Raw, target: str
) -> None:
    await plain.publish(
        "ai.agent.message.acme", b'{"text": "x"}', headers={"target_agent_id": target, "source_agent_id": "p"}
    )
    agent = await routing(client)
    async with agent.running(client):
        await eventually(lambda: _has(client, "p", 1))
        await eventually(lambda: _messages(client, 1))
    (bounce,) = await bounces(client, "p")
    assert bounce["reason"] == "no_such_agent"


async def test_mail_that_can_be_neither_stored_nor_bounced_is_dead_lettered(client: aiqueue.Client, plain: Raw) -> None:
    await plain.publish("ai.agent.message.acme", b'{"text": "x"}', headers={"target_agent_id": "a.b"})
    await plain.publish("ai.agent.message.a$b", b'{"text": "x"}', headers={"target_agent_id": "bob"})
    agent = await routing(client)
    async with agent.running(client):
        await eventually(lambda: _dead(client, 2))
        await eventually(lambda: _messages(client, 0))


async def test_strays_of_copies_are_dropped(client: aiqueue.Client, plain: Raw) -> None:
    agent = await routing(client)
    await plain.jetstream().publish(
        "ai.agent.message.acme", b"{}", headers={headers.COPY: "1", "target_agent_id": "bob"}
    )
    async with agent.running(client):
        await eventually(lambda: _messages(client, 0))
    assert await unread(client, "bob") == []


# -- what expires


async def test_mail_that_expires_in_the_inbox_of_an_offline_agent_is_bounced(client: aiqueue.Client) -> None:
    send = client.inboxes.send
    await send(Note(text="late"), tenant="acme", to="away", sender="alice", expires=0.001, conversation="c-1")
    await send(Note(text="stays"), tenant="acme", to="away", sender="alice", expires=60)
    await send(Note(text="nobody's"), tenant="acme", to="away", expires=0.001)
    await asyncio.sleep(0.01)
    mail_router = router(client)
    assert await mail_router.sweep() == 2
    assert await mail_router.sweep() == 0
    (bounce,) = await bounces(client, "alice")
    assert bounce["reason"] == "expired"
    assert (bounce["target"], bounce["conversation"], bounce["mail_kind"]) == ("away", "c-1", "note")
    assert [each.envelope.deadline is not None for each in await unread(client, "away")] == [True]
    await _dead(client, 1)  # the mail without a sender


async def test_a_sweep_is_bounded_and_the_next_one_continues(client: aiqueue.Client, monkeypatch: Any) -> None:
    monkeypatch.setattr("aiqueue.agent.router.SWEPT_MAILS_MAX", 3)
    for agent in ("a", "b", "c"):
        for n in range(2):
            await client.inboxes.send(Note(text=str(n)), tenant="acme", to=agent, sender="alice", expires=0.001)
    await asyncio.sleep(0.01)
    mail_router = router(client)
    counts = [await mail_router.sweep() for _ in range(4)]
    assert max(counts) <= 3
    assert sum(counts) == 6


async def test_sweeps_get_past_an_inbox_with_more_mail_than_one_sweep_reads(
    client: aiqueue.Client, monkeypatch: Any
) -> None:
    monkeypatch.setattr("aiqueue.agent.router.SWEPT_MAILS_MAX", 3)
    for n in range(7):
        await client.inboxes.send(Note(text=str(n)), tenant="acme", to="a", sender="alice")
    await client.inboxes.send(Note(text="late"), tenant="acme", to="a", sender="alice", expires=0.001)
    await client.inboxes.send(Note(text="late"), tenant="acme", to="b", sender="alice", expires=0.001)
    await asyncio.sleep(0.01)
    mail_router = router(client)
    assert [await mail_router.sweep() for _ in range(3)] == [0, 0, 2]
    assert len(await unread(client, "a")) == 7
    await client.inboxes.send(Note(text="late"), tenant="acme", to="a", sender="alice", expires=0.001)
    await asyncio.sleep(0.01)
    assert sum([await mail_router.sweep() for _ in range(4)]) == 1  # the sweeps have begun anew


async def test_mail_in_an_inbox_with_an_invalid_token_is_bounced_or_dead_lettered(
    client: aiqueue.Client, plain: Raw
) -> None:
    js = plain.jetstream()
    await js.publish("ai.agent.message.acme.b$b", b"{}", headers={"source_agent_id": "p"})
    await js.publish("ai.agent.message.a$a.bob", b"{}")
    await client.inboxes.send(Note(text="late"), tenant="acme", to="zoe", sender="alice", expires=0.001)
    await asyncio.sleep(0.01)
    assert await router(client).sweep() == 3
    assert [each["reason"] for each in await bounces(client, "p")] == ["no_such_agent"]
    await _dead(client, 1)


async def test_a_sweep_reads_headers_in_another_case(client: aiqueue.Client, plain: Raw) -> None:
    plain_headers = {"aiq-deadline": "1", "Source_Agent_Id": "p", "AIQ-KIND": "note"}
    await plain.jetstream().publish("ai.agent.message.acme.away", b"{}", headers=plain_headers)
    assert [each.envelope.kind for each in await unread(client, "away")] == ["note"]
    assert await router(client).sweep() == 1
    assert [(each["reason"], each["mail_kind"]) for each in await bounces(client, "p")] == [("expired", "note")]


NASTY: list[dict[str, str]] = [
    {},
    {"Aiq-Deadline": "soon", "Aiq-Job-Id": "a.b.*.>" * 30, "Aiq-Kind": "k" * 5_000},
    {"Aiq-Conversation": "caf\u00e9 \u202e", "source_agent_id": "a.b", "Aiq-Correlation": "\u00e9"},
    {"Aiq-Conversation": "x" * 10_000, "source_agent_id": "p", "Aiq-Correlation": "x" * 10_000},
    {"Content-Type": "image/png", "source_agent_id": "p"},
    {"Aiq-Deadline": "1", "source_agent_id": "p"},
    {"Aiq-Deadline": "9" * 30, "Aiq-Enqueued": "inf", "Aiq-Attempt": "-1", "Aiq-Broadcast": "1"},
    {"Aiq-Kind": "agent.bounce", "source_agent_id": "p"},
    {"Aiq-Document": "0" * 64, "Aiq-Run": "7", "Aiq-Parked": "w", "Aiq-Rest": "0"},
]
BODIES = [b"", b"{", b"\xff\xfe", b"[]", b"{}", b'{"text": 1}', b'{"text": "x"}', b"\x9f" * 2_000]


async def test_every_mail_of_a_plain_client_is_settled(client: aiqueue.Client, plain: Raw) -> None:
    agent = await routing(client)
    async with agent.running(client):
        for plain_headers in NASTY:
            for body in BODIES:
                for subject in ("ai.agent.message.acme", "ai.agent.message.acme.postmaster"):
                    target = {"target_agent_id": "postmaster"} if len(plain_headers) % 2 else {}
                    await plain.publish(subject, body, headers={**plain_headers, **target} or None)

        async def settled() -> None:
            assert set(await client.inboxes.counts()) <= {("acme", "p")}
            info = await client.connection.api(f"STREAM.INFO.{STREAM}", {"subjects_filter": "ai.agent.message.*"})
            assert not info["state"].get("subjects")

        await eventually(settled)
        await client.inboxes.send(Note(text="still there"), tenant="acme", to="postmaster")
        await eventually(settled)


async def test_a_process_that_runs_an_agent_sweeps_expired_mail(client: aiqueue.Client, monkeypatch: Any) -> None:
    monkeypatch.setattr("aiqueue.agent.router.SWEEP_EVERY_S", 0.05)
    agent = await routing(client)
    async with agent.running(client):
        await client.inboxes.send(Note(text="late"), tenant="acme", to="away", sender="alice", expires=0.1)
        await eventually(lambda: _has(client, "alice", 1))
    assert await unread(client, "away") == []


async def test_when_the_process_on_duty_ends_another_one_routes_mail(
    client: aiqueue.Client, account: Any, plain: Raw, monkeypatch: Any
) -> None:
    monkeypatch.setattr("aiqueue.agent.router.ACQUIRE_EVERY_S", 0.2)
    other = aiqueue.Agent("other", tenant="acme")
    connecting = aiqueue.connect(account.url, user=account.user, password=account.password)
    async with connecting as second, AsyncExitStack() as stack:
        await stack.enter_async_context(other.running(second))  # it is on duty
        async with (await routing(client)).running(client):
            for n in range(3):
                await plain.publish("ai.agent.message.acme", b"{}", headers={"target_agent_id": f"b{n}"})
                await eventually(lambda n=n: _has(client, f"b{n}", 1))
                if n == 0:
                    leaving = asyncio.create_task(stack.aclose())
            await leaving


async def test_a_bounce_never_bounces(client: aiqueue.Client) -> None:
    bounce = Bounce(reason="r", error="e", mail_id="m", mail_kind="k", target="t", conversation="c")
    await client.inboxes.send(bounce, tenant="acme", to="away", sender="alice", expires=0.001)
    await asyncio.sleep(0.01)
    await router(client).sweep()
    assert await unread(client, "alice") == []


async def test_a_mail_with_a_document_is_refused(client: aiqueue.Client) -> None:
    class Doc(aiqueue.Message, kind="doc"):
        file: aiqueue.Document

    document = await client.documents.put(b"x", tenant="acme")
    with pytest.raises(BadInput, match="cannot contain documents"):
        await client.inboxes.send(Doc(file=document), tenant="acme", to="bob")


@pytest.mark.parametrize("conversation", ["", " x", "ä", "a\nb", "x" * 129])
async def test_a_conversation_must_be_printable_ascii(client: aiqueue.Client, conversation: str) -> None:
    if conversation == "":
        sent = await client.inboxes.send(Note(text="x"), tenant="acme", to="bob", conversation=conversation)
        assert sent.conversation == sent.mail_id
        return
    with pytest.raises(BadInput, match="conversation"):
        await client.inboxes.send(Note(text="x"), tenant="acme", to="bob", conversation=conversation)


async def _has(client: aiqueue.Client, agent: str, count: int) -> None:
    assert len(await unread(client, agent)) == count


async def _messages(client: aiqueue.Client, count: int) -> None:
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    assert info["state"]["messages"] == count


async def _dead(client: aiqueue.Client, count: int) -> None:
    assert len([each async for each in client.dead.find()]) == count
