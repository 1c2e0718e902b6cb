"""Credits and turns of limited keys, however a delivery ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import headers, subjects
from aiqueue.enqueue import key_lanes
from aiqueue.errors import Unavailable
from aiqueue.lanes import key_gate
from aiqueue.limits import CreditBatch
from aiqueue.processes import Quarantine
from aiqueue.worker import limiting
from aiqueue.worker.opening import Opener

from ..support import Account, create_streams, eventually
from .provider import FAMILY, NAME, Provider
from .test_engine import Call, calling, delivered, fill, lane


@asynccontextmanager
async def connecting(
    account: Account, directory: Path, *tables: str, consumer: str = ""
) -> AsyncIterator[aiqueue.Client]:
    """Connect with these limits, and these settings of the family's consumers."""
    (directory / "llm.toml").write_text(FAMILY + (f"[consumer]\n{consumer}\n" if consumer else ""))
    (directory / "limits.toml").write_text("".join(f'[[limit]]\nfamily = "{NAME}"\n{each}\n' for each in tables))
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=directory) as client:
        await create_streams(client)
        yield client


async def test_a_delivery_that_cannot_be_opened_gives_its_place_in_flight_back(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, seen = aiqueue.Worker(concurrency=5), []

    @worker.handle(Call)
    async def handler(job: aiqueue.Job[Call]) -> None:
        seen.append((job.message.n, job.attempt))
        if job.message.n == 0 and job.attempt == 1:
            raise aiqueue.Retry("again", after=0.05)

    unopened = []
    opens = Opener.open

    async def fails_once(self: Opener, delivery: Any) -> Any:
        if delivery.delivery_count == 2 and not unopened:
            unopened.append(delivery)
            raise Unavailable("no answer")
        return await opens(self, delivery)

    monkeypatch.setattr(Opener, "open", fails_once)
    async with connecting(account, tmp_path, "in_flight = 1") as client, worker.running(client):
        await fill(client, 30)
        await eventually(lambda: bool(unopened))
        await eventually(lambda: len({n for n, _ in seen}) == 30)


async def test_jobs_whose_consumer_is_deleted_while_they_run_free_their_places_in_the_turn_of_their_tenant(
    account: Account, tmp_path: Path
) -> None:
    provider = Provider()
    async with (
        connecting(account, tmp_path, "requests = 1000", consumer="max_ack_pending = 2") as client,
        calling(provider).running(client),
    ):
        await fill(client, 2, takes_s=1.5)
        await eventually(lambda: provider.open == 2)
        await client.connection.api(f"CONSUMER.DELETE.LLM_CALLS.a-normal={subjects.hashed('m')}")
        await eventually(lambda: provider.open == 0)
        await fill(client, 4)
        await eventually(lambda: len(provider.calls) == 6)


async def test_a_key_that_was_paused_before_its_lane_was_found_goes_on_after_the_pause(
    account: Account, tmp_path: Path
) -> None:
    provider = Provider()
    async with connecting(account, tmp_path, "requests = 1000") as client:
        async with calling(provider).running(client):
            await fill(client, 3)
            await eventually(lambda: len(provider.calls) == 3)
            await client.pause(NAME, key="m")
            await client.pause(NAME, tenant="other")
            await fill(client, 3)
        async with calling(provider).running(client) as session:
            await eventually(lambda: any(each.key.key for each in session.puller.lanes))
            await client.resume(NAME, key="m")
            await eventually(lambda: len(provider.calls) == 6)


async def test_a_worker_that_knows_more_keys_than_it_keeps_still_heeds_the_pauses_of_its_lanes(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_gate, "TEXTS_MAX", 3)
    provider = Provider()
    async with (
        connecting(account, tmp_path, "requests = 1000") as client,
        calling(provider).running(client) as session,
    ):
        for n in range(5):
            await fill(client, 1, model=f"m{n}")
            await eventually(lambda: len(provider.calls) == n + 1)  # noqa: B023
        await client.pause(NAME, key="m0")
        first = next(each for each in session.puller.lanes if each.key.key == subjects.hashed("m0"))
        await eventually(lambda: first.paused)
        await fill(client, 1, model="m0")
        await client.resume(NAME, key="m0")
        await eventually(lambda: len(provider.calls) == 6)


async def test_idle_lanes_of_other_keys_take_no_place_of_a_tenant_with_few(account: Account, tmp_path: Path) -> None:
    provider = Provider()
    async with (
        connecting(account, tmp_path, "requests = 1000", consumer="max_ack_pending = 2") as client,
        calling(provider).running(client),
    ):
        for n in range(4):
            await fill(client, 1, model=f"m{n}")
        await eventually(lambda: len(provider.calls) == 4)
        await asyncio.sleep(0.5)
        await fill(client, 20, model="busy")
        await eventually(lambda: len(provider.calls) == 24)


@pytest.mark.parametrize("was_limited", [True, False])
async def test_a_limit_that_is_set_holds_for_credits_that_were_granted_before_and_wait_for_jobs(
    account: Account, tmp_path: Path, was_limited: bool
) -> None:
    """Three workers that share the jobs have credits left over, valid for a minute with this window, or for ever."""
    provider = Provider()
    async with connecting(account, tmp_path) as client, AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(calling(provider).running(client))
        await client.set_limit(NAME, "m", requests=100_000, window="1h")
        await fill(client, 100, takes_s=0.01)
        await eventually(lambda: len(provider.calls) == 100)
        if not was_limited:
            await client.unset_limit(NAME, "m")
        for n in range(1, 11):
            await fill(client, 30, takes_s=0.003)
            await eventually(lambda: len(provider.calls) == 100 + 30 * n)  # noqa: B023
        await client.set_limit(NAME, "m", requests=2, window="1h")
        await asyncio.sleep(0.5)
        before = len(provider.calls)
        await fill(client, 100)
        await asyncio.sleep(0.5)  # the span that is judged
        assert len(provider.calls) - before <= (0 if was_limited else 2)


async def test_workers_without_more_jobs_give_their_credits_back(account: Account, tmp_path: Path) -> None:
    """With this window a credit stays valid for a minute."""
    provider = Provider()
    async with connecting(account, tmp_path, 'requests = 100\nwindow = "1h"') as client, AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(calling(provider).running(client))
        for n in range(1, 7):
            await fill(client, 10, takes_s=0.003)
            await eventually(lambda: len(provider.calls) == 10 * n)  # noqa: B023
        await eventually(lambda: is_used(client, 60))


async def is_used(client: aiqueue.Client, requests: int) -> bool:
    """Whether so many requests count in the only limit, and no more are reserved."""
    (limit,) = await client.limits()
    return [each.requests for each in limit.uses] == [requests]


async def test_batches_of_credits_are_used_again_after_a_pause_that_has_ended_by_itself(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[bool] = []
    begin = CreditBatch.begin

    def noted(self: CreditBatch) -> bool:
        begun.append(begin(self))
        return begun[-1]

    monkeypatch.setattr(CreditBatch, "begin", noted)
    monkeypatch.setattr(key_lanes, "REFRESH_S", 0.1)  # only jobs that were stored in the lane of their key are plain
    async with (
        connecting(account, tmp_path, 'requests = 100000\nwindow = "10s"') as client,
        calling(Provider()).running(client),
    ):

        async def is_begun() -> bool:
            await fill(client, 50)
            return any(begun)

        await eventually(is_begun)
        await client.pause(NAME, key="m", duration="0.2s")
        await asyncio.sleep(0.3)
        begun.clear()
        await eventually(is_begun)


async def test_a_suspect_that_waits_for_its_limit_where_no_child_can_try_it_is_not_convicted(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler is in this test, where no child finds it. Its key is known only when its body was read."""
    monkeypatch.setattr(limiting, "WAIT_S", 0.1)
    provider = Provider()
    async with (
        connecting(account, tmp_path, 'requests = 1\nwindow = "4s"') as client,
        calling(provider).running(client),
    ):
        await fill(client, 1)
        await eventually(lambda: len(provider.calls) == 1)
        monkeypatch.setattr(Quarantine, "is_suspect", lambda *_: True)
        async with connecting(account, tmp_path) as other:  # which does not know yet whether there are lanes of keys
            handle = await other.enqueue(Call(n=7), tenant="a")
            await handle.result(timeout=20)
    (first, _, _), (second, _, _) = provider.calls
    assert second - first >= 3.9


async def test_jobs_that_come_to_idle_lanes_of_exhausted_keys_hold_no_slots(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limiting, "WAIT_S", 20.0)  # how long they would hold them
    provider = Provider()
    tables = 'key = "x*"\nrequests = 1\nwindow = "60s"', 'key = "free"\nrequests = 100000'
    async with connecting(account, tmp_path, *tables) as client, calling(provider, concurrency=5).running(client):
        for n in range(20):
            await client.enqueue(Call(model=f"x{n}"), tenant="a")
        await fill(client, 1, model="free")
        await eventually(lambda: len(provider.calls) == 21)
        await asyncio.gather(*(client.enqueue(Call(model=f"x{n}"), tenant="a") for n in range(20)))
        at = time.monotonic()
        await fill(client, 1, model="free")
        await eventually(lambda: len(provider.calls) == 22)
        assert time.monotonic() - at < 15


async def test_a_job_in_the_lane_of_another_key_waits_for_its_own_without_coming_back_every_moment(
    account: Account, tmp_path: Path
) -> None:
    """A publisher has mistaken the lane, and the job's own key is paused."""
    provider = Provider()
    async with connecting(account, tmp_path, "requests = 1000") as client, calling(provider).running(client):
        await client.pause(NAME, key="mine")
        told = {headers.KIND: "llm.call", headers.JOB_ID: subjects.new_id(), headers.LIMIT_KEY: "other"}
        subject = subjects.lane(NAME, "a", "normal", subjects.hashed("other"))
        await client.connection.store(subject, b'{"model":"mine"}', told, timeout_s=5)
        await asyncio.sleep(3)  # the span that is judged
        assert provider.calls == []
        assert await delivered(client, lane("other")) <= 7
        await client.resume(NAME, key="mine")
        await eventually(lambda: len(provider.calls) == 1, within=10)


async def test_a_lane_that_was_found_before_its_key_was_known_gets_its_credits_later(
    account: Account, tmp_path: Path
) -> None:
    provider = Provider()
    async with connecting(account, tmp_path, "requests = 3") as client, calling(provider).running(client) as session:
        client.connection.tell(subjects.hint(lane("m")), b"")  # an empty lane, of a hint that does not name the key
        await eventually(lambda: any(each.key.key for each in session.puller.lanes))
        await fill(client, 30)
        await eventually(lambda: len(provider.calls) == 3)
        await asyncio.sleep(3)  # the span that is judged
        assert await delivered(client, lane("m")) <= 3 + 2


async def test_a_tenant_that_runs_as_many_jobs_as_it_may_keeps_no_credits_for_more(
    account: Account, tmp_path: Path
) -> None:
    provider = Provider()
    settings = "max_ack_pending = 2"
    async with (
        connecting(account, tmp_path, "requests = 50", consumer=settings) as client,
        calling(provider).running(client),
    ):
        await fill(client, 20, takes_s=4)
        await eventually(lambda: provider.open == 2)
        await eventually(lambda: is_used(client, 2))
        for _ in range(15):  # longer than a credit is kept, and than the time between two looks for jobs
            await asyncio.sleep(0.1)
            assert await is_used(client, 2)
