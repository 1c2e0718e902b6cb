"""Dead letters that are hard to write or to read: full-size bodies, hostile headers."""

from __future__ import annotations

import asyncio
from typing import Any

import nats
import pytest

import aiqueue
from aiqueue.enqueue.deadletter import DeadLetter

from ..support import Eventually

pytestmark = pytest.mark.families("agent.tasks")
MAX = 1_048_576


class Echo(aiqueue.Message, kind="echo"):
    text: str = ""


async def letters(client: aiqueue.Client, count: int) -> list[DeadLetter]:
    async with asyncio.timeout(25):
        while len(found := [each async for each in client.dead.find()]) < count:
            await asyncio.sleep(0.02)
    return found


def rejecting() -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        raise aiqueue.Reject("no")

    return worker


async def publish(account: Any, body: bytes, headers: dict[str, str] | None = None) -> None:
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    await plain.jetstream().publish("ai.agent.tasks.acme", body, headers=headers)
    await plain.close()


async def test_a_body_of_the_largest_size_is_kept_whole_and_its_replay_says_why_it_cannot_go(
    client: aiqueue.Client, account: Any
) -> None:
    body = b"\xff" * MAX
    await publish(account, body)
    async with rejecting().running(client):
        (letter,) = await letters(client, 1)
    assert letter.body == body
    assert letter.reason == "undecodable"
    with pytest.raises(aiqueue.errors.TooLarge, match="max_payload"):
        await client.dead.replay(letter)
    assert (await client.dead.get(letter.seq)).body == body
    await client.dead.purge(letter)
    info = await client.connection.api("STREAM.INFO.AI_DEAD")
    assert info["state"]["messages"] == 0


async def test_a_job_that_the_library_stored_at_the_limit_is_buried_and_replayed(
    client: aiqueue.Client, account: Any
) -> None:
    where = {"user": account.user, "password": account.password, "claim_check": 0}
    async with aiqueue.connect(account.url, **where) as producer:
        await _at_the_limit(producer, client)


async def _at_the_limit(producer: aiqueue.Client, client: aiqueue.Client) -> None:
    size = MAX - 400
    async with rejecting().running(client):
        while True:
            try:
                await producer.enqueue(Echo(text="x" * size), tenant="acme", unique="big")
                break
            except aiqueue.errors.TooLarge:
                size -= 16
        (letter,) = await letters(client, 1)
        assert len(letter.body) > size
        await client.dead.replay(letter)
        async with asyncio.timeout(25):
            while (again := await letters(client, 1))[0].seq == letter.seq:
                await asyncio.sleep(0.02)
        assert again[0].body == letter.body


@pytest.mark.parametrize(
    "job_headers",
    [
        {"Aiq-Replay": "é"},
        {"Aiq-Replay": "²"},
        {"Aiq-Kind": "échø"},
        {"Aiq-Deadline": "²", "Aiq-Kind": "none"},
        {"Aiq-Deadline": "9" * 5_000, "Aiq-Kind": "none"},
        {"X-Any": "ünïcode", "Aiq-Kind": "none"},
        {"Aiq-Job-Id": "no token at all. ", "Aiq-Kind": "none"},
        {"Aiq-History": "[[1]]"},
        {"Content-Type": "application/é"},
        {f"X-{n}": "v" * 900 for n in range(60)},
    ],
)
async def test_no_header_keeps_a_job_from_its_dead_letter(
    client: aiqueue.Client, account: Any, job_headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.unknown_kinds.PATIENCE_S", 0.0)
    await publish(account, b'{"text": "x"}', job_headers)
    async with rejecting().running(client):
        (letter,) = await letters(client, 1)
    assert letter.body == b'{"text": "x"}'


async def test_a_status_header_on_an_empty_job_hides_no_dead_letter(client: aiqueue.Client, account: Any) -> None:
    async with rejecting().running(client):
        await publish(account, b"", {"Status": "503"})
        await publish(account, b"", {"Status": "404"})
        await client.enqueue(Echo(), tenant="acme")
        found = await letters(client, 3)
    assert sorted(each.reason for each in found) == ["rejected", "undecodable", "undecodable"]  # they run at once


async def test_a_tenant_that_is_no_token_is_reported_and_the_others_are_served(
    client: aiqueue.Client, account: Any, caplog: pytest.LogCaptureFixture
) -> None:
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    await plain.jetstream().publish("ai.agent.tasks.a$b", b"{}")
    await plain.close()
    async with rejecting().running(client):
        await client.enqueue(Echo(), tenant="acme")
        await letters(client, 1)
        async with asyncio.timeout(25):
            while "a$b" not in caplog.text:
                await asyncio.sleep(0.02)


async def test_tenants_cannot_be_chosen_where_all_share_the_lanes(client: aiqueue.Client) -> None:
    import dataclasses  # noqa: PLC0415

    family = dataclasses.replace(client.topology.families["agent.tasks"], lanes="shared")
    client.topology = dataclasses.replace(client.topology, families={**client.topology.families, "agent.tasks": family})
    worker = aiqueue.Worker(tenants=["acme"])
    worker.handle(Echo)(lambda job: None)
    with pytest.raises(aiqueue.errors.BadInput, match="serves all tenants"):
        async with worker.running(client):
            pass


async def test_while_the_dead_letters_are_full_a_job_that_failed_is_kept_and_not_run_again(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, eventually: Eventually
) -> None:
    monkeypatch.setattr("aiqueue.worker.settlement.DEAD_FULL_S", 0.3)
    live = (await client.connection.api("STREAM.INFO.AI_DEAD"))["config"]
    assert live["discard"] == "new"
    await client.connection.api("STREAM.UPDATE.AI_DEAD", live | {"max_msgs": 1})
    worker, ran = aiqueue.Worker(), []

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        ran.append(job.id)
        raise aiqueue.Reject(f"no {job.id}")

    async with worker.running(client):
        first = await client.enqueue(Echo(), tenant="acme", unique="first")
        with pytest.raises(aiqueue.JobFailed):
            await first.result(timeout=25)
        second = await client.enqueue(Echo(), tenant="acme", unique="second")
        await eventually(lambda: caplog.text.count("job second failed and its dead letter cannot be stored") >= 2)
        (letter,) = await letters(client, 1)
        await client.dead.purge(letter)
        with pytest.raises(aiqueue.JobFailed, match="no second"):
            await second.result(timeout=25)
    (letter,) = await letters(client, 1)
    assert (letter.job_id, letter.error, len(letter.history)) == ("second", "no second", 1)
    assert ran == ["first", "second"]
