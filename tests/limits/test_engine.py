"""The limits of a key, heeded by real workers: what waits, where, and what the provider sees."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import subjects

from ..support import Account, create_streams, eventually
from .provider import FAMILY, NAME, Provider

STREAM = "LLM_CALLS"


class Call(aiqueue.Message, kind="llm.call", family=NAME):
    n: int = 0
    model: str | None = "m"
    tokens: float = 1.0
    takes_s: float = 0.0


Connected = Callable[..., Any]


@pytest.fixture
def limits(tmp_path: Path) -> Callable[..., Path]:
    """Write a directory of stream files with the family of these tests, and limits.toml with these tables."""

    def write(*tables: str) -> Path:
        directory = tmp_path / subjects.new_id()
        directory.mkdir()
        (directory / "llm.toml").write_text(FAMILY)
        (directory / "limits.toml").write_text("".join(f'[[limit]]\nfamily = "{NAME}"\n{each}\n' for each in tables))
        return directory

    return write


@pytest.fixture
def connected(account: Account, limits: Callable[..., Path]) -> Connected:
    """Connect with these rules: ``async with connected('requests = 5') as client``."""

    @asynccontextmanager
    async def connect(*tables: str) -> AsyncIterator[aiqueue.Client]:
        async with aiqueue.connect(
            account.url, user=account.user, password=account.password, streams=limits(*tables)
        ) as client:
            await create_streams(client)
            yield client

    return connect


def calling(provider: Provider, *, concurrency: int = 20, cost: bool = False, **options: Any) -> aiqueue.Worker:
    """A worker that calls the provider for each job."""
    worker = aiqueue.Worker(concurrency=concurrency)
    if cost:
        options["cost"] = lambda message: message.tokens

    @worker.handle(Call, **options)
    async def handler(job: aiqueue.Job[Call]) -> None:
        await provider.call(f"{job.tenant}/{job.message.model}", job.message.tokens, job.message.takes_s)

    return worker


@asynccontextmanager
async def working(connected: Connected, tables: tuple[str, ...], workers: list[aiqueue.Worker]) -> AsyncIterator[None]:
    """Run each worker on a client of its own."""
    async with AsyncExitStack() as stack:
        for worker in workers:
            client = await stack.enter_async_context(connected(*tables))
            await stack.enter_async_context(worker.running(client))
        yield


async def fill(client: aiqueue.Client, count: int, tenant: str = "a", **fields: Any) -> None:
    await asyncio.gather(*(client.enqueue(Call(n=n, **fields), tenant=tenant) for n in range(count)))


async def stored(client: aiqueue.Client) -> dict[str, int]:
    """How many jobs wait or run, by subject."""
    info = await client.connection.api(f"STREAM.INFO.{STREAM}", {"subjects_filter": ">"})
    found: dict[str, int] = info["state"].get("subjects") or {}
    return found


async def is_empty(client: aiqueue.Client) -> bool:
    return not await stored(client)


async def delivered(client: aiqueue.Client, lane: subjects.Lane) -> int:
    """How many deliveries a lane has had."""
    family = client.topology.family(NAME)
    info = await client.connection.api(f"CONSUMER.INFO.{STREAM}.{family.lane_name(*lane[1:])}")
    return int(info["delivered"]["consumer_seq"])


def lane(key: str, tenant: str = "a", priority: str = "normal") -> subjects.Lane:
    return subjects.Lane(NAME, tenant, priority, subjects.hashed(key))


async def test_jobs_of_an_exhausted_key_wait_in_their_lane_while_another_key_runs_at_once(connected: Connected) -> None:
    provider = Provider()
    async with connected('key = "slow/1:x"\nrequests = 3') as client, calling(provider).running(client):
        await fill(client, 100, model="slow/1:x")
        await eventually(lambda: len(provider.calls) == 3)
        await fill(client, 100, model="free")
        await eventually(lambda: len(provider.calls) == 103)
        assert sum(count for subject, count in (await stored(client)).items() if subject.count(".") == 5) == 97
        assert await delivered(client, lane("slow/1:x")) <= 3 + 2  # those that ran, and one that found no credit
        assert Counter(tenant for _, tenant, _ in provider.calls) == {"a/slow/1:x": 3, "a/free": 100}


async def test_two_workers_never_call_more_often_or_for_more_than_a_window_allows(connected: Connected) -> None:
    provider = Provider()
    tables = ('requests = 30\ncost = 400\nwindow = "2s"',)
    workers = [calling(provider, cost=True) for _ in range(2)]
    async with connected(*tables) as client, working(connected, tables, workers):
        for n in range(150):
            await client.enqueue(Call(n=n, tokens=5.0 + n % 30), tenant="a")
        await asyncio.sleep(5)  # the span that is judged
    requests, cost = provider.worst(2.0)
    assert requests <= 30
    assert cost <= 400
    assert len(provider.calls) >= 40


async def test_a_limit_lowered_and_raised_holds_from_then_on(connected: Connected) -> None:
    provider = Provider()
    async with connected('requests = 1000\nwindow = "1s"') as client, calling(provider).running(client) as session:
        del session
        await fill(client, 400)
        await eventually(lambda: len(provider.calls) == 400)
        await client.set_limit(NAME, "m", requests=2, window="60s")
        await asyncio.sleep(1)
        before = len(provider.calls)
        await fill(client, 50)
        await asyncio.sleep(1)  # the span that is judged
        assert len(provider.calls) - before <= 2
        await client.unset_limit(NAME, "m")
        await eventually(lambda: len(provider.calls) == 450)


async def test_what_needs_more_than_the_limit_itself_is_a_dead_letter_at_once(connected: Connected) -> None:
    provider = Provider()
    async with connected("cost = 100") as client, calling(provider, cost=True).running(client):
        handle = await client.enqueue(Call(tokens=101), tenant="a")
        with pytest.raises(aiqueue.JobFailed, match="cost 101 is above the limit of 100 itself"):
            await handle.result(10)
        await fill(client, 1, tokens=100)
        await eventually(lambda: len(provider.calls) == 1)


@pytest.mark.parametrize(("tokens", "reason"), [(101.0, "limit"), (-1.0, "cost")])
async def test_a_job_that_was_moved_to_the_lane_of_its_key_and_may_not_run_is_a_dead_letter_at_once(
    connected: Connected, tokens: float, reason: str
) -> None:
    provider = Provider()
    async with (
        connected("cost = 100") as client,
        calling(provider, cost=True).running(client),
        connected() as producer,  # it does not know the lanes of keys yet: a worker moves its job
    ):
        await fill(client, 1)
        await eventually(lambda: len(provider.calls) == 1)  # the key has a lane
        handle = await producer.enqueue(Call(tokens=tokens), tenant="a")
        with pytest.raises(aiqueue.JobFailed) as failed:
            await handle.result(5)
    assert failed.value.reason == reason


async def test_a_job_without_a_key_and_one_that_no_rule_matches_are_not_limited(connected: Connected) -> None:
    provider = Provider()
    async with connected('key = "gpt-*"\nrequests = 1') as client, calling(provider).running(client):
        await fill(client, 20, model=None)
        await fill(client, 20, model="claude")
        await fill(client, 5, model="gpt-4o")
        await fill(client, 5, model="gpt-4o-mini")
        await eventually(lambda: len(provider.calls) == 42)
        assert Counter(tenant for _, tenant, _ in provider.calls)["a/gpt-4o"] == 1


async def test_calls_in_flight_are_limited_over_two_workers(connected: Connected) -> None:
    provider = Provider()
    tables = ("in_flight = 3",)
    async with (
        connected(*tables) as client,
        working(connected, tables, [calling(provider), calling(provider)]),
    ):
        await fill(client, 40, takes_s=0.05)
        await eventually(lambda: len(provider.calls) == 40, within=20)
    assert provider.most_open == 3


@pytest.mark.parametrize("kind", ["function", "step"])
async def test_a_thread_that_its_timeout_leaves_behind_keeps_its_place_in_flight(
    connected: Connected, kind: str
) -> None:
    started: list[int] = []
    left = threading.Event()
    worker = aiqueue.Worker(concurrency=5)

    def call(job: aiqueue.Job[Call]) -> None:
        started.append(job.message.n)
        if len(started) == 1:
            left.wait(20)

    if kind == "function":
        worker.handle(Call, timeout=0.2, retry=aiqueue.Backoff(attempts=1))(call)
    else:

        @worker.handle(Call, timeout=0.2, retry=aiqueue.Backoff(attempts=1))
        async def handler(job: aiqueue.Job[Call]) -> None:
            await job.step("call", partial(call, job))

    tables = ("in_flight = 1",)
    try:
        async with connected(*tables) as client, working(connected, tables, [worker]):
            first = await client.enqueue(Call(n=1), tenant="acme")
            with pytest.raises(aiqueue.JobFailed, match="timed out"):
                await first.result(timeout=10)
            second = await client.enqueue(Call(n=2), tenant="acme")
            await asyncio.sleep(0.5)  # the second one would have run in this time
            assert started == [1]
            left.set()
            await second.result(timeout=10)
            assert started == [1, 2]
    finally:
        left.set()


async def test_a_429_pauses_its_key_in_all_workers_and_no_other(connected: Connected) -> None:
    provider, refusals = Provider(), []

    def worker() -> aiqueue.Worker:
        made = aiqueue.Worker(concurrency=20)

        @made.handle(Call)
        async def handler(job: aiqueue.Job[Call]) -> None:
            if job.message.model == "busy" and not refusals:
                refusals.append(time.monotonic())
                raise aiqueue.Retry("429", after=1.5, pause="key")
            await provider.call(str(job.message.model), 1.0)

        return made

    tables = ('requests = 100000\nwindow = "1s"',)
    async with connected(*tables) as client, working(connected, tables, [worker(), worker()]):
        await fill(client, 1, model="busy")
        await eventually(lambda: bool(refusals))
        await fill(client, 100, model="busy")
        await fill(client, 100, model="other")
        await eventually(lambda: len(provider.calls) == 201, within=10)
    calls = [at for at, model, _ in provider.calls if model == "busy"]
    late = [at for at in calls if refusals[0] + 0.05 < at < refusals[0] + 1.5]
    assert late == []
    assert min(at for at in calls if at > refusals[0] + 1.4) < refusals[0] + 2.5
    assert max(at for at, model, _ in provider.calls if model == "other") < refusals[0] + 1.5


async def test_higher_priorities_go_first_within_an_exhausted_key(connected: Connected) -> None:
    seen: list[str] = []
    worker = aiqueue.Worker(concurrency=20)

    @worker.handle(Call)
    async def handler(job: aiqueue.Job[Call]) -> None:
        seen.append(job.priority)

    async with connected('requests = 10\nwindow = "1s"') as client:
        for priority in ("low", "high"):
            for n in range(20):
                await client.enqueue(Call(n=n), tenant="a", priority=priority)
        async with worker.running(client):
            await eventually(lambda: len(seen) == 40, within=15)
    assert seen[:20].count("high") >= 18  # the first ones are moved in any order


async def test_a_rule_that_comes_and_goes_over_waiting_jobs_loses_and_repeats_none(connected: Connected) -> None:
    provider = Provider()
    async with connected() as client:
        await fill(client, 300)
        await client.set_limit(NAME, "m", requests=10, window="60s")
        async with calling(provider).running(client):
            await eventually(lambda: len(provider.calls) == 10)
            await fill(client, 100)
            await client.unset_limit(NAME, "m")
            await eventually(lambda: len(provider.calls) >= 400, within=20)
            await eventually(lambda: is_empty(client))
    assert len(provider.calls) == 400


async def test_where_the_stream_has_no_lanes_of_keys_the_limit_holds_all_the_same(connected: Connected) -> None:
    provider = Provider()
    async with connected('requests = 5\nwindow = "60s"') as client:
        info = await client.connection.api(f"STREAM.INFO.{STREAM}")
        config = info["config"] | {"subjects": [each for each in info["config"]["subjects"] if each.count(".") < 5]}
        await client.connection.api(f"STREAM.UPDATE.{STREAM}", config)
        async with calling(provider).running(client):
            await fill(client, 20)
            await eventually(lambda: len(provider.calls) == 5)
            assert all(subject.count(".") == 4 for subject in await stored(client))
            await asyncio.sleep(0.5)  # the span that is judged
            assert len(provider.calls) == 5
