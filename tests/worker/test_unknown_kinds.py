"""Jobs whose kind no handler of a worker knows: parked aside, not counted, and run by a worker that knows the kind."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import headers, subjects
from aiqueue.enqueue import Filter, Parking
from aiqueue.errors import JobFailed, NotFound
from aiqueue.subjects import Lane
from aiqueue.worker import unknown_kinds
from aiqueue.worker.unknown_kinds import Hops, hop_of

from .. import keyed
from ..support import eventually

pytestmark = pytest.mark.families("agent.tasks")


class Known(aiqueue.Message, kind="known"):
    n: int = 0


class Other(aiqueue.Message, kind="other"):
    n: int = 0


def worker_of(model: type[aiqueue.Message], ran: list[int], **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(concurrency=20)

    @worker.handle(model, **options)
    async def handler(job: aiqueue.Job[Any]) -> int:
        ran.append(job.message.n)
        return job.attempt

    return worker


async def dead(client: aiqueue.Client) -> list[Any]:
    return [letter async for letter in client.dead.find(Filter())]


async def count(client: aiqueue.Client, stream: str, subject: str) -> int:
    info = await client.connection.api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})
    return sum((info["state"].get("subjects") or {}).values())


async def test_jobs_of_a_kind_that_nobody_knows_do_not_hold_up_those_behind_them(client: aiqueue.Client) -> None:
    ran: list[int] = []
    jobs = [Other(n=n) for n in range(1_200)] + [Known(n=n) for n in range(50)]
    async for _ in client.enqueue_many(jobs, tenant="acme"):
        pass
    async with worker_of(Known, ran).running(client):
        await eventually(lambda: len(ran) == 50)
        await eventually(lambda: count(client, "AI_PARKED", "ai.parked.*.agent.tasks.acme.normal.*.aside"))
    assert await dead(client) == []


@pytest.mark.parametrize("keeps", [True, False], ids=["result", "no result"])
async def test_two_services_on_one_family_do_all_jobs_of_both_and_none_is_counted_as_an_attempt(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, *, keeps: bool
) -> None:
    monkeypatch.setattr(unknown_kinds, "HOP_MAX_S", 0.25)  # each worker gets about half of the other's jobs at each hop
    known: list[int] = []
    other: list[int] = []
    jobs = [model(n=n) for n in range(200) for model in (Known, Other)]
    handles = [
        handle async for handle in client.enqueue_many(jobs, tenant="acme") if isinstance(handle, aiqueue.Handle)
    ]
    async with (
        worker_of(Known, known, result=keeps).running(client),
        worker_of(Other, other, result=keeps).running(client),
    ):
        if keeps:
            async with asyncio.timeout(60):
                assert {await handle.result() for handle in handles if isinstance(handle, aiqueue.Handle)} == {1}
        await eventually(lambda: len(known) == 200 and len(other) == 200, within=60)
    assert sorted(known) == sorted(other) == list(range(200))
    assert await dead(client) == []


async def test_a_caller_awaits_the_result_of_a_job_that_waits_for_a_worker_that_knows_it(
    client: aiqueue.Client,
) -> None:
    handle = await client.enqueue(Other(n=1), tenant="acme")
    waiting = asyncio.create_task(handle.result(60))
    ran: list[int] = []
    async with worker_of(Known, []).running(client):
        await eventually(lambda: count(client, "AI_PARKED", "ai.parked.*.agent.tasks.acme.normal.*.aside"))
        status = await handle.status()
        assert status.state in ("parked", "retrying", "queued", "in_flight")
        async with worker_of(Other, ran).running(client):
            assert await waiting == 1
    assert ran == [1]


async def test_a_job_parked_aside_is_cancelled(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Other(), tenant="acme")
    async with worker_of(Known, []).running(client):
        await eventually(lambda: count(client, "AI_PARKED", "ai.parked.*.agent.tasks.acme.normal.*.aside"))
        assert await handle.cancel()
        with pytest.raises(JobFailed, match="cancelled"):
            await handle.result(30)
        await eventually(
            lambda: _equals(0, count(client, "AI_PARKED", "ai.parked.>"), count(client, "AI_AGENT_TASKS", "ai.agent.>"))
        )


async def _equals(expected: int, *counts: Any) -> bool:
    return all([await each == expected for each in counts])


async def test_after_the_patience_a_job_is_a_dead_letter_that_can_be_replayed(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unknown_kinds, "PATIENCE_S", 0.5)
    handle = await client.enqueue(Other(n=7), tenant="acme")
    async with worker_of(Known, []).running(client):
        with pytest.raises(JobFailed, match="no handler for kind 'other'") as failed:
            await handle.result(30)
    assert failed.value.reason == "unknown_kind"
    (letter,) = await dead(client)
    assert (letter.reason, letter.kind, letter.attempt) == ("unknown_kind", "other", 1)
    monkeypatch.setattr(unknown_kinds, "PATIENCE_S", 60.0)
    ran: list[int] = []
    await client.dead.replay(letter)
    async with worker_of(Other, ran).running(client):
        await eventually(lambda: ran == [7])


async def test_failures_before_and_after_a_hop_count_together(client: aiqueue.Client) -> None:
    """A worker that knows the kind fails twice; in between, one that does not know the kind gets the job."""
    attempts: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Other, retry=aiqueue.Backoff(attempts=2, first=0.01, jitter=0))
    async def handler(job: aiqueue.Job[Other]) -> None:
        attempts.append(job.attempt)
        raise ValueError("broken")

    handle = await client.enqueue(Other(), tenant="acme")
    async with worker_of(Known, []).running(client):
        await eventually(lambda: count(client, "AI_PARKED", "ai.parked.*.agent.tasks.acme.normal.*.aside"))
    async with worker.running(client):
        with pytest.raises(JobFailed) as failed:
            await handle.result(30)
    assert attempts == [1, 2]
    assert failed.value.reason == "attempts"
    (letter,) = await dead(client)
    assert letter.attempt == 2


async def test_a_job_whose_retries_were_parked_outlives_a_worker_that_does_not_know_its_kind(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.settlement.PARK_AFTER_S", 0.1)
    attempts: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Other, retry=aiqueue.Backoff(attempts=5, first=0.5, factor=2, jitter=0))
    async def handler(job: aiqueue.Job[Other]) -> int:
        attempts.append(job.attempt)
        if job.attempt < 3:
            raise ValueError("broken")
        return job.attempt

    handle = await client.enqueue(Other(), tenant="acme")
    async with worker.running(client):
        await eventually(lambda: attempts == [1, 2])
    async with worker_of(Known, []).running(client):
        await eventually(lambda: count(client, "AI_PARKED", "ai.parked.*.agent.tasks.acme.normal.*.aside"))
    async with worker.running(client):
        assert await handle.result(30) == 3
    assert attempts == [1, 2, 3]


async def test_the_patience_starts_anew_when_a_worker_that_knows_the_kind_has_run_the_job(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.worker.settlement.PARK_AFTER_S", 0.1)
    monkeypatch.setattr(unknown_kinds, "PATIENCE_S", 2.0)
    attempts: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Other)
    async def handler(job: aiqueue.Job[Other]) -> int:
        attempts.append(job.attempt)
        if job.attempt == 1:
            raise aiqueue.Retry(after=2.5)
        return job.attempt

    handle = await client.enqueue(Other(), tenant="acme")
    aside = "ai.parked.*.agent.tasks.acme.normal.*.aside"
    async with worker_of(Known, []).running(client):
        await eventually(lambda: count(client, "AI_PARKED", aside))
    async with worker.running(client):
        await eventually(lambda: attempts == [1])
    async with worker_of(Known, []).running(client):
        await eventually(lambda: count(client, "AI_PARKED", aside))
    async with worker.running(client):
        assert await handle.result(30) == 2
    assert await dead(client) == []


async def test_where_the_lane_is_full_an_unknown_job_waits_in_its_lane(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unknown_kinds.UnknownKinds, "_count", _count_a_full_lane)
    handle = await client.enqueue(Other(), tenant="acme")
    async with worker_of(Known, []).running(client):
        info = "CONSUMER.INFO.AI_AGENT_TASKS.acme-normal"

        async def was_returned() -> bool:
            try:
                return (await client.connection.api(info))["num_redelivered"] > 0
            except NotFound:
                return False  # the worker has not made it yet

        monkeypatch.setattr("aiqueue.worker.settlement.UNKNOWN_KIND_DELAY_S", 0.05)
        await eventually(was_returned)
        assert await count(client, "AI_PARKED", "ai.parked.>") == 0
        ran: list[int] = []
        async with worker_of(Other, ran).running(client):
            assert await handle.result(60) == 1


@pytest.mark.parametrize("priority", ["normal", "high"])
async def test_a_full_lane_is_one_that_the_server_calls_full(account: Any, tmp_path: Path, priority: str) -> None:
    file = keyed.FILE.replace('"64MiB"', '"64MiB"\nmax_msgs_per_subject = 3')
    async with keyed.connect(account, tmp_path, file) as client:
        family, parking = client.topology.family(keyed.FAMILY), Parking(client.connection, client.topology)
        full, key = Lane(family.name, "acme", priority), keyed.key_lane("gpt-4o", priority=priority)
        kinds = unknown_kinds.UnknownKinds(client.connection, parking)
        for _ in range(3):
            await keyed.store(client, key, "gpt-4o")
            assert not await kinds._is_full(full, family)
            kinds._counted.clear()
        assert await kinds._is_full(key, family)
        for n in range(3):
            await client.enqueue(keyed.Call(n=n), tenant="acme", priority=priority)
        kinds._counted.clear()
        assert await kinds._is_full(full, family)


async def _count_a_full_lane(self: Any, stream: str, subject: str) -> int:
    return 10**9


# -- the hops


def delivery_with(value: str | None) -> Any:
    found = {} if value is None else {headers.UNKNOWN: value}
    return SimpleNamespace(message=SimpleNamespace(headers=found))


def test_hops_double_from_a_quarter_of_a_second_to_half_a_minute_so_that_ten_minutes_are_at_most_30() -> None:
    now, waited, delays = time.time(), 0.0, []
    hops = Hops(now, 0)
    while waited < 600:
        delays.append(hops.delay_s)
        waited += hops.delay_s
        hops = Hops.of(delivery_with(hops.header()), now)
    assert delays[:8] == [0.25, 0.5, 1, 2, 4, 8, 16, 30]
    assert len(delays) <= 30


@given(st.one_of(st.none(), st.text(max_size=40), st.from_regex(r"\d{1,20} \d{1,20}", fullmatch=True)))
def test_any_header_gives_hops_that_began_in_the_past_and_a_delay_within_bounds(value: str | None) -> None:
    now = time.time()
    hops = Hops.of(delivery_with(value), now)
    assert 0 <= hops.first_seen_at <= now
    assert 0.25 <= hops.delay_s <= 30
    assert Hops.of(delivery_with(hops.header()), now).number == hops.number + 1 or hops.number >= 10**17


@given(st.integers(1, 10**9), st.integers(1, 10**9), st.integers(1, 10**6))
def test_the_parking_id_of_a_hop_tells_its_number_and_no_other_parking_id_does(run: int, at: int, hop: int) -> None:
    assert hop_of(f"u{run}-{at}-h{hop}") == hop
    assert hop_of(f"r{run}-{at}-a{hop}") == 0
    assert hop_of(subjects.new_id()) == 0
