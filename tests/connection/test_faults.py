"""Servers that give way, stop or die: everything goes on by itself, and each enqueue ends in one way."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

import aiqueue
from aiqueue import headers
from aiqueue.errors import DataLossRefused, QueueFull, Unavailable
from aiqueue.topology import provision

from ..support import Cluster, Eventually, NatsProcess, create_streams

STREAM, LANE = "AI_AGENT_TASKS", "acme-normal"


class Ping(aiqueue.Message, kind="ping"):
    n: int


@asynccontextmanager
async def opened(cluster: Cluster, profile: str = "cluster") -> AsyncIterator[aiqueue.Client]:
    account = cluster.account
    async with aiqueue.connect(account.url, user=account.user, password=account.password, profile=profile) as client:
        yield client


class Stream:
    """Jobs enqueued one after the other at a steady rate, each awaited to its result."""

    def __init__(self, client: aiqueue.Client) -> None:
        self.client = client
        self.started_at: list[float] = []  # when handlers began
        self.results: set[int] = set()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = False

    def worker(self) -> aiqueue.Worker:
        worker = aiqueue.Worker(concurrency=10)

        @worker.handle(Ping)
        async def ping(job: aiqueue.Job[Ping]) -> int:
            self.started_at.append(time.monotonic())
            return job.message.n

        return worker

    async def produce(self) -> None:
        n = 0
        while not self._ended:
            n += 1
            self._tasks.append(asyncio.create_task(self._one(n)))
            await asyncio.sleep(0.02)

    async def _one(self, n: int) -> None:
        handle = await self.client.enqueue(Ping(n=n), tenant="acme", timeout=60)
        self.results.add(await handle.result(60))

    async def end(self) -> None:
        self._ended = True
        await asyncio.gather(*self._tasks)
        assert self.results == set(range(1, len(self._tasks) + 1))

    def gap_s(self, since: float) -> float:
        """The longest time without a job that began, after `since`."""
        times = [since, *sorted(each for each in self.started_at if each > since)]
        return max(b - a for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("fault", ["kill", "pause"])
async def test_an_enqueue_over_a_fault_ends_in_exactly_one_way(
    fault: str, own_server: Callable[..., NatsProcess], eventually: Eventually
) -> None:
    """Acknowledged, QueueFull, or Unavailable: and the stream holds what was told, each once."""
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password, ping_interval=0.5) as client:
        await create_streams(client)
        config = (await client.connection.api(f"STREAM.INFO.{STREAM}"))["config"]
        await client.connection.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_msgs_per_subject": 200})
        outcomes: dict[str, str] = {}

        async def one(n: int) -> None:
            key, timeout = f"u{n}", 0.7 if n % 3 else 30
            try:
                await client.enqueue(Ping(n=n), tenant="acme", unique=key, timeout=timeout)
            except QueueFull:
                outcomes[key] = "refused"
            except Unavailable as error:
                outcomes[key] = "perhaps" if error.maybe_stored else "not"
            else:
                outcomes[key] = "stored"

        tasks = [asyncio.create_task(one(n)) for n in range(150)]
        await eventually(lambda: len(outcomes) > 20)
        getattr(server, fault)()
        for n in range(150, 300):
            tasks.append(asyncio.create_task(one(n)))
            await asyncio.sleep(0.01)
        server.resume() if fault == "pause" else server.start()
        await asyncio.gather(*tasks)
        await eventually(lambda: client.connection.connected, within=40)
        await client.connection.flush()
        keys = [each.headers[headers.JOB_ID] async for each in client.connection.read(STREAM, ">")]
    assert len(outcomes) == 300
    assert len(keys) == len(set(keys))
    kept = {
        how: {key for key, each in outcomes.items() if each == how} for how in ("stored", "refused", "perhaps", "not")
    }
    assert kept["stored"] <= set(keys)
    assert set(keys) <= kept["stored"] | kept["perhaps"]


async def test_a_leader_that_gives_way_costs_no_election_and_fewer_replicas_are_refused(
    own_cluster: Cluster, eventually: Eventually
) -> None:
    async with opened(own_cluster) as client, opened(own_cluster, "single") as other:
        await provision.apply(client.connection, client.topology)
        with pytest.raises(DataLossRefused, match="num_replicas from 3 to 1 deletes copies"):
            await provision.apply(other.connection, other.topology)
        flow = Stream(client)
        async with flow.worker().running(client):
            producing = asyncio.create_task(flow.produce())
            await eventually(lambda: len(flow.results) > 20, within=40)
            for consumer in ("", LANE):
                since = time.monotonic()
                own_cluster.step_down(STREAM, consumer)
                await eventually(lambda: flow.started_at[-1] > since + 1, within=40)  # noqa: B023
                assert flow.gap_s(since) < 4  # an election takes 4 to 9 s
            await flow.end()
            await producing


async def test_the_first_job_runs_soon_after_the_restart_of_a_server(
    own_server: Callable[..., NatsProcess], eventually: Eventually
) -> None:
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        flow = Stream(client)
        async with flow.worker().running(client):
            producing = asyncio.create_task(flow.produce())
            await eventually(lambda: len(flow.results) > 20)
            server.kill()
            await asyncio.sleep(3)  # the backoff of the dialling has grown
            server.start()
            up = time.monotonic()
            await eventually(lambda: flow.started_at[-1] > up)
            first = next(each for each in flow.started_at if each > up)
            assert first - up < 12  # not when heartbeats have stayed away for 12.5 s
            await flow.end()
            await producing


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_leaders_that_hang_or_die_cost_an_election_and_nothing_else(
    own_cluster: Cluster, eventually: Eventually
) -> None:
    async with opened(own_cluster) as client:
        await provision.apply(client.connection, client.topology)
        flow = Stream(client)

        async def goes_on() -> None:
            ended, asked = len(flow.results), time.monotonic()
            await eventually(lambda: len(flow.results) > ended + 50, within=40)
            assert flow.gap_s(asked) < 12  # an election takes 4 to 9 s

        async with flow.worker().running(client):
            producing = asyncio.create_task(flow.produce())
            await eventually(lambda: len(flow.results) > 20, within=40)
            leader = own_cluster.leader(STREAM)
            leader.pause()
            await goes_on()
            leader.resume()
            await goes_on()
            own_cluster.leader(STREAM, LANE).kill()
            await goes_on()
            await flow.end()
            await producing
