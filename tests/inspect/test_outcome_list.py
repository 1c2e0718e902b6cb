"""The list of jobs that have ended."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pydantic
import pytest

import aiqueue
from aiqueue import headers
from aiqueue.errors import BadInput, JobFailed
from aiqueue.inspect import ListedOutcome, outcome_list, stats

from ..support import eventually

pytestmark = pytest.mark.families("agent.tasks", "gateway.requests")


class Task(aiqueue.Message, kind="task"):
    n: int = 0
    seconds: float = 0


class Large(aiqueue.Message, kind="large"):
    size: int


class Chat(aiqueue.Message, kind="chat", family="gateway.requests"):
    key: pydantic.SecretStr = pydantic.SecretStr("hunter2")


def worker() -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=1, name="one")

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=2, first="10ms", jitter=0))
    async def task(job: aiqueue.Job[Task]) -> int:
        await asyncio.sleep(job.message.seconds)
        if job.message.n < 0:
            raise ValueError("a negative number")
        return job.message.n

    @worker.handle(Large)
    async def large(job: aiqueue.Job[Large]) -> str:
        return "x" * job.message.size

    @worker.handle(Chat)
    async def chat(job: aiqueue.Job[Chat]) -> Any:
        return {"key": job.message.key}

    return worker


async def end(client: aiqueue.Client, *messages: aiqueue.Message, tenant: str = "acme") -> list[str]:
    """Have jobs end one after the other."""
    ids = []
    async with worker().running(client):
        for message in messages:
            handle = await client.enqueue(message, tenant=tenant)
            ids.append(handle.id)
            with contextlib.suppress(JobFailed):
                await handle.result(timeout=25)
    return ids


async def listed(client: aiqueue.Client, **which: Any) -> list[ListedOutcome]:
    return list((await client.jobs.outcomes(**which)).outcomes)


async def test_outcomes_are_listed_the_newest_first(client: aiqueue.Client) -> None:
    ids = await end(client, Task(n=7), Task(n=-1), Chat())
    waiting = await client.enqueue(Task(n=8), tenant="acme")
    parked = await client.enqueue(Task(n=9), tenant="acme", delay="1h")
    for handle in (waiting, parked):
        assert await handle.cancel()
    page = await client.jobs.outcomes()
    assert page.cursor == ""
    parked_one, waiting_one, chat, bad, good = page.outcomes
    assert [each.job_id for each in page.outcomes] == [parked.id, waiting.id, *reversed(ids)]
    assert (good.family, good.tenant, good.kind, good.state, good.attempt, good.result) == (
        "agent.tasks", "acme", "task", "done", 1, 7,
    )  # fmt: skip
    assert good.enqueued_at is not None
    assert good.started_at is not None
    assert good.run_s is not None
    assert good.enqueued_at <= good.started_at <= good.ended_at + 1
    assert (bad.state, bad.kind, bad.attempt, bad.reason, bad.error, bad.worker) == (
        "failed", "task", 2, "attempts", "ValueError: a negative number", "one",
    )  # fmt: skip
    assert (chat.family, chat.kind) == ("gateway.requests", "chat")
    assert "hunter2" not in str(chat.result)
    for each in (parked_one, waiting_one):
        assert (each.state, each.kind, each.reason, each.run_s) == ("cancelled", "task", "cancelled", None)
    shown = await client.jobs.outcomes(results=False)
    assert {each.result for each in shown.outcomes} == {None}


async def test_the_job_that_has_ended_shows_its_kind(client: aiqueue.Client) -> None:
    (job_id,) = await end(client, Task(n=7))
    assert (await stats.job(client.connection, client.topology, job_id)).kind == "task"


async def test_outcomes_are_selected(client: aiqueue.Client) -> None:
    slow, bad, _ = await end(client, Task(n=1, seconds=0.3), Task(n=-1), Large(size=10))
    (other,) = await end(client, Task(n=2), tenant="globex")
    (chat,) = await end(client, Chat())
    assert [each.job_id for each in await listed(client, family="gateway.requests")] == [chat]
    assert [each.job_id for each in await listed(client, tenant="globex")] == [other]
    assert [each.job_id for each in await listed(client, family="agent.tasks", tenant="globex")] == [other]
    assert [each.job_id for each in await listed(client, state="failed")] == [bad]
    assert [each.job_id for each in await listed(client, slower="290ms")] == [slow]
    assert [each.kind for each in await listed(client, kind="large")] == ["large"]
    assert await listed(client, newer="1ms") == []
    assert len(await listed(client, newer="1h")) == 5
    for wrong in ({"state": "queued"}, {"family": "no.such"}, {"tenant": "a b"}, {"cursor": "x"}, {"limit": 0}):
        with pytest.raises(BadInput):
            await client.jobs.outcomes(**wrong)  # type: ignore[arg-type]


async def test_pages_lead_through_all_of_them_whatever_the_size_of_a_block(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = await end(client, *(Task(n=n) for n in range(20)))
    (chat,) = await end(client, Chat())
    for block, read in ((1, 1), (2, 3), (1_024, 2_048)):
        monkeypatch.setattr(outcome_list, "BLOCK", block)
        monkeypatch.setattr(outcome_list, "READ_MAX", read)
        found, cursor, more = [], "", True
        while more:
            page = await client.jobs.outcomes(limit=3, cursor=cursor)
            found += [each.job_id for each in page.outcomes]
            cursor, more = page.cursor, bool(page.cursor)
        assert found == [chat, *reversed(ids)]
    monkeypatch.setattr(outcome_list, "SEARCHED_MAX", 2)
    page = await client.jobs.outcomes(family="agent.tasks")
    assert (len(page.outcomes), page.searched, bool(page.cursor)) == (2, 2, True)


async def test_entries_that_are_no_outcomes_are_left_out_and_large_results_not_read(client: aiqueue.Client) -> None:
    streaming = aiqueue.Worker()

    @streaming.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> str:
        await job.progress(0.5, "half")
        await job.chunk("a part")
        return "whole"

    async with streaming.running(client):
        handle = await client.enqueue(Task(), tenant="acme")
        await handle.result(timeout=25)
    (large,) = await end(client, Large(size=2_000_000))
    one, other = await listed(client)
    assert (one.job_id, "stored as a document" in one.result) == (large, True)
    assert (other.job_id, other.result) == (handle.id, "whole")


async def test_an_outcome_of_a_former_version_or_of_a_plain_client_has_no_kind(client: aiqueue.Client) -> None:
    (job_id,) = await end(client, Task(n=1))
    stream = client.topology.journal_stream.name
    (entry,) = [each async for each in client.connection.read(stream, "ai.>")]
    fields = {name: value for name, value in entry.headers.items() if name.startswith(("Aiq-", "Content-"))}
    assert fields.pop(headers.READ_KIND) == "task"
    subject = entry.subject.removesuffix(job_id) + "former"
    await client.connection.store(subject, entry.data, fields | {headers.MSG_ID: "former"})
    former, new = await listed(client)
    assert ((former.job_id, former.kind, former.result), new.kind) == (("former", "", 1), "task")


async def test_a_kind_that_only_the_body_names_is_known(client: aiqueue.Client) -> None:
    plain = aiqueue.Worker()

    @plain.handle_any("agent.tasks")
    async def odd(job: aiqueue.Job[aiqueue.RawMessage]) -> int:
        return 3

    async with plain.running(client):
        fields = {headers.MSG_ID: "acme/agent.tasks/odd-1", "task_id": "odd-1"}
        body = b'{"schema_version": "1.0", "message_type": "odd %s kind", "data": {}}'
        await client.connection.store("ai.agent.tasks.acme", body, fields)
        await eventually(lambda: _has_outcome(client))
    (found,) = await listed(client)
    assert (found.job_id, found.kind, found.result) == ("odd-1", "odd %s kind", 3)


async def _has_outcome(client: aiqueue.Client) -> bool:
    return bool(await listed(client))
