"""Publishes that wait at the same time go in atomic batches, where that is faster; nobody can tell by the outcome."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import nats
import pytest

import aiqueue
from aiqueue import codec, subjects
from aiqueue.client.client import Client
from aiqueue.connection import HEADERS_MAX, Stored, batches
from aiqueue.connection.batches import FEW, StreamBatcher
from aiqueue.connection.pace import IDLE_GAP_S, SPAN_S, TRIAL_FIRST_S, TRIAL_MAX_S, Pace
from aiqueue.enqueue.deadletter import Filter
from aiqueue.errors import AccessDenied, LaneFull, Unavailable
from aiqueue.job import JobSpec

from ..enqueue.test_bulk import WORK, acme_only, idle, outcomes, stored, texts
from ..enqueue.test_producer import Small, Task, where
from ..support import Account, Eventually, NatsProcess, create_streams

OwnServer = Callable[..., NatsProcess]
ALWAYS = "sync_interval: always"


class BatchingPace(Pace):
    """The pace of a stream where batches are known to be faster."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = True

    def measure(self, now: float, in_flight: int) -> None:
        pass


@pytest.fixture
async def client(account: Account, streams: Path) -> AsyncIterator[Client]:
    async with aiqueue.connect(**where(account, streams)) as opened:
        await create_streams(opened)
        yield batching(opened)


def batching(client: Client) -> Client:
    for stream in (WORK, "SMALL"):
        batcher(client, stream).pace = BatchingPace()
    return client


def batcher(client: Client, stream: str = WORK) -> StreamBatcher:
    return client.connection.window._get_batcher(stream)


def batched(jobs: list[Stored]) -> list[Stored]:
    return [each for each in jobs if "Nats-Batch-Id" in each.headers]


async def at_once(client: Client, count: int, **options: Any) -> list[Any]:
    calls = (client.enqueue(Task(text=str(n)), tenant="acme", **options) for n in range(count))
    return await asyncio.gather(*calls, return_exceptions=True)


def syncing_costs(directory: Path) -> bool:
    started = time.perf_counter()
    with (directory / "synced").open("wb") as file:
        for _ in range(20):
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    return time.perf_counter() - started > 0.002


# which way is chosen


@pytest.mark.parametrize("many", [False, True], ids=["enqueue", "enqueue_many"])
async def test_where_every_write_is_synced_those_that_wait_at_once_go_in_batches(
    own_server: OwnServer, streams: Path, tmp_path: Path, many: bool
) -> None:
    if not syncing_costs(tmp_path):
        pytest.skip("writing to disk costs nothing here")
    server = own_server(storage=ALWAYS)
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        jobs = 0

        async def caller() -> None:
            nonlocal jobs
            while not batcher(client).pace._rates[1]:
                await client.enqueue(Task(), tenant="acme")
                jobs += 1

        async with asyncio.timeout(30):
            if many:
                while not batcher(client).pace._rates[1]:
                    jobs += len(await outcomes(client, (Task() for _ in range(2_000))))
            else:
                await asyncio.gather(*(caller() for _ in range(256)))
        kept = await stored(client)
        assert len(kept) == jobs
        assert batched(kept)
        assert len({each.headers["Nats-Batch-Id"] for each in batched(kept)}) <= len(batched(kept)) / FEW


async def test_at_the_servers_default_setting_singles_stay_in_use(account: Account, streams: Path) -> None:
    async with aiqueue.connect(**where(account, streams)) as client:
        await create_streams(client)
        ways: list[bool] = []

        async def caller(pace: Pace) -> None:
            while len(ways) < 10_000 or pace.batches or not pace._rates[1]:
                await client.enqueue(Task(), tenant="acme")
                ways.append(pace.batches)

        async with asyncio.timeout(100):
            for _ in range(3):  # on a busy machine one measurement may be wrong
                ways.clear()
                batcher(client).pace = pace = Pace()
                await asyncio.gather(*(caller(pace) for _ in range(64)))
                if ways.count(True) < len(ways) / 2:
                    return
        raise AssertionError("batches were in use for more than half of the jobs, three times")


async def test_a_lone_enqueue_is_sent_at_once_whatever_is_faster(client: Client) -> None:
    await at_once(client, 64)
    assert batched(await stored(client))
    (last,) = await at_once(client, 1)
    call = asyncio.create_task(client.enqueue(Task(), tenant="acme"))
    await asyncio.sleep(0)
    assert client.connection.window.in_flight == 1
    for handle in (last, await call):
        job = await client.connection.get(WORK, handle._enqueued.seq)
        assert job is not None
        assert "Nats-Batch-Id" not in job.headers


# a batch that is opened, and two under way


async def opened(client: Client, *more: Callable[[], Any]) -> list[asyncio.Task[aiqueue.Handle]]:
    """The calls of as many callers as open a batch, the last ones `more`, in the turn of the loop that opens it."""
    await at_once(client, 64)
    assert idle(client)
    kinds = [*[lambda: client.enqueue(Task(text="open"), tenant="acme")] * (FEW - len(more)), *more]
    calls = [asyncio.create_task(each()) for each in kinds]
    await asyncio.sleep(0)
    (batch,) = batcher(client).batches.values()
    assert batch.open
    assert len(batch.members) == FEW - 1
    return calls


async def test_a_batch_is_opened_while_callers_run_and_complete_when_they_have(client: Client) -> None:
    calls = await opened(client)
    calls += [asyncio.create_task(client.enqueue(Task(text="open"), tenant="acme")) for _ in range(5)]
    await asyncio.sleep(0)
    (batch,) = batcher(client).batches.values()
    assert not batch.open
    handles = await asyncio.gather(*calls)
    sizes = [int(each.headers["Nats-Batch-Sequence"]) for each in batched(await stored(client))[-FEW:]]
    assert sizes == list(range(1, FEW + 1))
    assert len({each._enqueued.seq for each in handles}) == FEW + 5
    assert idle(client)


async def test_few_callers_open_no_batch_after_many(client: Client) -> None:
    await at_once(client, 64)
    calls = asyncio.create_task(at_once(client, FEW - 1))
    while not client.connection.window.in_flight:
        assert not batcher(client).batches
        await asyncio.sleep(0)
    for handle in await calls:
        job = await client.connection.get(WORK, handle._enqueued.seq)
        assert job is not None
        assert "Nats-Batch-Id" not in job.headers


async def test_an_opened_batch_whose_next_job_has_no_room_for_its_headers_is_given_up_and_all_go_alone(
    client: Client,
) -> None:
    template = client._open_producer().template(Task(), "acme", "normal", {"m": ""})
    room = HEADERS_MAX - len(template.header_block(subjects.new_id(), client.connection.clock))
    calls = await opened(client, lambda: client.enqueue(Task(text="large"), tenant="acme", headers={"m": "x" * room}))
    async with asyncio.timeout(25):
        handles = await asyncio.gather(*calls)
    kept = (await stored(client))[64:]
    assert texts(kept) == [*["open"] * (FEW - 1), "large"]
    assert [each._enqueued.seq for each in handles] == [each.seq for each in kept]
    assert not batched(kept)
    assert idle(client)


async def test_an_opened_batch_whose_next_caller_gives_up_is_given_up_and_the_others_go_alone(client: Client) -> None:
    calls = await opened(client)
    client.connection.window.abandon(list(batcher(client).gathered))
    calls.pop().cancel()
    async with asyncio.timeout(25):
        handles = await asyncio.gather(*calls)
    kept = (await stored(client))[64:]
    assert [each._enqueued.seq for each in handles] == [each.seq for each in kept]
    assert not batched(kept)
    assert idle(client)


async def test_a_link_that_is_lost_with_a_batch_open_loses_and_doubles_nothing(client: Client) -> None:
    calls = await opened(client)
    client.connection.renew()
    await client.connection._on_disconnected()  # at once, before the batch is completed
    assert not batcher(client).batches
    async with asyncio.timeout(20):
        handles = await asyncio.gather(*calls)
    kept = (await stored(client))[64:]
    assert {each._enqueued.seq for each in handles} == {each.seq for each in kept}
    assert len(kept) == FEW
    assert idle(client)


async def test_a_second_batch_is_sent_before_the_first_is_answered_and_the_refusal_of_one_is_not_the_others(
    client: Client,
) -> None:
    first = await client.enqueue(Task(text="first"), tenant="acme", unique="k")
    calls = [
        asyncio.create_task(client.enqueue(Task(text=str(n)), tenant="acme", unique="k" if n == 40 else None))
        for n in range(512)
    ]
    while len(batcher(client).batches) < 2:
        await asyncio.sleep(0)
    one, other = batcher(client).batches.values()
    assert min(len(one.members), len(other.members)) >= batches.ENOUGH
    handles = await asyncio.gather(*calls)
    assert [n for n, each in enumerate(handles) if each.duplicate] == [40]
    assert handles[40]._enqueued.seq == first._enqueued.seq
    by_seq = {each.seq: each for each in await stored(client)}
    assert len(by_seq) == 512
    for n, handle in enumerate(handles):
        if n != 40:
            assert codec.decode(by_seq[handle._enqueued.seq].data)["text"] == str(n)
    names = {each.headers["Nats-Batch-Id"] for each in batched(list(by_seq.values()))}
    assert other.name in names
    assert one.name not in names
    assert idle(client)


# what comes of each


async def test_512_callers_each_learn_the_place_of_their_own_job_beside_other_publishers(
    client: Client, account: Account
) -> None:
    plain = await nats.connect(account.url, user=account.user, password=account.password)
    ended = False

    async def others() -> int:
        count = 0
        while not ended:
            await plain.jetstream().publish("ai.agent.tasks.globex", b"{}")
            count += 1
        return count

    other = [asyncio.create_task(others()) for _ in range(4)]
    enqueued: list[tuple[int, aiqueue.Handle]] = []
    numbers = iter(range(5_000))

    async def caller() -> None:
        for n in numbers:
            handle = await client.enqueue(Task(text=str(n)), tenant="acme")
            enqueued.append((n, handle))

    await asyncio.gather(*(caller() for _ in range(512)))
    ended = True
    counts = await asyncio.gather(*other)
    await plain.close()
    by_seq = {each.seq: each for each in await stored(client)}
    assert len(by_seq) == 5_000 + sum(counts)
    assert len({handle._enqueued.seq for _, handle in enqueued}) == 5_000
    for n, handle in enqueued:
        job = by_seq[handle._enqueued.seq]
        assert (codec.decode(job.data)["text"], job.headers["Aiq-Job-Id"]) == (str(n), handle.id)
        assert not handle.duplicate
    in_batches = batched(list(by_seq.values()))
    assert len(in_batches) > 4_000
    assert max(int(each.headers["Nats-Batch-Sequence"]) for each in in_batches) > 100
    assert idle(client)


async def test_many_are_stored_in_their_order(client: Client) -> None:
    handles = await outcomes(client, (Task(text=str(n)) for n in range(10_000)))
    jobs = await stored(client)
    assert texts(jobs) == [str(n) for n in range(10_000)]
    assert [each._enqueued.seq for each in handles] == [each.seq for each in jobs]  # type: ignore[union-attr]
    assert len(batched(jobs)) > 9_000


async def test_a_duplicate_is_told_as_one_and_the_others_are_stored_once(client: Client) -> None:
    first = await client.enqueue(Task(text="first"), tenant="acme", unique="k")
    items = [JobSpec(Task(text=str(n)), unique={20: "k", 30: "twice", 40: "twice"}.get(n)) for n in range(64)]
    handles: Any = await outcomes(client, items)
    assert [n for n, each in enumerate(handles) if each.duplicate] == [20, 40]
    assert handles[20]._enqueued.seq == first._enqueued.seq
    assert handles[40]._enqueued.seq == handles[30]._enqueued.seq
    assert texts(await stored(client)) == ["first", *(str(n) for n in range(64) if n not in (20, 40))]
    assert batcher(client).pace.batches  # a duplicate says nothing against batches
    assert idle(client)


async def test_a_full_lane_refuses_what_does_not_fit_and_nothing_else(client: Client) -> None:
    calls = (client.enqueue(Small(n=n), tenant=("acme", "globex")[n % 2]) for n in range(64))
    results: list[Any] = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in results] == [*[aiqueue.Handle] * 6, *[LaneFull] * 58]
    assert len(await stored(client, "SMALL")) == 6


async def test_a_job_without_room_for_the_headers_of_a_batch_goes_by_itself(client: Client) -> None:
    template = client._open_producer().template(Task(), "acme", "normal", {"m": ""})
    room = HEADERS_MAX - len(template.header_block(subjects.new_id(), client.connection.clock))
    calls = (
        client.enqueue(Task(text=str(n)), tenant="acme", headers={"m": "x" * (room, 5)[n != 20]}) for n in range(40)
    )
    assert all(isinstance(each, aiqueue.Handle) for each in await asyncio.gather(*calls))
    jobs = await stored(client)
    assert texts(jobs) == [str(n) for n in range(40)]
    assert len(jobs[20].headers["m"]) == room
    assert "Nats-Batch-Id" not in jobs[20].headers
    assert len(batched(jobs)) > 20


async def test_a_tenant_that_is_not_permitted_is_denied_and_others_are_stored(
    own_server: OwnServer, streams: Path
) -> None:
    at = acme_only(own_server, streams)
    async with aiqueue.connect(**at, user="root", password="r") as root:
        await create_streams(root)
        for denied in ({5, 20}, {0}, {63}, set(range(0, 64, 2))):  # the first and the last message of a batch, too
            async with aiqueue.connect(**at, user="u", password="p") as client:
                batching(client)
                calls = (client.enqueue(Task(), tenant=("acme", "globex")[n in denied]) for n in range(64))
                async with asyncio.timeout(25):
                    results = await asyncio.gather(*calls, return_exceptions=True)
                assert {n for n, each in enumerate(results) if isinstance(each, AccessDenied)} == denied
                assert sum(isinstance(each, aiqueue.Handle) for each in results) == 64 - len(denied)
                assert idle(client)
        assert len(await stored(root)) == 4 * 64 - 36


async def test_a_stream_that_takes_no_batches_is_let_alone_for_a_while(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = await client.connection.api(f"STREAM.INFO.{WORK}")
    await client.connection.api(f"STREAM.UPDATE.{WORK}", info["config"] | {"allow_atomic": False})
    failed: list[str] = []
    failing = StreamBatcher._fail_batch
    monkeypatch.setattr(
        StreamBatcher,
        "_fail_batch",
        lambda self, batch, error: (failed.append(str(error)), failing(self, batch, error)),
    )
    for _ in range(5):
        assert all(isinstance(each, aiqueue.Handle) for each in await at_once(client, 200))
    assert len(failed) == 1
    assert "disabled" in failed[0]
    jobs = await stored(client)
    assert len(jobs) == 1_000
    assert not batched(jobs)


async def test_without_the_stream_each_says_what_to_do(account: Account, streams: Path, eventually: Eventually) -> None:
    async with aiqueue.connect(**where(account, streams)) as client:
        results = await at_once(batching(client), 50)
        assert all(isinstance(each, aiqueue.errors.NotFound) and "aiqueue apply" in str(each) for each in results)
        await eventually(lambda: idle(client))


# what goes wrong on the way


async def test_callers_that_are_cancelled_behind_a_batch_are_not_sent(own_server: OwnServer, streams: Path) -> None:
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        batching(client)
        first = [asyncio.create_task(client.enqueue(Task(text=f"{n}"), tenant="acme")) for n in range(100)]
        server.pause()  # or the batch may be answered before the others are gathered
        while not batcher(client).batches:
            await asyncio.sleep(0)
        behind = [asyncio.create_task(client.enqueue(Task(text=f"{n}"), tenant="acme")) for n in range(100, 160)]
        while len(batcher(client).gathered) < 60:
            await asyncio.sleep(0)
        for call in behind[20:40]:
            call.cancel()
        while len(batcher(client).gathered) > 40:
            await asyncio.sleep(0)
        server.resume()
        await asyncio.gather(*first, *behind, return_exceptions=True)
        assert idle(client)
        assert texts(await stored(client)) == [f"{n}" for n in range(160) if not 120 <= n < 140]


async def test_callers_that_are_cancelled_under_way_leave_the_others_their_places(client: Client) -> None:
    calls = [asyncio.create_task(client.enqueue(Task(text=str(n)), tenant="acme")) for n in range(100)]
    while not batcher(client).batches:
        await asyncio.sleep(0)
    for call in calls[40:50]:
        call.cancel()
    results = await asyncio.gather(*calls, return_exceptions=True)
    by_seq = {each.seq: each for each in await stored(client)}
    for n, handle in enumerate(results):
        if isinstance(handle, aiqueue.Handle):
            assert codec.decode(by_seq[handle._enqueued.seq].data)["text"] == str(n)
    assert sum(isinstance(each, aiqueue.Handle) for each in results) == 90
    assert idle(client)


async def test_a_batch_that_is_not_answered_goes_again_and_each_job_is_stored_once(
    own_server: OwnServer, streams: Path, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr("aiqueue.connection.publish_window.TRY_S", 0.3)
    server = own_server()
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        batching(client)
        server.pause()
        short = asyncio.create_task(at_once(client, 100, timeout=0.1))
        assert {type(each) for each in await short} == {Unavailable}
        calls = asyncio.create_task(at_once(client, 100))
        await eventually(lambda: not batcher(client).batches and client.connection.window.in_flight == 100)
        assert not calls.done()
        server.resume()
        handles = await calls
        assert all(isinstance(each, aiqueue.Handle) and not each.duplicate for each in handles)
        jobs = {each.headers["Aiq-Job-Id"]: each.seq for each in await stored(client)}
        assert {each.id: each._enqueued.seq for each in handles}.items() <= jobs.items()
        assert len(await stored(client)) == len(jobs)


async def test_a_client_that_is_closed_meanwhile_ends_all(client: Client) -> None:
    calls = [asyncio.create_task(client.enqueue(Task(), tenant="acme")) for _ in range(300)]
    while not batcher(client).batches:
        await asyncio.sleep(0)
    window = client.connection.window
    await client.close()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert {type(each) for each in results} <= {aiqueue.Handle, Unavailable}
    assert not window._in_flight
    assert not window._queue


@pytest.mark.parametrize("storage", ["", ALWAYS])
async def test_the_server_killed_in_the_midst_of_batches_loses_and_doubles_nothing(
    own_server: OwnServer, streams: Path, eventually: Eventually, storage: str
) -> None:
    server = own_server(storage=storage)
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        batching(client)
        enqueued: list[tuple[int, Any]] = []
        numbers = iter(range(1_000_000))
        ended = False

        async def caller() -> None:
            while not ended:
                n = next(numbers)
                enqueued.append((n, await client.enqueue(Task(text=str(n)), tenant="acme")))

        callers = [asyncio.create_task(caller()) for _ in range(256)]
        for _ in range(3):
            goal = len(enqueued) + 1_000
            await eventually(lambda goal=goal: len(enqueued) > goal and batcher(client).batches, within=30)
            server.kill()
            await eventually(lambda: not client.connection.connected)
            server.start()
            await eventually(lambda: client.connection.connected, within=30)
        ended = True
        async with asyncio.timeout(30):
            await asyncio.gather(*callers)
        jobs = await stored(client)
        ids = {each.headers["Aiq-Job-Id"]: each for each in jobs}
        assert len(ids) == len(jobs) == len(enqueued)
        for n, handle in enqueued:
            assert not handle.duplicate
            assert (ids[handle.id].seq, codec.decode(ids[handle.id].data)["text"]) == (handle._enqueued.seq, str(n))
        assert batched(jobs)
        assert idle(client)


async def test_many_over_a_server_restart_are_stored_once_and_told_once(
    own_server: OwnServer, streams: Path, eventually: Eventually
) -> None:
    server = own_server(storage=ALWAYS)
    async with aiqueue.connect(**where(server, streams)) as client:
        await create_streams(client)
        batching(client)
        handles: list[Any] = []

        async def run() -> None:
            async for outcome in client.enqueue_many((Task(text=str(n)) for n in range(12_000)), tenant="acme"):
                handles.append(outcome)  # noqa: PERF401

        work = asyncio.create_task(run())
        await eventually(lambda: len(handles) > 2_000, within=30)
        server.kill()
        await eventually(lambda: not client.connection.connected)
        assert len(handles) < 12_000
        server.start()
        async with asyncio.timeout(60):
            await work
        assert all(isinstance(each, aiqueue.Handle) and not each.duplicate for each in handles)
        jobs = await stored(client)
        assert texts(jobs) == [str(n) for n in range(12_000)]
        assert [each._enqueued.seq for each in handles] == [each.seq for each in jobs]


# downstream


async def test_a_worker_runs_what_was_stored_in_batches_and_carries_nothing_of_them_on(client: Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=2, first=0.02, cap=0.05))
    async def task(job: aiqueue.Job[Task]) -> str:
        if int(job.message.text) % 10 == 5:
            raise aiqueue.Reject("no")
        if int(job.message.text) % 10 == 6 and job.attempt == 1:
            raise aiqueue.Retry("later", after=0.05)
        return job.message.text

    handles = await at_once(client, 60, headers={"model": "m"})
    assert len(batched(await stored(client))) > 40
    async with worker.running(client):
        for n, handle in enumerate(handles):
            if n % 10 != 5:
                assert await handle.result(20) == str(n)
            else:
                with suppress(aiqueue.errors.JobFailed):
                    await handle.result(20)
    letters = [each async for each in client.dead.find(Filter())]
    assert len(letters) == 6
    for letter in letters:
        kept = await client.connection.get(client.topology.dead_stream.name, letter.seq)
        assert kept is not None
        assert kept.headers["model"] == "m"
        assert not [name for name in kept.headers if name.startswith("Nats-Batch")]


# the pace, without a server


def run(pace: Pace, now: float, seconds: float, rates: tuple[float, float], load: int = 64) -> float:
    """Load for so long on a stream of these rates, of singles and of batches. Returns when it ended."""
    pace.start_load(now)
    end = now + seconds
    while now < end:
        count = load if pace.batches else 1
        now += count / rates[pace.batches]
        if pace.count_replies(count, load):
            pace.measure(now, load - count)
    return now


def test_the_faster_way_is_found_within_some_hundred_milliseconds() -> None:
    pace = Pace()
    now = run(pace, 100.0, 0.3, (3_000, 12_000))
    assert (pace.batches, pace.trying) == (True, False)
    run(pace, now, 0.3, (3_000, 12_000))
    assert pace.batches


def test_the_slower_way_is_tried_again_ever_more_rarely() -> None:
    pace, now, slow, turns = Pace(), 100.0, 0.0, []
    while now < 220:
        started, way = now, pace.batches
        now = run(pace, now, 0.01, (25_000, 12_000))
        if pace.batches or way:
            slow += now - started
            turns.append(started)
    starts = [b for a, b in zip([0.0, *turns], turns, strict=False) if b - a > 0.2]
    assert len(starts) <= 12
    assert starts[-1] - starts[-2] > TRIAL_MAX_S - 1
    assert slow < 1


def test_a_server_whose_setting_changes_is_followed() -> None:
    pace = Pace()
    now = run(pace, 100.0, 60, (25_000, 12_000))
    assert not pace.batches
    now = run(pace, now, TRIAL_MAX_S + 1, (3_000, 12_000))
    assert pace.batches
    run(pace, now, TRIAL_MAX_S + 1, (25_000, 12_000))
    assert not pace.batches


def test_another_load_is_a_reason_to_try_early() -> None:
    pace = Pace()
    now = run(pace, 100.0, 60, (25_000, 20_000), load=64)
    assert not pace.batches
    run(pace, now, TRIAL_FIRST_S + 1, (25_000, 40_000), load=1_000)
    assert pace.batches


def test_loads_under_which_the_same_way_was_the_better_one_are_no_news() -> None:
    pace, tried, now = Pace(), 0, 100.0
    for turn in range(60):
        for load, rates in ((64, (3_000, 9_000)), (512, (3_000, 25_000))):
            before = pace._tried_at
            now = run(pace, now, 0.3, rates, load=load)
            tried += turn >= 30 and pace._tried_at != before
    assert pace.batches
    assert tried <= 2


def test_a_trial_that_is_plainly_worse_ends_early() -> None:
    pace = Pace()
    now = run(pace, 100.0, 1, (1_000, 12_000))
    assert pace.batches
    slow, trials = 0.0, 0
    while trials < 4:
        started, way, before = now, pace.batches, pace._tried_at
        now = run(pace, now, 0.002, (1_000, 12_000))
        slow += 0 if way and pace.batches else now - started
        trials += pace._tried_at != before
    assert slow / trials < 0.08  # what was under way when it began and when it ended is waited for


def test_few_at_a_time_or_now_and_then_are_no_measure() -> None:
    pace = Pace()
    now = run(pace, 100.0, 2, (5_000, 5_000), load=4)
    for _ in range(100):
        now = run(pace, now + 2 * IDLE_GAP_S, SPAN_S / 2, (5_000, 5_000))
    assert pace._rates == [0.0, 0.0]
    assert not pace.batches
    assert not pace.trying


def test_a_rest_is_kept() -> None:
    pace = Pace()
    now = run(pace, 100.0, 1, (3_000, 12_000))
    pace.pause_batches(now, 10)
    later = run(pace, now, 9, (3_000, 12_000))
    assert not pace.batches
    run(pace, later, 2, (3_000, 12_000))
    assert pace.batches
    assert batches.PAUSE_S >= 10


def test_what_was_found_in_a_bad_moment_does_not_outlast_it() -> None:
    pace = Pace()
    now = run(pace, 100.0, 100, (25_000, 12_000))
    now = run(pace, now, 0.6, (4_000, 12_000))  # something else had the processors
    run(pace, now, 1.5, (25_000, 12_000))
    assert not pace.batches
