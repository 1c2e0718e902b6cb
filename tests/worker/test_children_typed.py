"""Results of children, of the types that their messages declare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import ChildCancelled, ChildFailed, JobCancelled, NotFound, ResultInvalid

from ..support import eventually
from . import parenting
from .parenting import FAST, Book, Index, Leaf, Section, Table
from .test_children_ended import becomes, children_of, state_of

pytestmark = pytest.mark.families("agent.tasks", "agent.message", "rag.ingest")


def worker_of(index: Callable[..., Any] = parenting.index, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=2)
    worker.handle(Index, retry=FAST, **options)(index)
    worker.handle(Table)(parenting.table)
    worker.handle(parenting.Count)(parenting.count)
    return worker


@pytest.mark.parametrize("process", [False, True])
@pytest.mark.parametrize("index", [parenting.index, parenting.index_sync])
async def test_gathered_results_are_of_the_declared_type_and_misfits_stand_in_their_places(
    client: aiqueue.Client, index: Callable[..., Any], process: bool
) -> None:
    tables = [Table(title="Tea"), Table(title="odd", returns={"titel": 5}), Table(title="Salt" * 25_000)]
    async with worker_of(index, process=process).running(client):
        handle = await client.enqueue(Index(tables=tables), tenant="acme")
        tea, odd, salt, count = await handle.result(30)
    assert (tea, salt, count) == ("Tea Friday", "SaltSaltSaltSaltSalt Friday", "7")
    assert "is not of the type Section: title: Field required (and 1 more) {'titel': 5}" in odd


async def test_a_child_whose_result_does_not_fit_fails_its_gathering_and_has_the_data(client: aiqueue.Client) -> None:
    caught: list[ResultInvalid] = []

    async def handler(job: aiqueue.Job[Index]) -> list[str]:
        try:
            await job.gather(parenting.tables(job.message))
        except ResultInvalid as error:
            caught.append(error)
        return []

    odd = {"title": "x", "day": "never", "key": "hunter2"}
    async with worker_of(handler).running(client):
        handle = await client.enqueue(Index(tables=[Table(title="Tea"), Table(title="x", returns=odd)]), tenant="acme")
        assert await handle.result(30) == []
        [error] = caught
        assert error.data == odd
        assert await (await client.job(error.job_id)).result(30) == odd, "the child is done, and keeps its result"


async def test_a_gathering_of_several_types_gives_each_result_its_own(client: aiqueue.Client) -> None:
    gathered: list[Any] = []

    async def handler(job: aiqueue.Job[Index]) -> list[str]:
        plain = await job.enqueue(Leaf(n=1), "leaf")
        gathered.extend(await job.gather([("t", Table(title="Tea")), plain, ("c", parenting.Count(n=7))]))
        return []

    worker = worker_of(handler)
    worker.handle(Leaf)(leaf)
    async with worker.running(client):
        await (await client.enqueue(Index(tables=[]), tenant="acme")).result(30)
    section, plain, count = gathered
    assert isinstance(section, Section)
    assert (plain, count) == ({"title": "leaf", "day": "2026-01-02", "key": ""}, 7)


async def leaf(job: aiqueue.Job[Leaf]) -> Section:
    return Section.model_validate({"title": "leaf", "day": "2026-01-02"})


async def test_a_cancelled_child_is_a_cancelled_job_too_and_a_failed_one_is_not(client: aiqueue.Client) -> None:
    gathered: list[Any] = []

    async def handler(job: aiqueue.Job[Book]) -> None:
        rejected = Table(title="x")
        gathered.extend(await job.gather([("leaf", Leaf(n=1)), ("rejected", rejected)], on_failed="return"))
        await job.gather([await job.enqueue(Leaf(n=1), "again")])

    async def reject(job: aiqueue.Job[Table]) -> Section:
        raise aiqueue.Reject("cancelled")

    worker = aiqueue.Worker()
    worker.handle(Book, retry=aiqueue.Backoff(attempts=1))(handler)
    worker.handle(Table)(reject)
    async with worker.running(client):
        parent = await client.enqueue(Book(log=""), tenant="acme")
        await becomes(client, parent.id, "waiting")
        leaf_id, _ = await children_of(client)
        assert await client.cancel(leaf_id)
        await eventually(lambda: bool(gathered))

        async def is_stored_again() -> bool:
            ids = await children_of(client)
            with contextlib.suppress(NotFound):
                return len(ids) == 3 and await state_of(client, ids[-1]) == "queued"
            return False

        await eventually(is_stored_again)
        assert await client.cancel((await children_of(client))[-1])
        with pytest.raises(aiqueue.JobFailed, match=r"child 'again': job \w+ was cancelled before it started"):
            await parent.result(30)
    cancelled, failed = gathered[:2]
    assert type(cancelled) is ChildCancelled
    assert isinstance(cancelled, JobCancelled)
    assert (cancelled.name, cancelled.reason, cancelled.attempt) == ("leaf", "cancelled", 0)
    assert type(failed) is ChildFailed
    assert not isinstance(failed, JobCancelled)
