"""Agents at work: order, retries, requests, bounces, restarts, two processes of one agent."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
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
from aiqueue.agent import session
from aiqueue.agent.agent import Bounce, Mail
from aiqueue.errors import BadInput, ConfigMismatch, DecodeError, MailBounced, ReplyTimeout, Unavailable
from aiqueue.topology import provision

from ..support import Cluster, NatsProcess, eventually

STREAM = "AI_AGENT_MESSAGE"
SOON = aiqueue.Backoff(attempts=3, first=0.05, jitter=0)


class Step(aiqueue.Message, kind="step"):
    n: int


class Answer(aiqueue.Message, kind="answer"):
    n: int


@pytest.fixture
async def connect(account: Any) -> AsyncIterator[Callable[[], Any]]:
    """A factory of open clients: each is as a process of its own."""
    async with AsyncExitStack() as stack:

        async def make() -> aiqueue.Client:
            connecting = aiqueue.connect(account.url, user=account.user, password=account.password)
            client = await stack.enter_async_context(connecting)
            await provision.apply(client.connection, client.topology)
            return client

        yield make


@pytest.fixture
async def client(connect: Callable[[], Any]) -> aiqueue.Client:
    made: aiqueue.Client = await connect()
    return made


def keeping(name: str, kept: list[tuple[str, int]], **options: Any) -> aiqueue.Agent:
    """An agent that writes down conversation and number of its mail."""
    agent = aiqueue.Agent(name, tenant="acme", **options)

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        kept.append((mail.conversation, mail.message.n))

    return agent


async def put(client: aiqueue.Client, to: str, n: int, **options: Any) -> None:
    await client.inboxes.send(Step(n=n), tenant="acme", to=to, **options)


async def stored(client: aiqueue.Client) -> int:
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    return int(info["state"]["messages"])


async def emptied(client: aiqueue.Client, within: float = 25.0) -> None:
    async def empty() -> bool:
        try:
            return await stored(client) == 0
        except Unavailable:
            return False

    await eventually(empty, within=within)


async def reasons(client: aiqueue.Client) -> list[str]:
    return sorted([each.reason async for each in client.dead.find()])


async def test_an_offline_agent_gets_all_that_was_sent_once_each(client: aiqueue.Client) -> None:
    for n in range(50):
        await put(client, "bob", n)
    kept: list[tuple[str, int]] = []
    async with keeping("bob", kept).running(client):
        await eventually(lambda: len(kept) >= 50)
        await put(client, "bob", 50)
        await eventually(lambda: len(kept) >= 51)
        await emptied(client)
    assert sorted(n for _, n in kept) == list(range(51))


async def test_a_restarted_agent_goes_on_where_it_was(client: aiqueue.Client) -> None:
    kept: list[tuple[str, int]] = []
    agent = keeping("bob", kept, concurrency=2)
    sending = asyncio.create_task(_send_all(client, "bob", 300))
    for _ in range(4):
        async with agent.running(client):
            had = len(kept)
            await eventually(lambda had=had: len(kept) > had + 20)
    await sending
    async with agent.running(client):
        await emptied(client)
    assert sorted(n for _, n in kept) == list(range(300))


async def _send_all(client: aiqueue.Client, to: str, count: int) -> None:
    for n in range(count):
        await put(client, to, n, conversation=f"c{n % 7}")


async def test_mails_of_a_conversation_are_handled_in_order_and_one_at_a_time(client: aiqueue.Client) -> None:
    seen: dict[str, list[int]] = defaultdict(list)
    busy: set[str] = set()
    most = 0
    agent = aiqueue.Agent("bob", tenant="acme", concurrency=8)

    @agent.handle(Step, retry=aiqueue.Backoff(attempts=9, first=0.01))
    async def step(mail: Mail[Step]) -> None:
        nonlocal most
        assert mail.conversation not in busy
        busy.add(mail.conversation)
        most = max(most, len(busy))
        try:
            await asyncio.sleep(random.uniform(0, 0.004))
            if random.random() < 0.02:
                raise RuntimeError("again")
            seen[mail.conversation].append(mail.message.n)
        finally:
            busy.discard(mail.conversation)

    numbers = {f"c{each}": iter(range(40)) for each in range(20)}
    order = [name for name in numbers for _ in range(40)]
    random.shuffle(order)
    async with agent.running(client):
        for name in order:
            await put(client, "bob", next(numbers[name]), conversation=name)
        await emptied(client, within=20)
    assert seen == {name: list(range(40)) for name in numbers}
    assert 1 < most <= 8


async def test_a_mail_that_is_tried_again_holds_up_its_own_conversation_only(client: aiqueue.Client) -> None:
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
        await emptied(client)
    assert kept[10:] == [("bad", 0), ("bad", 1)]


async def test_a_request_is_answered_in_its_conversation(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")

    @bob.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(Answer(n=mail.message.n + 1))

    async with alice.running(client), bob.running(client):
        many = await asyncio.gather(*(alice.request(Step(n=n), to="bob", reply=Answer, timeout=10) for n in range(50)))
        untyped = await alice.request(Step(n=7), to="bob", conversation="c-1", timeout=10)
        await emptied(client)
    assert [each.message.n for each in many] == list(range(1, 51))
    assert all(each.sender == "bob" and each.correlation == each.conversation for each in many)
    assert (untyped.conversation, untyped.message.model_dump()) == ("c-1", {"n": 8})


async def test_a_handler_may_ask_another_agent_while_its_conversation_waits(client: aiqueue.Client) -> None:
    alice, bob, eve = (aiqueue.Agent(each, tenant="acme", concurrency=1) for each in ("alice", "bob", "eve"))

    @bob.handle(Step)
    async def ask(mail: Mail[Step]) -> None:
        said = await bob.request(Step(n=1), to="eve", reply=Answer, conversation=mail.conversation, timeout=10)
        await mail.reply(said.message)

    @eve.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(Answer(n=42))

    async with alice.running(client), bob.running(client), eve.running(client):
        said = await alice.request(Step(n=0), to="bob", reply=Answer, timeout=10)
    assert said.message.n == 42


async def test_a_request_that_nobody_answers_ends_by_its_timeout(client: aiqueue.Client) -> None:
    alice = aiqueue.Agent("alice", tenant="acme")
    async with alice.running(client):
        with pytest.raises(ReplyTimeout) as late:
            await alice.request(Step(n=0), to="nobody", timeout=0.2)
        assert isinstance(late.value, TimeoutError)
        assert late.value.retryable


async def test_a_reply_that_comes_too_late_goes_to_a_handler_or_back(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")
    late: list[int] = []
    back: list[str] = []
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
        back.append(f"{mail.message.mail_kind} {mail.message.reason}")

    async with alice.running(client), bob.running(client):
        with pytest.raises(ReplyTimeout):
            await alice.request(Step(n=0), to="bob", timeout=2)  # it is in hand by then
        free.set()
        await eventually(lambda: late == [1] and back == ["step expired"])
    assert await reasons(client) == []


async def test_a_handler_that_asks_is_answered_while_its_agent_leaves(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")
    begun, heard = asyncio.Event(), asyncio.Event()
    said: list[int] = []

    @alice.handle(Step)
    async def ask(mail: Mail[Step]) -> None:
        begun.set()
        said.append((await alice.request(Answer(n=5), to="bob", reply=Answer, timeout=10)).message.n)

    @bob.handle(Answer)
    async def reply(mail: Mail[Answer]) -> None:
        await heard.wait()
        await mail.reply(mail.message)

    async with bob.running(client):
        async with alice.running(client) as desk:
            await put(client, "alice", 1)
            await begun.wait()
            asyncio.get_running_loop().call_later(0.1, heard.set)
        assert desk.clean
        await emptied(client)
    assert said == [5]


async def test_a_reply_of_the_wrong_kind_is_an_error(client: aiqueue.Client) -> None:
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")

    @bob.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(mail.message)

    async with alice.running(client), bob.running(client):
        with pytest.raises(DecodeError, match="is a step, not a answer"):
            await alice.request(Step(n=0), to="bob", reply=Answer, timeout=10)


async def test_mail_that_comes_to_nothing_goes_back_and_a_waiting_request_fails_at_once(
    client: aiqueue.Client,
) -> None:
    class Unheard(aiqueue.Message, kind="unheard"):
        pass

    class BadStep(aiqueue.Message, kind="step"):
        n: str

    heard: list[Bounce] = []
    alice, bob = aiqueue.Agent("alice", tenant="acme"), aiqueue.Agent("bob", tenant="acme")

    @alice.handle(Bounce)
    async def bounce(mail: Mail[Bounce]) -> None:
        heard.append(mail.message)

    @bob.handle(Step, retry=SOON)
    async def step(mail: Mail[Step]) -> None:
        raise aiqueue.Reject("no") if mail.message.n == 0 else RuntimeError("broken")

    async with alice.running(client), bob.running(client):
        asked = {"unknown_kind": Unheard(), "invalid": BadStep(n="x"), "rejected": Step(n=0), "attempts": Step(n=1)}
        for reason, message in asked.items():
            with pytest.raises(MailBounced) as back:
                await alice.request(message, to="bob", timeout=10)
            assert back.value.reason == reason
        sent = await alice.send(Step(n=0), to="bob", conversation="c-9")
        await eventually(lambda: heard)
        await emptied(client)
    assert [(each.mail_id, each.reason, each.conversation) for each in heard] == [(sent.mail_id, "rejected", "c-9")]
    assert await reasons(client) == ["attempts", "invalid", "rejected", "rejected", "unknown_kind"]


async def test_mail_that_expires_behind_other_mail_goes_back(client: aiqueue.Client) -> None:
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
        await asyncio.sleep(0.1)
        free.set()

        async def back() -> None:
            assert [each.envelope.kind async for each in client.inboxes.read("alice", tenant="acme")] == [
                "agent.bounce"
            ]

        await eventually(back)
    assert handled == [0]
    assert await reasons(client) == []  # its sender knows


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


async def test_a_handler_that_hangs_is_ended_and_tried_again(client: aiqueue.Client) -> None:
    attempts: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step, timeout=0.1, retry=SOON)
    async def step(mail: Mail[Step]) -> None:
        attempts.append(mail.attempt)
        if mail.attempt == 1:
            await asyncio.sleep(60)

    async with agent.running(client):
        await put(client, "bob", 1)
        await emptied(client)
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
        await emptied(client)
    assert kept == [1]


async def test_a_second_process_of_an_agent_stands_by_and_takes_over_in_order(connect: Callable[[], Any]) -> None:
    one, two = await connect(), await connect()
    kept: list[tuple[str, int]] = []
    first, second = keeping("bob", kept), keeping("bob", kept)
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
            await emptied(two)
    assert kept == [("c", n) for n in range(100)]


async def test_who_has_lost_the_inbox_ends_what_it_was_doing(client: aiqueue.Client, monkeypatch: Any) -> None:
    monkeypatch.setattr(session, "KEEP_S", 0.2)
    ended: list[str] = []
    agent = aiqueue.Agent("bob", tenant="acme", drain_timeout=1)

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(mail.id)
            raise

    async with agent.running(client) as desk:
        await put(client, "bob", 1)
        await eventually(lambda: desk.running)
        other = client.inboxes.presence.hold("acme", "bob", 30)

        async def steal() -> bool:
            """As if this process had been paused for longer than its key lives."""
            await client.connection.api("STREAM.PURGE.KV_AI_PRESENCE", {"filter": "$KV.AI_PRESENCE.live.acme.bob"})
            return await other.take()

        await eventually(steal)
        await eventually(lambda: ended and not desk.active)
        assert await stored(client) == 1


async def test_mail_in_hand_survives_a_restart_of_the_server(own_server: Callable[..., NatsProcess]) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await provision.apply(client.connection, client.topology)
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
            await emptied(client, within=40)
    assert seen == list(range(200))


async def _send_all_one(client: aiqueue.Client, count: int) -> None:
    for n in range(count):
        await put(client, "bob", n, conversation="c", unique=f"n{n}", timeout=60)


APP = """
    import asyncio, os
    import aiqueue
    from aiqueue.agent import session
    from aiqueue.agent import Mail

    session.TTL_S, session.KEEP_S, session.TAKE_S = 2.0, 0.5, 0.3
    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Step(aiqueue.Message, kind="step"):
        n: int

    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await asyncio.sleep(0.002)
        os.write(LOG, f"{mail.conversation} {mail.message.n} {os.getpid()}\\n".encode())
    """


COMMAND = [sys.executable, "-m", "aiqueue", "work", "app:agent", "--log-level", "warning"]


def _told(account: Any, directory: Path) -> dict[str, str]:
    return {
        **os.environ,
        "JOB_LOG": str(directory / "log"),
        "AIQUEUE_URL": account.url,
        "AIQUEUE_USER": account.user,
        "AIQUEUE_PASSWORD": account.password,
    }


async def test_killed_9_an_agents_next_process_gets_the_rest_in_order(
    client: aiqueue.Client, account: Any, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    log = tmp_path / "log"
    log.touch()
    running = [subprocess.Popen(COMMAND, cwd=tmp_path, env=_told(account, tmp_path)) for _ in range(2)]
    try:
        for n in range(600):
            await put(client, "bob", n, conversation=f"c{n % 3}")
            if n == 300:
                await eventually(lambda: len(log.read_text().splitlines()) > 100, within=40)
                victim = int(log.read_text().splitlines()[-1].split()[2])
                os.kill(victim, signal.SIGKILL)
        await emptied(client, within=30)
    finally:
        for each in running:
            each.terminate()
        for each in running:
            each.wait(timeout=40)
    seen: dict[str, list[int]] = defaultdict(list)
    pids = set()
    for line in log.read_text().splitlines():
        conversation, n, pid = line.split()
        pids.add(pid)
        if int(n) not in seen[conversation]:
            seen[conversation].append(int(n))
    assert seen == {f"c{each}": list(range(each, 600, 3)) for each in range(3)}
    assert len(pids) == 2


DEADLY = APP.replace("await asyncio.sleep(0.002)", "os._exit(9) if mail.message.n == 7 else await asyncio.sleep(0.002)")


@pytest.mark.slow
async def test_a_mail_that_kills_its_processes_is_given_up_and_no_other(
    client: aiqueue.Client, account: Any, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text(textwrap.dedent(DEADLY))
    (tmp_path / "log").touch()
    for n in range(40):
        await put(client, "bob", n, conversation=f"c{n % 6}", sender="alice")
    deaths = 0
    for _ in range(8):
        process = subprocess.Popen(COMMAND, cwd=tmp_path, env=_told(account, tmp_path))
        try:
            while process.poll() is None and await client.inboxes.counts() != {("acme", "alice"): 1}:
                await asyncio.sleep(0.1)
        finally:
            process.terminate()
            deaths += process.wait(timeout=40) == 9
        if await client.inboxes.counts() == {("acme", "alice"): 1}:  # the bounce
            break
    assert 3 <= deaths <= 5
    assert await reasons(client) == ["killed_worker"]
    lines = (tmp_path / "log").read_text().splitlines()
    assert {int(line.split()[1]) for line in lines} == set(range(40)) - {7}


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_on_a_cluster_mail_keeps_its_order_over_the_deaths_of_servers(own_cluster: Cluster) -> None:
    account = own_cluster.account
    given = {"user": account.user, "password": account.password, "profile": "cluster"}
    seen: list[int] = []
    agent = aiqueue.Agent("bob", tenant="acme")

    @agent.handle(Step)
    async def step(mail: Mail[Step]) -> None:
        seen.append(mail.message.n)

    async with aiqueue.connect(own_cluster.url, **given) as client:
        await provision.apply(client.connection, client.topology)
        async with agent.running(client):
            sending = asyncio.create_task(_send_all_one(client, 2_000))
            for at, name in ((300, "n1"), (900, "n2"), (1_500, "n3")):
                await eventually(lambda at=at: len(seen) > at, within=60)
                own_cluster.node(name).kill()
                await asyncio.to_thread(own_cluster.start)
            await sending
            await emptied(client, within=60)
    assert list(dict.fromkeys(seen)) == list(range(2_000))


async def test_a_mail_that_was_lost_on_its_way_still_comes_before_newer_ones(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a server dies with a delivery: without this it would come again when its lease runs out, the last."""
    lose = {3, 7}
    on_delivery = session.AgentSession._on_delivery

    def some(room: session.AgentSession, delivery: Any) -> None:
        if delivery.lane.key.priority != "bob" or delivery.seq not in lose:
            on_delivery(room, delivery)
        lose.discard(delivery.seq)

    monkeypatch.setattr(session.AgentSession, "_on_delivery", some)
    for n in range(1, 11):
        await put(client, "bob", n, conversation="c")
    kept: list[tuple[str, int]] = []
    async with keeping("bob", kept).running(client):
        await emptied(client)
    assert not lose
    assert [n for _, n in kept] == list(range(1, 11))
    assert not await reasons(client)


async def test_deaths_over_one_mail_are_counted_and_another_begins_anew(client: aiqueue.Client) -> None:
    presence = client.inboxes.presence
    assert [await presence.died("acme", "bob", seq) for seq in (5, 5, 6, 6, 6)] == [1, 2, 1, 2, 3]


async def test_anothers_consumer_on_an_inbox_is_not_taken_away(client: aiqueue.Client) -> None:
    config = {"durable_name": "mine", "filter_subject": "ai.agent.message.acme.bob", "ack_policy": "explicit"}
    await client.connection.api(
        f"CONSUMER.CREATE.{STREAM}.mine.{config['filter_subject']}", {"stream_name": STREAM, "config": config}
    )
    with pytest.raises(ConfigMismatch, match="consumer mine of another program"):
        async with keeping("bob", []).running(client):
            pass
    assert await client.inboxes.presence.online() == {}


TROUPE = """
    import aiqueue
    from aiqueue.agent import Mail

    class Step(aiqueue.Message, kind="step"):
        n: int

    agents = [aiqueue.Agent(name, tenant="acme") for name in ("first", "second")]

    @agents[0].handle(Step)
    async def ask(mail: Mail[Step]) -> None:
        said = await agents[0].request(mail.message, to="second", reply=Step, timeout=10)
        await mail.reply(said.message)

    @agents[1].handle(Step)
    async def step(mail: Mail[Step]) -> None:
        await mail.reply(Step(n=mail.message.n + 1))
    """


async def test_a_list_of_agents_is_run_as_one_service(client: aiqueue.Client, account: Any, tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(textwrap.dedent(TROUPE))
    command = [*COMMAND[:4], "app:agents", "--health-file", "health", "--concurrency", "3"]
    service = subprocess.Popen(command, cwd=tmp_path, env=_told(account, tmp_path), stdout=subprocess.PIPE, text=True)
    try:
        caller = aiqueue.Agent("caller", tenant="acme")
        async with caller.running(client):
            said = await caller.request(Step(n=1), to="first", reply=Step, timeout=20)
        assert said.message.n == 2
        await eventually(lambda: '"done":2' in (tmp_path / "health").read_text().replace(" ", ""))
        assert '"slots":6' in (tmp_path / "health").read_text().replace(" ", "")
    finally:
        service.terminate()
        told, _ = service.communicate(timeout=40)
    assert service.returncode == 0
    assert "2 agents: first of acme, second of acme, at nats://" in told
    assert "\n2 agents: 2 deliveries in" in told


async def test_an_agent_of_ours_and_a_plain_one_talk_both_ways(client: aiqueue.Client, account: Any) -> None:
    """The plain one does as the guide says: it listens on the bare subject and looks at the headers."""
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
        said = await alice.request(Step(n=7), to="plain", reply=Answer, timeout=10)
    await nc.close()
    assert (said.message.n, said.sender) == (8, "plain")


async def test_a_client_runs_several_agents_by_one_room_and_ends_it_with_the_last(client: aiqueue.Client) -> None:
    kept: list[tuple[str, int]] = []
    agents = [keeping(f"a{n}", kept) for n in range(20)]
    async with AsyncExitStack() as stack:
        for each in agents:
            await stack.enter_async_context(each.running(client))
        room = session.AgentSession.of(client)
        sent = await client.inboxes.broadcast(Step(n=1), tenant="acme")
        assert len(sent) == 20
        await eventually(lambda: len(kept) == 20)
        assert session.AgentSession.of(client) is room
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    assert info["state"]["consumer_count"] <= 1  # the router's
    assert client not in session._rooms


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
    agent = keeping("bob", [])
    with pytest.raises(BadInput, match="has a handler already"):

        @agent.handle(Step)
        async def again(mail: Mail[Step]) -> None: ...
