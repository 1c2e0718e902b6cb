"""The lanes that a worker serves, and those that it lets go."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.connection import timestamp
from aiqueue.lanes import consumers, discovery, refusals

from ..support import Eventually, create_streams

STREAM, FAMILY = "AI_AGENT_TASKS", "agent.tasks"
JOBS, TENANTS = 12, [f"t{n}" for n in range(6)]


class Echo(aiqueue.Message, kind="echo"):
    n: int = 0


class Hint(NamedTuple):
    subject: str


class Ran:
    """Which jobs a worker's handler began, and how often. `held`: those of this tenant wait for `release`."""

    def __init__(self, *, held: str = "", concurrency: int = 20) -> None:
        self.times: Counter[tuple[str, int]] = Counter()
        self.release = asyncio.Event()
        self.worker = aiqueue.Worker(concurrency=concurrency)

        @self.worker.handle(Echo, result=False)
        async def echo(job: aiqueue.Job[Echo]) -> None:
            self.times[job.tenant, job.message.n] += 1
            if job.tenant == held:
                await self.release.wait()


@pytest.fixture
async def client(account: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiqueue.Client]:
    """Its lanes are in memory, two are many, one job is a backlog, and a lane is hinted at once."""
    monkeypatch.setattr("aiqueue.enqueue.producer.HINT_EVERY_S", 1e9)
    monkeypatch.setattr(discovery, "FEW_LANES", 2)
    monkeypatch.setattr(discovery, "BACKLOG_MIN", 1)
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        family = dataclasses.replace(client.topology.families[FAMILY], lane_storage="memory")
        client.topology = dataclasses.replace(client.topology, families={**client.topology.families, FAMILY: family})
        yield client


async def fill(client: aiqueue.Client, first: int = 0) -> None:
    for tenant in TENANTS:
        for n in range(first, first + JOBS):
            await client.enqueue(Echo(n=n), tenant=tenant)


async def consumer_names(client: aiqueue.Client) -> set[str]:
    return set((await client.connection.api(f"CONSUMER.NAMES.{STREAM}"))["consumers"] or ())


async def left(client: aiqueue.Client) -> int:
    return int((await client.connection.api(f"STREAM.INFO.{STREAM}"))["state"]["messages"])


async def test_of_many_lanes_those_whose_backlog_is_done_go_and_come_back(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    await fill(client)
    ran = Ran()

    async def few_left() -> bool:
        return not await left(client) and len(await consumer_names(client)) <= discovery.FEW_LANES

    async with ran.worker.running(client):
        await eventually(few_left)
        await fill(client, first=JOBS)
        await eventually(lambda: len(ran.times) == 2 * JOBS * len(TENANTS))
    assert set(ran.times.values()) == {1}


async def test_a_lane_with_a_job_in_flight_stays(client: aiqueue.Client, eventually: Eventually) -> None:
    await fill(client)
    ran = Ran(held="t0")

    async def others_gone() -> bool:
        return await left(client) == JOBS and len(await consumer_names(client)) <= discovery.FEW_LANES

    async with ran.worker.running(client):
        await eventually(others_gone)
        assert "t0-normal" in await consumer_names(client)
        ran.release.set()
        await eventually(lambda: _none_left(client))
    assert set(ran.times.values()) == {1}


async def _none_left(client: aiqueue.Client) -> bool:
    return not await left(client)


async def test_a_lane_at_which_another_worker_waits_is_not_removed(client: aiqueue.Client) -> None:
    async with Ran().worker.running(client) as session:
        lane = session.discovery
        await client.enqueue(Echo(), tenant="acme")
        async with asyncio.timeout(25):
            while not any(pull.standing_request for pull in session.puller.lanes):
                await asyncio.sleep(0.01)
        assert not await lane._consumers.remove_if_unused(f"{STREAM}.acme-normal")
        info = await client.connection.api(f"CONSUMER.INFO.{STREAM}.acme-normal")
    assert not info.get("paused")


async def test_workers_that_let_lanes_go_under_each_other_run_each_job_once(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    one, two = Ran(), Ran()

    async def some_gone() -> bool:
        return len(await consumer_names(client)) < len(TENANTS)

    await fill(client)
    async with one.worker.running(client), two.worker.running(client):
        await eventually(some_gone)
        await fill(client, first=JOBS)  # in the midst of it
        await eventually(lambda: len(one.times + two.times) == 2 * JOBS * len(TENANTS))
        await eventually(lambda: _none_left(client))
    assert set((one.times + two.times).values()) == {1}


async def test_a_redelivery_knows_the_consumer_that_another_worker_has_recreated(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Echo, retry=aiqueue.Backoff(attempts=3, first=0.02, cap=0.05))
    async def echo(job: aiqueue.Job[Echo]) -> str:
        if job.attempt == 1:
            raise ValueError
        return "ok"

    async with worker.running(client) as session:
        assert await (await client.enqueue(Echo(), tenant="acme")).result(25) == "ok"
        (pull,) = session.puller.lanes
        pull.created -= 100.0  # as after another worker has removed and recreated the lane
        handle = await client.enqueue(Echo(n=1), tenant="acme")
        assert await handle.result(25) == "ok"
        info = await client.connection.api(f"CONSUMER.INFO.{STREAM}.acme-normal")
        assert pull.created == timestamp(info["created"])
    assert pull.key == subjects.Lane(FAMILY, "acme", "normal")


async def drained(client: aiqueue.Client) -> None:
    """A lane, acme-normal, that was served and holds nothing, and at which nobody waits."""
    ran = Ran()
    async with ran.worker.running(client):
        await client.enqueue(Echo(), tenant="acme")
        async with asyncio.timeout(25):
            while not ran.times or await left(client):
                await asyncio.sleep(0.01)
    async with asyncio.timeout(25):
        while (await info_of(client))["num_waiting"]:
            await asyncio.sleep(0.01)


async def info_of(client: aiqueue.Client) -> dict[str, Any]:
    return await client.connection.api(f"CONSUMER.INFO.{STREAM}.acme-normal")


def leaving(client: aiqueue.Client, verb: str, meanwhile: Callable[[], Awaitable[object]]) -> consumers.LaneConsumers:
    """The lanes of a worker with another thing that is done once, after its first call of this verb was answered."""
    api, done = client.connection.api, []

    async def asked(subject: str, *args: Any, **options: Any) -> dict[str, Any]:
        info = await api(subject, *args, **options)
        if subject.startswith(f"CONSUMER.{verb}.") and not done:
            done.append(subject)
            client.connection.api = api  # type: ignore[method-assign]
            await meanwhile()
            client.connection.api = asked  # type: ignore[method-assign]
        return info

    client.connection.api = asked  # type: ignore[method-assign]
    return consumers.LaneConsumers(client.connection)


async def test_an_unused_lane_is_removed(client: aiqueue.Client) -> None:
    await drained(client)
    assert await leaving(client, "NONE", asyncio.Event().wait).remove_if_unused(f"{STREAM}.acme-normal")
    assert "acme-normal" not in await consumer_names(client)


async def test_a_job_that_comes_before_a_lane_is_paused_keeps_it(client: aiqueue.Client) -> None:
    await drained(client)
    let_go = leaving(client, "INFO", lambda: client.enqueue(Echo(n=1), tenant="acme"))
    assert not await let_go.remove_if_unused(f"{STREAM}.acme-normal")
    assert not (await info_of(client)).get("paused")


async def test_a_lane_whose_pause_may_be_over_stays(client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    await drained(client)
    monkeypatch.setattr(consumers, "PAUSED_S", 0.3)
    monkeypatch.setattr(consumers, "DELETE_WITHIN_S", 0.1)

    async def over() -> None:
        while (await info_of(client)).get("paused"):
            await asyncio.sleep(0.01)

    assert not await leaving(client, "PAUSE", over).remove_if_unused(f"{STREAM}.acme-normal")
    assert not (await info_of(client)).get("paused")


async def test_the_pause_is_counted_from_when_it_is_asked_for(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    await drained(client)
    monkeypatch.setattr(consumers, "PAUSED_S", 0.8)
    monkeypatch.setattr(consumers, "DELETE_WITHIN_S", 0.1)
    let_go = leaving(client, "INFO", lambda: asyncio.sleep(0.9))  # a server that is slow to answer
    assert await let_go.remove_if_unused(f"{STREAM}.acme-normal")


async def test_a_lane_that_another_worker_has_paused_is_left_to_that_one(client: aiqueue.Client) -> None:
    await drained(client)
    until = "2100-01-02T03:04:05.678Z"

    async def other() -> None:
        await client.connection.api(f"CONSUMER.PAUSE.{STREAM}.acme-normal", {"pause_until": until})

    assert await leaving(client, "PAUSE", other).remove_if_unused(f"{STREAM}.acme-normal")
    info = await info_of(client)
    assert info["paused"]
    assert info["config"]["pause_until"] == until


async def test_a_lane_that_was_recreated_meanwhile_is_not_removed(client: aiqueue.Client) -> None:
    await drained(client)
    config = client.topology.family(FAMILY).lane_config("acme", "normal")

    async def recreated() -> None:
        name = f"{STREAM}.acme-normal"
        await client.connection.api(f"CONSUMER.DELETE.{name}")
        request = {"stream_name": STREAM, "config": config, "action": "create"}
        await client.connection.api(f"CONSUMER.CREATE.{name}.{config['filter_subject']}", request)

    assert not await leaving(client, "INFO", recreated).remove_if_unused(f"{STREAM}.acme-normal")
    assert not (await info_of(client)).get("paused")


async def test_a_lane_that_is_hinted_while_it_is_to_go_stays(client: aiqueue.Client, eventually: Eventually) -> None:
    await fill(client)
    ran = Ran()
    async with ran.worker.running(client) as session:
        found = session.discovery
        await eventually(lambda: bool(found._settling))
        pull = next(iter(found._settling))
        found._on_hint(Hint(f"{subjects.HINTS}.{pull.key.family}.{pull.key.tenant}.{pull.key.priority}"))  # type: ignore[arg-type]
        await eventually(lambda: bool(pull.standing_request))
        assert found._open[pull.key] is pull


async def test_a_worker_that_stops_while_lanes_go_leaves_none_paused(client: aiqueue.Client) -> None:
    await fill(client)
    ran, paused = Ran(), asyncio.Event()
    async with asyncio.timeout(20), ran.worker.running(client) as session:

        async def stopping() -> None:
            paused.set()
            while not session.discovery._stopped:
                await asyncio.sleep(0.001)

        leaving(client, "PAUSE", stopping)
        await paused.wait()
    for name in await consumer_names(client):
        assert not (await client.connection.api(f"CONSUMER.INFO.{STREAM}.{name}")).get("paused"), name


def test_only_a_tenants_own_lane_whose_jobs_are_delivered_again_may_stand_in_line(client: aiqueue.Client) -> None:
    family, lane = client.topology.family(FAMILY), subjects.Lane(FAMILY, "acme", "normal")
    assert discovery._may_wait(family, lane)
    assert not discovery._may_wait(dataclasses.replace(family, max_deliver=1), lane)
    assert not discovery._may_wait(dataclasses.replace(family, lanes="shared"), lane)
    assert not discovery._may_wait(family, lane._replace(key=subjects.hashed("model")))


async def test_a_lane_that_has_had_no_job_for_long_is_released_and_taken_up_again(
    client: aiqueue.Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(discovery, "POLL_S", 0.1)
    monkeypatch.setattr(discovery, "IDLE_S", 0.2)
    monkeypatch.setattr(refusals, "EXPIRES_S", 0.6)
    monkeypatch.setattr(refusals, "HEARTBEAT_S", 0.2)
    ran = Ran()
    async with ran.worker.running(client) as session:
        for n in range(2):
            await client.enqueue(Echo(n=n), tenant="acme")
            await eventually(lambda: ran.times["acme", n] == 1)  # noqa: B023
            await eventually(lambda: not list(session.puller.lanes))
