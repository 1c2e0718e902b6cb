from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import codec, headers, provision, subjects
from aiqueue.parking import CONSUMER, Forwarder, Parking
from aiqueue.subjects import Lane

from .support import NatsProcess, eventually

FAMILY = "agent.tasks"
STREAM = "AI_AGENT_TASKS"
words = st.from_regex(subjects.TOKEN, fullmatch=True)


class Task(aiqueue.Message, kind="task"):
    n: int = 0


@pytest.fixture
async def client(account: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        yield client


def told(job_id: str) -> dict[str, str]:
    return {headers.CONTENT_TYPE: codec.CBOR, headers.KIND: "task", headers.JOB_ID: job_id, "mine": "yes"}


async def park(client: aiqueue.Client, job_id: str, due: float, *, tenant: str = "acme", hop: str = "1") -> None:
    lane = Lane(FAMILY, tenant, "normal")
    await Parking(client.connection, client.topology).park(
        lane, job_id, due, told(job_id), codec.encode(Task()), hop=hop
    )


async def stored(client: aiqueue.Client, stream: str, subject: str = ">") -> int:
    info = await client.connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})
    return sum((info["state"].get("subjects") or {}).values())


def taking(seen: list[tuple[str, float, dict[str, str]]], **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(**options)

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append((f"{job.tenant}/{job.id}", time.time(), dict(job.headers)))

    return worker


@given(words, words, words, words, st.booleans())
def test_a_parked_jobs_subject_says_which_job_it_is(tenant: str, priority: str, job: str, hop: str, due: bool) -> None:
    lane = Lane(FAMILY, tenant, priority)
    subject = subjects.parked(lane, job, hop, due=due)
    assert subjects.parse_parked(subject) == subjects.Parked(lane, job, hop, due)
    assert subjects.parse_lane(subject) is None


@given(st.text(max_size=60))
def test_no_other_subject_is_taken_for_a_parked_job(subject: str) -> None:
    found = subjects.parse_parked(subject)
    assert found is None or subjects.parked(*found[:3], due=found.due) == subject


async def test_a_parked_job_comes_back_at_its_time_and_not_before(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    due = time.time() + 1
    async with taking(seen).running(client):
        await park(client, "j1", due)
        await park(client, "j2", time.time() - 5)
        await eventually(lambda: len(seen) == 2, within=10)
    (first, at_once, _), (second, came, carried) = seen
    assert (first, second) == ("acme/j2", "acme/j1")
    assert at_once < due <= came
    assert carried["mine"] == "yes"
    assert carried[headers.PARKED] == "1"
    assert not any("Schedule" in name for name in carried)
    assert await stored(client, "AI_PARKED") == 0
    assert await stored(client, STREAM) == 0


async def test_parking_twice_under_one_hop_stores_one_job(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    due = time.time() + 0.5
    for _ in range(3):
        await park(client, "j1", due)
    await park(client, "j1", due, hop="2")
    assert await stored(client, "AI_PARKED") == 2
    async with taking(seen).running(client):
        await eventually(lambda: len(seen) == 2, within=10)
        await eventually(lambda: stored_none(client), within=10)
    assert len(seen) == 2


async def stored_none(client: aiqueue.Client) -> bool:
    return await stored(client, "AI_PARKED") == 0 and await stored(client, STREAM) == 0


async def test_any_worker_forwards_the_jobs_of_all_families(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    class Query(aiqueue.Message, kind="rag.query", family="rag.queries"):
        pass

    @worker.handle(Query)
    async def query(job: aiqueue.Job[Query]) -> None: ...

    await park(client, "j1", time.time())
    async with worker.running(client):
        await eventually(lambda: stored(client, STREAM), within=10)


async def test_a_due_message_that_was_forwarded_already_is_stored_once(client: aiqueue.Client) -> None:
    """What a forwarder leaves that dies between the store and the ack."""
    lane = Lane(FAMILY, "acme", "normal")
    await park(client, "j1", time.time())
    await eventually(lambda: stored(client, "AI_PARKED", "ai.parked.due.>"), within=5)
    there = await client.connection.last("AI_PARKED", subjects.parked(lane, "j1", "1", due=True))
    assert there is not None
    kept = headers.carried(there.headers) | {headers.MSG_ID: subjects.msg_id(FAMILY, "acme", "j1", "due-1")}
    await client.connection.store(subjects.work(*lane), there.data, kept)
    forwarder = Forwarder(client.connection, client.topology)
    await forwarder.start()
    await eventually(lambda: stored_parked_none(client), within=10)
    await forwarder.stop()
    await forwarder.stop()
    assert await stored(client, STREAM) == 1


async def stored_parked_none(client: aiqueue.Client) -> bool:
    return await stored(client, "AI_PARKED") == 0


async def test_a_full_lane_keeps_its_own_due_jobs_waiting_and_no_other_tenants(account: Any) -> None:
    topology_limit = 5
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        info = await client.connection.api(f"STREAM.INFO.{STREAM}")
        config = info["config"] | {"max_msgs_per_subject": topology_limit}
        await client.connection.api(f"STREAM.UPDATE.{STREAM}", config)
        for n in range(topology_limit):
            await client.enqueue(Task(n=n), tenant="acme")
        now = time.time()
        await asyncio.gather(*(park(client, f"j{n}", now) for n in range(3_000)))  # more than may be pending
        await eventually(lambda: stored(client, "AI_PARKED", "ai.parked.due.>"), within=10)
        forwarder = Forwarder(client.connection, client.topology)
        await forwarder.start()
        try:
            begun = time.monotonic()
            await park(client, "other", time.time(), tenant="globex")
            await eventually(lambda: stored(client, STREAM, "ai.agent.tasks.globex.>"), within=10)
            assert time.monotonic() - begun < 5
            assert await stored(client, STREAM, "ai.agent.tasks.acme.>") == topology_limit
            assert await stored(client, "AI_PARKED") == 3_000
            await client.connection.api(f"STREAM.UPDATE.{STREAM}", info["config"])
            await eventually(lambda: stored_parked_none(client), within=30)
            assert await stored(client, STREAM, "ai.agent.tasks.acme.>") == topology_limit + 3_000
        finally:
            await forwarder.stop()


async def test_the_forwarder_goes_on_when_its_consumer_is_deleted(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    async with taking(seen).running(client):
        await park(client, "j1", time.time())
        await eventually(lambda: len(seen) == 1, within=10)
        await client.connection.api(f"CONSUMER.DELETE.AI_PARKED.{CONSUMER}")
        await park(client, "j2", time.time())
        await eventually(lambda: len(seen) == 2, within=15)


async def test_a_worker_waits_for_a_stream_of_parked_jobs_that_is_not_there_yet(account: Any) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        await client.connection.api("STREAM.DELETE.AI_PARKED")
        async with taking(seen).running(client):
            await client.enqueue(Task(), tenant="acme", unique="j0")
            await eventually(lambda: len(seen) == 1, within=10)
            await provision.apply(client.connection, client.topology)
            await park(client, "j1", time.time())
            await eventually(lambda: len(seen) == 2, within=15)


async def test_parked_jobs_survive_a_killed_server_and_come_when_it_is_back(own_server: Any) -> None:
    server: NatsProcess = own_server()
    seen: list[tuple[str, float, dict[str, str]]] = []
    url = server.account
    async with aiqueue.connect(url.url, user=url.user, password=url.password) as client:
        await provision.apply(client.connection, client.topology)
        due = time.time() + 1
        async with taking(seen).running(client):
            for n in range(20):
                await park(client, f"j{n}", due)
            server.kill()
            await asyncio.sleep(max(0.0, due - time.time()))  # they become due while nobody is there
            server.start()
            await eventually(lambda: len(seen) >= 20, within=30)
            await eventually(lambda: stored_none(client), within=30)
    assert sorted({name for name, _, _ in seen}) == sorted(f"acme/j{n}" for n in range(20))
    assert all(came >= due for _, came, _ in seen)
