"""Pauses: what no worker starts, what goes on meanwhile, and what is as before when the pause is over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.enqueue import Filter
from aiqueue.lanes import StoredPauses
from aiqueue.worker.session import Session
from aiqueue.worker.unknown_kinds import Hops

from ..support import Account, NatsProcess, create_streams, eventually
from . import pausable

OwnServer = Callable[..., NatsProcess]
STREAM = "AI_AGENT_TASKS"


class Ping(aiqueue.Message, kind="ping"):
    n: int = 0


class Pong(aiqueue.Message, kind="pong.now"):
    n: int = 0


def pinger(ran: list[tuple[str, str, int]], **options: Any) -> aiqueue.Worker:
    """A worker that notes tenant, kind and attempt of each job."""
    worker = aiqueue.Worker(concurrency=20)

    @worker.handle(Ping, **options)
    async def ping(job: aiqueue.Job[Ping]) -> int:
        ran.append((job.tenant, job.kind, job.attempt))
        return job.message.n

    @worker.handle(Pong, **options)
    async def pong(job: aiqueue.Job[Pong]) -> int:
        ran.append((job.tenant, job.kind, job.attempt))
        return job.message.n

    return worker


async def runs(client: aiqueue.Client, model: type[aiqueue.Message] = Ping, tenant: str = "acme") -> None:
    assert await (await client.enqueue(model(n=1), tenant=tenant)).result(25) == 1  # type: ignore[call-arg]


def heeds(session: Session, family: str = "agent.tasks", tenant: str = "acme", kind: str = "ping") -> bool:
    """Whether the worker knows that such a job is paused."""
    return session._pausing.watch.active.of_job(family, tenant, kind) is not None


async def delivered(client: aiqueue.Client, consumer: str = "acme-normal") -> int:
    """How many deliveries a lane's consumer has made; 0 if there is none."""
    try:
        info = await client.connection.api(f"CONSUMER.INFO.{STREAM}.{consumer}")
    except aiqueue.errors.NotFound:
        return 0
    return int(info["delivered"]["consumer_seq"])


async def dead(client: aiqueue.Client) -> list[Any]:
    return [letter async for letter in client.dead.find(Filter())]


async def parked(client: aiqueue.Client) -> int:
    info = await client.connection.api("STREAM.INFO.AI_PARKED", {"subjects_filter": "ai.parked.>"})
    return sum((info["state"].get("subjects") or {}).values())


@asynccontextmanager
async def several(account: Account, count: int) -> AsyncIterator[list[aiqueue.Client]]:
    async with AsyncExitStack() as stack:
        clients = [aiqueue.connect(account.url, user=account.user, password=account.password) for _ in range(count)]
        yield [await stack.enter_async_context(each) for each in clients]


@pytest.mark.parametrize("tenant", [None, "acme"], ids=["family", "tenant"])
async def test_a_paused_lane_is_not_pulled_by_any_worker_until_it_is_resumed(
    client: aiqueue.Client, account: Account, tenant: str | None
) -> None:
    ran: list[tuple[str, str, int]] = []
    async with (
        several(account, 2) as (first, second),
        pinger(ran).running(first) as one,
        pinger(ran).running(second) as two,
    ):
        for _ in range(4):  # both workers have a standing pull on the lane
            await runs(client)
        await client.pause("agent.tasks", tenant=tenant, reason="the provider is away", by="anna")
        await eventually(lambda: heeds(one) and heeds(two))
        await asyncio.sleep(0.1)  # what was on its way has returned to the queue
        before, started = await delivered(client), len(ran)
        for n in range(50):
            await client.enqueue(Ping(n=n), tenant="acme")
        await asyncio.sleep(1.2)  # longer than the poll
        assert (await delivered(client), len(ran)) == (before, started)
        assert await client.resume("agent.tasks", tenant=tenant)
        await eventually(lambda: len(ran) == started + 50)
    assert {attempt for _, _, attempt in ran} == {1}
    assert await dead(client) == []


async def test_a_pause_is_heeded_at_once_and_ended_at_once(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.lanes.pause_watch.LOOK_EVERY_S", 60.0)  # by the notices, then
    async with pinger([]).running(client) as session:
        await runs(client)
        await client.pause("agent.tasks", tenant="acme")
        await eventually(lambda: heeds(session))
        handle = await client.enqueue(Ping(n=7), tenant="acme")
        await client.resume("agent.tasks", tenant="acme")
        assert await handle.result(20) == 7


async def test_jobs_of_other_tenants_and_families_are_run_meanwhile(client: aiqueue.Client) -> None:
    async with pinger([]).running(client) as session:
        await runs(client)
        await client.pause("agent.tasks", tenant="acme")
        await client.pause("rag.ingest")
        await eventually(lambda: heeds(session))
        for _ in range(3):
            await runs(client, tenant="globex")
        handle = await client.enqueue(Ping(), tenant="acme")
        with pytest.raises(TimeoutError):
            await handle.result(0.5)


async def test_a_worker_that_starts_during_a_pause_starts_nothing_before_its_end(client: aiqueue.Client) -> None:
    await client.pause("agent.tasks")
    handle = await client.enqueue(Ping(n=3), tenant="acme")
    async with pinger([]).running(client):
        with pytest.raises(TimeoutError):
            await handle.result(1.5)
        assert await delivered(client) == 0
        await client.resume("agent.tasks")
        assert await handle.result(3) == 3


async def test_a_pause_outlives_the_server_and_the_workers(own_server: OwnServer) -> None:
    server = own_server()
    async with aiqueue.connect(url=server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        ran: list[tuple[str, str, int]] = []
        async with pinger(ran).running(client) as session:
            await runs(client)
            await client.pause("agent.tasks", reason="for long")
            await eventually(lambda: heeds(session))
            server.kill()
            server.start()
            handle = await client.enqueue(Ping(n=5), tenant="acme")
            with pytest.raises(TimeoutError):
                await handle.result(1.5)
        async with pinger(ran).running(client) as session:
            assert heeds(session)
            (pause,) = await client.pauses()
            assert (pause.family, pause.tenant, pause.kind, pause.reason) == ("agent.tasks", None, None, "for long")
            await client.resume("agent.tasks")
            assert await handle.result(5) == 5
        assert len(ran) == 2


async def test_a_pause_with_a_duration_ends_by_itself(client: aiqueue.Client) -> None:
    async with pinger([]).running(client) as session:
        started_at = time.monotonic()
        pause = await client.pause("agent.tasks", duration=1.0)
        assert pause.until is not None
        assert 0.9 < pause.until - pause.since < 1.1
        await eventually(lambda: heeds(session))
        handle = await client.enqueue(Ping(n=2), tenant="acme")
        assert await handle.result(10) == 2
        assert time.monotonic() - started_at > 0.9
        assert await client.pauses() == []
        assert not await client.resume("agent.tasks")


@pytest.mark.parametrize("tenant", [None, "acme"], ids=["all tenants", "one tenant"])
async def test_jobs_of_a_paused_kind_wait_outside_their_lane_and_use_no_attempt(
    client: aiqueue.Client, tenant: str | None
) -> None:
    ran: list[tuple[str, str, int]] = []
    async with pinger(ran).running(client) as session:
        await client.pause("agent.tasks", tenant=tenant, kind="pong.now")
        await eventually(lambda: heeds(session, kind="pong.now"))
        handles = [await client.enqueue(Pong(n=n), tenant="acme") for n in range(20)]
        for _ in range(3):
            await runs(client)
        await eventually(lambda: _is(20, parked(client)))
        assert {kind for _, kind, _ in ran} == {"ping"}
        if tenant is not None:
            await runs(client, Pong, "globex")
        ran.clear()
        await client.resume("agent.tasks", tenant=tenant, kind="pong.now")
        assert [await each.result(5) for each in handles] == list(range(20))
    assert ran == [("acme", "pong.now", 1)] * 20
    assert await dead(client) == []


async def _is(expected: int, counted: Any) -> bool:
    return int(await counted) == expected


async def test_the_time_of_a_pause_does_not_count_as_unknown(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.unknown_kinds.PATIENCE_S", 0.5)
    monkeypatch.setattr("aiqueue.worker.unknown_kinds.PAUSED_FIRST_S", 0.3)
    monkeypatch.setattr("aiqueue.worker.unknown_kinds.PAUSED_MAX_S", 0.3)
    monkeypatch.setattr("aiqueue.worker.unknown_kinds.SOON_S", 0.0)

    async def hops() -> list[Hops]:
        """Of the job that is parked aside, as of its next delivery."""
        read = client.connection.read("AI_PARKED", "ai.parked.at.agent.tasks.>")
        found = [each.headers["Aiq-Unknown"].split() async for each in read]
        return [Hops(int(at) / 1000, int(number)) for at, number in found]

    async with pinger([]).running(client) as session:
        await client.pause("agent.tasks", kind="pong.now")
        await eventually(lambda: heeds(session, kind="pong.now"))
        handle = await client.enqueue(Pong(n=9), tenant="acme")
        enqueued_at = time.time()

        async def hopped() -> bool:
            return any(each.number >= 3 and each.first_seen_at > enqueued_at + 0.6 for each in await hops())

        await eventually(hopped, within=10)
        assert await dead(client) == []
        await client.resume("agent.tasks", kind="pong.now")
        assert await handle.result(5) == 9


async def test_a_job_of_a_paused_kind_in_a_family_that_claims_ids_runs_once(client: aiqueue.Client) -> None:
    class Ask(aiqueue.Message, kind="ask", family="gateway.requests"):
        request_id: str

    ran: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Ask)
    async def ask(job: aiqueue.Job[Ask]) -> int:
        ran.append(job.attempt)
        return job.attempt

    async with worker.running(client) as session:
        await client.pause("gateway.requests", kind="ask")
        await eventually(lambda: heeds(session, "gateway.requests", kind="ask"))
        handle = await client.enqueue(Ask(request_id="r-1"), tenant="acme")
        await eventually(lambda: _is(1, parked(client)))
        await client.resume("gateway.requests", kind="ask")
        assert await handle.result(5) == 1
    assert ran == [1]


async def test_a_paused_tenant_of_a_family_with_shared_lanes_holds_up_no_other(
    account: Account, tmp_path: Path
) -> None:
    (tmp_path / "shared.toml").write_text(
        '[family]\nname = "shared.jobs"\ndefault_kind = "shared"\nlanes = "shared"\n[stream]\nname = "SHARED"\n'
    )

    class Shared(aiqueue.Message, kind="shared", family="shared.jobs"):
        n: int = 0

    worker = aiqueue.Worker()

    @worker.handle(Shared)
    async def run(job: aiqueue.Job[Shared]) -> int:
        return job.attempt

    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=tmp_path) as client:
        await create_streams(client)
        async with worker.running(client) as session:
            await client.pause("shared.jobs", tenant="acme")
            await eventually(lambda: heeds(session, "shared.jobs"))
            handle = await client.enqueue(Shared(), tenant="acme")
            assert await (await client.enqueue(Shared(), tenant="globex")).result(10) == 1
            await eventually(lambda: _is(1, parked(client)))
            await client.resume("shared.jobs", tenant="acme")
            assert await handle.result(5) == 1


# -- what runs


async def test_a_running_job_goes_on_unless_the_pause_says_now(client: aiqueue.Client) -> None:
    began: list[int] = []
    go_on = asyncio.Event()
    worker = aiqueue.Worker()

    @worker.handle(Ping)
    async def wait(job: aiqueue.Job[Ping]) -> int:
        began.append(job.attempt)
        await go_on.wait()
        return job.message.n

    async with worker.running(client) as session:
        handle = await client.enqueue(Ping(n=4), tenant="acme")
        await eventually(lambda: began)
        await client.pause("agent.tasks")
        await eventually(lambda: heeds(session))
        assert session.running == 1
        await client.pause("agent.tasks", now=True)
        await eventually(lambda: session.running == 0)
        assert (await client.pauses())[0].now
        go_on.set()
        with pytest.raises(TimeoutError):
            await handle.result(0.5)
        await client.resume("agent.tasks")
        assert await handle.result(5) == 4
    assert began == [1, 1]  # the attempt is not counted


@pytest.mark.parametrize("scope", [{}, {"tenant": "acme"}, {"kind": "ping"}, {"tenant": "acme", "kind": "ping"}])
async def test_now_stops_the_jobs_of_the_pause_and_no_other(client: aiqueue.Client, scope: dict[str, str]) -> None:
    began: Counter[tuple[str, str]] = Counter()
    go_on = asyncio.Event()
    worker = aiqueue.Worker()

    async def wait(job: aiqueue.Job[Any]) -> int:
        began[job.tenant, job.kind] += 1
        await go_on.wait()
        return job.attempt

    worker.handle(Ping)(wait)
    worker.handle(Pong)(wait)
    async with worker.running(client) as session:
        handles = [
            await client.enqueue(model(), tenant=tenant) for model in (Ping, Pong) for tenant in ("acme", "globex")
        ]
        await eventually(lambda: session.running == len(began) == 4)
        await client.pause("agent.tasks", now=True, **scope)
        stopped = {
            key for key in began if scope.get("tenant", key[0]) == key[0] and scope.get("kind", key[1]) == key[1]
        }
        await eventually(lambda: session.running == 4 - len(stopped))
        go_on.set()
        await client.resume("agent.tasks", **scope)
        assert [await each.result(10) for each in handles] == [1] * 4
    assert {key for key, times in began.items() if times == 2} == stopped


async def test_now_stops_jobs_in_threads_and_children(client: aiqueue.Client, tmp_path: Path) -> None:
    async with pausable.worker.running(client) as session:
        models = (pausable.InThread, pausable.InChild)
        handles = [await client.enqueue(model(place=str(tmp_path)), tenant="acme") for model in models]
        await eventually(lambda: len(list(tmp_path.iterdir())) == 2)
        await client.pause("agent.tasks", now=True)
        await eventually(lambda: session.running == 0)
        (tmp_path / "go").touch()
        await client.resume("agent.tasks")
        assert [await each.result(20) for each in handles] == [1, 1]
    assert Counter(each.name.rpartition("-")[0].rpartition("-")[0] for each in tmp_path.iterdir()) == {
        "in-thread": 2, "in-child": 2, "": 1,
    }  # fmt: skip


# -- what goes on meanwhile


async def test_jobs_are_enqueued_delayed_and_cancelled_during_a_pause(client: aiqueue.Client) -> None:
    ran: list[tuple[str, str, int]] = []
    async with pinger(ran).running(client) as session:
        await runs(client)
        await client.pause("agent.tasks")
        await eventually(lambda: heeds(session))
        now = await client.enqueue(Ping(n=1), tenant="acme")
        later = await client.enqueue(Ping(n=2), tenant="acme", delay=0.3)
        unwanted = await client.enqueue(Ping(n=3), tenant="acme")
        assert await unwanted.cancel()
        with pytest.raises(aiqueue.JobCancelled):
            await unwanted.result(10)
        await eventually(lambda: _is(0, parked(client)))  # the delayed one waits in its lane by now
        assert (await now.status()).state == (await later.status()).state == "queued"
        await client.resume("agent.tasks")
        assert (await now.result(5), await later.result(5)) == (1, 2)
    assert len(ran) == 3


async def test_a_deadline_that_passes_during_a_pause_makes_a_dead_letter(client: aiqueue.Client) -> None:
    async with pinger([]).running(client) as session:
        await client.pause("agent.tasks")
        await eventually(lambda: heeds(session))
        handle = await client.enqueue(Ping(), tenant="acme", deadline=0.3)
        await asyncio.sleep(0.4)
        await client.resume("agent.tasks")
        with pytest.raises(aiqueue.JobFailed, match="deadline"):
            await handle.result(10)


async def test_a_paused_lane_is_not_taken_for_stalled(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aiqueue.lanes.stalled.CHECK_EVERY_S", 0.1)
    monkeypatch.setattr("aiqueue.lanes.stalled.QUIET_S", 0.4)
    caplog.set_level(logging.WARNING, "aiqueue")
    async with pinger([]).running(client) as session:
        await runs(client)
        inbox = session.puller._inbox
        await client.pause("agent.tasks")
        await eventually(lambda: heeds(session) and session.puller._inbox != inbox)
        inbox = session.puller._inbox
        handle = await client.enqueue(Ping(n=1), tenant="acme")
        await asyncio.sleep(1.8)  # the poll reports the job
        assert session.vitals()["state"] == "ok"
        assert session.puller._inbox == inbox
        assert [each for each in caplog.records if "stalled" in each.getMessage()] == []
        await client.resume("agent.tasks")
        assert await handle.result(5) == 1


async def test_a_job_between_two_attempts_keeps_its_count_when_its_lane_was_idle_for_long(
    account: Account, tmp_path: Path
) -> None:
    (tmp_path / "brief.toml").write_text(
        '[family]\nname = "brief.jobs"\ndefault_kind = "brief"\n[stream]\nname = "BRIEF"\n'
        '[consumer]\ninactive_threshold = "1s"\n'
    )

    class Brief(aiqueue.Message, kind="brief", family="brief.jobs"):
        pass

    attempts: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Brief, retry=aiqueue.Backoff(first=0.5, jitter=0))
    async def run(job: aiqueue.Job[Brief]) -> int:
        attempts.append(job.attempt)
        if job.attempt == 1:
            raise ValueError("not yet")
        return job.attempt

    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=tmp_path) as client:
        await create_streams(client)
        async with worker.running(client) as session:
            handle = await client.enqueue(Brief(), tenant="acme")
            await eventually(lambda: attempts)
            await client.pause("brief.jobs")
            await eventually(lambda: heeds(session, "brief.jobs"))
            await asyncio.sleep(2.5)  # longer than the time after which the server deletes an idle consumer
            assert attempts == [1]
            await client.resume("brief.jobs")
            assert await handle.result(5) == 2
    assert attempts == [1, 2]


async def test_jobs_that_are_paused_and_resumed_while_they_flow_run_once_each(
    client: aiqueue.Client, account: Account
) -> None:
    ran: list[tuple[int, int]] = []
    worker = aiqueue.Worker(concurrency=10)

    @worker.handle(Ping)
    async def ping(job: aiqueue.Job[Ping]) -> None:
        ran.append((job.message.n, job.attempt))

    async def fill() -> None:
        for start in range(0, 1_000, 50):
            jobs = [Ping(n=n) for n in range(start, start + 50)]
            assert not [each async for each in client.enqueue_many(jobs, tenant="acme") if isinstance(each, Exception)]
            await asyncio.sleep(0.08)

    async with several(account, 2) as (first, second), worker.running(first), worker.running(second):
        filling = asyncio.create_task(fill())
        scopes: list[dict[str, Any]] = [{}, {"tenant": "acme"}, {"kind": "ping"}]
        for scope in scopes * 2:
            await client.pause("agent.tasks", now=True, **scope)
            await asyncio.sleep(0.15)
            await client.resume("agent.tasks", **scope)
            await asyncio.sleep(0.1)
        await filling
        await eventually(lambda: len(ran) >= 1_000)
    assert sorted(ran) == [(n, 1) for n in range(1_000)]
    assert await dead(client) == []


# -- what the call refuses, and what a worker misses


async def test_what_cannot_be_paused_is_refused_with_one_line(client: aiqueue.Client) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"family": "agent.task"}, "agent.task"),
        ({"family": "agent.message"}, "mail of agent.message cannot be paused"),
        ({"family": "agent.tasks", "tenant": "a b"}, "tenant"),
        ({"family": "agent.tasks", "kind": "so so"}, "kind 'so so'"),
        ({"family": "agent.tasks", "kind": ""}, "kind ''"),
        ({"family": "agent.tasks", "duration": 0}, "above 0"),
        ({"family": "agent.tasks", "duration": "1000d"}, "up to 366d"),
        ({"family": "agent.tasks", "reason": "x" * 501}, "501 characters"),
        ({"family": "agent.tasks", "now": "yes"}, "True or False"),
    ]
    for arguments, told in wrong:
        with pytest.raises(aiqueue.errors.BadInput) as raised:
            await client.pause(**arguments)
        assert told in str(raised.value)
        assert "\n" not in str(raised.value)
    assert await client.pauses() == []


async def test_a_pause_that_is_replaced_keeps_its_beginning(client: aiqueue.Client) -> None:
    first = await client.pause("agent.tasks", by="anna", reason="one")
    await asyncio.sleep(0.05)
    await client.pause("agent.tasks", by="bert", duration="1h")
    (pause,) = await client.pauses()
    assert (pause.since, pause.by, pause.reason) == (first.since, "bert", "")
    assert pause.until is not None
    assert await client.resume("agent.tasks")
    assert await client.pauses() == []


async def test_resuming_a_family_leaves_the_pauses_of_its_tenants_and_kinds(client: aiqueue.Client) -> None:
    for scope in ({}, {"tenant": "acme"}, {"kind": "pong.now"}, {"tenant": "acme", "kind": "ping"}):
        await client.pause("agent.tasks", **scope)
    assert not await client.resume("agent.tasks", tenant="globex")
    assert await client.resume("agent.tasks")
    left = [(each.tenant, each.kind) for each in await client.pauses()]
    assert left == [(None, "pong.now"), ("acme", None), ("acme", "ping")]


async def test_a_worker_that_missed_the_notices_looks_within_a_second(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.subjects.PAUSES", "aiq.elsewhere")
    async with pinger([]).running(client) as session:
        monkeypatch.undo()
        await client.pause("agent.tasks")
        await eventually(lambda: heeds(session))  # within LOOK_EVERY_S, on a machine that is not busy
        handle = await client.enqueue(Ping(n=1), tenant="acme")
        await client.resume("agent.tasks")
        assert await handle.result(20) == 1


async def test_a_key_of_a_form_that_only_a_later_version_knows_pauses_nothing(client: aiqueue.Client) -> None:
    stream = StoredPauses(client.connection, client.topology).stream
    for tokens in ("agent.tasks.key.gpt", "agent.tasks.tenant.acme.key.gpt", "agent.tasks.kind.a.b"):
        await client.connection.store(f"$KV.{stream[3:]}.pause.{tokens}", b"{}", {"Nats-Msg-Id": tokens})
    assert await client.pauses() == []
    async with pinger([]).running(client):
        await runs(client)


async def test_an_operator_may_write_a_pause_with_the_nats_command(client: aiqueue.Client) -> None:
    await client.connection.store("$KV.AI_PRESENCE.pause.agent.tasks", b"", {"Nats-Msg-Id": "1"})
    (pause,) = await client.pauses()
    assert abs(pause.since - time.time()) < 5
    async with pinger([]).running(client) as session:
        assert heeds(session)
