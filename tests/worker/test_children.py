"""Children of jobs: enqueued once for a run of their parent, and gathered without holding a slot."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, ChildFailed, JobFailed
from aiqueue.inspect import stats

from ..support import create_streams, eventually
from . import parenting
from .parenting import FAST, Book, Leaf, Page, noted

pytestmark = pytest.mark.families("agent.tasks", "agent.message", "rag.ingest")
STREAM = "AI_CHECKPOINTS"
PAGES = [{"n": 0}, {"n": 1}, {"n": 2}]


async def nothing_kept(client: aiqueue.Client) -> None:
    async def empty() -> bool:
        info = await client.connection.api(f"STREAM.INFO.{STREAM}")
        return not info["state"]["messages"]

    await eventually(empty)


def worker_of(book: Callable[..., Any] = parenting.book, *, concurrency: int = 1, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=concurrency)
    worker.handle(Book, retry=FAST, **options)(book)
    worker.handle(Page, retry=FAST)(parenting.page)
    return worker


async def run(client: aiqueue.Client, message: Book, book: Callable[..., Any] = parenting.book, **options: Any) -> Any:
    """Return the result of a book."""
    async with worker_of(book, **options).running(client):
        return await (await client.enqueue(message, tenant="acme")).result(timeout=30)


# -- enqueue


async def test_a_child_has_its_parents_tenant_priority_deadline_and_says_whose_it_is(client: aiqueue.Client) -> None:
    made: list[aiqueue.Child] = []

    async def handler(job: aiqueue.Job[Book]) -> None:
        made.append(await job.enqueue(Leaf(n=1), "first", headers={"trace": "t"}))
        made.append(await job.enqueue(Leaf(n=2), "second", priority="low", delay="1h"))

    worker = aiqueue.Worker()
    worker.handle(Book)(handler)
    async with worker.running(client):
        parent = await client.enqueue(Book(log=""), tenant="acme", priority="high", deadline=60)
        await parent.result(timeout=20)
    first, second = made
    assert (first.tenant, first.priority, first.name, first.duplicate) == ("acme", "high", "first", False)
    assert first.id.startswith(f"{parent.id[:26]}_first_")
    [stored] = [each async for each in client.connection.read("AI_RAG_INGEST", "ai.rag.ingest.acme.high")]
    run = f"agent.tasks/{parent.id}/{stored.headers['Aiq-Parent'].rpartition('/')[2]}"
    lineage = {name: value for name, value in stored.headers.items() if name in ("Aiq-Parent", "Aiq-Root", "Aiq-Depth")}
    assert lineage == {"Aiq-Parent": run, "Aiq-Root": f"agent.tasks/{parent.id}", "Aiq-Depth": "1"}
    assert stored.headers["trace"] == "t"
    assert stored.headers["Aiq-Deadline"]
    found = await stats.job(client.connection, client.topology, second.id)
    assert (found.state, found.priority) == ("parked", "low")


async def test_a_parent_that_runs_again_finds_the_children_that_it_has(client: aiqueue.Client) -> None:
    seen: list[list[Any]] = []

    async def handler(job: aiqueue.Job[Book]) -> None:
        children = [await job.enqueue(Leaf(n=n), f"p-{n}") for n in range(job.attempt)]
        seen.append([(each.id, each.duplicate) for each in children])
        if job.attempt < 3:
            raise ValueError("not yet")

    worker = aiqueue.Worker()
    worker.handle(Book, retry=FAST)(handler)
    async with worker.running(client):
        await (await client.enqueue(Book(log=""), tenant="acme")).result(timeout=20)
    assert [[duplicate for _, duplicate in each] for each in seen] == [[False], [True, False], [True, True, False]]
    assert [name for name, _ in seen[0]] == [name for name, _ in seen[2]][:1]
    assert len([each async for each in client.connection.read("AI_RAG_INGEST", ">")]) == 3
    await nothing_kept(client)


async def test_a_new_run_of_an_id_has_children_of_its_own(client: aiqueue.Client) -> None:
    made: list[str] = []

    async def handler(job: aiqueue.Job[Book]) -> None:
        made.append((await job.enqueue(Leaf(n=1), "p")).id)

    worker = aiqueue.Worker()
    worker.handle(Book)(handler)
    async with worker.running(client):
        for _ in range(2):
            await (await client.enqueue(Book(log=""), tenant="acme", unique="b")).result(timeout=20)
            await nothing_kept(client)
            await client.connection.api("STREAM.DELETE.AI_AGENT_TASKS")  # it forgets the id
            await create_streams(client)
            await asyncio.sleep(1)  # a run is told apart by its second, where a stream counts from 1 again
    assert len(set(made)) == 2


async def test_misuse_of_children_is_refused_with_what_to_do(client: aiqueue.Client) -> None:
    errors: dict[str, BadInput] = {}
    page = Page(log="", n=1)

    async def handler(job: aiqueue.Job[Book]) -> None:
        await job.enqueue(page, "a")
        for name, attempt in {
            "twice": lambda: job.enqueue(page, "a"),
            "twice at once": lambda: job.gather([("g", page), ("g", page)]),
            "name": lambda: job.enqueue(page, ""),
            "message": lambda: job.enqueue("page", "m"),  # type: ignore[arg-type]
            "in step": lambda: job.step("s", job.enqueue, page, "s"),
            "gather in step": lambda: job.step("t", job.gather, [("t", page)]),
            "no list": lambda: job.gather(page),  # type: ignore[arg-type]
            "no pair": lambda: job.gather([page]),  # type: ignore[list-item]
            "unknown": lambda: job.gather([aiqueue.Child("other", "i", "agent.tasks", "acme", "normal")]),
            "of another job": lambda: job.gather([aiqueue.Child("a", "i", "agent.tasks", "acme", "normal")]),
            "priority": lambda: job.enqueue(page, "p", priority="urgent"),
            "header": lambda: job.enqueue(page, "h", headers={"Aiq-Run": "1"}),
            "on_failed": lambda: job.gather([], on_failed="ignore"),  # type: ignore[arg-type]
            "blocks": lambda: asyncio.sleep(0, job.gather_sync([])),
        }.items():
            with pytest.raises(BadInput) as caught:
                await attempt()
            errors[name] = caught.value

    worker = aiqueue.Worker()
    worker.handle(Book, retry=aiqueue.Backoff(attempts=1))(handler)
    async with worker.running(client):
        await (await client.enqueue(Book(log=""), tenant="acme")).result(timeout=20)
    texts = {name: str(error) for name, error in errors.items()}
    assert "number the children of a loop" in texts["twice"]
    assert "number the children of a loop" in texts["twice at once"]
    assert "printable" in texts["name"]
    assert "within step 's'" in texts["in step"]
    assert "within step 't'" in texts["gather in step"]
    assert "pass a list" in texts["no list"]
    assert "the pair of its name and its message" in texts["no pair"]
    assert "child 'other' (i) is none of this execution" in texts["unknown"]
    assert "child 'a' (i) is none of this execution" in texts["of another job"]
    assert "has no priority 'urgent'" in texts["priority"]
    assert "reserved" in texts["header"]
    assert "`gather` and not `gather_sync`" in texts["blocks"]


async def test_a_job_that_enqueues_itself_without_end_is_stopped_at_32_ancestors(client: aiqueue.Client) -> None:
    depths: list[int] = []

    async def handler(job: aiqueue.Job[Book]) -> None:
        depths.append(int(job.headers.get("Aiq-Depth", "0")))
        await job.enqueue(Book(log=""), "again")

    worker = aiqueue.Worker()
    worker.handle(Book, retry=aiqueue.Backoff(attempts=1))(handler)
    async with worker.running(client):
        await client.enqueue(Book(log=""), tenant="acme")

        async def failed() -> bool:
            return [each.reason async for each in client.dead.find()] == ["attempts"]

        await eventually(failed)
        [letter] = [each async for each in client.dead.find()]
    assert depths == list(range(33))
    assert "at most 32 ancestors" in letter.error


async def test_a_child_that_was_refused_can_be_enqueued_again_under_its_name(client: aiqueue.Client) -> None:
    async def handler(job: aiqueue.Job[Book]) -> str:
        with pytest.raises(BadInput):
            await job.enqueue(Leaf(n=1), "leaf", priority="urgent")
        return (await job.enqueue(Leaf(n=1), "leaf")).priority

    assert await run(client, Book(log=""), handler) == "normal"


# -- gather


@pytest.mark.parametrize(
    ("book", "options"),
    [
        (parenting.book, {}),
        (parenting.book_sync, {}),
        (parenting.book, {"process": True}),
        (parenting.book_sync, {"process": True}),
    ],
)
async def test_a_job_gathers_its_children_in_the_only_slot_and_is_not_counted(
    client: aiqueue.Client, tmp_path: Path, book: Callable[..., Any], options: dict[str, Any]
) -> None:
    log = str(tmp_path / "log")
    assert await run(client, Book(log=log), book, **options) == PAGES
    assert sorted(noted(log)) == ["book 1", "book 1", "page 0", "page 1", "page 2"]
    await nothing_kept(client)


async def test_an_attempt_after_a_gathering_runs_no_child_again(client: aiqueue.Client, tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    assert await run(client, Book(log=log, ends_at=3), concurrency=4) == PAGES
    assert [each for each in noted(log) if each in ("book 2", "book 3")] == ["book 2", "book 3"]
    assert sorted(each for each in noted(log) if each.startswith("page")) == ["page 0", "page 1", "page 2"]


async def test_children_that_were_enqueued_before_are_gathered_by_what_enqueue_returned(
    client: aiqueue.Client, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")

    async def handler(job: aiqueue.Job[Book]) -> Any:
        first = await job.enqueue(Page(log=log, n=0), "zero")
        return await job.gather([("one", Page(log=log, n=1)), first])

    assert await run(client, Book(log=log), handler) == [{"n": 1}, {"n": 0}]
    assert await run(client, Book(log=log, pages=0)) == []


async def test_two_gatherings_at_once_and_one_after_another_all_end(client: aiqueue.Client, tmp_path: Path) -> None:
    log = str(tmp_path / "log")

    async def handler(job: aiqueue.Job[Book]) -> Any:
        async with asyncio.TaskGroup() as group:
            both = [group.create_task(job.gather([(f"a-{n}", Page(log=log, n=n))])) for n in range(3)]
        return [each.result() for each in both] + await job.gather([("b", Page(log=log, n=9))])

    assert await run(client, Book(log=log), handler) == [[{"n": 0}], [{"n": 1}], [{"n": 2}], {"n": 9}]


async def test_a_result_above_64_kib_comes_from_the_childs_journal(client: aiqueue.Client) -> None:
    async def large(job: aiqueue.Job[Page]) -> str:
        return "x" * 100_000

    worker = aiqueue.Worker()
    worker.handle(Book)(parenting.book)
    worker.handle(Page)(large)
    async with worker.running(client):
        handle = await client.enqueue(Book(log="/dev/null", pages=1), tenant="acme")
        assert await handle.result(timeout=20) == ["x" * 100_000]


async def test_a_child_without_results_ends_its_gathering_with_none(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    worker.handle(Book)(parenting.book)
    worker.handle(Page, result=False)(parenting.page)
    async with worker.running(client):
        handle = await client.enqueue(Book(log="/dev/null", pages=2), tenant="acme")
        assert await handle.result(timeout=20) == [None, None]


# -- failed children


async def test_a_failed_child_fails_its_gathering_when_all_have_ended(client: aiqueue.Client, tmp_path: Path) -> None:
    log, caught = str(tmp_path / "log"), []

    async def handler(job: aiqueue.Job[Book]) -> str:
        try:
            await parenting.book(job)
        except ChildFailed as error:
            caught.append(error)
        return "ended"

    assert await run(client, Book(log=log, fails="reject"), handler) == "ended"
    [error] = caught
    assert isinstance(error, JobFailed)
    assert (error.name, error.reason, error.error) == ("page-1", "rejected", "torn")
    assert str(error).startswith("child 'page-1': job ")
    assert len([each for each in noted(log) if each.startswith("page")]) == 3
    [first, second, third] = await run(client, Book(log=log, fails="reject", on_failed="return"))
    assert (first, third) == ({"n": 0}, {"n": 2})
    assert "torn" in second


async def test_inspect_shows_a_job_and_its_children_as_a_tree(client: aiqueue.Client, tmp_path: Path) -> None:
    async def handler(job: aiqueue.Job[Book]) -> Any:
        made: list[Any] = [("page", Page(log=job.message.log, n=1)), ("leaf", Leaf(n=1))]
        if job.message.pages:
            made.append(("book", Book(log=job.message.log, pages=0)))
        return await job.gather(made)

    async with worker_of(handler).running(client):
        parent = await client.enqueue(Book(log=str(tmp_path / "log")), tenant="acme")

        async def settled() -> None:
            found = await stats.job(client.connection, client.topology, parent.id)
            assert found.state == "waiting"
            assert found.child_count == 3
            assert [(each.name, each.state) for each in found.children] == [
                ("page", "done"), ("leaf", "queued"), ("book", "waiting"),
            ]  # fmt: skip
            below = found.children[2].children
            assert [(each.name, each.state) for each in below] == [("page", "done"), ("leaf", "queued")]

        await eventually(settled)
        found = await stats.job(client.connection, client.topology, parent.id)
        assert next(each.text for each in found.timeline if each.event == "waits") == "for 3 children"
        child = await stats.job(client.connection, client.topology, found.children[1].job_id)
        assert child.parent == parent.id


async def test_a_worker_whose_handlers_all_await_results_says_what_to_use(
    client: aiqueue.Client, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("aiqueue.worker.announcer.EVERY_S", 0.2)

    async def handler(job: aiqueue.Job[Book]) -> Any:
        return await (await client.enqueue(Page(log=job.message.log, n=1), tenant="acme")).result()

    async with worker_of(handler).running(client):
        parent = await client.enqueue(Book(log=str(tmp_path / "log")), tenant="acme")
        await eventually(lambda: "`job.gather`, which holds no slot" in caplog.text)
        assert await parent.cancel()
