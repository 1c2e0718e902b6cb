"""What a known id leads to: `on_duplicate`, and the handles of a job id's runs."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue import headers, subjects
from aiqueue.enqueue.parking import Parking
from aiqueue.errors import BadInput, DuplicateJob, JobFailed, LaneFull, Unavailable
from aiqueue.requests import claims
from aiqueue.topology import provision

from ..support import Cluster, Eventually, create_streams

TENANT = "acme"


class Task(aiqueue.Message, kind="task"):
    n: int = 0
    fails: bool = False


class Page(aiqueue.Message, kind="rag.query", family="rag.queries"):
    fails: bool = False


@pytest.fixture
async def client(account: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


class Runs:
    """A worker's runs of Task: their numbers, in the order in which they began."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.go = asyncio.Event()
        self.go.set()

    def worker(self) -> aiqueue.Worker:
        worker = aiqueue.Worker()

        @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
        async def task(job: aiqueue.Job[Task]) -> int:
            self.numbers.append(job.message.n)
            await self.go.wait()
            if job.message.fails:
                raise ValueError(f"task {job.message.n} fails")
            return job.message.n

        @worker.handle(Page, retry=aiqueue.Backoff(attempts=1))
        async def page(job: aiqueue.Job[Page]) -> str:
            if job.message.fails:
                raise ValueError("no page")
            return "page"

        return worker


async def letters(client: aiqueue.Client) -> list[int]:
    return [each.seq async for each in client.dead.find()]


async def fail(client: aiqueue.Client, unique: str = "k", n: int = 1) -> aiqueue.Handle:
    """Enqueue a job that fails, and wait for its failure and its dead letter."""
    handle = await client.enqueue(Task(n=n, fails=True), tenant=TENANT, unique=unique)
    with pytest.raises(JobFailed):
        await handle.result(25)
    return handle


# -- reruns


async def test_of_twenty_concurrent_reruns_of_a_failed_job_one_runs_and_the_first_handle_keeps_its_failure(
    client: aiqueue.Client,
) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        first = await fail(client)
        handles = await asyncio.gather(
            *(
                client.enqueue(Task(n=100 + i), tenant=TENANT, unique="k", on_duplicate="rerun_failed")
                for i in range(20)
            )
        )
        results = await asyncio.gather(*(handle.result(25) for handle in handles))
        assert Counter(handle.duplicate for handle in handles) == {False: 1, True: 19}
        assert len(set(results)) == 1
        assert runs.numbers == [1, results[0]]
        with pytest.raises(JobFailed, match="task 1 fails"):
            await first.result(25)
        assert await letters(client) == []
        assert {handle.id for handle in handles} == {"k"}


async def test_a_rerun_that_fails_too_can_be_rerun_and_each_handle_has_the_end_of_its_run(
    client: aiqueue.Client,
) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        handles = [await fail(client)]
        for n in (2, 3):
            again = await client.enqueue(Task(n=n, fails=True), tenant=TENANT, unique="k", on_duplicate="rerun_failed")
            assert not again.duplicate
            with pytest.raises(JobFailed):
                await again.result(25)
            handles.append(again)
        last = await client.enqueue(Task(n=4), tenant=TENANT, unique="k", on_duplicate="rerun_failed")
        assert await last.result(25) == 4
        for n, handle in enumerate(handles, 1):
            with pytest.raises(JobFailed, match=f"task {n} fails"):
                await handle.result(25)
        assert runs.numbers == [1, 2, 3, 4]
        assert await letters(client) == []  # each rerun has dropped that of the run before it


async def test_a_job_that_has_succeeded_is_not_rerun_by_rerun_failed_and_is_by_rerun(client: aiqueue.Client) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        first = await client.enqueue(Task(n=1), tenant=TENANT, unique="k")
        assert await first.result(25) == 1
        known = await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate="rerun_failed")
        assert known.duplicate
        assert await known.result(25) == 1
        again = await client.enqueue(Task(n=3), tenant=TENANT, unique="k", on_duplicate="rerun")
        assert not again.duplicate
        assert (await again.result(25), await first.result(25)) == (3, 1)
        assert runs.numbers == [1, 3]


async def test_a_job_without_a_kept_result_that_has_ended_is_rerun_by_rerun_once(client: aiqueue.Client) -> None:
    numbers: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Task, result=False)
    async def task(job: aiqueue.Job[Task]) -> None:
        numbers.append(job.message.n)

    async def stored() -> bool:
        info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
        return info["state"]["messages"] > 0

    async with worker.running(client):
        await client.enqueue(Task(n=1), tenant=TENANT, unique="k")
        async with asyncio.timeout(25):
            while numbers != [1] or await stored():
                await asyncio.sleep(0.01)
        known = await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate="rerun_failed")
        assert known.duplicate
        again = await asyncio.gather(
            *(client.enqueue(Task(n=3), tenant=TENANT, unique="k", on_duplicate="rerun") for _ in range(5))
        )
        assert Counter(handle.duplicate for handle in again) == {False: 1, True: 4}
        async with asyncio.timeout(25):
            while numbers != [1, 3] or await stored():
                await asyncio.sleep(0.01)
    assert numbers == [1, 3]


async def test_a_job_that_waits_or_runs_is_the_duplicate_of_a_rerun(client: aiqueue.Client) -> None:
    runs = Runs()
    first = await client.enqueue(Task(n=1), tenant=TENANT, unique="k")
    queued = await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate="rerun")
    runs.go.clear()
    async with runs.worker().running(client):
        async with asyncio.timeout(25):
            while not runs.numbers:
                await asyncio.sleep(0.01)
        running = await client.enqueue(Task(n=3), tenant=TENANT, unique="k", on_duplicate="rerun")
        runs.go.set()
        assert [await each.result(25) for each in (first, queued, running)] == [1, 1, 1]
    assert (queued.duplicate, running.duplicate, runs.numbers) == (True, True, [1])


async def test_a_job_that_waits_for_its_time_or_its_next_attempt_is_the_duplicate_of_a_rerun(
    client: aiqueue.Client,
) -> None:
    delayed = await client.enqueue(Task(n=1), tenant=TENANT, unique="delayed", delay="1h")
    known = await client.enqueue(Task(n=2), tenant=TENANT, unique="delayed", on_duplicate="rerun")
    assert (known.duplicate, known.due) == (True, delayed.due)
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=2, first="1h", cap="1h"))
    async def task(job: aiqueue.Job[Task]) -> None:
        raise ValueError("later")

    async with worker.running(client):
        retried = await client.enqueue(Task(n=3), tenant=TENANT, unique="retried")
        async with asyncio.timeout(25):
            while (await retried.status()).state != "retrying":
                await asyncio.sleep(0.02)
        again = await client.enqueue(Task(n=4), tenant=TENANT, unique="retried", on_duplicate="rerun_failed")
        assert again.duplicate
        assert await again.cancel()
        with pytest.raises(JobFailed, match="cancelled"):
            await retried.result(25)


async def test_a_job_that_is_back_in_its_lane_after_a_long_wait_is_the_duplicate_of_a_rerun(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its entries say when it was to be back, not at which sequence it waits, and it was due at another time."""
    monkeypatch.setattr(claims, "RETURN_MAX_S", -3_600.0)
    numbers: list[int] = []
    worker, forwarding = aiqueue.Worker(), aiqueue.Worker()  # the latter serves another family
    forwarding.handle(Page)(lambda job: "page")

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=2, first="10m", cap="10m", jitter=0))
    async def task(job: aiqueue.Job[Task]) -> int:
        numbers.append(job.message.n)
        if job.attempt == 1:
            raise ValueError("later")
        return job.message.n

    first = await client.enqueue(Task(n=1), tenant=TENANT, unique="k")
    async with worker.running(client), asyncio.timeout(25):
        while (await first.status()).state != "retrying":
            await asyncio.sleep(0.02)
    await first.run_now()
    async with forwarding.running(client), asyncio.timeout(25):
        while not [each async for each in client.connection.read("AI_AGENT_TASKS", ">")]:
            await asyncio.sleep(0.02)
    for value in ("rerun", "rerun_failed"):
        assert (await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate=value)).duplicate
    async with worker.running(client):
        assert await first.result(25) == 1
    assert numbers == [1, 1]


async def test_a_cancelled_job_is_rerun_by_rerun_failed(client: aiqueue.Client) -> None:
    runs = Runs()
    for delay in (None, "1h"):
        unique = f"delay-{delay}"
        first = await client.enqueue(Task(n=1), tenant=TENANT, unique=unique, delay=delay)
        assert await first.cancel()
        async with runs.worker().running(client):
            again = await client.enqueue(Task(n=2), tenant=TENANT, unique=unique, on_duplicate="rerun_failed")
            assert await again.result(25) == 2
            with pytest.raises(JobFailed, match="cancelled"):
                await first.result(25)
    assert runs.numbers == [2, 2]


async def test_a_failed_job_can_be_rerun_at_a_later_time_and_once(client: aiqueue.Client) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        first = await fail(client)
        handles = await asyncio.gather(
            *(
                client.enqueue(Task(n=7), tenant=TENANT, unique="k", on_duplicate="rerun_failed", delay=1.5)
                for _ in range(10)
            )
        )
        assert Counter(handle.duplicate for handle in handles) == {False: 1, True: 9}
        assert [await handle.result(25) for handle in handles] == [7] * 10
        assert runs.numbers == [1, 7]
        with pytest.raises(JobFailed, match="task 1 fails"):
            await first.result(25)


async def test_reruns_while_reruns_end_make_one_run_for_each_end(client: aiqueue.Client) -> None:
    """Callers rerun without a pause what fails at once: each end is followed by one run at most."""
    runs = Runs()
    async with runs.worker().running(client):
        await fail(client, n=0)
        stored: list[aiqueue.Handle] = []

        async def rerun_often(caller: int) -> None:
            for i in range(15):
                handle = await client.enqueue(
                    Task(n=1 + caller * 100 + i, fails=True), tenant=TENANT, unique="k", on_duplicate="rerun_failed"
                )
                if not handle.duplicate:
                    stored.append(handle)
                with pytest.raises(JobFailed):
                    await handle.result(25)

        await asyncio.gather(*(rerun_often(caller) for caller in range(8)))
        subject = subjects.journal("ai.agent.results", TENANT, "k")
        ends: Counter[int] = Counter()
        order: list[tuple[str, int]] = []
        async for entry in client.connection.read(client.journal.stream, subject):
            if entry.headers[headers.EVENT] == "failed":
                ends[int(entry.headers[headers.RUN])] += 1
                order.append(("failed", int(entry.headers[headers.RUN])))
        assert len(runs.numbers) == len(stored) + 1 == len(ends)
        assert set(ends.values()) == {1}
        assert [run for _, run in order] == sorted(run for _, run in order)  # one after the other, never two at once
        assert len(await letters(client)) == 1  # that of the last run


async def test_a_dead_letter_whose_journal_has_expired_is_dropped_when_its_job_is_rerun(
    client: aiqueue.Client,
) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        await fail(client)
        await client.connection.api("STREAM.PURGE.AI_RESULTS")
        config = (await client.connection.api("STREAM.INFO.AI_AGENT_TASKS"))["config"]
        await client.connection.api("STREAM.UPDATE.AI_AGENT_TASKS", {**config, "duplicate_window": 100_000_000})
        async with asyncio.timeout(25):
            while True:
                again = await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate="rerun_failed")
                if not again.duplicate:
                    break
                await asyncio.sleep(0.05)
        assert await again.result(25) == 2
        assert await letters(client) == []


async def test_a_rerun_goes_on_where_the_dead_letters_may_not_be_read(own_server: Any) -> None:
    runs = Runs()
    server = own_server()
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        async with runs.worker().running(client):
            await fail(client)
            await client.connection.api("STREAM.DELETE.AI_DEAD")
            again = await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate="rerun_failed")
            assert await again.result(25) == 2


async def test_a_replay_leaves_the_first_handle_its_failure_and_a_looked_up_one_has_the_replays_end(
    client: aiqueue.Client,
) -> None:
    runs = Runs()
    fails = True
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> str:
        if fails:
            raise ValueError("first")
        return "replayed"

    async with worker.running(client):
        first = await client.enqueue(Task(), tenant=TENANT, unique="k")
        with pytest.raises(JobFailed):
            await first.result(25)
        fails = False
        await client.dead.replay(await client.dead.get((await letters(client))[0]))
        found = await client.job("k")
        assert await found.result(25) == "replayed"
        with pytest.raises(JobFailed, match="first"):
            await first.result(25)
        duplicate = await client.enqueue(Task(), tenant=TENANT, unique="k")
        assert await duplicate.result(25) == "replayed"
    assert runs.numbers == []


async def test_a_family_that_claims_its_ids_reruns_what_has_failed_and_refuses_to_rerun_the_rest(
    client: aiqueue.Client,
) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        first = await client.enqueue(Page(fails=True), tenant=TENANT, unique="q")
        with pytest.raises(JobFailed):
            await first.result(25)
        again = await client.enqueue(Page(), tenant=TENANT, unique="q", on_duplicate="rerun_failed")
        assert await again.result(25) == "page"
        with pytest.raises(JobFailed, match="no page"):
            await first.result(25)
        with pytest.raises(BadInput, match="runs an id once"):
            await client.enqueue(Page(), tenant=TENANT, unique="q", on_duplicate="rerun")


async def test_a_rerun_in_a_cluster_makes_one_run(own_cluster: Cluster) -> None:
    account, runs = own_cluster.account, Runs()
    async with aiqueue.connect(account.url, user=account.user, password=account.password, profile="cluster") as client:
        await provision.apply(client.connection, client.topology)
        async with runs.worker().running(client):
            first = await fail(client)
            handles = await asyncio.gather(
                *(client.enqueue(Task(n=9), tenant=TENANT, unique="k", on_duplicate="rerun_failed") for _ in range(20))
            )
            assert [await handle.result(25) for handle in handles] == [9] * 20
            with pytest.raises(JobFailed):
                await first.result(25)
            assert runs.numbers == [1, 9]


# -- raise


async def test_raise_names_the_job_that_is_there_and_stores_nothing(client: aiqueue.Client) -> None:
    first = await client.enqueue(Task(n=1), tenant=TENANT, unique="k", on_duplicate="raise")
    assert not first.duplicate
    with pytest.raises(DuplicateJob, match=r"job k is already in agent\.tasks acme/normal") as raised:
        await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate="raise")
    assert (raised.value.job_id, raised.value.retryable) == ("k", False)
    await client.enqueue(Task(n=3), tenant=TENANT, unique="d", delay="1h", on_duplicate="raise")
    with pytest.raises(DuplicateJob):
        await client.enqueue(Task(n=4), tenant=TENANT, unique="d", delay="1h", on_duplicate="raise")
    info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
    assert info["state"]["messages"] == 1


async def test_on_duplicate_without_an_id_and_other_words_are_refused(client: aiqueue.Client) -> None:
    for word in ("raise", "rerun_failed", "rerun", "replace"):
        with pytest.raises(BadInput, match="needs an id: pass unique="):
            await client.enqueue(Task(), tenant=TENANT, on_duplicate=word)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="on_duplicate must be one of 'first', 'raise'"):
        await client.enqueue(Task(), tenant=TENANT, unique="k", on_duplicate="failed")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="on_duplicate must be one of"):
        client.enqueue_many([Task()], tenant=TENANT, on_duplicate=["failed"])  # type: ignore[arg-type]


async def test_enqueue_many_takes_on_duplicate_for_all_items_and_for_one(client: aiqueue.Client) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        await fail(client, "a")
        done = await client.enqueue(Task(n=5), tenant=TENANT, unique="b")
        assert await done.result(25) == 5
        items = [
            aiqueue.JobSpec(Task(n=11), unique="a"),
            aiqueue.JobSpec(Task(n=12), unique="b"),
            aiqueue.JobSpec(Task(n=13), unique="b", on_duplicate="raise"),
            aiqueue.JobSpec(Task(n=14), unique="c", on_duplicate="first"),
            aiqueue.JobSpec(Task(n=15), unique="d", on_duplicate="sometimes"),  # type: ignore[arg-type]
        ]
        outcomes = [each async for each in client.enqueue_many(items, tenant=TENANT, on_duplicate="rerun_failed")]
        handles = [each for each in outcomes if isinstance(each, aiqueue.Handle)]
        assert [(each.id, each.duplicate) for each in handles] == [("a", False), ("b", True), ("c", False)]
        assert [await each.result(25) for each in handles] == [11, 5, 14]
        assert isinstance(outcomes[2], DuplicateJob)
        assert outcomes[2].item is items[2]
        assert isinstance(outcomes[4], BadInput)


# -- replace


async def test_a_delayed_job_is_replaced_by_the_last_message_and_time(client: aiqueue.Client) -> None:
    runs = Runs()
    handles = [
        await client.enqueue(Task(n=n), tenant=TENANT, unique="k", delay=1.0, on_duplicate="replace") for n in range(20)
    ]
    assert not any(handle.duplicate for handle in handles)
    assert handles[0].due is not None
    assert handles[-1].due is not None
    assert handles[0].due < handles[-1].due
    async with runs.worker().running(client):
        assert [await handle.result(25) for handle in handles] == [19] * 20
    assert runs.numbers == [19]


async def test_replace_without_a_delay_starts_the_job_now_and_without_a_parked_job_enqueues(
    client: aiqueue.Client,
) -> None:
    runs = Runs()
    async with runs.worker().running(client):
        await client.enqueue(Task(n=1), tenant=TENANT, unique="k", delay="1h")
        now = await client.enqueue(Task(n=2), tenant=TENANT, unique="k", on_duplicate="replace")
        assert await now.result(25) == 2
        new = await client.enqueue(Task(n=3), tenant=TENANT, unique="other", on_duplicate="replace")
        assert await new.result(25) == 3
        known = await client.enqueue(Task(n=4), tenant=TENANT, unique="other", on_duplicate="replace")
        assert known.duplicate
    assert runs.numbers == [2, 3]


async def test_replacing_at_the_moment_in_which_the_job_leaves_parking_loses_none_and_doubles_none(
    client: aiqueue.Client,
) -> None:
    """The new message always runs, and once. The old one runs at most once."""
    runs = Runs()
    async with runs.worker().running(client):
        start = client.connection.clock.now() + 5.0  # on a busy machine 300 jobs take two seconds to be stored

        async def replace(key: int) -> aiqueue.Handle:
            """Replace a delayed job once: 0.5 s before its time, or in the 0.27 s in which the server moves it."""
            await client.enqueue(Task(n=key), tenant=TENANT, unique=f"k{key}", at=start)
            after_s = -0.5 if key % 4 == 0 else key % 90 * 0.003
            await asyncio.sleep(start - client.connection.clock.now() + after_s)
            new = Task(n=1_000 + key)
            return await client.enqueue(new, tenant=TENANT, unique=f"k{key}", delay=0.5, on_duplicate="replace")

        handles = await asyncio.gather(*(replace(key) for key in range(300)))
        assert not any(handle.duplicate for handle in handles)
        results = await asyncio.gather(*(handle.result(25) for handle in handles))
        assert results == [1_000 + key for key in range(300)]
        counted = Counter(runs.numbers)
        assert set(counted.values()) == {1}
        old = [n for n in counted if n < 1_000]
        assert 0 < len(old) < 300  # so that the moment was hit from both sides
        assert await parked(client) == 0


async def parked(client: aiqueue.Client) -> int:
    info = await client.connection.api("STREAM.INFO.AI_PARKED")
    return int(info["state"]["messages"])


async def test_of_concurrent_replaces_one_message_is_left_and_runs(client: aiqueue.Client) -> None:
    runs = Runs()
    await client.enqueue(Task(n=0), tenant=TENANT, unique="k", delay=2)
    handles = await asyncio.gather(
        *(client.enqueue(Task(n=n), tenant=TENANT, unique="k", delay=2, on_duplicate="replace") for n in range(1, 13))
    )
    assert await parked(client) == 1
    async with runs.worker().running(client):
        results = {await handle.result(25) for handle in handles}
    assert len(results) == 1
    assert runs.numbers == list(results)


async def test_a_job_whose_full_lane_keeps_it_waiting_is_not_replaced(
    account: Any, streams: Any, eventually: Eventually
) -> None:
    class Small(aiqueue.Message, kind="small", family="small.jobs"):
        n: int = 0

    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        for _ in range(3):
            await client.enqueue(Small(), tenant=TENANT)
        worker = aiqueue.Worker(families=["agent.tasks"])  # its forwarder moves jobs of all families

        @worker.handle(Task)
        async def task(job: aiqueue.Job[Task]) -> None: ...

        async with worker.running(client):
            await client.enqueue(Small(n=1), tenant=TENANT, unique="k", delay=0.2)
            lane = subjects.Lane("small.jobs", TENANT, "normal")

            async def waits() -> None:
                found = await Parking(client.connection, client.topology).find_delayed(lane, "k")
                assert found is not None
                assert found.is_waiting

            await eventually(waits)
            with pytest.raises(LaneFull, match="waits for a place"):
                await client.enqueue(Small(n=2), tenant=TENANT, unique="k", delay=0.2, on_duplicate="replace")
            with pytest.raises(Unavailable, match="changed before each try"):
                await client.enqueue(
                    Small(n=2),
                    tenant=TENANT,
                    unique="k",
                    delay=0.2,
                    on_duplicate="replace",
                    on_full="wait",
                    timeout=0.5,
                )
