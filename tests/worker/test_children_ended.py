"""Children that end otherwise than by a result, and parents that do."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import codec, headers
from aiqueue.client import cancel
from aiqueue.client.cancel import Canceller
from aiqueue.enqueue import Parents
from aiqueue.enqueue.parking import Parking
from aiqueue.errors import ChildFailed, ChildLost, JobFailed
from aiqueue.inspect import stats
from aiqueue.journal import ChildEnd, ChildEnds, EndsRecord, WakeAt
from aiqueue.worker import gathering

from ..support import eventually
from . import parenting
from .parenting import FAST, Book, Leaf, Page, note, noted
from .test_children import nothing_kept, worker_of

pytestmark = pytest.mark.families("agent.tasks", "agent.message", "rag.ingest")
WORK = ("AI_AGENT_TASKS", "AI_RAG_INGEST", "AI_PARKED")


async def state_of(client: aiqueue.Client, job_id: str) -> str:
    return (await stats.job(client.connection, client.topology, job_id)).state


async def becomes(client: aiqueue.Client, job_id: str, *states: str) -> None:
    async def reached() -> bool:
        return await state_of(client, job_id) in states

    await eventually(reached)


async def children_of(client: aiqueue.Client) -> list[str]:
    read = client.connection.read("AI_CHECKPOINTS", "ai.checkpoint.>")
    entries = [codec.decode(each.data) async for each in read if each.headers["Aiq-Event"] == "children"]
    return [child["id"] for entry in entries for child in entry["children"]]


async def leaves(job: aiqueue.Job[Book]) -> Any:
    """Children that no worker runs."""
    return await job.gather([(f"leaf-{n}", Leaf(n=n)) for n in range(job.message.pages)])


# -- cancelled


async def test_cancelling_a_job_that_waits_cancels_its_children(client: aiqueue.Client) -> None:
    async with worker_of(leaves).running(client):
        parent = await client.enqueue(Book(log=""), tenant="acme")
        await becomes(client, parent.id, "waiting")
        ids = await children_of(client)
        assert await parent.cancel()
        assert [await state_of(client, each) for each in [parent.id, *ids]] == ["cancelled"] * 4
        assert await parent.cancel()
    read = client.connection.read("AI_CHECKPOINTS", "ai.checkpoint.>")
    assert [each.headers["Aiq-Event"] async for each in read] == ["cancelled"]


@pytest.mark.parametrize("who", ["worker", "canceller"])
async def test_a_job_that_is_cancelled_just_before_it_is_parked_does_not_stay_parked(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    """The canceller looks for it before it is parked. `who` sees that: the other one does not look any more."""
    cancelling: list[asyncio.Task[bool]] = []
    has_looked, is_parked = asyncio.Event(), asyncio.Event()
    cancel_children, real_park = cancel.cancel_children, Parking.park

    async def later(*arguments: Any) -> bool:
        has_looked.set()
        if who == "canceller":
            await is_parked.wait()
        return await cancel_children(*arguments)

    async def park(self: Parking, lane: Any, job_id: str, *arguments: Any, dedup_key: str, **options: Any) -> Any:
        if dedup_key.startswith("w"):
            cancelling.append(asyncio.create_task(parent.cancel()))
            await (has_looked.wait() if who == "canceller" else cancelling[0])
        ack = await real_park(self, lane, job_id, *arguments, dedup_key=dedup_key, **options)
        is_parked.set()
        return ack

    async def nobody(*_: Any) -> None: ...

    monkeypatch.setattr(cancel, "cancel_children", later)
    monkeypatch.setattr(Parking, "park", park)
    if who == "canceller":
        monkeypatch.setattr(Parents, "wake_if_reached", nobody)
    else:
        monkeypatch.setattr(Canceller, "_delete_late_waits", nobody)

    async def handler(job: aiqueue.Job[Book]) -> None:
        await job.gather([("leaf", Leaf(n=1))])

    async with worker_of(handler).running(client):
        parent = await client.enqueue(Book(log=""), tenant="acme")
        await eventually(lambda: cancelling)
        assert await cancelling[0]

        async def none_left() -> bool:
            return not [each for name in WORK async for each in client.connection.read(name, ">")]

        await eventually(none_left)


async def test_a_cancelled_child_wakes_its_parent(client: aiqueue.Client) -> None:
    caught: list[ChildFailed] = []

    async def handler(job: aiqueue.Job[Book]) -> str:
        try:
            await leaves(job)
        except ChildFailed as error:
            caught.append(error)
        return "ended"

    async with worker_of(handler).running(client):
        parent = await client.enqueue(Book(log="", pages=2), tenant="acme")
        await becomes(client, parent.id, "waiting")
        for each in await children_of(client):
            assert await client.cancel(each)
        assert await parent.result(timeout=20) == "ended"
    assert (caught[0].name, caught[0].reason) == ("leaf-0", "cancelled")
    await nothing_kept(client)


@pytest.mark.parametrize("process", [False, True])
async def test_cancelling_a_running_tree_ends_every_job_cancelled_or_done(
    client: aiqueue.Client, tmp_path: Path, process: bool
) -> None:
    worker = aiqueue.Worker(concurrency=4)
    worker.handle(Book, process=process)(parenting.tree)
    worker.handle(Page)(parenting.slow_page)
    log = str(tmp_path / "log")
    async with worker.running(client):
        parent = await client.enqueue(Book(log=log, pages=6, ends_at=2), tenant="acme")
        await eventually(lambda: any(line.startswith("page") for line in noted(log)))
        assert await parent.cancel()
        await eventually(lambda: drained(client))
        ids = {line.split()[1] for line in noted(log)}
        states = {await state_of(client, each) for each in ids}
        assert states <= {"cancelled", "done"}
        finals: dict[str, list[str]] = {}
        async for stored in client.connection.read("AI_RESULTS", ">"):
            if stored.headers["Aiq-Event"] in ("result", "failed", "cancelled"):
                finals.setdefault(stored.subject, []).append(stored.headers["Aiq-Event"])
        assert all(len(each) == 1 for each in finals.values())
        before = len(noted(log))
        await asyncio.sleep(1)
        assert len(noted(log)) == before, "no descendant starts after that"


async def drained(client: aiqueue.Client) -> bool:
    infos = [await client.connection.api(f"STREAM.INFO.{each}") for each in ("AI_AGENT_TASKS", "AI_PARKED")]
    return not any(info["state"]["messages"] for info in infos)


async def test_a_child_that_is_stored_after_its_parent_was_cancelled_does_not_run(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    log, held = str(tmp_path / "log"), asyncio.Event()
    store = gathering.ChildJobs.store

    async def late(*args: Any) -> Any:
        held.set()
        await asyncio.sleep(1)
        return await store(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gathering.ChildJobs, "store", late)
        worker = worker_of(concurrency=2)
        async with worker.running(client):
            parent = await client.enqueue(Book(log=log, pages=1), tenant="acme")
            await held.wait()
            [child] = await children_of(client)
            assert await parent.cancel()
            jobs = gathering.ChildJobs(client.connection, client.topology)
            run = next(
                iter([each.subject async for each in client.connection.read("AI_CHECKPOINTS", "ai.checkpoint.>")])
            )
            _, _, a, b, _, job_id, key = run.split(".")
            spec = aiqueue.job.children.make_child_spec("page-0", Page(log=log, n=0))
            lane = jobs.lane_of(spec, "acme", "normal")
            await store(jobs, spec, lane, child, {headers.PARENT: f"{a}.{b}/{job_id}/{key}"})
            await becomes(client, child, "cancelled")
    assert not [each for each in noted(log) if each.startswith("page")]


# -- a parent that is replayed


async def test_a_replayed_parent_keeps_the_results_of_children_and_makes_failed_ones_anew(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    log, broken = str(tmp_path / "log"), [True]
    worker = aiqueue.Worker(concurrency=2)
    worker.handle(Book, retry=aiqueue.Backoff(attempts=1))(parenting.book)

    @worker.handle(Page)
    async def page(job: aiqueue.Job[Page]) -> int:
        note(log, f"page {job.message.n}")
        if broken and job.message.n == 1:
            raise aiqueue.Reject("torn")
        return job.message.n

    async with worker.running(client):
        parent = await client.enqueue(Book(log=log), tenant="acme")
        with pytest.raises(JobFailed, match="torn"):
            await parent.result(timeout=20)
        broken.clear()
        [letter] = [each async for each in client.dead.find() if each.job_id == parent.id]
        await client.dead.replay(letter)

        async def done() -> bool:
            return await state_of(client, parent.id) == "done"

        await eventually(done)
        assert (await stats.job(client.connection, client.topology, parent.id)).result == [0, 1, 2]
    assert sorted(each for each in noted(log) if each.startswith("page")) == ["page 0", "page 1", "page 1", "page 2"]
    await nothing_kept(client)


async def test_a_replayed_child_tells_its_parent(client: aiqueue.Client, tmp_path: Path) -> None:
    log, broken = str(tmp_path / "log"), [True]
    worker = aiqueue.Worker(concurrency=2)

    @worker.handle(Book)
    async def book(job: aiqueue.Job[Book]) -> Any:
        made = [(f"p-{n}", Page(log=log, n=n)) for n in range(2)]
        return await job.gather([*made, ("leaf", Leaf(n=1))])

    @worker.handle(Page)
    async def page(job: aiqueue.Job[Page]) -> int:
        if broken and job.message.n == 1:
            raise aiqueue.Reject("torn")
        return job.message.n

    async with worker.running(client):
        parent = await client.enqueue(Book(log=log), tenant="acme")

        async def letters() -> bool:
            return bool([each async for each in client.dead.find()])

        await eventually(letters)
        broken.clear()
        for letter in [each async for each in client.dead.find()]:
            await client.dead.replay(letter)
            await becomes(client, letter.job_id, "done")
        worker_of_leaves = aiqueue.Worker()
        worker_of_leaves.handle(Leaf)(lambda job: job.message.n)
        async with worker_of_leaves.running(client):
            assert await parent.result(timeout=20) == [0, 1, 1]


# -- children that nobody reports


async def test_a_parent_looks_after_children_whose_end_it_was_not_told(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One whose end nobody has reported, one that is still queued, and one that was purged."""
    monkeypatch.setattr(gathering, "FALLBACK_S", 1.5)
    monkeypatch.setattr(gathering, "CONFIRM_S", 0.1)
    found: list[Any] = []

    async def handler(job: aiqueue.Job[Book]) -> str:
        found.append(
            await job.gather(
                [("page", Page(log=job.message.log, n=0)), ("leaf-1", Leaf(n=1)), ("leaf-2", Leaf(n=2))],
                on_failed="return",
            )
        )
        return "ended"

    async def nobody(*_: Any, **__: Any) -> None: ...

    report = Parents.report
    monkeypatch.setattr(Parents, "report", nobody)
    async with worker_of(handler).running(client):
        parent = await client.enqueue(Book(log=str(tmp_path / "log")), tenant="acme")
        await becomes(client, parent.id, "waiting")
        read = client.connection.read("AI_RAG_INGEST", ">")
        seqs = {each.headers["Aiq-Job-Id"]: each.seq async for each in read}
        assert await client.connection.delete(
            "AI_RAG_INGEST", next(seq for each, seq in seqs.items() if "leaf-2" in each)
        )
        await asyncio.sleep(4)
        assert not found, "leaf-1 is still queued"
        monkeypatch.setattr(Parents, "report", report)
        worker = aiqueue.Worker()
        worker.handle(Leaf)(lambda job: job.message.n)
        async with worker.running(client):
            assert await parent.result(timeout=30) == "ended"
    [page, first, second] = found[0]
    assert (page, first) == ({"n": 0}, 1)
    assert isinstance(second, ChildLost)
    assert "leaf-2" in str(second)


async def test_a_job_that_has_waited_runs_no_child_again_when_what_it_kept_of_them_is_gone(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    """As after more days than the stream keeps entries."""
    seen: list[Any] = []

    async def handler(job: aiqueue.Job[Book]) -> str:
        seen.append(await job.gather([("leaf-1", Leaf(n=1)), ("leaf-2", Leaf(n=2))], on_failed="return"))
        await job.gather([("leaf-3", Leaf(n=3))])
        return "ended"

    async with worker_of(handler).running(client):
        parent = await client.enqueue(Book(log=str(tmp_path / "log")), tenant="acme")
        await becomes(client, parent.id, "waiting")
        await client.connection.api("STREAM.PURGE.AI_CHECKPOINTS")
        await client.connection.api("STREAM.PURGE.AI_RAG_INGEST")
        await parent.run_now()
        with pytest.raises(JobFailed, match=r"child 'leaf-3': job \S+ is lost: .* has expired or was purged"):
            await parent.result(timeout=20)
    assert all([type(each) for each in found] == [ChildLost, ChildLost] for found in seen)
    assert not [each async for each in client.connection.read("AI_RAG_INGEST", ">")]


async def test_children_are_not_stored_twice_when_their_ids_are_forgotten(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gathering.ChildrenResources, "duplicate_window_s", lambda *_: 0.0)
    config = client.topology.streams["AI_RAG_INGEST"].config
    await client.connection.api("STREAM.UPDATE.AI_RAG_INGEST", {**config, "duplicate_window": 100_000_000})

    async def handler(job: aiqueue.Job[Book]) -> None:
        await job.enqueue(Leaf(n=1), "queued")
        await job.enqueue(Leaf(n=2), "parked", delay="1h")
        if job.attempt < 3:
            raise aiqueue.Retry(after=0.5)

    async with worker_of(handler).running(client):
        parent = await client.enqueue(Book(log=str(tmp_path / "log")), tenant="acme")
        await parent.result(timeout=20)
    assert len([each async for each in client.connection.read("AI_RAG_INGEST", ">")]) == 1
    assert len([each async for each in client.connection.read("AI_PARKED", ">")]) == 1


# -- what is told, and who is woken


def ends_of(client: aiqueue.Client) -> ChildEnds:
    return ChildEnds(client.connection, "AI_CHECKPOINTS", "ai.checkpoint.agent.tasks.acme.j.1-1-ended")


async def test_either_the_parent_knows_an_end_before_it_waits_or_the_reporter_knows_that_it_waits(
    client: aiqueue.Client,
) -> None:
    ends, record = ends_of(client), EndsRecord()
    assert await ends.add([ChildEnd("a", "result")], await ends.newest()) is None
    assert await ends.wait(record, {}, WakeAt(2, "normal", "w1-1")) == 0, "an end came that the parent has not read"
    await ends.read_on(record)
    assert (record.count, list(record.ends)) == (1, ["a"])
    assert await ends.wait(record, {"b": 7}, WakeAt(record.count + 2, "normal", "w1-1"))
    assert await ends.add([ChildEnd("b", "failed", reason="r", error="e")], None) is None
    assert await ends.add([ChildEnd("c", "result", b"\x01")], await ends.newest()) == WakeAt(3, "normal", "w1-1")
    later = EndsRecord()
    await ends.read_on(later)
    assert (later.count, later.stored, sorted(later.ends)) == (3, {"b": 7}, ["a", "b", "c"])
    assert later.ends["c"].result == b"\x01"
    assert later.ends["b"] == ChildEnd("b", "failed", reason="r", error="e")


async def test_many_reports_at_once_are_all_counted(client: aiqueue.Client) -> None:
    run = "ai.checkpoint.agent.tasks.acme.j.1-1"
    await client.connection.store(run, b"", {"Nats-Msg-Id": "x", "Aiq-Event": "children"})
    several = [Parents(client.connection, client.topology) for _ in range(3)]
    job_headers = {headers.PARENT: "agent.tasks/j/1-1"}
    await asyncio.gather(
        *(
            several[n % 3].report(job_headers, "acme", ChildEnd(f"c-{n}", "result", b"x" * 5_000), journaled=True)
            for n in range(300)
        )
    )
    record = EndsRecord()
    await ends_of(client).read_on(record)
    assert (record.count, len(record.ends)) == (300, 300)
    info = await client.connection.api("STREAM.INFO.AI_CHECKPOINTS")
    assert info["state"]["messages"] < 60, "several reports go into one entry"
    assert not any(each._queues for each in several)


@pytest.mark.parametrize("parent", ["", "x", "agent.tasks/j", "agent.tasks/j/1-1/x", "a b/j/1-1", "agent.tasks/j*/1-1"])
async def test_a_parent_that_nobody_can_be_is_told_nothing(client: aiqueue.Client, parent: str) -> None:
    parents = Parents(client.connection, client.topology)
    await parents.report({headers.PARENT: parent}, "acme", ChildEnd("c", "result"), journaled=False)
    info = await client.connection.api("STREAM.INFO.AI_CHECKPOINTS")
    assert info["state"]["messages"] == 0


async def test_a_parent_that_has_ended_is_told_nothing(client: aiqueue.Client, tmp_path: Path) -> None:
    async def handler(job: aiqueue.Job[Book]) -> None:
        await job.enqueue(Page(log=job.message.log, n=1), "page")

    log = str(tmp_path / "log")
    async with worker_of(handler).running(client):
        await (await client.enqueue(Book(log=log), tenant="acme")).result(timeout=20)
        await eventually(lambda: noted(log) == ["page 1"])
        await eventually(lambda: drained(client))
    info = await client.connection.api("STREAM.INFO.AI_CHECKPOINTS")
    assert info["state"]["messages"] == 0
    assert FAST.attempts == 4
