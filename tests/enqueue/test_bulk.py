"""Many jobs through one window."""

from __future__ import annotations

import asyncio
import gc
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import codec
from aiqueue.client.client import Client
from aiqueue.connection import Stored, publish_window
from aiqueue.enqueue import producer
from aiqueue.errors import (
    AccessDenied,
    AIQueueError,
    BadInput,
    EncodeError,
    InvalidToken,
    LaneFull,
    NotFound,
    QueueFull,
    TooLarge,
    Unavailable,
    UnknownFamily,
)
from aiqueue.job import JobSpec, Message, untyped

from ..support import Account, Eventually, NatsProcess, create_streams
from .test_producer import Small, Task, where

OwnServer = Callable[..., NatsProcess]
WORK = "AI_AGENT_TASKS"


@pytest.fixture
async def client(account: Account, streams: Path) -> AsyncIterator[Client]:
    async with aiqueue.connect(**where(account, streams)) as opened:
        await create_streams(opened)
        yield opened


async def stored(client: Client, stream: str = WORK) -> list[Stored]:
    return [each async for each in client.connection.read(stream, ">")]


def texts(messages: list[Stored]) -> list[str]:
    return [codec.decode(each.data)["text"] for each in messages]


async def outcomes(client: Client, items: Any, **options: Any) -> list[aiqueue.Handle | AIQueueError]:
    return [each async for each in client.enqueue_many(items, **({"tenant": "acme"} | options))]


def idle(client: Client) -> bool:
    at = client.connection.window
    gathered = any(each.gathered or each.batches or each._in_flight for each in at._batchers.values())
    return not (
        at._in_flight
        or at._queue
        or at._retries
        or at._lookups._waiting
        or at._lookups._tasks
        or at._in_flight_bytes
        or gathered
    )


# what is stored


async def test_twenty_thousand_of_many_lanes_are_stored_once_in_the_order_of_each_lane(client: Client) -> None:
    tenants, priorities = ("acme", "globex", "initech"), ("high", "normal", "low")

    def items() -> Iterator[JobSpec]:
        for n in range(20_000):
            yield JobSpec(Task(text=str(n)), tenant=tenants[n % 3], priority=priorities[n % 7 % 3])

    results = await outcomes(client, items(), tenant=None)
    assert len(results) == 20_000
    jobs = await stored(client)
    assert len(jobs) == 20_000
    by_seq = {each.seq: each for each in jobs}
    for n, handle in enumerate(results):
        assert isinstance(handle, aiqueue.Handle)
        job = by_seq[handle._enqueued.seq]
        assert codec.decode(job.data)["text"] == str(n)
        assert job.subject == f"ai.agent.tasks.{tenants[n % 3]}.{priorities[n % 7 % 3]}"
        assert job.headers["Aiq-Job-Id"] == handle.id
    numbers = list(map(int, texts(jobs)))
    assert numbers == sorted(numbers)  # all lanes, even
    assert idle(client)


async def test_a_job_of_many_is_like_one_alone(client: Client) -> None:
    options: dict[str, Any] = {"headers": {"model": "50%b"}, "deadline": "1h"}
    (many,) = await outcomes(client, [Small(n=5)], priority="high", **options)
    one = await client.enqueue(Small(n=5), tenant="acme", priority="high", **options)
    assert isinstance(many, aiqueue.Handle)
    alike = []
    for job, handle in zip(await stored(client, "SMALL"), (many, one), strict=True):
        job_headers = {name: value.replace(handle.id, "ID") for name, value in job.headers.items()}
        assert abs(int(job_headers.pop("Aiq-Deadline")) / 1000 - time.time() - 3600) < 30
        alike.append((job.subject, job.data, job_headers))
    assert alike[0] == alike[1]
    assert (many.tenant, many.family, many.lane.priority, many.duplicate) == ("acme", "small.jobs", "high", False)


async def test_an_items_options_go_over_those_of_all(client: Client) -> None:
    items = [
        Task(text="plain"), JobSpec(Task(text="own"), tenant="globex", priority="low", headers={"b": "3", "c": "4"}),
        JobSpec(Task(text="key"), unique="k-1", deadline=60), Task(text="field", task_id="t-1"),
    ]  # fmt: skip
    results = await outcomes(client, items, headers={"a": "1", "b": "2"})
    assert [each.id for each in results[2:]] == ["k-1", "t-1"]  # type: ignore[union-attr]
    plain, own, key, _ = await stored(client)
    assert (plain.headers["a"], plain.headers["b"]) == ("1", "2")
    assert own.subject == "ai.agent.tasks.globex.low"
    assert (own.headers["a"], own.headers["b"], own.headers["c"]) == ("1", "3", "4")
    assert "Aiq-Deadline" in key.headers
    assert "Aiq-Deadline" not in plain.headers


async def test_the_same_key_twice_is_one_job_and_a_duplicate(client: Client) -> None:
    results = await outcomes(client, [JobSpec(Task(), unique="k") for _ in range(3)])
    assert [each.duplicate for each in results] == [False, True, True]  # type: ignore[union-attr]
    assert len(await stored(client)) == 1


async def test_a_key_that_a_model_sets_by_itself_is_the_id_of_every_item(client: Client) -> None:
    class Derived(Message, kind="derived", family="gateway.requests"):
        url: str

        def model_post_init(self, context: Any) -> None:
            object.__setattr__(self, "request_id", self.url)

    handles = await outcomes(client, [Derived(url=url) for url in ("a", "b", "c", "b")])
    assert [(each.id, each.duplicate) for each in handles if isinstance(each, aiqueue.Handle)] == [
        ("a", False), ("b", False), ("c", False), ("b", True),
    ]  # fmt: skip


async def test_workers_are_hinted_of_each_item_of_an_iterable_that_takes_its_time(
    client: Client, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(producer, "HINT_EVERY_S", -1.0)
    hints: list[Any] = []
    await client.connection.subscribe("aiq.hint.>", hints.append)

    async def items() -> AsyncIterator[Small]:
        for _ in range(5):
            yield Small()
            await asyncio.sleep(0)

    assert len(await outcomes(client, items())) == 5
    await eventually(lambda: len(hints) == 5)


async def test_no_items_are_no_outcomes(client: Client) -> None:
    assert await outcomes(client, []) == []
    assert await outcomes(client, iter(())) == []


async def test_an_async_iterable_is_told_of_each_item_before_the_next_one_comes(client: Client) -> None:
    heard: asyncio.Queue[str] = asyncio.Queue()

    async def items() -> AsyncIterator[Message]:
        for n in range(5):
            yield Task(text=str(n), task_id=f"t-{n}")
            assert await heard.get() == f"t-{n}"

    async for outcome in client.enqueue_many(items(), tenant="acme"):
        assert isinstance(outcome, aiqueue.Handle)
        heard.put_nowait(outcome.id)
    assert texts(await stored(client)) == ["0", "1", "2", "3", "4"]


async def test_many_of_an_async_iterable_are_stored_in_order_within_the_window(client: Client) -> None:
    taken = 0

    async def items() -> AsyncIterator[Message]:
        nonlocal taken
        for n in range(3_000):
            taken += 1
            yield Task(text=str(n))

    yielded = 0
    async for outcome in client.enqueue_many(items(), tenant="acme", window=50):
        assert isinstance(outcome, aiqueue.Handle)
        assert taken - yielded <= 51  # the one that is being yielded
        yielded += 1
    assert texts(await stored(client)) == [str(n) for n in range(3_000)]


# errors in their places


class Wild(Message, kind="wild"):
    def model_dump(self, **_: Any) -> dict[str, Any]:
        raise KeyError("of the model's own")


@pytest.mark.parametrize(
    ("bad", "kind", "problem"),
    [
        (JobSpec(Task(), tenant="a.b"), InvalidToken, "tenant"), (JobSpec(Task(), tenant=5), InvalidToken, "tenant"),
        (JobSpec(Task(), unique=""), BadInput, "unique key"), (Task(task_id="a.b"), InvalidToken, "task_id"),
        (JobSpec(Task(), priority="urgent"), BadInput, "high, normal, low"),
        (JobSpec(Task(), headers={"Nats-TTL": "1"}), BadInput, "Nats-TTL"),
        (JobSpec(Task(), headers={"m": "é"}), BadInput, "header"),
        (JobSpec(Task(), headers={"m": "x "}), BadInput, "must not begin or end with a space"),
        (JobSpec(Task(), deadline="soon"), BadInput, "deadline"),
        (JobSpec(Task(), headers={"m": "x" * 2_000_000}), TooLarge, "65,535"),
        (Small(blob=bytes(200_000)), BadInput, "max_msg_size"),
        (untyped("x", "no.family")(), UnknownFamily, "no.family"),
        (untyped("x", "agent.tasks")(a=object()), EncodeError, "object"), (Wild(), EncodeError, "KeyError"),
        ({"text": "x"}, BadInput, "not a dict"), (None, BadInput, "Message"), (JobSpec("x"), BadInput, "not a str"),
    ],
)  # fmt: skip
async def test_one_bad_item_is_an_error_in_its_place_and_stops_no_other(
    client: Client, bad: Any, kind: type[AIQueueError], problem: str
) -> None:
    first, error, last = await outcomes(client, [Task(text="a"), bad, Task(text="b")])
    assert isinstance(first, aiqueue.Handle)
    assert isinstance(last, aiqueue.Handle)
    assert isinstance(error, kind)
    assert problem in str(error)
    assert error.item is bad
    assert texts(await stored(client)) == ["a", "b"]
    assert "item" not in aiqueue.errors.details(error)


async def test_without_a_tenant_anywhere_it_is_that_items_error(client: Client) -> None:
    bad, good = await outcomes(client, [Task(), JobSpec(Task(), tenant="acme")], tenant=None)
    assert isinstance(bad, BadInput)
    assert "tenant" in str(bad)
    assert isinstance(good, aiqueue.Handle)


@pytest.mark.parametrize("form", ["plain", "async"])
async def test_what_the_items_raise_comes_after_all_outcomes_before_it(client: Client, form: str) -> None:
    def plain() -> Iterator[Message]:
        yield from (Task(text=str(n)) for n in range(100))
        raise ZeroDivisionError

    async def waited() -> AsyncIterator[Message]:
        for each in plain():
            yield each

    results = []

    async def run() -> None:
        async for outcome in client.enqueue_many(plain() if form == "plain" else waited(), tenant="acme"):
            results.append(outcome)  # noqa: PERF401

    with pytest.raises(ZeroDivisionError):
        await run()
    assert len(results) == len(await stored(client)) == 100


async def test_a_cancellation_within_the_items_is_raised_after_all_outcomes_before_it(client: Client) -> None:
    """As of a task that the items await, and that somebody else cancels. The caller itself is not cancelled."""
    results, awaited = [], asyncio.get_running_loop().create_future()

    async def items() -> AsyncIterator[Message]:
        for n in range(100):
            yield Task(text=str(n))
        await awaited

    async def run() -> None:
        async for outcome in client.enqueue_many(items(), tenant="acme"):
            results.append(outcome)
            if len(results) == 100:
                awaited.cancel()

    running = asyncio.create_task(run())
    done, _ = await asyncio.wait([running], timeout=20)
    running.cancel()
    assert done, "the caller waits for ever"
    assert running.cancelled()
    assert not running.cancelling()  # by anybody else
    assert len(results) == len(await stored(client)) == 100


@pytest.mark.parametrize(
    "options",
    [{"window": 0}, {"window": 1.5}, {"on_full": "drop"}, {"timeout": "soon"}, {"deadline": -1}],
)
async def test_a_wrong_argument_is_refused_at_once(client: Client, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(options))):
        client.enqueue_many([Task()], tenant="acme", **options)


async def test_without_the_stream_each_item_says_what_to_do(
    account: Account, streams: Path, eventually: Eventually
) -> None:
    async with aiqueue.connect(**where(account, streams)) as client:
        results = await outcomes(client, [Task() for _ in range(50)])
        assert all(isinstance(each, NotFound) and "aiqueue apply" in str(each) for each in results)
        assert len(set(map(id, results))) == 50
        await eventually(lambda: idle(client))


def acme_only(own_server: OwnServer, streams: Path) -> dict[str, Any]:
    """Where user root (password r) may do all, and user u (password p) may enqueue tasks of the tenant acme only."""
    permitted = '"ai.agent.tasks.acme", "$JS.API.>", "aiq.>"'
    server = own_server(
        "authorization { users: [ {user: root, password: r}, {user: u, password: p, permissions: "
        f'{{publish: [{permitted}], subscribe: [">"]}}}} ] }}'
    )
    return {"url": server.url, "streams": streams}


async def test_a_tenant_that_is_not_permitted_is_denied_and_others_are_stored(
    own_server: OwnServer, streams: Path
) -> None:
    at = acme_only(own_server, streams)
    async with aiqueue.connect(**at, user="root", password="r") as root:
        await create_streams(root)
        async with aiqueue.connect(**at, user="u", password="p") as client:
            items = [JobSpec(Task(), tenant=("acme", "globex")[n % 2]) for n in range(20)]
            results = await outcomes(client, items)
            assert all(isinstance(each, aiqueue.Handle) for each in results[::2])
            assert all(isinstance(each, AccessDenied) for each in results[1::2])
        assert len(await stored(root)) == 10


# how much is under way


async def test_an_endless_iterator_is_read_no_further_than_the_window(client: Client) -> None:
    taken = 0

    def items() -> Iterator[Message]:
        nonlocal taken
        for taken in itertools.count(1):
            yield Task(text=str(taken))

    yielded = 0
    many = client.enqueue_many(items(), tenant="acme", window=100)
    async with aclosing(many):
        async for outcome in many:
            assert isinstance(outcome, aiqueue.Handle)
            yielded += 1
            assert taken - yielded <= 100
            if yielded == 1_000:
                await asyncio.sleep(0.05)  # a slow caller is not outrun
                assert taken - yielded <= 100
                break
    assert idle(client)
    assert texts(await stored(client))[:yielded] == [str(n) for n in range(1, yielded + 1)]


async def test_large_bodies_are_bounded_by_their_size_too(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aiqueue.enqueue.bulk.BYTES_MAX", 1_000_000)
    taken = yielded = most = 0

    def items() -> Iterator[Message]:
        nonlocal taken
        while taken < 100:
            taken += 1
            yield Task(text="x" * 100_000)

    async for outcome in client.enqueue_many(items(), tenant="acme"):
        assert isinstance(outcome, aiqueue.Handle)
        most = max(most, taken - yielded)
        yielded += 1
    assert yielded == 100
    assert most <= 11


async def test_leaving_early_leaves_nothing_behind(client: Client, eventually: Eventually) -> None:
    before = asyncio.all_tasks()

    async def endless() -> AsyncIterator[Message]:
        for n in itertools.count():
            yield Task(text=str(n))

    async for _ in client.enqueue_many(endless(), tenant="acme"):
        break
    gc.collect()
    await eventually(lambda: idle(client) and asyncio.all_tasks() == before)

    async def forever() -> None:
        async for _ in client.enqueue_many(endless(), tenant="acme"):
            pass

    task = asyncio.create_task(forever())
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: idle(client) and asyncio.all_tasks() == before)
    assert not (await client.enqueue(Task(), tenant="acme")).duplicate  # the connection lives


async def test_concurrent_callers_share_one_window_first_come_first_served(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_window, "IN_FLIGHT_MAX", 16)
    at, most = client.connection.window, 0
    send = at.send

    def counted(publish: Any) -> None:
        nonlocal most
        send(publish)
        most = max(most, at.in_flight)

    monkeypatch.setattr(at, "send", counted)
    results = await asyncio.gather(*(client.enqueue(Task(text=str(n)), tenant="acme") for n in range(500)))
    assert most == 16
    assert [each._enqueued.seq for each in results] == list(range(1, 501))
    assert idle(client)


async def test_callers_that_are_cancelled_in_line_are_not_sent(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish_window, "IN_FLIGHT_MAX", 1)
    calls = [asyncio.create_task(client.enqueue(Task(text=str(n)), tenant="acme")) for n in range(10)]
    await asyncio.sleep(0)
    for call in calls[3:7]:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert texts(await stored(client)) == ["0", "1", "2", "7", "8", "9"]


# full lanes


async def test_a_full_lane_refuses_its_items_and_no_others(client: Client) -> None:
    items = [JobSpec(Small(n=n), tenant=("acme", "globex")[n >= 6]) for n in range(8)]
    results = await outcomes(client, items)
    assert [type(each) for each in results] == [aiqueue.Handle] * 3 + [LaneFull] * 3 + [aiqueue.Handle] * 2
    error = results[3]
    assert isinstance(error, QueueFull)
    assert (error.limit, error.item) == (3, items[3])
    assert len(await stored(client, "SMALL")) == 5


async def test_waiting_for_a_full_lane_lets_others_pass_and_keeps_its_order(client: Client) -> None:
    items = [JobSpec(Small(n=n), tenant=("acme", "globex")[n == 11]) for n in range(12)]
    waiting = asyncio.create_task(outcomes(client, items, on_full="wait", timeout=20))
    seen: list[int] = []
    while not waiting.done():
        for job in await stored(client, "SMALL"):
            seen.append(codec.decode(job.data)["n"])
            await client.connection.api("STREAM.MSG.DELETE.SMALL", {"seq": job.seq})
        await asyncio.sleep(0.01)
    seen += [codec.decode(job.data)["n"] for job in await stored(client, "SMALL")]
    assert all(isinstance(each, aiqueue.Handle) for each in waiting.result())
    assert sorted(seen) == list(range(12))
    assert seen.index(11) <= 4  # went past the lane that was full


async def test_waiting_for_a_full_lane_ends_at_the_timeout(client: Client) -> None:
    started_at = time.monotonic()
    results = await outcomes(client, [Small(n=n) for n in range(200)], on_full="wait", timeout=0.6)
    assert 0.5 < time.monotonic() - started_at < 20
    assert [type(each) for each in results] == [aiqueue.Handle] * 3 + [LaneFull] * 197
    assert idle(client)


# faults


async def test_over_a_server_restart_each_item_is_stored_once_and_told_once(
    own_server: OwnServer, streams: Path, eventually: Eventually
) -> None:
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        results: list[aiqueue.Handle | AIQueueError] = []

        async def run() -> None:
            async for outcome in client.enqueue_many((Task(text=str(n)) for n in range(12_000)), tenant="acme"):
                results.append(outcome)  # noqa: PERF401

        work = asyncio.create_task(run())
        await eventually(lambda: len(results) > 1_000)
        server.kill()
        await eventually(lambda: not client.connection.connected)
        assert len(results) < 12_000
        server.start()
        await work
        assert all(isinstance(each, aiqueue.Handle) and not each.duplicate for each in results)
        jobs = await stored(client)
        assert texts(jobs) == [str(n) for n in range(12_000)]
        assert [each._enqueued.seq for each in results] == [each.seq for each in jobs]  # type: ignore[union-attr]
        assert idle(client)


async def test_without_a_server_each_item_ends_at_its_timeout_and_says_whether_it_may_be_stored(
    own_server: OwnServer, streams: Path, eventually: Eventually
) -> None:
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        server.pause()
        work = outcomes(client, [Task() for _ in range(30)], timeout=0.5, window=10)
        assert all(isinstance(each, Unavailable) and each.maybe_stored for each in await work)
        server.kill()
        await eventually(lambda: not client.connection.connected)
        results = await outcomes(client, [Task()], timeout=0.3)
        assert [(type(each), each.maybe_stored) for each in results] == [(Unavailable, False)]  # type: ignore[union-attr]


async def test_a_client_that_is_closed_meanwhile_ends_it(client: Client) -> None:
    with pytest.raises(BadInput, match="async with"):
        aiqueue.connect().enqueue_many([])
    results = []
    async for outcome in client.enqueue_many((Task() for _ in range(3_000)), tenant="acme", window=500):
        results.append(outcome)
        if len(results) == 100:
            await client.close()
    assert len(results) == 3_000
    assert {type(each) for each in results} == {aiqueue.Handle, Unavailable}


# progress, and the sync form


async def test_progress_is_told_now_and_then_and_at_the_end(client: Client) -> None:
    reports: list[tuple[int, int]] = []
    items = [Task(task_id="a.b") if n % 10 == 0 else Task() for n in range(5_000)]
    started_at = time.monotonic()
    await outcomes(client, items, progress=lambda done, failed: reports.append((done, failed)))
    assert reports == sorted(reports)
    assert reports[-1] == (4_500, 500)
    assert len(reports) <= (time.monotonic() - started_at) * 10 + 3


async def test_the_sync_form_yields_the_same(client: Client, account: Account, streams: Path) -> None:
    def script() -> list[Any]:
        with aiqueue.connect_sync(**where(account, streams)) as sync:
            items = (JobSpec(Task(text=str(n)), tenant="a.b" if n == 5 else None) for n in range(50))
            return list(sync.enqueue_many(items, tenant="acme", window=8))

    results = await asyncio.to_thread(script)
    assert [type(each) for each in results] == [*[aiqueue.SyncHandle] * 5, InvalidToken, *[aiqueue.SyncHandle] * 44]
    assert texts(await stored(client)) == [str(n) for n in range(50) if n != 5]
