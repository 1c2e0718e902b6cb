from __future__ import annotations

import asyncio
import logging
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.enqueue.forwarder import CONSUMER, Forwarder
from aiqueue.enqueue.parking import Parking
from aiqueue.errors import BadInput, JobFailed, NotFound, ResultDisabled
from aiqueue.subjects import Lane
from aiqueue.topology import provision

from ..support import Cluster, NatsProcess, eventually

FAMILY = "agent.tasks"
STREAM = "AI_AGENT_TASKS"
tokens = st.from_regex(subjects.TOKEN, fullmatch=True)


class Task(aiqueue.Message, kind="task"):
    n: int = 0


def job_headers(job_id: str) -> dict[str, str]:
    return {headers.CONTENT_TYPE: codec.CBOR, headers.KIND: "task", headers.JOB_ID: job_id, "mine": "yes"}


async def park(client: aiqueue.Client, job_id: str, due: float, *, tenant: str = "acme", dedup_key: str = "1") -> None:
    lane = Lane(FAMILY, tenant, "normal")
    await Parking(client.connection, client.topology).park(
        lane, job_id, due, job_headers(job_id), codec.encode(Task()), dedup_key=dedup_key
    )


async def stored(client: aiqueue.Client, stream: str, subject: str = ">") -> int:
    info = await client.connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})
    return sum((info["state"].get("subjects") or {}).values())


async def parked_jobs(client: aiqueue.Client) -> int:
    """How many jobs are parked: one that is parked again is there twice for a moment."""
    info = await client.connection.api("STREAM.INFO.AI_PARKED", {"subjects_filter": ">"})
    found = map(subjects.parse_parked, info["state"].get("subjects") or {})
    return len({parsed.job_id for parsed in found if parsed is not None})


def taking(seen: list[tuple[str, float, dict[str, str]]], **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(**options)

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.append((f"{job.tenant}/{job.id}", time.time(), dict(job.headers)))

    return worker


@given(tokens, tokens, tokens, tokens, st.booleans())
def test_a_parked_jobs_subject_says_which_job_it_is(tenant: str, priority: str, job: str, move: str, due: bool) -> None:
    lane = Lane(FAMILY, tenant, priority)
    subject = subjects.parked(lane, job, move, is_due=due)
    assert subjects.parse_parked(subject) == subjects.ParkedSubject(lane, job, move, due)
    assert subjects.parse_lane(subject) is None


@given(st.text(max_size=60))
def test_no_other_subject_is_taken_for_a_parked_job(subject: str) -> None:
    found = subjects.parse_parked(subject)
    assert found is None or subjects.parked(*found[:3], is_due=found.is_due) == subject


async def test_a_parked_job_comes_back_at_its_time_and_not_before(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    async with taking(seen).running(client):
        await park(client, "j2", time.time() - 5)
        await eventually(lambda: len(seen) == 1)
        due = time.time() + 1
        await park(client, "j1", due)
        await eventually(lambda: len(seen) == 2)
    (first, _, _), (second, came, carried) = seen
    assert (first, second) == ("acme/j2", "acme/j1")
    assert due <= came
    assert carried["mine"] == "yes"
    assert carried[headers.PARKED] == "1"
    assert not any("Schedule" in name for name in carried)
    assert await stored(client, "AI_PARKED") == 0
    assert await stored(client, STREAM) == 0


async def test_parking_twice_under_one_key_stores_one_job(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    due = time.time() + 0.5
    for _ in range(3):
        await park(client, "j1", due)
    await park(client, "j1", due, dedup_key="2")
    assert await stored(client, "AI_PARKED") == 2
    async with taking(seen).running(client):
        await eventually(lambda: len(seen) == 2)
        await eventually(lambda: stored_none(client))
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
        await eventually(lambda: stored(client, STREAM))


async def test_a_due_message_that_was_forwarded_already_is_stored_once(client: aiqueue.Client) -> None:
    """What a forwarder leaves that dies between the store and the ack."""
    lane = Lane(FAMILY, "acme", "normal")
    await park(client, "j1", time.time())
    await eventually(lambda: stored(client, "AI_PARKED", "ai.parked.due.>"))
    there = await client.connection.last("AI_PARKED", subjects.parked(lane, "j1", "1", is_due=True))
    assert there is not None
    kept = headers.carried(there.headers, ours=True) | {headers.MSG_ID: subjects.msg_id(FAMILY, "acme", "j1", "due-1")}
    await client.connection.store(subjects.work(*lane), there.data, kept)
    forwarder = Forwarder(client.connection, client.topology)
    await forwarder.start()
    await eventually(lambda: stored_parked_none(client))
    await forwarder.stop()
    await forwarder.stop()
    assert await stored(client, STREAM) == 1


async def stored_parked_none(client: aiqueue.Client) -> bool:
    return await stored(client, "AI_PARKED") == 0


async def parked_are(client: aiqueue.Client, jobs: int) -> bool:
    return await parked_jobs(client) == jobs


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
        await eventually(lambda: stored(client, "AI_PARKED", "ai.parked.due.>"))
        forwarder = Forwarder(client.connection, client.topology)
        await forwarder.start()
        try:
            await park(client, "other", time.time(), tenant="globex")
            await eventually(lambda: stored(client, STREAM, "ai.agent.tasks.globex.>"))
            await eventually(lambda: parked_are(client, 3_000))  # the moved job's parked copy goes after the move
            assert await stored(client, STREAM, "ai.agent.tasks.acme.>") == topology_limit
            await client.connection.api(f"STREAM.UPDATE.{STREAM}", info["config"])
            await eventually(lambda: stored_parked_none(client), within=30)
            assert await stored(client, STREAM, "ai.agent.tasks.acme.>") == topology_limit + 3_000
        finally:
            await forwarder.stop()


async def test_the_forwarder_goes_on_when_its_consumer_is_deleted(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    async with taking(seen).running(client):
        await park(client, "j1", time.time())
        await eventually(lambda: len(seen) == 1)
        await client.connection.api(f"CONSUMER.DELETE.AI_PARKED.{CONSUMER}")
        await park(client, "j2", time.time())
        await eventually(lambda: len(seen) == 2)


async def test_a_worker_waits_for_a_stream_of_parked_jobs_that_is_not_there_yet(account: Any) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await provision.apply(client.connection, client.topology)
        await client.connection.api("STREAM.DELETE.AI_PARKED")
        async with taking(seen).running(client):
            await client.enqueue(Task(), tenant="acme", unique="j0")
            await eventually(lambda: len(seen) == 1)
            await provision.apply(client.connection, client.topology)
            await park(client, "j1", time.time())
            await eventually(lambda: len(seen) == 2)


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


# enqueueing with a delay


async def test_a_delayed_job_begins_at_its_time_and_gives_its_result(client: aiqueue.Client) -> None:
    started_at: dict[str, float] = {}
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> int:
        started_at[job.id] = time.time()
        return job.message.n + 1

    now = time.time()
    by_delay = await client.enqueue(Task(n=1), tenant="acme", delay="1s")
    by_time = await client.enqueue(Task(n=2), tenant="acme", at=datetime.fromtimestamp(now + 1, UTC), priority="high")
    by_seconds = await client.enqueue(Task(n=3), tenant="acme", at=now + 1)
    record = await client.enqueue(Task(n=4), tenant="acme", at=now - 100)
    handles = [by_delay, by_time, by_seconds]
    assert record.due is None
    assert all(each.due is not None and 0 <= each.due - now - 1 < 30 for each in handles)
    assert "due 20" in repr(by_delay)
    async with worker.running(client):
        assert await record.result(25) == 5
        assert [await each.result(25) for each in handles] == [2, 3, 4]
    assert all(started_at[each.id] >= (each.due or 0) for each in handles)
    assert [await each.result(25) for each in handles] == [2, 3, 4]  # asked for afterwards, too


async def test_a_delayed_job_without_a_result_says_so(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task, result=False)
    async def task(job: aiqueue.Job[Task]) -> None: ...

    handle = await client.enqueue(Task(), tenant="acme", delay=0.3)
    async with worker.running(client):
        with pytest.raises(ResultDisabled):
            await handle.result(25)


async def test_a_delayed_job_that_is_parked_already_is_a_duplicate(client: aiqueue.Client) -> None:
    first = await client.enqueue(Task(n=1), tenant="acme", unique="a", delay="1h")
    second = await client.enqueue(Task(n=2), tenant="acme", unique="a", delay="2h")
    other = await client.enqueue(Task(n=2), tenant="globex", unique="a", delay="2h")
    assert (first.duplicate, second.duplicate, other.duplicate) == (False, True, False)
    assert second.due == first.due
    specs = [aiqueue.JobSpec(Task(), unique="a"), aiqueue.JobSpec(Task(), unique="b"), aiqueue.JobSpec(Task())]
    made = [each async for each in client.enqueue_many([*specs, *specs], tenant="acme", delay="1h")]
    assert [each.duplicate for each in made if isinstance(each, aiqueue.Handle)] == [
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    assert made[0].due == first.due  # type: ignore[union-attr]
    assert await stored(client, "AI_PARKED") == 5


async def test_what_is_enqueued_in_bulk_may_be_delayed_item_by_item(client: aiqueue.Client) -> None:
    now = time.time()
    items = [
        aiqueue.JobSpec(Task(), delay="1h"),
        aiqueue.JobSpec(Task(), at=now + 60),
        Task(),
        aiqueue.JobSpec(Task(), delay=-1),
    ]
    made = [each async for each in client.enqueue_many(items, tenant="acme")]
    dues = [each.due for each in made if isinstance(each, aiqueue.Handle)]
    assert dues[0] is not None
    assert dues[1] is not None
    assert 3599 < dues[0] - now < 3660
    assert 0 <= dues[1] - now - 60 < 0.01
    assert dues[2] is None
    assert isinstance(made[3], BadInput)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"at": datetime(2030, 1, 1)}, "no time zone"),  # noqa: DTZ001
        ({"at": "tomorrow"}, "seconds since the epoch"),
        ({"at": float("nan")}, "seconds since the epoch"),
        ({"at": True}, "seconds since the epoch"),
        ({"delay": "soon"}, "not a duration"),
        ({"delay": -1}, "not a duration"),
        ({"delay": "366d"}, "at most 365 days"),
        ({"delay": 1, "at": 1}, "one of them"),
    ],
)
async def test_a_time_that_makes_no_sense_is_refused(
    client: aiqueue.Client, wrong: dict[str, Any], problem: str
) -> None:
    with pytest.raises(BadInput, match=problem):
        await client.enqueue(Task(), tenant="acme", **wrong)
    with pytest.raises(BadInput, match=problem):
        client.enqueue_many([Task()], tenant="acme", **wrong)


async def test_a_deadline_counts_while_a_job_is_parked(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    handle = await client.enqueue(Task(), tenant="acme", delay=0.5, deadline=0.2)
    async with taking(seen).running(client):
        with pytest.raises(JobFailed, match="deadline"):
            await handle.result(25)
    assert not seen


async def test_an_embedded_server_without_the_stream_says_what_to_do(client: aiqueue.Client) -> None:
    await client.connection.api("STREAM.DELETE.AI_PARKED")
    with pytest.raises(NotFound, match="aiqueue apply"):
        await client.enqueue(Task(), tenant="acme", delay=1)


async def test_a_sync_client_delays_and_cancels(client: aiqueue.Client, account: Any) -> None:
    def plain() -> tuple[Any, ...]:
        with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as sync:
            handle = sync.enqueue(Task(), tenant="acme", delay="1h", unique="x")
            other = sync.enqueue(Task(), tenant="acme", delay="1h", unique="y")
            return handle.due, handle.cancel(), sync.cancel(other.id)

    due, first, second = await asyncio.to_thread(plain)
    assert due > time.time() + 3500
    assert first
    assert second


async def test_a_worker_that_is_killed_while_it_forwards_loses_nothing(client: aiqueue.Client, account: Any) -> None:
    code = (
        "import asyncio, sys, aiqueue\n"
        "from aiqueue.enqueue.forwarder import Forwarder\n"
        "async def main():\n"
        "    async with aiqueue.connect(sys.argv[1], user=sys.argv[2], password=sys.argv[3]) as client:\n"
        "        await Forwarder(client.connection, client.topology).start()\n"
        "        print('up', flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    due = time.time() + 1
    outcomes = [each async for each in client.enqueue_many((Task(n=n) for n in range(3_000)), tenant="acme", at=due)]
    assert all(isinstance(each, aiqueue.Handle) for each in outcomes)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, account.url, account.user, account.password, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"up\n"
    try:
        await eventually(lambda: stored(client, STREAM), within=40)
    finally:
        process.kill()
        await process.wait()
    seen: list[tuple[str, float, dict[str, str]]] = []
    async with taking(seen, concurrency=500).running(client):
        await eventually(lambda: len(seen) >= 3_000, within=30)
        await eventually(lambda: stored_none(client), within=30)
    assert len(seen) == len({name for name, _, _ in seen}) == 3_000


async def test_jobs_of_a_stream_that_is_missing_wait_and_no_others(client: aiqueue.Client) -> None:
    info = await client.connection.api("STREAM.INFO.AI_RAG_INGEST")
    await client.connection.api("STREAM.DELETE.AI_RAG_INGEST")
    parking, now = Parking(client.connection, client.topology), time.time()
    lane = Lane("rag.ingest", "acme", "normal")
    await asyncio.gather(
        *(parking.park(lane, f"d{n}", now, job_headers(f"d{n}"), b"", dedup_key="1") for n in range(2_500))
    )
    await eventually(lambda: stored(client, "AI_PARKED", "ai.parked.due.>"))
    forwarder = Forwarder(client.connection, client.topology)
    await forwarder.start()
    try:
        await park(client, "j1", time.time())
        await eventually(lambda: stored(client, STREAM))

        async def forwarded() -> bool:
            return await parked_jobs(client) == 2_500

        await eventually(forwarded)
        await client.connection.api("STREAM.CREATE.AI_RAG_INGEST", info["config"])
        await eventually(lambda: stored_parked_none(client), within=30)
        assert await stored(client, "AI_RAG_INGEST") == 2_500
    finally:
        await forwarder.stop()


async def test_a_due_job_that_neither_stream_takes_is_forwarded_within_seconds_of_the_end_of_that(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiqueue.enqueue.forwarder")
    await park(client, "j1", time.time() - 5)
    await eventually(lambda: stored(client, "AI_PARKED", "ai.parked.due.>"))
    parked = await client.connection.api("STREAM.INFO.AI_PARKED")
    await client.connection.api("STREAM.UPDATE.AI_PARKED", {**parked["config"], "max_msg_size": 10})
    await client.connection.api(f"STREAM.DELETE.{STREAM}")
    forwarder = Forwarder(client.connection, client.topology)
    await forwarder.start()
    try:
        await eventually(lambda: "a due job is not forwarded yet" in caplog.text)
        await provision.apply(client.connection, client.topology)
        await client.connection.api("STREAM.UPDATE.AI_PARKED", parked["config"])
        await eventually(lambda: stored(client, STREAM))
    finally:
        await forwarder.stop()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_after_a_leaders_death_due_jobs_come_soon_after_the_election(own_cluster: Cluster) -> None:
    account = own_cluster.account
    seen: list[tuple[str, float, dict[str, str]]] = []
    async with aiqueue.connect(account.url, user=account.user, password=account.password, profile="cluster") as client:
        await provision.apply(client.connection, client.topology)
        own_cluster.wait_ready([STREAM, "AI_PARKED"], current=True)
        dying = own_cluster.leader("AI_PARKED")
        for _ in range(20):
            if own_cluster.leader(STREAM) is dying:
                break
            own_cluster.step_down(STREAM)
            own_cluster.wait_ready([STREAM], current=True)
        due = datetime.fromtimestamp(time.time() + 4, UTC)
        specs = [aiqueue.JobSpec(Task(n=n), tenant="acme", at=due) for n in range(1_000)]
        handles = [each async for each in client.enqueue_many(specs)]
        async with taking(seen).running(client):
            await asyncio.sleep(max(0.0, due.timestamp() + 0.1 - time.time()))
            dying.kill()
            await eventually(lambda: len(seen) >= len(handles), within=120)
    lateness = sorted(at - due.timestamp() for _, at, _ in seen)
    assert len({name for name, *_ in seen}) == len(handles)
    assert lateness[-1] < 40, [round(each, 1) for each in lateness[::50]]


async def test_times_are_datetimes_and_durations_are_timedeltas_everywhere(client: aiqueue.Client) -> None:
    seen: list[tuple[str, float, dict[str, str]]] = []
    until = datetime.now(UTC) + timedelta(hours=1)
    at = datetime.now(UTC) + timedelta(seconds=1)
    spec = aiqueue.JobSpec(Task(n=2), unique="many", at=at, deadline=until)
    await client.enqueue(Task(n=1), tenant="acme", unique="one", delay=timedelta(seconds=1), deadline=until)
    async for handle in client.enqueue_many([spec], tenant="acme", timeout=timedelta(seconds=30)):
        assert isinstance(handle, aiqueue.Handle)
    await client.enqueue(Task(n=3), tenant="acme", unique="now", deadline=timedelta(minutes=5))
    past = await client.enqueue(Task(n=4), tenant="acme", unique="late", deadline=at - timedelta(days=1))
    async with taking(seen, drain_timeout=timedelta(seconds=5)).running(client):
        await eventually(lambda: len(seen) == 3)
        with pytest.raises(JobFailed, match="deadline"):
            await past.result(timedelta(seconds=25))
    found = {name: carried for name, _, carried in seen}
    for name in ("acme/one", "acme/many"):
        assert found[name][headers.DEADLINE] == str(round(until.timestamp() * 1000))
    assert min(came for name, came, _ in seen if name == "acme/many") >= at.timestamp()
    sent = await client.inboxes.send(Task(), tenant="acme", to="planner", expires=until)
    (mail,) = [each async for each in client.inboxes.read("planner", tenant="acme")]
    assert (mail.envelope.mail_id, mail.envelope.deadline) == (sent.mail_id, round(until.timestamp(), 3))
    assert aiqueue.Backoff(first=timedelta(seconds=2), cap=timedelta(minutes=1)).delay_s(1, lambda: 0) == 2
    assert aiqueue.Retry("later", after=timedelta(seconds=3)).after_s == 3
