"""Agents at work: order, retries, requests, bounces, restarts, two processes of one agent."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
import signal
import subprocess
import textwrap
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import nats
import pytest

import aiqueue
from aiqueue.agent import Bounce, Mail, session
from aiqueue.errors import BadInput, ConfigMismatch, DecodeError, MailBounced, ReplyTimeout, Unavailable
from aiqueue.topology import provision

from .. import forks
from ..support import Cluster, NatsProcess, create_streams, eventually, whole_lines

STREAM = "AI_AGENT_MESSAGE"
SOON = aiqueue.Backoff(attempts=3, first=0.05, jitter=0)


class Step(aiqueue.Message, kind="step"):
    n: int


class Answer(aiqueue.Message, kind="answer"):
    n: int


@pytest.fixture
async def connect(account: Any) -> AsyncIterator[Callable[[], Any]]:
    """A factory of open clients: each stands for a process of its own."""
    async with AsyncExitStack() as stack:

        async def make() -> aiqueue.Client:
            connecting = aiqueue.connect(account.url, user=account.user, password=account.password)
            client = await stack.enter_async_context(connecting)
            await create_streams(client)
            return client

        yield make


@pytest.fixture
async def client(connect: Callable[[], Any]) -> aiqueue.Client:
    created: aiqueue.Client = await connect()
    return created


def recording_agent(name: str, kept: list[tuple[str, int]], **options: Any) -> aiqueue.Agent:
    """Return an agent that records conversation and number of its mail."""
    agent = aiqueue.Agent(name, tenant="acme", **options)

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        kept.append((mail.conversation, mail.message.n))

    return agent


async def put(client: aiqueue.Client, to: str, n: int, **options: Any) -> None:
    await client.inboxes.send(Step(n=n), tenant="acme", to=to, **options)


async def stored_count(client: aiqueue.Client) -> int:
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    return int(info["state"]["messages"])


async def until_empty(client: aiqueue.Client, within: float = 25.0) -> None:
    async def empty() -> bool:
        try:
            return await stored_count(client) == 0
        except Unavailable:
            return False

    await eventually(empty, within=within)


async def dead_letter_reasons(client: aiqueue.Client) -> list[str]:
    return sorted([each.reason async for each in client.dead.find()])


async def test_an_offline_agent_gets_all_that_was_sent_once_each(client: aiqueue.Client) -> None:
    for n in range(50):
        await put(client, "bob", n)
    kept: list[tuple[str, int]] = []
    async with recording_agent("bob", kept).running(client):
        await eventually(lambda: len(kept) >= 50)
        await put(client, "bob", 50)
        await eventually(lambda: len(kept) >= 51)
        await until_empty(client)
    assert sorted(n for _, n in kept) == list(range(51))


async def test_a_restarted_agent_continues_where_it_stopped(client: aiqueue.Client) -> None:
    kept: list[tuple[str, int]] = []
    agent = recording_agent("bob", kept, concurrency=2)
    sending = asyncio.create_task(_send_all(client, "bob", 300))
    for _ in range(4):
        async with agent.running(client):
            had = len(kept)
            await eventually(lambda had=had: len(kept) > had + 20)
    await sending
    async with agent.running(client):
        await until_empty(client)
    assert sorted(n for _, n in kept) == list(range(300))


async def _send_all(client: aiqueue.Client, to: str, count: int) -> None:
    for n in range(count):
        await put(client, to, n, conversation=f"c{n % 7}")


async def test_mails_of_a_conversation_are_handled_in_order_and_one_at_a_time(client: aiqueue.Client) -> None:
    seen: dict[str, list[int]] = defaultdict(list)
    busy: set[str] = set()
    busiest = 0
    agent = aiqueue.Agent("bob", tenant="acme", concurrency=8)

    @agent.handle(Step, retry=aiqueue.Backoff(attempts=9, first=0.01))
    async def step(mail: Mail[Step]) -> None:
        nonlocal busiest
        assert mail.conversation not in busy
        busy.add(mail.conversation)
        busiest = max(busiest, len(busy))
        try:
            await asyncio.sleep(random.uniform(0, 0.004))
            if random.random() < 0.02:
                raise RuntimeError("fails now and then")
            seen[mail.conversation].append(mail.message.n)
        finally:
            busy.discard(mail.conversation)

    numbers = {f"c{each}": iter(range(40)) for each in range(20)}
    order = [name for name in numbers for _ in range(40)]
    random.shuffle(order)
    async with agent.running(client):
        for name in order:
            await put(client, "bob", next(numbers[name]), conversation=name)
        await until_empty(client, within=20)
    assert seen == {name: list(range(40)) for name in numbers}
    assert 1 < busiest <= 8


async def test_a_mail_that_is_retried_blocks_only_its_own_conversation(client: aiqueue.Client) -> None:
    kept: list[tuple[str, int]] = []
    agent = aiqueue.Agent("bob", tenant="acme", concurrency=1)
    failing = True

    @agent.handle(Step, retry=aiqueue.Backoff(attempts=1_000, first=0.05, factor=1, jitter=0))
    async def step(mail: Mail[Step]) -> None:
        if mail.conversation == "bad" and failing:
            raise RuntimeError("not yet")
        kept.append((mail.conversation, mail.message.n))

    async with agent.running(client):
        await put(client, "bob", 0, conversation="bad")
        await put(client, "bob", 1, conversation="bad")
        for n in range(10):
            await put(client, "bob", n, conversation="good")
        await eventually(lambda: len(kept) >= 10)
        assert kept == [("good", n) for n in range(10)]
        failing = False
        await until_empty(client)
    assert kept[10:] == [("bad", 0), ("bad", 1)]


async def test_a_retry_of_mail_that_pauses_a_key_is_a_retry_and_is_logged(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        kept.append(mail.attempt)
        if mail.attempt == 1:
            raise aiqueue.Retry("429", after="10ms", pause="key")

    async with agent.running(client):
        await put(client, "bob", 1)
        await eventually(lambda: kept == [1, 2])
        await until_empty(client)
    assert (
        caplog.text.count('to bob: the handler raised Retry(pause="key"), which pauses nothing: mail has no key') == 1
    )


async def test_a_request_is_answered_in_its_conversation(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")

    @bob.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(Answer(n=mail.message.n + 1))

    async with alice.running(client), bob.running(client):
        many = await asyncio.gather(*(alice.request(Step(n=n), to="bob", reply=Answer, timeout=10) for n in range(50)))
        untyped = await alice.request(Step(n=7), to="bob", conversation="c-1", timeout=10)
        await until_empty(client)
    assert [each.message.n for each in many] == list(range(1, 51))
    assert all(each.sender == "bob" and each.correlation == each.conversation for each in many)
    assert (untyped.conversation, untyped.message.model_dump()) == ("c-1", {"n": 8})


async def test_a_handler_may_send_a_request_while_its_conversation_waits(client: aiqueue.Client) -> None:
    alice, bob, eve = (aiqueue.Agent(each, tenant="acme", concurrency=1) for each in ("alice", "bob", "eve"))

    @bob.handle(Step)
    async def forward(mail: Mail[Step]) -> None:
        reply_mail = await bob.request(Step(n=1), to="eve", reply=Answer, conversation=mail.conversation, timeout=10)
        await mail.reply(reply_mail.message)

    @eve.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(Answer(n=42))

    async with alice.running(client), bob.running(client), eve.running(client):
        reply_mail = await alice.request(Step(n=0), to="bob", reply=Answer, timeout=10)
    assert reply_mail.message.n == 42


@pytest.mark.parametrize("drains", [False, True])
async def test_a_handler_gets_its_reply_behind_more_mail_than_its_agent_holds(
    client: aiqueue.Client, drains: bool
) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme", concurrency=1), aiqueue.Agent("bob", tenant="acme")
    replies: list[int] = []
    handled: list[int] = []
    late: list[int] = []
    asked, may_reply = asyncio.Event(), asyncio.Event()

    @alice.handle(Step)
    async def forward(mail: Mail[Step]) -> None:
        if mail.message.n == 0:
            replies.append((await alice.request(Step(n=5), to="bob", reply=Answer, timeout=25)).message.n)
        handled.append(mail.message.n)

    @alice.handle(Answer)
    async def answer(mail: Mail[Answer]) -> None:
        late.append(mail.message.n)

    @bob.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        asked.set()
        await may_reply.wait()
        await mail.reply(Answer(n=mail.message.n))

    count = 3 * session.WINDOW_MIN
    async with bob.running(client), AsyncExitStack() as stack:
        inbox_worker = await stack.enter_async_context(alice.running(client))
        await put(client, "alice", 0)
        await asked.wait()
        leaving = asyncio.create_task(stack.aclose()) if drains else None
        if drains:
            await eventually(lambda: inbox_worker.vitals()["state"] == "draining")
        for n in range(1, count):
            await put(client, "alice", n)
        may_reply.set()
        await eventually(lambda: replies == [5])
        if leaving is not None:
            await leaving
            assert inbox_worker.clean
            assert handled == [0]
            assert await stored_count(client) == count - 1
        else:
            await until_empty(client)
            assert handled == list(range(count))
    assert late == []
    assert await dead_letter_reasons(client) == []


async def test_a_request_without_a_reply_ends_by_its_timeout(client: aiqueue.Client) -> None:
    alice = aiqueue.Agent("alice", tenant="acme")
    async with alice.running(client):
        with pytest.raises(ReplyTimeout) as late:
            await alice.request(Step(n=0), to="nobody", timeout=0.2)
        assert isinstance(late.value, TimeoutError)
        assert late.value.retryable


async def test_a_late_reply_goes_to_a_handler_or_is_bounced(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")
    late: list[int] = []
    bounced: list[str] = []
    free = asyncio.Event()

    @alice.handle(Answer)
    async def answer(mail: Mail[Answer]) -> None:
        late.append(mail.message.n)

    @bob.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await free.wait()
        await mail.reply(Answer(n=1))
        await mail.reply(mail.message)

    @bob.handle(Bounce)
    async def bounce(mail: Mail[Bounce]) -> None:
        bounced.append(f"{mail.message.mail_kind} {mail.message.reason}")

    async with alice.running(client), bob.running(client):
        with pytest.raises(ReplyTimeout):
            await alice.request(Step(n=0), to="bob", timeout=2)  # the mail is being handled by then
        free.set()
        await eventually(lambda: late == [1] and bounced == ["step expired"])
    assert await dead_letter_reasons(client) == []


async def test_a_handler_gets_the_reply_to_its_request_while_its_agent_drains(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")
    started, may_reply = asyncio.Event(), asyncio.Event()
    replies: list[int] = []

    @alice.handle(Step)
    async def forward(mail: Mail[Step]) -> None:
        started.set()
        replies.append((await alice.request(Answer(n=5), to="bob", reply=Answer, timeout=10)).message.n)

    @bob.handle(Answer)
    async def reply(mail: Mail[Answer]) -> None:
        await may_reply.wait()
        await mail.reply(mail.message)

    async with bob.running(client):
        async with alice.running(client) as inbox_worker:
            await put(client, "alice", 1)
            await started.wait()
            asyncio.get_running_loop().call_later(0.1, may_reply.set)
        assert inbox_worker.clean
        await until_empty(client)
    assert replies == [5]


async def test_an_agent_that_drains_stores_the_dead_letter_of_a_handler_that_fails_meanwhile(
    client: aiqueue.Client,
) -> None:
    agent = aiqueue.Agent("bob", tenant="acme", drain_timeout=30)
    started, may_fail = asyncio.Event(), asyncio.Event()

    @agent.handle(Step, retry=aiqueue.Backoff(attempts=1))
    async def step(mail: Mail[Step]) -> None:
        started.set()
        await may_fail.wait()
        raise ValueError("no")

    async with AsyncExitStack() as stack:
        inbox_worker = await stack.enter_async_context(agent.running(client))
        await put(client, "bob", 1)
        await started.wait()
        leaving = asyncio.create_task(stack.aclose())
        await eventually(lambda: inbox_worker.vitals()["state"] == "draining")
        may_fail.set()
        await leaving
    assert inbox_worker.clean
    assert [each.reason async for each in client.dead.find()] == ["attempts"]
    assert await stored_count(client) == 0


async def test_mail_that_nobody_has_to_handle_is_acknowledged_a_thousand_in_a_row(client: aiqueue.Client) -> None:
    kept: list[tuple[str, int]] = []
    agent = recording_agent("bob", kept, concurrency=100)
    await client.inboxes.create("bob", tenant="acme")
    for first in range(0, 1_000, 100):
        sending = (
            client.inboxes.broadcast(Answer(n=n), tenant="acme", conversation="c") for n in range(first, first + 100)
        )
        await asyncio.gather(*sending)
    await put(client, "bob", 7, conversation="c")
    async with agent.running(client) as inbox_worker:
        await eventually(lambda: inbox_worker.done == 1_001)
    assert kept == [("c", 7)]
    assert await stored_count(client) == 0


async def test_a_reply_of_the_wrong_kind_is_an_error(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")

    @bob.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(mail.message)

    async with alice.running(client), bob.running(client):
        with pytest.raises(DecodeError, match="is a step, not a answer"):
            await alice.request(Step(n=0), to="bob", reply=Answer, timeout=10)


async def test_mail_that_cannot_be_handled_is_bounced_and_a_waiting_request_fails_at_once(
    client: aiqueue.Client,
) -> None:
    class Unknown(aiqueue.Message, kind="unknown"):
        pass

    class BadStep(aiqueue.Message, kind="step"):
        n: str

    bounces: list[Bounce] = []
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")

    @alice.handle(Bounce)
    async def bounce(mail: Mail[Bounce]) -> None:
        bounces.append(mail.message)

    @bob.handle(Step, retry=SOON)
    async def step(mail: Mail[Step]) -> None:
        raise aiqueue.Reject("no") if mail.message.n == 0 else RuntimeError("broken")

    async with alice.running(client), bob.running(client):
        requests = {"unknown_kind": Unknown(), "invalid": BadStep(n="x"), "rejected": Step(n=0), "attempts": Step(n=1)}
        for reason, message in requests.items():
            with pytest.raises(MailBounced) as bounced:
                await alice.request(message, to="bob", timeout=10)
            assert bounced.value.reason == reason
        sent = await alice.send(Step(n=0), to="bob", conversation="c-9")
        await eventually(lambda: bounces)
        await until_empty(client)
    assert [(each.mail_id, each.reason, each.conversation) for each in bounces] == [(sent.mail_id, "rejected", "c-9")]
    assert await dead_letter_reasons(client) == ["attempts", "invalid", "rejected", "rejected", "unknown_kind"]


async def test_mail_that_expires_behind_other_mail_is_bounced(client: aiqueue.Client) -> None:
    free = asyncio.Event()
    agent = aiqueue.Agent("bob", tenant="acme")
    handled: list[int] = []

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await free.wait()
        handled.append(mail.message.n)

    async with agent.running(client):
        await put(client, "bob", 0, sender="alice", conversation="c")
        await put(client, "bob", 1, sender="alice", conversation="c", expires=0.05)
        expires_at = client.connection.clock.now() + 0.05  # at the latest
        await eventually(lambda: client.connection.clock.now() > expires_at)
        free.set()

        async def bounce_is_stored() -> None:
            assert [each.envelope.kind async for each in client.inboxes.read("alice", tenant="acme")] == [
                "agent.bounce"
            ]

        await eventually(bounce_is_stored)
    assert handled == [0]
    assert await dead_letter_reasons(client) == []  # its sender got the bounce


async def test_a_dead_letter_of_an_agent_can_be_replayed_to_its_inbox(client: aiqueue.Client) -> None:
    kept: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        if not kept:
            kept.append(0)
            raise aiqueue.Reject("not today")
        kept.append(mail.message.n)

    async with agent.running(client):
        await put(client, "bob", 5)

        async def replay() -> None:
            letters = [each async for each in client.dead.find()]
            assert letters
            await client.dead.replay(letters[0])

        await eventually(replay)
        await eventually(lambda: kept == [0, 5])


async def test_a_handler_that_hangs_is_cancelled_and_retried(client: aiqueue.Client) -> None:
    attempts: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step, timeout=0.1, retry=SOON)
    async def step(mail: Mail[Step]) -> None:
        attempts.append(mail.attempt)
        if mail.attempt == 1:
            await asyncio.sleep(60)

    async with agent.running(client):
        await put(client, "bob", 1)
        await until_empty(client)
    assert attempts == [1, 2]


async def test_a_plain_function_runs_in_a_thread(client: aiqueue.Client) -> None:
    agent = aiqueue.Agent("bob", tenant="acme")
    kept: list[int] = []

    @agent.handle(Step)
    def step(mail: Mail[Step]) -> None:
        time.sleep(0.01)
        kept.append(mail.message.n)

    async with agent.running(client):
        await put(client, "bob", 1)
        await until_empty(client)
    assert kept == [1]


async def test_a_second_process_of_an_agent_stands_by_and_takes_over_in_order(connect: Callable[[], Any]) -> None:
    one, two = await connect(), await connect()
    kept: list[tuple[str, int]] = []
    first, second = recording_agent("bob", kept), recording_agent("bob", kept)
    async with AsyncExitStack() as stack:
        at_first = await stack.enter_async_context(first.running(one))
        async with second.running(two) as at_second:
            assert at_first.active
            assert not at_second.active
            with pytest.raises(Unavailable, match="stands by"):
                await second.request(Step(n=0), to="eve", timeout=1)
            for n in range(100):
                await put(one, "bob", n, conversation="c")
                if n == 50:
                    leaving = asyncio.create_task(stack.aclose())
            await leaving
            await eventually(lambda: at_second.active)
            await until_empty(two)
    assert kept == [("c", n) for n in range(100)]


async def test_a_process_that_lost_the_inbox_cancels_its_handlers(client: aiqueue.Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(session, "RENEW_EVERY_S", 0.2)
    agent = aiqueue.Agent("bob", tenant="acme", drain_timeout=1)
    cancelled = handle_until_cancelled(agent)

    async with agent.running(client) as inbox_worker:
        await put(client, "bob", 1)
        await eventually(lambda: inbox_worker.running)
        await steal_inbox(client, "bob")
        await eventually(lambda: cancelled and not inbox_worker.active)
        assert await stored_count(client) == 1


def handle_until_cancelled(agent: aiqueue.Agent) -> list[str]:
    """Have the agent's handler run until it is cancelled. Returns the list of the mails for which it was."""
    cancelled: list[str] = []

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(mail.id)
            raise

    return cancelled


async def steal_inbox(client: aiqueue.Client, name: str) -> None:
    """Acquire an agent's lock, as if its process had been paused for longer than the lock lives."""
    other = client.inboxes.presence.inbox_lock("acme", name, 30)

    async def steal() -> bool:
        await client.connection.api("STREAM.PURGE.KV_AI_PRESENCE", {"filter": f"$KV.AI_PRESENCE.live.acme.{name}"})
        return await other.acquire()

    await eventually(steal)


async def test_a_process_whose_inbox_was_taken_over_stops_its_handlers_and_retries(client: aiqueue.Client) -> None:
    """The new holder has deleted this process's consumer, so nothing is being pulled when the loss is noticed."""
    cancelled: list[str] = []
    failed: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme", concurrency=2)

    @agent.handle(Step, retry=aiqueue.Backoff(attempts=9, first=200, jitter=0))
    async def step(mail: Mail[Step]) -> None:
        if mail.message.n:
            failed.append(mail.message.n)
            raise RuntimeError("not yet")
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            cancelled.append(mail.id)
            raise

    async with agent.running(client) as inbox_worker:
        await put(client, "bob", 0)
        await put(client, "bob", 1)
        await eventually(lambda: failed and inbox_worker.running == 1)
        assert inbox_worker.pull is not None
        consumer = inbox_worker.pull.consumer
        await steal_inbox(client, "bob")
        await client.connection.api(f"CONSUMER.DELETE.{STREAM}.{consumer}")
        await eventually(lambda: cancelled and not inbox_worker.held)
        assert not inbox_worker.active
        assert await stored_count(client) == 2


async def test_a_process_that_lost_the_inbox_starts_no_mail_when_a_slot_becomes_free(client: aiqueue.Client) -> None:
    attempts: list[tuple[int, int]] = []
    agent = aiqueue.Agent("bob", tenant="acme", concurrency=1)

    @agent.handle(Step, retry=SOON)
    async def step(mail: Mail[Step]) -> None:
        attempts.append((mail.message.n, mail.attempt))
        if mail.message.n == 0 and mail.attempt == 1:
            raise RuntimeError("not yet")
        await asyncio.sleep(600)

    async with agent.running(client) as inbox_worker:
        await put(client, "bob", 0)
        await put(client, "bob", 1)
        await eventually(lambda: attempts == [(0, 1), (1, 1)] and len(inbox_worker._ready) == 1)  # the retry is due
        await inbox_worker.abandon()
        assert not inbox_worker.running
    assert attempts == [(0, 1), (1, 1)]


async def test_an_agent_whose_drain_is_cancelled_cancels_its_handlers_and_releases_its_inbox(
    client: aiqueue.Client,
) -> None:
    inbox_workers: list[Any] = []
    agent = aiqueue.Agent("bob", tenant="acme", drain_timeout=600)
    cancelled = handle_until_cancelled(agent)

    async def run() -> None:
        async with agent.running(client) as inbox_worker:
            inbox_workers.append(inbox_worker)
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    await put(client, "bob", 1)
    await eventually(lambda: inbox_workers and inbox_workers[0].running)
    running.cancel()
    await eventually(lambda: inbox_workers[0].vitals()["state"] == "draining")
    while not running.done():  # at every step from here on
        running.cancel()
        await asyncio.sleep(0)
    assert running.cancelled()
    assert len(cancelled) == 1
    assert not inbox_workers[0].clean
    assert await client.inboxes.presence.online() == {}
    assert client not in session._sessions
    info = await client.connection.api(f"STREAM.INFO.{STREAM}", {})
    assert (info["state"]["messages"], info["state"]["consumer_count"]) == (1, 1)  # the router's
    async with agent.running(client) as inbox_worker:
        await eventually(lambda: inbox_worker.running)
        inbox_worker.spec = dataclasses.replace(inbox_worker.spec, drain_timeout_s=0)


async def test_mail_that_is_held_survives_a_restart_of_the_server(own_server: Callable[..., NatsProcess]) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        seen: list[int] = []
        agent = aiqueue.Agent("bob", tenant="acme", concurrency=2)

        @agent.handle(Step)
        async def step(mail: Mail[Step]) -> None:
            await asyncio.sleep(0.01)
            seen.append(mail.message.n)

        async with agent.running(client):
            sending = asyncio.create_task(_send_all_one(client, 200))
            await eventually(lambda: len(seen) > 40)
            server.kill()
            server.start()
            await sending
            await until_empty(client, within=40)
    assert seen == list(range(200))


async def _send_all_one(client: aiqueue.Client, count: int) -> None:
    for n in range(count):
        await put(client, "bob", n, conversation="c", unique=f"n{n}", timeout=60)


APP = """
    import asyncio, os
    import aiqueue
    from aiqueue.agent import Mail, session

    session.LOCK_TTL_S, session.RENEW_EVERY_S, session.ACQUIRE_EVERY_S = 2.0, 0.5, 0.3
    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Step(aiqueue.Message, kind="step"):
        n: int

    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await asyncio.sleep(0.002)
        os.write(LOG, f"{mail.conversation} {mail.message.n} {os.getpid()}\\n".encode())
    """


COMMAND = ["aiqueue", "work", "app:agent", "--log-level", "warning"]


def _environment(account: Any, directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        "JOB_LOG": str(directory / "log"),
        "AIQUEUE_URL": account.url,
        "AIQUEUE_USER": account.user,
        "AIQUEUE_PASSWORD": account.password,
    }


async def test_after_a_kill_9_the_agents_next_process_gets_the_rest_in_order(
    client: aiqueue.Client, account: Any, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    log = tmp_path / "log"
    log.touch()
    running = [forks.start(*COMMAND, cwd=tmp_path, env=_environment(account, tmp_path)) for _ in range(2)]
    try:
        for n in range(600):
            await put(client, "bob", n, conversation=f"c{n % 3}")
            if n == 300:
                await eventually(lambda: len(whole_lines(log)) > 100, within=40)
                victim = int(whole_lines(log)[-1].split()[2])
                os.kill(victim, signal.SIGKILL)
        await until_empty(client, within=30)
    finally:
        for each in running:
            each.terminate()
        for each in running:
            each.wait(timeout=40)
    seen: dict[str, list[int]] = defaultdict(list)
    pids = set()
    for line in whole_lines(log):
        conversation, n, pid = line.split()
        pids.add(pid)
        if int(n) not in seen[conversation]:
            seen[conversation].append(int(n))
    assert seen == {f"c{each}": list(range(each, 600, 3)) for each in range(3)}
    assert len(pids) == 2


DEADLY = APP.replace("await asyncio.sleep(0.002)", "os._exit(9) if mail.message.n == 7 else await asyncio.sleep(0.002)")


@pytest.mark.slow
async def test_a_mail_that_kills_its_processes_is_dead_lettered_and_no_other(
    client: aiqueue.Client, account: Any, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(textwrap.dedent(DEADLY))
    (tmp_path / "log").touch()
    for n in range(40):
        await put(client, "bob", n, conversation=f"c{n % 6}", sender="alice")
    deaths = 0

    async def is_done() -> bool:
        return await client.inboxes.counts() == {("acme", "alice"): 1}  # the bounce

    async def is_dead_or_done() -> bool:
        return process.poll() is not None or await is_done()

    for _ in range(8):
        process = forks.start(*COMMAND, cwd=tmp_path, env=_environment(account, tmp_path))
        try:
            await eventually(is_dead_or_done, within=120)
        finally:
            process.terminate()
            deaths += process.wait(timeout=40) == 9
        if await is_done():
            break
    assert 3 <= deaths <= 5
    assert await dead_letter_reasons(client) == ["killed_worker"]
    lines = whole_lines(tmp_path / "log")
    assert {int(line.split()[1]) for line in lines} == set(range(40)) - {7}


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_on_a_cluster_mail_keeps_its_order_over_the_deaths_of_servers(own_cluster: Cluster) -> None:
    account = own_cluster.account
    options = {"user": account.user, "password": account.password, "profile": "cluster"}
    seen: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        seen.append(mail.message.n)

    async with aiqueue.connect(own_cluster.url, **options) as client:
        await provision.apply(client.connection, client.topology)
        async with agent.running(client):
            sending = asyncio.create_task(_send_all_one(client, 2_000))
            for at, name in ((300, "n1"), (900, "n2"), (1_500, "n3")):
                await eventually(lambda at=at: len(seen) > at, within=60)
                own_cluster.node(name).kill()
                await asyncio.to_thread(own_cluster.start)
            await sending
            await until_empty(client, within=60)
    assert list(dict.fromkeys(seen)) == list(range(2_000))


async def test_a_mail_whose_delivery_was_lost_is_still_handled_before_newer_mail(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a server dies with a delivery. Otherwise the mail would be redelivered, last, when its lease expires."""
    lose = {3, 7}
    on_delivery = session.AgentSession._on_delivery

    def lose_some(agents: session.AgentSession, delivery: Any) -> None:
        if delivery.lane.key.priority != "bob" or delivery.seq not in lose:
            on_delivery(agents, delivery)
        lose.discard(delivery.seq)

    monkeypatch.setattr(session.AgentSession, "_on_delivery", lose_some)
    for n in range(1, 11):
        await put(client, "bob", n, conversation="c")
    kept: list[tuple[str, int]] = []
    async with recording_agent("bob", kept).running(client):
        await until_empty(client)
    assert not lose
    assert [n for _, n in kept] == list(range(1, 11))
    assert not await dead_letter_reasons(client)


async def test_an_agents_own_consumer_that_seemed_lost_is_no_death(client: aiqueue.Client) -> None:
    """As in an election of the consumer's group: a pull is refused, and the consumer is there all the same."""
    free = asyncio.Event()
    handled: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        handled.append(mail.message.n)
        await free.wait()

    async with agent.running(client) as inbox_worker:
        sent = await client.inboxes.send(Step(n=1), tenant="acme", to="bob")
        for _ in range(session.DEATHS_MAX):
            await eventually(lambda: inbox_worker.active and inbox_worker.running)
            pull = inbox_worker.pull
            assert pull is not None
            session.AgentSession.of(client)._on_gone(pull)
            await eventually(lambda pull=pull: inbox_worker.active and inbox_worker.pull is not pull)
        assert await client.inboxes.presence.record_death("acme", "bob", sent.seq) == 1
        free.set()
        await until_empty(client)
    assert handled == [1]
    assert await dead_letter_reasons(client) == []


async def test_deaths_over_one_mail_are_counted_and_another_mail_restarts_the_count(client: aiqueue.Client) -> None:
    presence = client.inboxes.presence
    assert [await presence.record_death("acme", "bob", seq) for seq in (5, 5, 6, 6, 6)] == [1, 2, 1, 2, 3]


async def test_another_programs_consumer_on_an_inbox_is_not_deleted(client: aiqueue.Client) -> None:
    config = {"durable_name": "mine", "filter_subject": "ai.agent.message.acme.bob", "ack_policy": "explicit"}
    await client.connection.api(
        f"CONSUMER.CREATE.{STREAM}.mine.{config['filter_subject']}", {"stream_name": STREAM, "config": config}
    )
    with pytest.raises(ConfigMismatch, match="consumer mine of another program"):
        async with recording_agent("bob", []).running(client):
            pass
    assert await client.inboxes.presence.online() == {}


GROUP = """
    import aiqueue
    from aiqueue.agent import Mail

    class Step(aiqueue.Message, kind="step"):
        n: int

    agents = [aiqueue.Agent(name, tenant="acme") for name in ("first", "second")]

    @agents[0].handle(Step)
    async def forward(mail: Mail[Step]) -> None:
        reply_mail = await agents[0].request(mail.message, to="second", reply=Step, timeout=10)
        await mail.reply(reply_mail.message)

    @agents[1].handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(Step(n=mail.message.n + 1))
    """


async def test_a_list_of_agents_is_run_as_one_service(client: aiqueue.Client, account: Any, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(textwrap.dedent(GROUP))
    command = ["aiqueue", "work", "app:agents", "--health-file", "health", "--concurrency", "3"]
    environment = _environment(account, tmp_path)
    service = forks.start(*command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE)
    try:
        caller = aiqueue.Agent("caller", tenant="acme")
        async with caller.running(client):
            reply_mail = await caller.request(Step(n=1), to="first", reply=Step, timeout=20)
        assert reply_mail.message.n == 2
        await eventually(lambda: '"done":2' in (tmp_path / "health").read_text().replace(" ", ""))
        assert '"slots":6' in (tmp_path / "health").read_text().replace(" ", "")
    finally:
        service.terminate()
        output, _ = service.communicate(timeout=40)
    assert service.returncode == 0
    assert "2 agents: first of acme, second of acme, at nats://" in output
    assert "\n2 agents: 2 deliveries in" in output


async def test_an_agent_of_ours_and_a_plain_one_talk_both_ways(client: aiqueue.Client, account: Any) -> None:
    """The plain agent subscribes to the bare subject and checks the headers, as in docs/guides/plain-clients.md."""
    nc = await nats.connect(account.url, user=account.user, password=account.password)

    async def message_handler(message: Any) -> None:
        if message.headers.get("target_agent_id") != "plain":
            return
        await nc.publish(
            "ai.agent.message.acme",
            b'{"n": 8}',
            headers={
                "target_agent_id": message.headers["source_agent_id"],
                "source_agent_id": "plain",
                "Aiq-Kind": "answer",
                "Aiq-Correlation": message.headers["Aiq-Job-Id"],
            },
        )

    await nc.subscribe("ai.agent.message.acme", cb=message_handler, queue="agent.plain")
    await nc.flush()
    alice = aiqueue.Agent("alice", tenant="acme")
    async with alice.running(client):
        reply_mail = await alice.request(Step(n=7), to="plain", reply=Answer, timeout=10)
    await nc.close()
    assert (reply_mail.message.n, reply_mail.sender) == (8, "plain")


async def test_a_client_runs_several_agents_in_one_session_and_closes_it_with_the_last(client: aiqueue.Client) -> None:
    kept: list[tuple[str, int]] = []
    agents = [recording_agent(f"a{n}", kept) for n in range(20)]
    async with AsyncExitStack() as stack:
        for each in agents:
            await stack.enter_async_context(each.running(client))
        shared = session.AgentSession.of(client)
        sent = await client.inboxes.broadcast(Step(n=1), tenant="acme")
        assert len(sent) == 20
        await eventually(lambda: len(kept) == 20)
        assert session.AgentSession.of(client) is shared
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    assert info["state"]["consumer_count"] <= 1  # the router's
    assert client not in session._sessions


async def test_an_agent_that_does_not_run_cannot_send(client: aiqueue.Client) -> None:
    agent = aiqueue.Agent("bob", tenant="acme")
    with pytest.raises(BadInput, match="does not run"):
        await agent.send(Step(n=1), to="eve")
    async with agent.running(client):
        with pytest.raises(BadInput, match="runs already"):
            async with agent.running(client):
                pass
        await agent.send(Step(n=1), to="eve")


@pytest.mark.parametrize("wrong", [{"concurrency": 0}, {"concurrency": True}, {"capabilities": "summaries"}])
def test_a_wrong_argument_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        aiqueue.Agent("bob", tenant="acme", **wrong)


def test_a_kind_has_one_handler() -> None:
    agent = recording_agent("bob", [])
    with pytest.raises(BadInput, match="has a handler already"):

        @agent.handle(Step)
        async def second(mail: Mail[Step]) -> None: ...
