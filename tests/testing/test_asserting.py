"""`assert_enqueued`: what is found, and what a failure says."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import pydantic
import pytest

import aiqueue
from aiqueue import testing
from aiqueue.errors import BadInput


class Summarise(aiqueue.Message, kind="assert.summarise"):
    text: str
    count: int = 0
    key: pydantic.SecretStr = pydantic.SecretStr("hidden")


class Other(aiqueue.Message, kind="assert.other"):
    pass


worker = aiqueue.Worker()


@worker.handle(Summarise)
async def summarise(job: aiqueue.Job[Summarise]) -> str:
    return job.message.text


@pytest.fixture
def families() -> Collection[str]:
    return ["agent.tasks"]


async def test_jobs_are_found_in_their_lanes_and_parked_by_tenant_priority_and_fields(client: aiqueue.Client) -> None:
    first = await client.enqueue(Summarise(text="x"), tenant="acme")
    second = await client.enqueue(Summarise(text="y", count=2), tenant="acme", priority="high", delay="1h")
    await client.enqueue(Other(), tenant="acme")
    large = await client.enqueue(Summarise(text="z" * 300_000), tenant="other", headers={"trace": "7"})

    async def ids(**conditions: Any) -> set[str]:
        return {each.id for each in await testing.assert_enqueued(client, Summarise, **conditions)}

    assert await ids() == {first.id, second.id, large.id}
    assert await ids(tenant="acme") == await ids(count=2, tenant="acme") == {first.id, second.id}
    assert await ids(text="x") == await ids(delayed=False, tenant="acme") == {first.id}
    assert await ids(priority="high") == await ids(delayed=True) == await ids(where={"count": 2}) == {second.id}
    (found,) = await testing.assert_enqueued(client, Summarise, tenant="other")
    assert found.message == Summarise(text="z" * 300_000)
    assert (found.family, found.priority, found.due_at) == ("agent.tasks", "normal", None)
    assert found.headers == {"trace": "7"}  # none of aiqueue's own
    await testing.assert_enqueued(client, Summarise, count=0, tenant="nobody")


async def test_jobs_of_one_id_in_two_tenants_are_two_jobs(client: aiqueue.Client) -> None:
    for delay in (None, "1h"):
        text = f"delayed by {delay}"
        for tenant in ("acme", "globex"):
            handle = await client.enqueue(Summarise(text=text), tenant=tenant, unique=f"same-{delay}", delay=delay)
            assert not handle.duplicate
        found = await testing.assert_enqueued(client, Summarise, count=2, text=text)
        assert {(job.tenant, job.id) for job in found} == {("acme", f"same-{delay}"), ("globex", f"same-{delay}")}
    drained = await testing.drain(client, worker, delayed=True)
    assert drained.done == 4


async def test_within_waits_for_a_job_that_is_on_its_way(client: aiqueue.Client) -> None:
    async def enqueue() -> None:
        await asyncio.sleep(0.05)
        await client.enqueue(Summarise(text="x"), tenant="acme")

    task = asyncio.create_task(enqueue())
    await testing.assert_enqueued(client, Summarise, count=1, within="5s")
    await task


async def test_a_failure_says_what_is_stored_instead_without_its_secrets(client: aiqueue.Client) -> None:
    with pytest.raises(AssertionError, match=r"^at least 1 assert\.summarise should be enqueued, and 0 are; no job of"):
        await testing.assert_enqueued(client, Summarise)
    for number in range(5):
        await client.enqueue(Summarise(text=str(number)), tenant="acme")
    with pytest.raises(AssertionError) as told:
        await testing.assert_enqueued(client, Summarise, count=1, text="7", tenant="acme")
    assert str(told.value).startswith(
        "1 assert.summarise with tenant='acme', text='7' should be enqueued, and 0 are; stored of this kind: "
        "Summarise(text='0', count=0, key=SecretStr('**********')) of acme/normal"
    )
    assert str(told.value).endswith(", and 2 more")
    with pytest.raises(AssertionError, match=r"2 assert\.summarise should be enqueued, and 5 are"):
        await testing.assert_enqueued(client, Summarise, count=2)


async def test_wrong_arguments_say_in_one_line_what_to_do(client: aiqueue.Client) -> None:
    class Elsewhere(aiqueue.Message, kind="elsewhere", family="no.such"):
        pass

    for wrong, problem in (
        ({"txt": "x"}, "Summarise has no field 'txt': it has text, count, key"),
        ({"count": -1}, "count must be a whole number"),
        ({"within": "soon"}, "within"),
        ({"tenant": "a b"}, "tenant 'a b'"),
        ({"priority": "urgent"}, "has no priority 'urgent'"),
        ({"delayed": 1}, "delayed"),
    ):
        options: Any = wrong
        with pytest.raises(BadInput) as told:
            await testing.assert_enqueued(client, Summarise, **options)
        assert problem in str(told.value)
    with pytest.raises(BadInput, match=r"no\.such"):
        await testing.assert_enqueued(client, Elsewhere)
    with pytest.raises(BadInput, match="assert_enqueued needs the class of a message"):
        await testing.assert_enqueued(client, Summarise(text="x"))  # type: ignore[type-var]
