"""What is full, and that work goes on: each limit its own error, no acknowledged job lost."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import AccountFull, DiskFull, LaneFull, QueueFull, StreamFull
from aiqueue.topology import provision
from aiqueue.worker import overflow

from ..support import Eventually, NatsProcess

BODY = 10_000
KIB = 1024


class Parcel(aiqueue.Message, kind="parcel"):
    n: int = 0
    blob: bytes = b""


DISK = f'jetstream {{ store_dir: ".", max_file_store: {1024 * KIB} }}'
ACCOUNT = f"""
no_auth_user: u
authorization {{}}
accounts {{ A: {{ jetstream: {{ max_disk: {1024 * KIB} }}, users: [{{ user: u, password: p }}] }} }}
"""
FULL = {
    "lane": ("", {"max_msgs_per_subject": 30}, LaneFull),
    "stream bytes": ("", {"max_bytes": 300 * KIB}, StreamFull),
    "stream messages": ("", {"max_msgs": 30}, StreamFull),
    "account": (ACCOUNT, {}, AccountFull),
    "disk": (DISK, {}, DiskFull),
}


@asynccontextmanager
async def opened(server: NatsProcess, limits: dict[str, int]) -> AsyncIterator[aiqueue.Client]:
    """A client of a server whose streams set nothing aside: only then can the jobs use all storage up."""
    user, password = ("u", "p") if "no_auth_user" in server.extra else (server.user, server.password)
    async with aiqueue.connect(server.url, user=user, password=password) as client:
        for spec in client.topology.streams.values():
            own = limits if spec.name == "AI_AGENT_TASKS" else {}
            await client.connection.api(f"STREAM.CREATE.{spec.name}", {**spec.config, "max_bytes": -1, **own})
        yield client


def parcels(count: int, start: int = 0) -> list[Parcel]:
    return [Parcel(n=n, blob=os.urandom(BODY)) for n in range(start, start + count)]


@pytest.mark.parametrize("what", FULL)
async def test_what_is_full_is_told_nothing_acknowledged_is_lost_and_work_goes_on(
    what: str, own_server: Callable[..., NatsProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "NO_ROOM_S", 0.3)
    config, limits, error = FULL[what]
    async with opened(own_server(config), limits) as client:
        handles, refused = [], []
        async for outcome in client.enqueue_many(parcels(150), tenant="acme"):
            (refused if isinstance(outcome, aiqueue.AIQueueError) else handles).append(outcome)
        assert {type(each) for each in refused} == {error}
        assert handles
        with pytest.raises(error) as caught:
            await client.enqueue(parcels(1, 200)[0], tenant="acme")
        assert caught.value.retry_after_s > 0
        assert isinstance(caught.value, QueueFull)

        waiting = asyncio.create_task(client.enqueue(parcels(1, 200)[0], tenant="acme", on_full="wait", timeout=30))
        many = asyncio.create_task(everything(client))
        worker, ran = aiqueue.Worker(concurrency=8), set()

        @worker.handle(Parcel)
        async def handle(job: aiqueue.Job[Parcel]) -> bytes:
            ran.add(job.message.n)
            return b"x" * (BODY // 2)

        async with worker.running(client):
            handles += [await waiting, *await many]
            assert {len(await handle.result(30)) for handle in handles} == {BODY // 2}
        assert len(ran) == len(handles)
        info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
        assert info["state"]["messages"] == 0


async def test_results_larger_than_their_jobs_hold_no_slot_while_they_wait_for_room(
    own_server: Callable[..., NatsProcess], monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(overflow, "NO_ROOM_S", 0.2)
    async with opened(own_server(DISK), {}) as client:
        outcomes = [each async for each in client.enqueue_many(parcels(150), tenant="acme")]
        handles = [each for each in outcomes if not isinstance(each, aiqueue.AIQueueError)]
        worker = aiqueue.Worker(concurrency=4)

        @worker.handle(Parcel)
        async def handle(job: aiqueue.Job[Parcel]) -> bytes | None:
            return b"x" * (BODY * 3) if job.message.n < 20 else None

        at_once = asyncio.gather(*(handle.result(20) for handle in handles))
        async with worker.running(client):
            assert [len(each or b"") for each in await at_once][:20] == [BODY * 3] * 20

            async def written() -> bool:
                info = await client.connection.api("STREAM.INFO.AI_RESULTS")
                return bool(info["state"]["messages"] == len(handles))

            await eventually(written, within=30)
            assert len(await handles[0].result(25)) == BODY * 3


async def everything(client: aiqueue.Client) -> list[Any]:
    found = client.enqueue_many(parcels(20, 201), tenant="acme", on_full="wait", timeout=30)
    return [outcome async for outcome in found]


async def test_the_limit_that_is_told_is_the_server_s(own_server: Callable[..., NatsProcess]) -> None:
    async with opened(own_server(), {"max_bytes": 300 * KIB}) as client:
        outcomes = [each async for each in client.enqueue_many(parcels(40), tenant="acme")]
        with pytest.raises(StreamFull, match=f"limit {300 * KIB:,}"):
            await client.enqueue(parcels(1, 300)[0], tenant="acme")
    full = outcomes[-1]
    assert isinstance(full, StreamFull)
    assert full.limit == 300 * KIB != client.topology.streams["AI_AGENT_TASKS"].config["max_bytes"]
    assert "the stream of agent.tasks acme/normal is full: maximum bytes exceeded" in str(full)


async def test_a_limit_that_apply_raises_lets_a_waiting_enqueue_through(own_server: Callable[..., NatsProcess]) -> None:
    async with opened(own_server(), {"max_msgs_per_subject": 3}) as client:
        for n in range(3):
            await client.enqueue(Parcel(n=n), tenant="acme")
        waiting = asyncio.create_task(client.enqueue(Parcel(n=3), tenant="acme", on_full="wait", timeout=30))
        with pytest.raises(LaneFull):
            await client.enqueue(Parcel(n=4), tenant="acme")
        assert not waiting.done()
        await provision.apply(client.connection, client.topology)
        assert not (await waiting).duplicate


async def test_a_redelivered_job_runs_although_its_journal_has_no_space_for_an_entry(
    own_server: Callable[..., NatsProcess],
) -> None:
    async with opened(own_server(DISK), {}) as client:
        lane = client.topology.family("agent.tasks").lane_config("acme", "normal") | {"ack_wait": 10**9}
        subject = f"CONSUMER.CREATE.AI_AGENT_TASKS.acme-normal.{lane['filter_subject']}"
        await client.connection.api(subject, {"stream_name": "AI_AGENT_TASKS", "config": lane})
        async for _ in client.enqueue_many(parcels(150), tenant="acme"):
            pass
        inbox, heard = client.connection.new_inbox(), asyncio.Queue[Any]()
        await client.connection.subscribe(inbox, heard.put_nowait)
        ask = json.dumps({"batch": 1_000, "no_wait": True}).encode()
        await client.connection.publish("$JS.API.CONSUMER.MSG.NEXT.AI_AGENT_TASKS.acme-normal", ask, reply=inbox)
        lost = 0
        while (await asyncio.wait_for(heard.get(), 25)).status is None:
            lost += 1  # leased to nobody: every job there is will be a redelivery
        worker, ran = aiqueue.Worker(concurrency=8), set()

        @worker.handle(Parcel)
        async def handle(job: aiqueue.Job[Parcel]) -> None:
            ran.add(job.message.n)

        async with worker.running(client), asyncio.timeout(30):
            while len(ran) < lost:
                await asyncio.sleep(0.02)
        assert lost > 50
