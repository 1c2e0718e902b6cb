"""`subscribe`: durable on the families' subjects with a queue, plain NATS elsewhere."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

import aiqueue
from aiqueue import codec
from aiqueue.bus import BusSubscription, Msg, create_envelope, decode, encode
from aiqueue.enqueue import DeadLetter, Filter
from aiqueue.errors import BadInput, JobFailed

from ..support import eventually

FAST = aiqueue.Backoff(attempts=3, first="10ms", cap="10ms")


class Task(aiqueue.Message, kind="agent.task"):
    text: str


class Note(aiqueue.Message, kind="agent.message", family="agent.message"):
    text: str


def tasks(tenant: str) -> str:
    return f"ai.agent.tasks.{tenant}"


async def dead_letters(client: aiqueue.Client, tenant: str) -> list[DeadLetter]:
    return [each async for each in client.dead.find(Filter(tenant=tenant))]


# -- jobs


@pytest.mark.parametrize("content_type", [codec.JSON, codec.CBOR])
@pytest.mark.parametrize("data", [{}, {"n": 1, "text": "x"}, {"n": [1, {"m": 2}], "more": {"a": [3]}}])
@pytest.mark.parametrize("form", ["nested", "flat", "bare"])
async def test_each_decoding_of_a_job_gives_new_data(
    bus: aiqueue.NATSClient, tenant: str, data: dict[str, Any], content_type: str, form: str
) -> None:
    body = data if form == "bare" else create_envelope("agent_task", data, flat=form == "flat")
    decoded: asyncio.Queue[list[Any]] = asyncio.Queue()

    async def handle(msg: Msg) -> None:
        found: list[Any] = []
        for _ in range(2):
            fields = decode(msg)
            found.append(json.loads(json.dumps(fields)))
            for value in fields.values():
                if isinstance(value, list | dict):
                    value.clear()
            fields.clear()
        decoded.put_nowait([*found, decode(msg.data)])

    await bus.subscribe(tasks(tenant), queue="workers", callback=handle)
    await bus.publish(tasks(tenant), encode(body, content_type))
    assert await asyncio.wait_for(decoded.get(), 25) == [data] * 3


@pytest.mark.parametrize(
    ("payload", "kind", "meant"),
    [
        (encode(create_envelope("other", {"n": 1})), "", {"n": 1}),
        (encode(create_envelope("other", {"n": 1})), "stated", {"n": 1}),  # the worker takes it for the fields
        (encode(create_envelope("other", {"n": 1}, flat=True)), "stated", {"n": 1}),
        (encode({"message_type": "other", "n": 1}), "", {"message_type": "other", "n": 1}),
        (encode({"message_type": "other", "n": 1}), "stated", {"message_type": "other", "n": 1}),
        (encode(create_envelope("a", create_envelope("b", {"n": 1}))), "", create_envelope("b", {"n": 1})),
        (encode([1, {"a": 2}]), "", [1, {"a": 2}]),
        (encode("text"), "stated", "text"),
    ],
)
async def test_a_job_is_decoded_as_its_payload_is(
    bus: aiqueue.NATSClient, tenant: str, payload: bytes, kind: str, meant: Any
) -> None:
    got: asyncio.Queue[tuple[Any, Any]] = asyncio.Queue()
    await bus.subscribe(
        tasks(tenant), queue="workers", callback=lambda msg: got.put_nowait((decode(msg), decode(msg.data)))
    )
    fields = {"Aiq-Kind": kind, "Content-Type": codec.JSON, "Aiq-Job-Id": f"j-{tenant}"} if kind else None
    await bus.publish(tasks(tenant), payload, headers=fields)
    assert await asyncio.wait_for(got.get(), 25) == (meant, meant)


async def test_a_callback_gets_jobs_of_all_priorities_and_what_it_returns_is_the_result(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    got: list[Msg] = []

    async def handle(msg: Msg) -> dict[str, str]:
        got.append(msg)
        return {"said": decode(msg)["text"].upper()}

    await bus.subscribe(subject=tasks(tenant), callback=handle, queue="agent.workers")
    handles = [
        await client.enqueue(Task(text=priority), tenant=tenant, priority=priority, headers={"model": "small"})
        for priority in ("high", "normal", "low")
    ]
    assert [await each.result(20) for each in handles] == [{"said": each} for each in ("HIGH", "NORMAL", "LOW")]
    assert sorted(each.subject for each in got) == [tasks(tenant), f"{tasks(tenant)}.high", f"{tasks(tenant)}.low"]
    for each in got:
        assert each.headers["model"] == "small"
        assert each.reply == ""
        assert each.job is not None
        assert (each.job.attempt, each.job.tenant, each.job.kind) == (1, tenant, "agent.task")


@pytest.mark.parametrize(
    ("answer", "result"), [(b'{"a": 1}', {"a": 1}), ("hello", "hello"), (b"\xff\x00", b"\xff\x00"), (b"", None)]
)
async def test_what_a_callback_responds_is_the_result(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, answer: bytes | str, result: Any
) -> None:
    async def handle(msg: Msg) -> str:
        await msg.respond(answer)
        with pytest.raises(BadInput, match="answered already"):
            await msg.respond(b"again")
        return "not this"

    await bus.subscribe(tasks(tenant), "q", handle)
    assert await (await client.enqueue(Task(text="x"), tenant=tenant)).result(20) == result


async def test_a_plain_function_runs_in_a_thread(bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str) -> None:
    def handle(msg: Msg) -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        return str(decode(msg)["text"])

    await bus.subscribe(tasks(tenant), queue="q", cb=handle)
    assert await (await client.enqueue(Task(text="x"), tenant=tenant)).result(20) == "x"


async def test_a_callback_that_raises_twice_runs_three_times(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    attempts: list[int] = []

    async def handle(msg: Msg) -> str:
        assert msg.job is not None
        attempts.append(msg.job.attempt)
        if len(attempts) < 3:
            raise ValueError("not yet")
        return "done"

    await bus.subscribe(tasks(tenant), queue="q", callback=handle, retry=FAST)
    assert await (await client.enqueue(Task(text="x"), tenant=tenant)).result(20) == "done"
    assert attempts == [1, 2, 3]


async def test_a_callback_that_always_raises_ends_in_a_dead_letter_that_can_be_replayed(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    failing = True

    async def handle(msg: Msg) -> str:
        if failing:
            raise ValueError("no")
        return "done"

    await bus.subscribe(tasks(tenant), queue="q", callback=handle, retry=FAST)
    job = await client.enqueue(Task(text="x"), tenant=tenant)
    with pytest.raises(JobFailed, match="no"):
        await job.result(20)
    (letter,) = await dead_letters(client, tenant)
    assert (letter.reason, letter.attempt) == ("attempts", 3)
    failing = False
    await client.dead.replay(letter)
    assert await (await client.job(job.id, tenant=tenant)).result(20) == "done"


async def test_reject_and_retry_mean_what_they_mean_in_a_handler(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    runs: Counter[str] = Counter()

    async def handle(msg: Msg) -> str:
        text = decode(msg)["text"]
        runs[text] += 1
        if text == "bad":
            raise aiqueue.Reject("not wanted")
        if runs[text] == 1:
            raise aiqueue.Retry(after="10ms")
        return "done"

    await bus.subscribe(tasks(tenant), queue="q", callback=handle)
    bad = await client.enqueue(Task(text="bad"), tenant=tenant)
    good = await client.enqueue(Task(text="good"), tenant=tenant)
    assert await good.result(20) == "done"
    with pytest.raises(JobFailed, match="not wanted") as raised:
        await bad.result(20)
    assert raised.value.reason == "rejected"
    assert runs == {"bad": 1, "good": 2}


async def test_a_callback_that_hangs_ends_at_its_timeout(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    async def handle(msg: Msg) -> None:
        await asyncio.Event().wait()

    await bus.subscribe(tasks(tenant), queue="q", callback=handle, timeout="50ms", retry=aiqueue.Backoff(attempts=1))
    with pytest.raises(JobFailed, match=r"timed out after 0\.05 s"):
        await (await client.enqueue(Task(text="x"), tenant=tenant)).result(20)


async def test_at_most_concurrency_callbacks_run_at_once(bus: aiqueue.NATSClient, tenant: str) -> None:
    running, most, go = 0, 0, asyncio.Event()

    async def handle(msg: Msg) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1

    for _ in range(6):
        await bus.publish(tasks(tenant), b"{}")
    await bus.subscribe(tasks(tenant), queue="q", callback=handle, concurrency=3)
    await eventually(lambda: running == 3)
    go.set()
    await eventually(lambda: running == 0)
    assert most == 3


async def test_two_queue_names_share_the_jobs_which_is_said_once(
    bus: aiqueue.NATSClient, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    got: list[str] = []

    async def handle(msg: Msg) -> None:
        assert msg.job is not None
        got.append(msg.job.id)

    for queue in ("one", "one", "two", "three"):
        await bus.subscribe(tasks(tenant), queue=queue, callback=handle)
    ids = [published.id for _ in range(30) if (published := await bus.publish(tasks(tenant), b"{}"))]
    await eventually(lambda: len(got) >= 30)
    assert sorted(got) == sorted(ids)
    said = [each.getMessage() for each in caplog.records if "share the jobs" in each.getMessage()]
    assert len(said) == 1
    assert "'one' and 'two' share the jobs of agent.tasks" in said[0]


async def test_one_subscription_takes_the_jobs_of_all_tenants(bus: aiqueue.NATSClient, tenant: str) -> None:
    got: set[str] = set()

    async def handle(msg: Msg) -> None:
        got.add(msg.subject)

    subjects = {f"ai.rag.ingest.{tenant}-{at}" for at in range(3)}
    for each in subjects:
        await bus.publish(each, b"{}")
    await bus.subscribe("ai.rag.ingest.*", queue="q", callback=handle)
    await eventually(lambda: subjects <= got)


async def test_a_typed_workers_kinds_stay_its_own_if_the_callback_is_on_another_tenant(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    worker = aiqueue.Worker(tenants=[f"{tenant}-typed"])

    @worker.handle(Task)
    async def typed(job: aiqueue.Job[Task]) -> str:
        return "typed"

    await bus.subscribe(tasks(tenant), queue="q", callback=lambda msg: "raw")
    async with worker.running(client):
        for each, said in ((tenant, "raw"), (f"{tenant}-typed", "typed")):
            assert await (await client.enqueue(Task(text="x"), tenant=each)).result(20) == said


async def test_unsubscribing_lets_the_running_callback_finish_and_takes_no_more(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def handle(msg: Msg) -> str:
        started.set()
        await go.wait()
        return "done"

    subscription = await bus.subscribe(tasks(tenant), queue="q", callback=handle)
    first = await client.enqueue(Task(text="x"), tenant=tenant)
    await started.wait()
    ending = asyncio.create_task(subscription.unsubscribe())
    await eventually(lambda: subscription.closed)
    assert not ending.done()
    go.set()
    await ending
    await subscription.unsubscribe()
    assert await first.result(5) == "done"
    second = await client.enqueue(Task(text="y"), tenant=tenant)
    await bus.subscribe(tasks(tenant), queue="q", callback=lambda msg: "by the next")
    assert await second.result(20) == "by the next"


async def test_a_callback_may_end_its_own_subscription(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    made: list[BusSubscription] = []

    async def handle(msg: Msg) -> str:
        await made[0].unsubscribe()
        return "the last"

    made.append(await bus.subscribe(tasks(tenant), queue="q", callback=handle))
    assert await (await client.enqueue(Task(text="x"), tenant=tenant)).result(20) == "the last"
    await made[0].unsubscribe()

    plain: list[BusSubscription] = []
    ended = asyncio.Event()

    async def once(msg: Msg) -> None:
        await plain[0].drain()
        ended.set()

    plain.append(await bus.subscribe(f"once.{tenant}", callback=once))
    await bus.publish(f"once.{tenant}", b"")
    await asyncio.wait_for(ended.wait(), 20)


async def test_disconnecting_drains_all_subscriptions(shared: Any, client: aiqueue.Client, tenant: str) -> None:
    running = asyncio.Event()

    async def handle(msg: Msg) -> str:
        running.set()
        await asyncio.sleep(0.1)
        return "done"

    bus = await aiqueue.NATSClient(shared.url, user=shared.user, password=shared.password).connect()
    subscription = await bus.subscribe(tasks(tenant), queue="q", callback=handle)
    job = await client.enqueue(Task(text="x"), tenant=tenant)
    await running.wait()
    await bus.disconnect()
    assert subscription.closed
    assert await job.result(5) == "done"


# -- mail


async def test_an_inbox_is_taken_in_order_and_its_mail_can_be_answered(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    got: list[str] = []

    async def hear(msg: Msg) -> None:
        assert msg.mail is not None
        assert msg.subject == f"ai.agent.message.{tenant}"
        assert msg.reply == f"ai.agent.message.{tenant}.writer"
        got.append(msg.mail.message.decode()["text"])
        await asyncio.sleep(0)
        await msg.respond(json.dumps({"text": f"re {got[-1]}"}))

    replies: list[tuple[str, str | None]] = []
    writer = aiqueue.Agent("writer", tenant=tenant)

    @writer.handle_any()
    async def note(mail: Any) -> None:
        replies.append((mail.message.decode()["text"], mail.sender))

    texts = [f"n{at}" for at in range(20)]
    async with writer.running(client):
        for text in texts:
            await writer.send(Note(text=text), to="reader")
        await bus.subscribe(f"ai.agent.message.{tenant}", queue="agent.reader", callback=hear)
        await eventually(lambda: len(replies) == 20)
        assert got == texts
        assert sorted(replies) == sorted((f"re {each}", "reader") for each in texts)

        asked = await writer.request(Note(text="question"), to="reader", reply=Note, timeout=20)
        assert asked.message.text == "re question"


async def test_a_mail_whose_callback_fails_is_repeated_and_bounced_at_the_end(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    attempts: list[int] = []

    async def hear(msg: Msg) -> None:
        assert msg.mail is not None
        attempts.append(msg.mail.attempt)
        raise ValueError("no")

    await bus.subscribe(f"ai.agent.message.{tenant}", queue="agent.reader", callback=hear, retry=FAST)
    await bus.publish(f"ai.agent.message.{tenant}", b"{}", headers={"target_agent_id": "reader"})
    await eventually(lambda: dead_letters(client, tenant))
    assert attempts == [1, 2, 3]


async def test_a_mail_without_a_sender_cannot_be_answered(bus: aiqueue.NATSClient, tenant: str) -> None:
    got: list[str] = []

    async def hear(msg: Msg) -> None:
        assert msg.reply == ""
        try:
            await msg.respond(b"x")
        except BadInput as error:
            got.append(str(error))

    await bus.subscribe(f"ai.agent.message.{tenant}", queue="agent.reader", callback=hear)
    await bus.publish(f"ai.agent.message.{tenant}.reader", b"{}")
    await eventually(lambda: got)
    assert "nobody waits for an answer" in got[0]


async def test_an_agent_that_is_subscribed_is_on_the_roster(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    await bus.subscribe(f"ai.agent.message.{tenant}", queue="agent.reader", callback=lambda msg: None)
    (found,) = await client.inboxes.stats(tenant)
    assert found.card is not None
    assert (found.agent, list(found.card.kinds)) == ("reader", ["*"])


# -- observers and plain NATS


async def test_an_observer_sees_jobs_and_takes_none(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    seen: list[Msg] = []
    await bus.subscribe(tasks(tenant), callback=seen.append)
    job = await client.enqueue(Task(text="x"), tenant=tenant)
    await eventually(lambda: seen)
    assert seen[0].headers["Aiq-Job-Id"] == job.id
    assert seen[0].reply == ""  # the publisher's, for the server's PubAck
    with pytest.raises(BadInput, match="nobody waits for an answer"):
        await seen[0].respond(b"x")
    await bus.subscribe(tasks(tenant), queue="q", callback=lambda msg: "done")
    assert await job.result(20) == "done"


async def test_plain_subjects_are_plain_nats(bus: aiqueue.NATSClient, tenant: str) -> None:
    every, shared_a, shared_b = [], [], []
    for queue, got in (("", every), ("g", shared_a), ("g", shared_b)):

        async def hear(msg: Msg, got: list[Any] = got) -> None:
            got.append((msg.subject, msg.data, dict(msg.headers), msg.reply))

        await bus.subscribe(f"plain.{tenant}.*", queue=queue, callback=hear)
    for at in range(20):
        assert await bus.publish(f"plain.{tenant}.{at}", f"{at}", headers={"n": str(at)}) is None
    await eventually(lambda: (len(every), len(shared_a) + len(shared_b)) == (20, 20))
    assert every == [(f"plain.{tenant}.{at}", f"{at}".encode(), {"n": str(at)}, "") for at in range(20)]


async def test_plain_messages_come_one_at_a_time_and_survive_a_callback_that_raises(
    bus: aiqueue.NATSClient, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    running, got = 0, []

    async def hear(msg: Msg) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0)
        running -= 1
        got.append(msg.data)
        if msg.data == b"1":
            raise ValueError("no")

    await bus.subscribe(f"plain.{tenant}", callback=hear)
    for at in range(5):
        await bus.publish(f"plain.{tenant}", str(at))
    await eventually(lambda: len(got) == 5)
    assert [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR] == [
        f"the callback of plain.{tenant} raised; plain messages are not repeated"
    ]


async def test_a_slow_observer_drops_messages_and_says_so(
    bus: aiqueue.NATSClient, tenant: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiqueue.bus.subscriptions.PENDING_MAX", 3)
    go, got = asyncio.Event(), []

    async def hear(msg: Msg) -> None:
        await go.wait()
        got.append(msg.data)

    await bus.subscribe(f"plain.{tenant}", callback=hear)
    for at in range(20):
        await bus.publish(f"plain.{tenant}", str(at))
    await eventually(lambda: "messages are dropped" in caplog.text)
    await bus.client.connection.flush()
    go.set()
    await eventually(lambda: "keeps up again" in caplog.text)
    await bus.publish(f"plain.{tenant}", "last")
    await eventually(lambda: got[-1:] == [b"last"])
    assert 3 <= len(got) - 1 < 20


async def test_a_plain_callback_that_does_not_end_is_cancelled_after_the_drain_timeout(
    shared: Any, tenant: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = asyncio.Event()

    async def hear(msg: Msg) -> None:
        running.set()
        await asyncio.Event().wait()

    options: Any = {"user": shared.user, "password": shared.password, "drain_timeout": "50ms"}
    async with aiqueue.NATSClient(shared.url, **options) as bus:
        await bus.subscribe(f"plain.{tenant}", callback=hear)
        await bus.publish(f"plain.{tenant}", b"")
        await running.wait()
    assert "did not end within 0.05 s: cancelled" in caplog.text


async def test_a_plain_function_that_hangs_does_not_keep_the_process(shared: Any, tenant: str) -> None:
    running, end = threading.Event(), threading.Event()

    def hear(msg: Msg) -> None:
        running.set()
        end.wait(60)

    options: Any = {"user": shared.user, "password": shared.password, "drain_timeout": "50ms"}
    try:
        async with aiqueue.NATSClient(shared.url, **options) as bus:
            await bus.subscribe(f"plain.{tenant}", callback=hear)
            await bus.publish(f"plain.{tenant}", b"")
            await eventually(running.is_set)
        left = [thread for thread in threading.enumerate() if thread.name.startswith("aiqueue-callback")]
        assert [thread.daemon for thread in left] == [True]
    finally:
        end.set()
    await eventually(lambda: not left[0].is_alive())


# -- arguments


async def ignore(msg: Msg) -> None: ...


def parts(msg: Msg) -> Iterator[int]:
    yield 1


async def async_parts(msg: Msg) -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give the function that gets the messages, as callback="),
        ({"callback": ignore, "cb": ignore}, "as callback= "),
        ({"callback": "f"}, "callback must be a function of one message"),
        ({"callback": lambda: None}, "must take one argument, the message"),
        ({"callback": parts}, r"^parts is a generator function: answer with `await msg\.respond\(\.\.\.\)`.*$"),
        ({"callback": async_parts}, "^async_parts is a generator function: answer with .*$"),
        ({"callback": functools.partial(parts)}, "is a generator function: answer with"),
        ({"callback": ignore, "retry": FAST}, "retry= is for jobs and mail"),
        ({"callback": ignore, "concurrency": 2}, "concurrency= is for queues"),
        ({"callback": ignore, "queue": "q", "concurrency": 0}, "concurrency must be a whole number"),
        ({"callback": ignore, "queue": "q", "retry": 3}, "retry must be a Backoff"),
        ({"callback": ignore, "queue": "q", "timeout": 0}, "timeout must be above 0"),
        (
            {"callback": ignore, "queue": "q", "subject": "ai.agent.message.acme"},
            r"queue 'q' is no agent's inbox: subscribe with queue=f\"agent\.\{agent_id\}\"",
        ),
        (
            {"callback": ignore, "queue": "agent.a", "subject": "ai.agent.message.acme.b"},
            "queue 'agent.a' is no agent's inbox",
        ),
        ({"callback": ignore, "queue": "agent.a", "subject": "ai.agent.message.*"}, "an agent has one tenant"),
        (
            {"callback": ignore, "subject": "ai.rag.results.acme", "retry": FAST},
            r"retry= is for jobs and mail; messages on ai\.rag\.results\.acme are not repeated",
        ),
    ],
)
async def test_a_wrong_argument_says_what_to_pass(bus: aiqueue.NATSClient, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        await bus.subscribe(**{"subject": "ai.agent.tasks.acme"} | options)
    assert not bus._subscriptions


async def test_a_family_with_shared_lanes_cannot_be_had_for_one_tenant(account: Any, tmp_path: Any) -> None:
    (tmp_path / "shared.toml").write_text(
        '[family]\nname = "shared.jobs"\ndefault_kind = "s"\npriorities = ["normal"]\nlanes = "shared"\n'
        '[stream]\nname = "SHARED"\nstorage = "memory"\nmax_msgs_per_subject = 10\nmax_bytes = "1MiB"\n'
    )
    options: Any = {"user": account.user, "password": account.password, "streams": tmp_path}
    async with aiqueue.NATSClient(account.url, **options) as bus:
        with pytest.raises(BadInput, match=r"cannot be taken alone: subscribe to ai\.shared\.jobs\.\*"):
            await bus.subscribe("ai.shared.jobs.acme", queue="q", callback=ignore)
