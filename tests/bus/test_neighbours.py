"""Subscriptions beside what else there is: parked jobs, typed workers, records of other workers, TLS."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import headers
from aiqueue.bus import Msg, create_envelope, decode, encode
from aiqueue.topology import provision

from ..support import NatsProcess, eventually, tls_config


class Task(aiqueue.Message, kind="agent.task"):
    text: str


class Other(aiqueue.Message, kind="other"):
    text: str


async def jobs_left(client: aiqueue.Client, tenant: str) -> int:
    """How many jobs of a tenant are in their lanes, or parked."""
    found = 0
    for stream, subject in (("AI_AGENT_TASKS", f"ai.*.*.{tenant}.*"), ("AI_PARKED", f"ai.parked.*.*.*.{tenant}.>")):
        async for _ in client.connection.read(stream, subject):
            found += 1
    return found


# -- parked jobs


@pytest.mark.parametrize("how", ["delayed", "parked by a plain client"])
async def test_a_job_that_waits_for_its_time_reaches_the_callback_once(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, how: str
) -> None:
    runs: list[tuple[str, int]] = []

    async def handle(msg: Msg) -> str:
        assert msg.job is not None
        runs.append((decode(msg)["text"], msg.job.attempt))
        return "done"

    await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="q", callback=handle)
    if how == "delayed":
        job = await client.enqueue(Task(text="later"), tenant=tenant, delay="200ms")
    else:
        parked = f"agent.tasks.{tenant}.normal.t-1.mine"
        due = client.connection.clock.now() + 0.5
        stamp = f"@at {to_rfc3339(due)}"
        fields = {
            "Nats-Schedule": stamp, "Nats-Schedule-Target": f"ai.parked.due.{parked}", headers.JOB_ID: "t-1",
            "Nats-Msg-Id": f"{tenant}/agent.tasks/t-1/park-1", "Aiq-Parked": "1", "Aiq-Due": str(int(due * 1000)),
        }  # fmt: skip
        await client.connection.store(f"ai.parked.at.{parked}", encode({"text": "later"}), fields)
        job = await client.job("t-1", family="agent.tasks", tenant=tenant)
    assert await job.result(20) == "done"
    await eventually(lambda: none_left(client, tenant))
    assert runs == [("later", 1)]


def to_rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def none_left(client: aiqueue.Client, tenant: str) -> bool:
    return await jobs_left(client, tenant) == 0


async def test_a_retry_beyond_a_minute_waits_parked_and_reaches_the_callback_once(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str
) -> None:
    attempts: list[int] = []

    async def handle(msg: Msg) -> str:
        assert msg.job is not None
        attempts.append(msg.job.attempt)
        if msg.job.attempt == 1:
            raise ValueError("not yet")
        return "done"

    slow = aiqueue.Backoff(attempts=3, first="2m", jitter=0)
    subscription = await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="q", callback=handle, retry=slow)
    published = await bus.publish(f"ai.agent.tasks.{tenant}", b'{"text": "x"}')
    assert published is not None
    job = await client.job(published.id, family="agent.tasks", tenant=tenant)

    async def is_parked() -> bool:
        return (await job.status()).state == "retrying"

    await eventually(is_parked)
    await subscription.unsubscribe()  # whoever subscribes next gets it
    await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="q", callback=handle, retry=slow)
    await job.run_now()
    assert await job.result(20) == "done"
    await eventually(lambda: none_left(client, tenant))
    assert attempts == [1, 2]


# -- other workers


async def test_a_typed_worker_and_a_callback_share_its_kind_and_the_callback_gets_every_other(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.unknown_kinds.HOP_MAX_S", 0.25)  # else a few jobs wait for half a minute
    worker = aiqueue.Worker(tenants=[tenant])
    runs: Counter[str] = Counter()

    @worker.handle(Task)
    async def typed(job: aiqueue.Job[Task]) -> str:
        runs[job.id] += 1
        return "typed"

    async def every(msg: Msg) -> str:
        assert msg.job is not None
        runs[msg.job.id] += 1
        return f"callback: {msg.job.kind}"

    async with worker.running(client):
        await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="q", callback=every)
        jobs: list[tuple[str, Any]] = []
        for at in range(60):
            message = Task(text="x") if at % 2 else Other(text="x")
            jobs.append((message.aiq_kind, await client.enqueue(message, tenant=tenant)))
        results = [(kind, await job.result(30)) for kind, job in jobs]
    assert {result for kind, result in results if kind == "other"} == {"callback: other"}
    assert {result for kind, result in results if kind == "agent.task"} <= {"typed", "callback: agent.task"}
    assert set(runs.values()) == {1}
    assert len(runs) == 60


@pytest.mark.parametrize("kinds", [{"agent.tasks": ["other"]}, {}, None, ["agent.tasks"]])
async def test_a_record_of_another_version_keeps_no_job_from_the_callback(
    bus: aiqueue.NATSClient, client: aiqueue.Client, tenant: str, kinds: Any
) -> None:
    """A record without ``*``, or of another form, names a worker that is not there: the callback takes all kinds."""
    record = json.dumps({"worker": f"old-{tenant}", "state": "ok", "kinds": kinds}).encode()
    fields = {"Nats-Msg-Id": f"old-{tenant}", "Nats-TTL": "20s"}
    await client.connection.store(f"$KV.AI_PRESENCE.worker.old-{tenant}", record, fields)
    await bus.subscribe(f"ai.agent.tasks.{tenant}", queue="q", callback=lambda msg: msg.job and msg.job.kind)
    for kind in ("other", "agent_task"):
        published = await bus.publish(f"ai.agent.tasks.{tenant}", encode(create_envelope(kind, {"text": "x"})))
        assert published is not None
        job = await client.job(published.id, family="agent.tasks", tenant=tenant)
        assert await job.result(20) == kind.replace("_", ".")


# -- TLS


async def test_over_tls_with_a_private_ca_jobs_and_plain_messages_arrive_and_without_the_ca_the_error_says_why(
    own_server: Callable[..., NatsProcess], certificates: Path
) -> None:
    server = own_server(tls_config(certificates))
    url = server.url.replace("nats://", "tls://")
    options: Any = {"user": server.user, "password": server.password}
    async with aiqueue.NATSClient(url, tls_ca=certificates / "ca.pem", **options) as bus:
        await provision.apply(bus.client.connection, bus.client.topology)
        heard: asyncio.Queue[Msg] = asyncio.Queue()
        await bus.subscribe("plain.a", callback=heard.put)
        await bus.subscribe("ai.agent.tasks.acme", queue="q", callback=lambda msg: decode(msg)["text"])
        await bus.publish("plain.a", b"secret")
        published = await bus.publish("ai.agent.tasks.acme", b'{"text": "hello"}')
        assert published is not None
        job = await bus.client.job(published.id, family="agent.tasks", tenant="acme")
        assert await job.result(20) == "hello"
        assert (await asyncio.wait_for(heard.get(), 20)).data == b"secret"
    with pytest.raises(aiqueue.AIQueueError, match=r"certificate verify failed.*: set tls_ca to the certificate"):
        await aiqueue.NATSClient(url, **options).connect()
