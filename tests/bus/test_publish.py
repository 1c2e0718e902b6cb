"""`publish`: on the families' subjects a stored job or mail, elsewhere plain NATS."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import cbor2
import pytest

import aiqueue
from aiqueue.bus import Msg, Published, create_envelope, encode
from aiqueue.errors import BadInput, InboxFull, LaneFull, NotFound, SettingsError, TooLarge, Unavailable
from aiqueue.mailbox import Bounce
from aiqueue.topology import provision

from ..support import Account, Relay, eventually

TASKS = "ai.agent.tasks"
ODD_IDS: tuple[Any, ...] = ("  ", True, 1.5, [], {})
NO_SUBJECTS = ("a b", "a\r\nPUB b 0\r\n", "a\tb", "a..b", ".a", "a\x00", "a\ud83d", "a" * 1_001, "ä" * 501)


class Task(aiqueue.Message, kind="agent.task"):
    text: str


async def stored(client: aiqueue.Client, published: Published) -> Any:
    found = await client.connection.get(published.stream, published.seq)
    assert found is not None
    return found


async def publish(bus: aiqueue.NATSClient, subject: str, payload: Any = b"{}", **options: Any) -> Published:
    published = await bus.publish(subject, payload, **options)
    assert published is not None
    return published


async def test_a_job_without_an_id_gets_one_and_its_result_can_be_awaited(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def handle(job: aiqueue.Job[Task]) -> str:
        return job.message.text.upper()

    published = await publish(bus, f"{TASKS}.{tenant}", b'{"text": "hello"}')
    assert not published.duplicate
    async with worker.running(client):
        handle_of = await client.job(published.id, family="agent.tasks", tenant=tenant)
        assert await handle_of.result(20) == "HELLO"


@pytest.mark.parametrize(
    ("payload", "headers"),
    [
        ('{"text": "x"}', {"task_id": "t-1"}),
        ('{"text": "x"}', {"Task_ID": "t-1"}),
        ('{"text": "x"}', {"aiq-job-id": "t-1"}),
        (b'{"text": "x", "task_id": "t-1"}', None),
        (b'{"schema_version": "1.0", "message_type": "agent_task", "data": {"task_id": "t-1"}}', None),
        (bytearray(b'{"schema_version": "1.0", "message_type": "agent_task", "task_id": "t-1"}'), {}),
        (b"not decoded", {"Nats-Msg-Id": "TENANT/agent.tasks/t-1"}),
    ],
)
async def test_an_id_in_headers_or_body_is_stored_once(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, payload: Any, headers: dict[str, str] | None
) -> None:
    given = None if headers is None else {name: value.replace("TENANT", tenant) for name, value in headers.items()}
    first, second = [await publish(bus, f"{TASKS}.{tenant}", payload, headers=given) for _ in range(2)]
    assert (first.id, second.id) == ("t-1", "t-1")
    assert (first.duplicate, second.duplicate) == (False, True)
    assert first.seq == second.seq
    assert (await stored(client, first)).headers["Nats-Msg-Id"] == f"{tenant}/agent.tasks/t-1"


@pytest.mark.parametrize("empty", ["", None])
@pytest.mark.parametrize("headers", [None, {"model": "small"}])
async def test_an_empty_id_in_a_body_is_none_as_in_a_typed_message(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, empty: str | None, headers: dict[str, str] | None
) -> None:
    first, second = [
        await publish(bus, f"{TASKS}.{tenant}", encode({"task_id": empty}), headers=headers) for _ in range(2)
    ]
    assert (first.duplicate, second.duplicate) == (False, False)
    got: asyncio.Queue[str] = asyncio.Queue()
    await bus.subscribe(f"{TASKS}.{tenant}", "q", lambda msg: got.put_nowait(msg.job.id))  # type: ignore[union-attr]
    assert {await asyncio.wait_for(got.get(), 20) for _ in range(2)} == {first.id, second.id}


@pytest.mark.parametrize("value", ["", "  ", None, True, 1.5, [1]])
async def test_what_is_no_id_in_a_plain_publishers_body_makes_each_its_own_job(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, value: Any
) -> None:
    got: asyncio.Queue[str] = asyncio.Queue()
    for _ in range(2):
        await client.connection.publish(f"{TASKS}.{tenant}", encode({"task_id": value}))
    await bus.subscribe(f"{TASKS}.{tenant}", "q", lambda msg: got.put_nowait(msg.job.id))  # type: ignore[union-attr]
    one, other = [await asyncio.wait_for(got.get(), 20) for _ in range(2)]
    assert one != other
    assert one.startswith("s")


async def test_an_id_whose_key_is_escaped_in_json_is_found(bus: aiqueue.NATSClient, tenant: str) -> None:
    assert (await publish(bus, f"{TASKS}.{tenant}", b'{"task\\u005fid": "t-1"}')).id == "t-1"


async def test_the_same_id_of_another_tenant_or_family_is_another_job(bus: aiqueue.NATSClient, tenant: str) -> None:
    subjects = [f"{TASKS}.{tenant}", f"{TASKS}.{tenant}-b", f"ai.rag.ingest.{tenant}"]
    published = [await publish(bus, each, b"{}", headers={"Aiq-Job-Id": "same"}) for each in subjects]
    assert [each.duplicate for each in published] == [False] * 3


@pytest.mark.parametrize(
    ("last", "headers", "lane"),
    [
        ("", None, "normal"),
        ("", {"priority": "high"}, "high"),
        ("", {"Priority": "low"}, "low"),
        (".low", None, "low"),
        (".low", {"priority": "high"}, "low"),
    ],
)
async def test_the_priority_decides_the_lane(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, last: str, headers: dict[str, str], lane: str
) -> None:
    published = await publish(bus, f"{TASKS}.{tenant}{last}", b"{}", headers=headers)
    assert (await stored(client, published)).subject == f"{TASKS}.{tenant}.{lane}"


async def test_a_body_and_its_headers_arrive_unchanged(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    body = bytes(range(256))
    published = await publish(bus, f"{TASKS}.{tenant}", body, headers={"model": "small", "X": ""})
    found = await stored(client, published)
    assert found.data == body
    assert {"model": "small", "X": ""}.items() <= found.headers.items()
    assert "Content-Type" not in found.headers


@pytest.mark.parametrize(
    ("body", "content_type", "kind"),
    [
        (b'{"text": "x"}', "application/json", "agent.task"),
        (cbor2.dumps({"text": "x"}), "application/cbor", "agent.task"),
        (encode(create_envelope("agent_task", {"text": "x"})), "application/json", ""),
        (cbor2.dumps(create_envelope("agent_task", {"text": "x"}, flat=True)), "application/cbor", ""),
        (b'{"message\\u005ftype": "other", "schema_version": "1.0"}', "application/json", ""),
        (b"[1]", "", ""),
        (b"\xff", "", ""),
        (b"", "", ""),
    ],
)
async def test_a_job_without_headers_states_what_workers_would_find_in_its_body(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, body: bytes, content_type: str, kind: str
) -> None:
    for last, priority in (("", "normal"), ("", "normal"), (".high", "high")):
        published = await publish(bus, f"{TASKS}.{tenant}{last}", body)
        found = await stored(client, published)
        stated = {"Nats-Msg-Id": f"{tenant}/agent.tasks/{published.id}", "Aiq-Job-Id": published.id}
        stated |= {"Content-Type": content_type} if content_type else {}
        stated |= {"Aiq-Kind": kind} if kind else {}
        assert found.headers == stated | {"priority": priority}
        assert (found.subject, found.data) == (f"{TASKS}.{tenant}.{priority}", body)


async def test_a_mail_is_stored_in_the_inbox_of_its_target(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    headers = {"target_agent_id": "reader", "source_agent_id": "writer", "Aiq-Job-Id": "m-1"}
    first, second = [await publish(bus, f"ai.agent.message.{tenant}", b"{}", headers=headers) for _ in range(2)]
    assert (first.id, first.duplicate, second.duplicate) == ("m-1", False, True)
    unread = [each async for each in client.inboxes.read("reader", tenant=tenant)]
    assert [(each.envelope.mail_id, each.envelope.sender, each.body) for each in unread] == [("m-1", "writer", b"{}")]


async def test_a_mail_to_an_agents_own_subject_needs_no_target(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    published = await publish(bus, f"ai.agent.message.{tenant}.reader", b"{}", headers={"Nats-Msg-Id": "m-1"})
    assert published.id == "m-1"
    assert [each.seq async for each in client.inboxes.read("reader", tenant=tenant)] == [published.seq]


async def test_a_mail_without_a_target_is_for_all_agents_of_the_roster(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    got: list[str] = []
    for name in ("one", "two"):
        await client.inboxes.create(name, tenant=tenant)
    await publish(bus, f"ai.agent.message.{tenant}", b'{"text": "all"}', headers={"source_agent_id": "three"})
    for name in ("one", "two"):

        async def hear(msg: Msg) -> None:
            assert msg.mail is not None
            got.append(msg.mail.to)

        await bus.subscribe(f"ai.agent.message.{tenant}", queue=f"agent.{name}", callback=hear)
    await eventually(lambda: sorted(got) == ["one", "two"])


async def test_a_plain_publishers_mail_with_an_empty_target_is_returned_and_not_broadcast(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    got: list[str] = []
    bounced: asyncio.Queue[Any] = asyncio.Queue()
    writer = aiqueue.Agent("writer", tenant=tenant)
    writer.handle(Bounce)(lambda mail: bounced.put_nowait(mail.message))
    await client.inboxes.create("other", tenant=tenant)
    await bus.subscribe(f"ai.agent.message.{tenant}", "agent.other", lambda msg: got.append(msg.subject))
    async with writer.running(client):
        headers = {"target_agent_id": "", "source_agent_id": "writer", "Nats-Msg-Id": f"{tenant}/m-1"}
        await client.connection.store(f"ai.agent.message.{tenant}", b"{}", headers)
        bounce = await asyncio.wait_for(bounced.get(), 20)
    assert bounce.reason == "no_such_agent"
    assert not got


async def test_a_full_lane_is_an_error_with_limit_and_retry_hint(account: Account, streams: Path) -> None:
    settings: Any = {"user": account.user, "password": account.password, "streams": streams}
    async with aiqueue.NATSClient(account.url, **settings) as bus:
        await provision.apply(bus.client.connection, bus.client.topology)
        for _ in range(3):
            await publish(bus, "ai.small.jobs.acme")
        with pytest.raises(LaneFull, match=r"small\.jobs acme/normal is full.*limit 3.*try again in 1 s") as raised:
            await publish(bus, "ai.small.jobs.acme")
        assert (raised.value.limit, raised.value.retry_after_s, raised.value.retryable) == (3, 1.0, True)
        await publish(bus, "ai.small.jobs.other")

        waiting = asyncio.create_task(publish(bus, "ai.small.jobs.acme", on_full="wait"))
        await bus.subscribe("ai.small.jobs.acme", queue="workers", callback=lambda msg: None)
        assert (await asyncio.wait_for(waiting, 20)).stream == "SMALL"


async def test_a_full_lane_is_waited_for_until_the_timeout(account: Account, streams: Path) -> None:
    settings: Any = {"user": account.user, "password": account.password, "streams": streams}
    async with aiqueue.NATSClient(account.url, **settings) as bus:
        await provision.apply(bus.client.connection, bus.client.topology)
        for _ in range(3):
            await publish(bus, "ai.small.jobs.acme")
        with pytest.raises(LaneFull):
            await publish(bus, "ai.small.jobs.acme", on_full="wait", timeout=0.3)


async def test_a_full_inbox_is_an_error_with_its_limit(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    async with aiqueue.NATSClient(account.url, user=account.user, password=account.password) as bus:
        connection, topology = bus.client.connection, bus.client.topology
        await provision.apply(connection, topology)
        stream = topology.inbox_family.stream
        config = (await connection.api(f"STREAM.INFO.{stream}"))["config"] | {"max_msgs_per_subject": 1}
        await connection.api(f"STREAM.UPDATE.{stream}", config)
        headers = {"target_agent_id": "reader"}
        await publish(bus, "ai.agent.message.acme", headers=headers)
        with pytest.raises(InboxFull, match="the inbox of reader is full"):
            await publish(bus, "ai.agent.message.acme", headers=headers)
        with pytest.raises(InboxFull):
            await publish(bus, "ai.agent.message.acme", headers=headers, on_full="wait", timeout="200ms")


@pytest.mark.parametrize("headers", [{"task_id": "k-1 "}, {"task_id": " k-1", "priority": "high "}])
async def test_an_id_is_read_as_it_arrives_without_spaces_around_it(
    bus: aiqueue.NATSClient, tenant: str, headers: dict[str, str]
) -> None:
    got: list[str] = []

    async def hear(msg: Msg) -> None:
        got.append(msg.headers["task_id"])

    await bus.subscribe(f"{TASKS}.{tenant}", queue="agent.workers", callback=hear)
    published = await publish(bus, f"{TASKS}.{tenant}", headers=headers)
    await eventually(lambda: got == ["k-1"])
    assert published.id == "k-1"


async def test_a_publish_during_an_outage_is_stored_once_the_server_is_back(
    shared: Account, client: aiqueue.Client, tenant: str
) -> None:
    async with (
        Relay(shared.address) as relay,
        aiqueue.NATSClient(relay.url, user=shared.user, password=shared.password) as bus,
    ):
        await relay.cut()
        await eventually(lambda: not bus.connected)
        late = asyncio.create_task(publish(bus, f"{TASKS}.{tenant}", headers={"task_id": "late"}))
        await relay.mend()
        published = await asyncio.wait_for(late, 20)
        assert (await stored(client, published)).headers["task_id"] == "late"


@pytest.mark.parametrize("subject", ["ai.agent.tasks.acme", "ai.agent.message.acme.reader", "orders"])
async def test_a_publish_during_an_outage_is_unavailable_at_its_timeout(shared: Account, subject: str) -> None:
    async with (
        Relay(shared.address) as relay,
        aiqueue.NATSClient(relay.url, user=shared.user, password=shared.password) as bus,
    ):
        await relay.cut()
        await eventually(lambda: not bus.connected)
        started_at = time.monotonic()
        with pytest.raises(Unavailable, match="no connection to"):
            await bus.publish(subject, b"", timeout=0.4)
        assert time.monotonic() - started_at < 5


async def test_a_request_during_an_outage_says_that_nothing_was_sent(shared: Account) -> None:
    async with (
        Relay(shared.address) as relay,
        aiqueue.NATSClient(relay.url, user=shared.user, password=shared.password) as bus,
    ):
        await relay.cut()
        await eventually(lambda: not bus.connected)
        started_at = time.monotonic()
        with pytest.raises(Unavailable, match=r"the request for job r1 was not sent within 0\.4 s"):
            await bus.request("ai.gateway.responses.acme", b'{"request_id":"r1","prompt":"x"}', timeout=0.4)
        assert time.monotonic() - started_at < 10


async def test_a_server_without_streams_says_to_apply_them(account: Account) -> None:
    async with aiqueue.NATSClient(account.url, user=account.user, password=account.password) as bus:
        with pytest.raises(NotFound, match="run `aiqueue apply`"):
            await bus.publish("ai.agent.tasks.acme", b"{}", timeout=20)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"payload": {"a": 1}}, r"payload must be bytes or text, not dict: encode it first"),
        ({"payload": None}, "payload must be bytes or text, not NoneType"),
        ({"headers": ["a"]}, "headers must be a mapping"),
        ({"headers": {7: "a"}}, "the names of headers must be texts, not 7"),
        ({"headers": {"task_id": 7}}, "the value of header 'task_id' must be a text, not 7: write str"),
        ({"headers": {"trace": None}}, "the value of header 'trace' must be a text, not None"),
        ({"headers": {"priority": "urgent"}}, "has no priority 'urgent': use one of high, normal, low"),
        ({"timeout": "soon"}, "timeout"),
        ({"on_full": "drop"}, 'on_full must be "raise" or "wait"'),
        ({"reply": "answers"}, "has no reply subject"),
        ({"headers": {"task_id": ""}}, "the header task_id is empty: set an id"),
        ({"headers": {"TASK_ID": "  "}}, "the header task_id is empty: set an id"),
        ({"headers": {"Aiq-Job-Id": ""}}, "the header Aiq-Job-Id is empty"),
        ({"headers": {"Nats-Msg-Id": ""}}, "the header Nats-Msg-Id is empty"),
        ({"headers": {"Nats-Msg-Id": "acme/agent.tasks/"}}, "the header Nats-Msg-Id names no id"),
        *(({"payload": encode({"task_id": each})}, "task_id in the payload must be a text") for each in ODD_IDS),
        ({"payload": encode({"task_id": "  "}), "headers": {"model": "m"}}, "task_id in the payload must be a text"),
        *(
            ({"subject": "ai.agent.message.acme", "headers": headers}, says)
            for headers, says in (
                ({"target_agent_id": ""}, "the header target_agent_id is empty: name an agent, or leave it out"),
                ({"Target_Agent_Id": " "}, "the header target_agent_id is empty"),
                ({"target_agent_id": "*"}, "target|agent"),
                ({"source_agent_id": ""}, "source_agent_id"),
                ({"Nats-Msg-Id": ""}, "the header Nats-Msg-Id is empty"),
                ({"Aiq-Job-Id": ""}, "the header Aiq-Job-Id is empty"),
            )
        ),
        *(({"subject": "plain", "reply": each}, "^reply must") for each in NO_SUBJECTS),
        *(({"subject": "plain", "reply": each}, "^reply must") for each in ("a.*", ">", 7)),
        ({"subject": "plain", "headers": {"a\r\nb": "c"}}, "invalid header name"),
        ({"subject": "plain", "headers": {"a": "b\r\nc: d"}}, "invalid value of header 'a'"),
        ({"subject": "plain", "headers": {"": "b"}}, "invalid header name"),
    ],
)
async def test_a_wrong_argument_says_what_to_pass(bus: aiqueue.NATSClient, options: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        await bus.publish(**{"subject": "ai.agent.tasks.acme", "payload": b""} | options)


# -- payloads above a message's size


async def holds(client: aiqueue.Client, tenant: str) -> int:
    return len([hold async for hold, _, _ in client.documents.list_holds() if hold.tenant == tenant])


@pytest.mark.parametrize("given", [None, {"task_id": "large-1"}, {"priority": "high", "content-type": "text/plain"}])
async def test_a_payload_above_the_servers_limit_travels_as_a_document(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, given: dict[str, str] | None
) -> None:
    payload = encode(create_envelope("agent_task", {"text": "x" * 3_000_000}))
    published = await publish(bus, f"{TASKS}.{tenant}", payload, headers=given)
    found = await stored(client, published)
    assert found.data == b""
    assert found.headers["Aiq-Document-Size"] == str(len(payload))
    assert published.id in (found.headers.get("Aiq-Job-Id"), found.headers.get("task_id"))
    assert await holds(client, tenant) == 1
    got: asyncio.Queue[Msg] = asyncio.Queue()
    subscription = await bus.subscribe(f"{TASKS}.{tenant}", queue="workers", callback=got.put_nowait)
    async with asyncio.timeout(30):
        msg = await got.get()
        assert (msg.data, msg.subject.removesuffix(".high")) == (payload, f"{TASKS}.{tenant}")
        while await holds(client, tenant) or [each async for each in client.documents.find(tenant)]:
            await asyncio.sleep(0.02)  # they go with the job
    await subscription.unsubscribe()


async def test_a_typed_worker_gets_a_large_payload(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    worker = aiqueue.Worker(tenants=[tenant])

    @worker.handle(Task)
    async def handle(job: aiqueue.Job[Task]) -> int:
        return len(job.message.text)

    async with worker.running(client):
        for payload in (encode({"text": "x" * 300_000}), cbor2.dumps({"text": "x" * 300_000})):
            published = await publish(bus, f"{TASKS}.{tenant}", payload)
            handle = await client.job(published.id, tenant=tenant)
            assert await handle.result(timeout=30) == 300_000


async def test_a_large_payload_published_twice_is_held_once(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    payload = encode({"task_id": "large-2", "text": "x" * 300_000})
    first, second = [await publish(bus, f"{TASKS}.{tenant}", payload) for _ in range(2)]
    assert (first.duplicate, second.duplicate) == (False, True)
    assert second[:3] == first[:3]
    assert await holds(client, tenant) == 1
    assert len([each async for each in client.documents.find(tenant)]) == 1


async def test_a_large_payload_that_is_refused_leaves_nothing(account: Account, streams: Path) -> None:
    settings: Any = {"user": account.user, "password": account.password, "streams": streams}
    async with aiqueue.NATSClient(account.url, **settings) as bus:
        await provision.apply(bus.client.connection, bus.client.topology)
        for _ in range(3):
            await publish(bus, "ai.small.jobs.acme")
        for given in (None, {"Aiq-Job-Id": "7"}):
            with pytest.raises(LaneFull):
                await bus.publish("ai.small.jobs.acme", bytes(300_000), headers=given)
        assert await holds(bus.client, "acme") == 0
        assert not [each async for each in bus.client.documents.find("acme")]


async def test_a_publisher_may_have_stored_the_body_itself(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    given = {"aiq-document": "0" * 64, "aiq-document-ref": "mine"}
    for payload in (b"", bytes(300_000)):
        found = await stored(client, await publish(bus, f"{TASKS}.{tenant}", payload, headers=given))
        assert (found.headers["Aiq-Document"], found.headers["Aiq-Document-Ref"]) == ("0" * 64, "mine")
        assert found.data == payload
    assert await holds(client, tenant) == 0


@pytest.mark.parametrize("given", [None, {"task_id": "7"}])
async def test_a_payload_that_no_worker_could_hold_is_too_large(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, given: dict[str, str] | None
) -> None:
    with pytest.raises(TooLarge, match=r"documents\.put"):
        await bus.publish(f"{TASKS}.{tenant}", bytes(64 * 2**20 + 1), headers=given)
    assert await holds(client, tenant) == 0


async def test_a_mail_above_the_servers_limit_is_too_large(bus: aiqueue.NATSClient, tenant: str) -> None:
    for given in (None, {"target_agent_id": "a"}):
        with pytest.raises(TooLarge, match="exceed the limit"):
            await bus.publish(f"ai.agent.message.{tenant}", bytes(2**20), headers=given)


async def test_a_target_that_is_no_token_is_refused(bus: aiqueue.NATSClient) -> None:
    with pytest.raises(BadInput, match="agent 'a b' must be"):
        await bus.publish("ai.agent.message.acme", b"", headers={"target_agent_id": "a b"})


async def test_a_client_that_is_not_connected_says_to_connect(shared: Account) -> None:
    bus = aiqueue.NATSClient(shared.url, user=shared.user, password=shared.password)
    with pytest.raises(BadInput, match=r"call `await nats_client.connect\(\)` first"):
        await bus.publish("orders", b"")
    await bus.disconnect()
    await bus.connect()
    assert bus.connected
    assert await bus.connect() is bus
    await bus.publish("orders", b"")
    await bus.disconnect()
    await bus.disconnect()
    assert not bus.connected
    with pytest.raises(BadInput, match="not connected"):
        await bus.request("orders", b"")


async def test_a_server_that_does_not_answer_is_unavailable_within_the_connect_timeout() -> None:
    started_at = time.monotonic()
    with pytest.raises(Unavailable, match="is it running, is argument url right"):
        await aiqueue.NATSClient("nats://127.0.0.1:1", connect_timeout=0.5).connect()
    assert time.monotonic() - started_at < 5
    with pytest.raises(SettingsError):
        aiqueue.NATSClient("http://127.0.0.1")


async def test_a_given_client_stays_open(bus: aiqueue.NATSClient, client: aiqueue.Client) -> None:
    async with aiqueue.NATSClient(client=client) as other:
        await other.publish("orders", b"")
    assert client.connection.connected
    with pytest.raises(BadInput, match="either client= or the address"):
        aiqueue.NATSClient("nats://localhost", client=client)
    with pytest.raises(BadInput, match="pass an open client"):
        aiqueue.NATSClient(client=json)  # type: ignore[arg-type]
