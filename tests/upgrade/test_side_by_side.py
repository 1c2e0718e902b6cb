"""Workers and producers of the former version (commit eb423bd) beside those of this one: nothing lost, doubled or
stuck, also while workers of both are killed.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import cbor2
import pytest

import aiqueue
from aiqueue.topology import provision

from ..support import eventually
from .former import Started, Versions

STREAM = """
    [family]
    name = "test.mixed"
    default_kind = "plain"
    [stream]
    name = "TEST_MIXED"
    max_bytes = "256MiB"
    [consumer]
    ack_wait = "2s"
    """

APP = """
    import asyncio, contextlib, os, sys
    import aiqueue

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    FORMER = not hasattr(aiqueue.Job, "step")
    if not FORMER:
        from aiqueue.worker import gathering
        gathering.FALLBACK_S = 2.0  # a former worker does not tell a parent of its child's end

    def log(*words):
        os.write(LOG, (" ".join(map(str, words)) + "\\n").encode())

    class Plain(aiqueue.Message, kind="plain", family="test.mixed"):
        n: int
        text: str = ""
        works: bool = True

    class Paid(aiqueue.Message, kind="paid", family="test.mixed"):
        n: int

    class Parent(aiqueue.Message, kind="parent", family="test.mixed"):
        n: int
        width: int = 3
        delay_s: float = 0.0

    @contextlib.asynccontextmanager
    async def lifespan():
        log("works", os.getpid())
        yield None

    worker = aiqueue.Worker(concurrency=4, lifespan=lifespan)
    patient = aiqueue.Backoff(attempts=100, first=0.05, cap=0.2)

    @worker.handle(Plain)
    async def plain(job):
        log("plain", job.message.n, job.attempt, "former" if FORMER else "new")
        await asyncio.sleep(0.002)
        if not job.message.works:
            raise aiqueue.Reject("not this one")
        return [job.message.n, len(job.message.text)]

    @worker.handle(Paid, retry=patient)
    async def paid(job):
        log("begins", job.message.n, job.attempt, "former" if FORMER else "new")
        if FORMER:
            raise ConnectionError("this version knows no steps")

        async def pay(part):
            log("pays", f"{job.message.n}-{part}")
            return part

        first = await job.step("first", pay, 1)
        if job.attempt == 1:
            await job.called({"n": job.message.n})
            log("fails", job.message.n)
            raise aiqueue.Retry("not yet", after=1)
        return {"parts": [first, await job.step("second", pay, 2)], "calls": await job.calls()}

    @worker.handle(Parent, retry=patient)
    async def parent(job):
        log("begins", job.message.n, job.attempt, "former" if FORMER else "new")
        if FORMER:
            raise ConnectionError("this version knows no children")
        message, children = job.message, []
        for n in range(message.width):
            child = Plain(n=message.n * 1_000 + n)
            children.append(await job.enqueue(child, f"c-{n}", delay=message.delay_s or None))
        return [result[0] for result in await job.gather(children)]

    async def produce(first, count):
        async with aiqueue.connect() as client:
            for n in range(first, first + count):
                large = "x" * 300_000 if n % 20 == 0 else ""
                delay = 0.5 if n % 10 == 5 else None
                await client.enqueue(Plain(n=n, text=large), tenant="acme", unique=f"former-{n}", delay=delay)
            await client.enqueue(Plain(n=first + count), tenant="acme", unique="former-late", delay=3_600)

    if __name__ == "__main__":
        asyncio.run(produce(int(sys.argv[1]), int(sys.argv[2])))
    """


class Plain(aiqueue.Message, kind="plain", family="test.mixed"):
    n: int
    text: str = ""
    works: bool = True


class Paid(aiqueue.Message, kind="paid", family="test.mixed"):
    n: int


class Parent(aiqueue.Message, kind="parent", family="test.mixed"):
    n: int
    width: int = 3
    delay_s: float = 0.0


@pytest.fixture
def versions(tmp_path: Path, former: Path, account: Any) -> Iterator[Versions]:
    made = Versions(tmp_path, former, account, app=APP, stream=STREAM)
    yield made
    made.end()


@pytest.fixture
async def client(versions: Versions, account: Any) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(
        account.url, user=account.user, password=account.password, streams=versions.streams
    ) as client:
        await provision.apply(client.connection, client.topology)
        yield client


async def finals(client: aiqueue.Client) -> dict[str, list[str]]:
    """The final entries of all jobs, by id."""
    found: dict[str, list[str]] = {}
    async for stored in client.connection.read("AI_RESULTS", ">"):
        if (event := stored.headers["Aiq-Event"]) in ("result", "failed", "cancelled"):
            found.setdefault(stored.subject.rpartition(".")[2], []).append(event)
    return found


async def nothing_left(client: aiqueue.Client, versions: Versions, within: float) -> None:
    async def empty() -> None:
        for stream in ("TEST_MIXED", "AI_PARKED", "AI_DEAD"):
            subjects = [each.subject async for each in client.connection.read(stream, ">")]
            assert not subjects, f"{stream}: {subjects[:5]} {versions.errors()}"

    await eventually(empty, within=within)


async def kill_and_replace(
    versions: Versions, workers: list[tuple[Started, bool]], every_s: float, kills: list[int]
) -> None:
    """Kill one of the workers each `every_s`, and start another of its version."""
    try:
        while True:
            await asyncio.sleep(every_s * random.uniform(0.8, 1.2))
            working = [each for each in workers if versions.works(each[0])]
            if len(working) == len(workers):
                victim = random.choice(working)
                workers.remove(victim)
                workers.append((versions.start_worker(former=victim[1]), victim[1]))
                versions.kill(victim[0])
                kills.append(victim[0].pid)
    finally:
        for process, _ in workers:
            assert process.poll() is None, versions.errors()


async def share_some(client: aiqueue.Client, versions: Versions, within: float) -> int:
    """Enqueue jobs until workers of both versions have run some. Return how many these are."""
    count = 0
    async with asyncio.timeout(within):
        while {version for *_, version in versions.lines("plain")} != {"former", "new"}:
            handles = [await client.enqueue(Plain(n=-n - 1), tenant="acme") for n in range(count, count + 8)]
            results = await asyncio.gather(*(each.result(timeout=within) for each in handles))
            assert results == [[-n - 1, 0] for n in range(count, count + 8)]
            count += 8
    return count


async def run_side_by_side(
    client: aiqueue.Client, versions: Versions, jobs: int, *, kill_every_s: float, within: float
) -> None:
    """Have producers and workers of both versions share `jobs` jobs, a tenth with steps and a tenth with children."""
    kills: list[int] = []
    workers = [(versions.start_worker(former=former), former) for former in (True, False)]
    await eventually(lambda: all(versions.works(each) for each, _ in workers))
    shared = await share_some(client, versions, within)  # amid the kills a slow start can leave all to one version
    killing = asyncio.create_task(kill_and_replace(versions, workers, kill_every_s, kills))
    half = jobs // 2
    producer = versions.start("app.py", str(half), str(half), former=True)
    wanted: dict[aiqueue.Handle, Any] = {}

    async def enqueue(message: aiqueue.Message, result: Any, **options: Any) -> None:
        wanted[await client.enqueue(message, tenant="acme", **options)] = result

    failing: list[aiqueue.Handle] = []
    for n in range(half):
        match n % 10:
            case 0:
                await enqueue(Paid(n=n), [1, 2])
            case 1:
                await enqueue(Parent(n=n), [n * 1_000 + k for k in range(3)], unique=f"http://parents/{n} ü")
            case 2:
                message = Plain(n=n, works=False)
                failing.append(await client.enqueue(message, tenant="acme", unique=f"fails {n}/\udc80"))
            case 3:
                await enqueue(Plain(n=n), [n, 0], delay=3_600, unique=f"later.{n}.>")
                later = [*wanted][-1]
                await later.run_now()
            case 4:
                await enqueue(Plain(n=n, text="y" * 300_000), [n, 300_000], unique=f"large {n} *")
            case _:
                await enqueue(Plain(n=n), [n, 0], unique="k" * 200 + str(n))
    for n, each in zip(range(2, half, 10), failing, strict=True):
        with pytest.raises(aiqueue.JobFailed, match="not this one"):
            await each.result(timeout=within)
        await enqueue(Plain(n=n), [n, 0], unique=f"fails {n}/\udc80", on_duplicate="rerun_failed")
        assert not [*wanted][-1].duplicate
    await asyncio.to_thread(producer.wait, 60)
    assert producer.returncode == 0, versions.errors()
    versions.alive.remove(producer)
    late = await client.job("former-late")
    await late.reschedule(delay=3_000)
    await late.run_now()
    assert await late.result(timeout=within) == [jobs, 0]
    results = await asyncio.gather(*(each.result(timeout=within) for each in wanted), return_exceptions=True)
    assert [each["parts"] if isinstance(each, dict) else each for each in results] == [*wanted.values()]
    for n in range(half, half + half):
        result = await (await client.job(f"former-{n}")).result(timeout=within)
        assert result == [n, 300_000 if n % 20 == 0 else 0]
    await eventually(lambda: len(kills) >= 2, within=within)
    await nothing_left(client, versions, within=60)
    killing.cancel()
    await asyncio.wait([killing])
    assert killing.cancelled(), versions.errors()

    ends = await finals(client)
    parents, children = half // 10, half // 10 * 3
    assert len(ends) == shared + jobs + 1 + children
    rerun = {each.id for each in failing}
    assert all(events == (["failed", "result"] if job_id in rerun else ["result"]) for job_id, events in ends.items())
    runs = Counter(n for n, *_ in versions.lines("plain"))
    assert runs.total() <= shared + jobs + 1 - half // 10 - parents + half // 10 + children + 4 * len(kills)
    paid = Counter(part for (part,) in versions.lines("pays"))
    assert len(paid) == half // 10 * 2
    assert paid.total() <= half // 10 * 2 + 4 * len(kills), "only steps under way at a kill are paid twice"


async def test_workers_and_producers_of_both_versions_share_jobs_while_workers_are_killed(
    client: aiqueue.Client, versions: Versions
) -> None:
    await run_side_by_side(client, versions, 100, kill_every_s=0.3, within=60)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_a_thousand_jobs_are_shared_by_workers_and_producers_of_both_versions_while_workers_are_killed(
    client: aiqueue.Client, versions: Versions
) -> None:
    await run_side_by_side(client, versions, 1_000, kill_every_s=1.0, within=300)


async def started(versions: Versions, n: int, version: str) -> None:
    await eventually(lambda: [n, version] in [[int(line[0]), line[2]] for line in versions.lines("begins")])


async def test_a_run_that_a_former_worker_takes_over_goes_on_from_its_steps_and_notes(
    client: aiqueue.Client, versions: Versions
) -> None:
    """The former worker's handler fails: it knows no steps. It is stopped once, and killed once."""
    handle = await client.enqueue(Paid(n=7), tenant="acme")
    new = versions.start_worker(former=False)
    await eventually(lambda: versions.lines("fails"))
    versions.kill(new)
    for signal in ("terminate", "kill"):
        former = versions.start_worker(former=True)
        await started(versions, 7, "former")
        getattr(former, signal)()
        await asyncio.to_thread(former.wait, 30)
        versions.alive.remove(former)
    versions.start_worker(former=False)
    assert await handle.result(timeout=30) == {"parts": [1, 2], "calls": [{"n": 7}]}
    assert versions.lines("pays") == [["7-1"], ["7-2"]]
    await nothing_left(client, versions, within=20)


async def test_a_job_that_waits_for_its_children_survives_a_former_worker(
    client: aiqueue.Client, versions: Versions
) -> None:
    """The former worker runs the children, of which it does not tell, and fails the parent, which knows no children."""
    parent = await client.enqueue(Parent(n=3, delay_s=3), tenant="acme", unique="parent of three ü")
    new = versions.start_worker(former=False)

    async def waits() -> bool:
        return (await parent.status()).state == "waiting"

    await eventually(waits)
    versions.kill(new)
    former = versions.start_worker(former=True)
    await eventually(lambda: len(versions.lines("plain")) == 3)
    await nudge(parent)
    await started(versions, 3, "former")
    versions.kill(former)
    versions.start_worker(former=False)
    assert await parent.result(timeout=40) == [3_000, 3_001, 3_002]
    ends = await finals(client)
    assert len(ends) == 4
    assert all(events == ["result"] for events in ends.values())
    await nothing_left(client, versions, within=20)


async def test_jobs_that_were_moved_or_cancelled_by_a_filter_are_left_so_by_a_former_worker(
    client: aiqueue.Client, versions: Versions
) -> None:
    handles = [await client.enqueue(Plain(n=n), tenant="acme") for n in range(20)]
    dropped = [await client.enqueue(Plain(n=n), tenant="other") for n in range(20, 30)]
    moved = await client.jobs.act(await client.jobs.plan("move", to="high", tenant="acme"))
    cancelled = await client.jobs.act(await client.jobs.plan("cancel", tenant="other"))
    assert (moved.done, cancelled.done) == (20, 10)
    versions.start_worker(former=True)
    assert [await each.result(timeout=40) for each in handles] == [[n, 0] for n in range(20)]
    for each in dropped:
        with pytest.raises(aiqueue.JobCancelled):
            await each.result(timeout=20)
    assert sorted(int(n) for n, *_ in versions.lines("plain")) == list(range(20))
    await nothing_left(client, versions, within=20)


async def nudge(parent: aiqueue.Handle) -> None:
    """Have a parent run that may be parked or in its lane."""
    try:
        await parent.run_now()
    except aiqueue.errors.NotParked:
        assert (await parent.status()).state in ("queued", "in_flight", "retrying")


async def test_apply_of_either_version_leaves_what_the_other_has_made(
    client: aiqueue.Client, versions: Versions
) -> None:
    """The former version does not know the streams of checkpoints, of the audit and of metrics."""

    async def streams() -> dict[str, Any]:
        found = {}
        for each in (await client.connection.api("STREAM.LIST"))["streams"]:
            kept = {key: value for key, value in each["config"]["metadata"].items() if not key.startswith("aiqueue.")}
            found[each["config"]["name"]] = (each["config"] | {"metadata": kept}, each["state"]["messages"])
        return found

    await client.connection.store("ai.checkpoint.test.mixed.acme.j.1-1", b"", {"Aiq-Event": "taken"})
    async with client.audit.act("pause", {"family": "test.mixed"}, by="anna"):
        pass
    await client.connection.store("ai.metrics.total.test.mixed.k.done", b"", {"Nats-Incr": "7", "Nats-Msg-Id": "i"})
    before = await streams()
    assert (before["AI_CHECKPOINTS"][1], before["AI_AUDIT"][1], before["AI_METRICS"][1]) == (1, 2, 1)
    for former in (True, False, True):
        versions.run("-m", "aiqueue", "apply", former=former)
        after = await streams()
        assert after.keys() == before.keys()
        assert after["AI_CHECKPOINTS"] == before["AI_CHECKPOINTS"]
        assert after["AI_AUDIT"] == before["AI_AUDIT"]
        assert after["AI_METRICS"] == before["AI_METRICS"]
    versions.run("-m", "aiqueue", "apply", former=False)
    assert await streams() == before


async def test_a_former_apply_leaves_optional_families_and_a_narrow_one_leaves_those_of_the_former(
    account: Any, versions: Versions
) -> None:
    options: dict[str, Any] = {"user": account.user, "password": account.password, "streams": versions.streams}

    async def subjects(client: aiqueue.Client) -> dict[str, set[str]]:
        listed = await client.connection.api("STREAM.LIST")
        return {each["config"]["name"]: set(each["config"]["subjects"]) for each in listed["streams"]}

    versions.run("-m", "aiqueue", "apply", former=True)
    async with aiqueue.connect(account.url, **options, families=["test.mixed", "agent.memory"]) as client:
        before = await subjects(client)
        await provision.apply(client.connection, client.topology)
        after = await subjects(client)
        assert "AI_AGENT_MEMORY" in after
        assert all(before[name] <= after[name] for name in before)
        assert "ai.agent.memory-results.*.*" in after["AI_RESULTS"]
        versions.run("-m", "aiqueue", "apply", former=True)
        assert await subjects(client) == after
        assert not (await provision.plan(client.connection, client.topology)).drift


async def test_a_stream_that_the_former_version_has_made_is_completed_by_apply(
    versions: Versions, account: Any
) -> None:
    versions.run("-m", "aiqueue", "apply", former=True)
    options = {"user": account.user, "password": account.password, "streams": versions.streams}
    async with aiqueue.connect(account.url, **options) as client:
        handle = await client.enqueue(Paid(n=1), tenant="acme")
        worker = versions.start_worker(former=False)  # it has no stream of checkpoints yet
        await started(versions, 1, "new")
        versions.run("-m", "aiqueue", "apply", former=False)
        assert (await handle.result(timeout=30))["parts"] == [1, 2]
        assert worker.poll() is None


FORMER_READER = """
import asyncio, json, os, sys, aiqueue

async def main():
    async with aiqueue.connect() as client:
        result = await (await client.job(sys.argv[1])).result(timeout=20)
        await client.documents.open(aiqueue.Document(**result)).save("body")
        await asyncio.to_thread(open("result.json", "w").write, json.dumps(result))

asyncio.run(main())
"""


class Large(aiqueue.Message, kind="large"):
    pass


async def test_a_former_client_gets_the_reference_of_a_large_result_and_a_former_collector_leaves_its_document(
    client: aiqueue.Client, versions: Versions
) -> None:
    worker = aiqueue.Worker()
    text = "x" * 300_000

    @worker.handle(Large)
    async def large(job: aiqueue.Job[Large]) -> str:
        await job.step("large", lambda: text)
        if not has_ended.is_set():
            raise aiqueue.Retry(after=60)
        return text

    has_ended = asyncio.Event()
    async with worker.running(client):
        parked = await client.enqueue(Large(), tenant="acme")

        async def holds_a_step() -> bool:
            return [each.steps async for each in client.documents.find()] == [1]

        await eventually(holds_a_step)
        has_ended.set()
        ended = await client.enqueue(Large(), tenant="acme")
        await ended.result(timeout=20)

        async def held() -> list[tuple[int, int]]:
            return sorted([(each.results, each.steps) async for each in client.documents.find()])

        async def are_both_held() -> bool:
            return await held() == [(0, 1), (1, 0)]

        await eventually(are_both_held)  # the step of the job that has ended is released
        versions.run("-m", "aiqueue", "documents", "collect", "--grace", "0s", former=True)
        assert await held() == [(0, 1), (1, 0)]
        versions.run("-c", FORMER_READER, ended.id, former=True)
        reference = json.loads((versions.streams.parent / "result.json").read_text())
        assert set(reference) == {"tenant", "sha256", "size", "name", "content_type"}
        assert cbor2.loads((versions.streams.parent / "body").read_bytes()) == text
        await parked.cancel()
        assert await held() == [(1, 0)]
