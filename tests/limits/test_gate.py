"""Credits and turns of limited keys, however a delivery ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.errors import Unavailable
from aiqueue.topology import provision
from aiqueue.worker.opening import Opener

from ..support import Account, eventually
from .provider import FAMILY, NAME, Provider
from .test_engine import Call, calling, fill


@asynccontextmanager
async def connecting(
    account: Account, directory: Path, *tables: str, consumer: str = ""
) -> AsyncIterator[aiqueue.Client]:
    """Connect with these limits, and these settings of the family's consumers."""
    (directory / "llm.toml").write_text(FAMILY + (f"[consumer]\n{consumer}\n" if consumer else ""))
    (directory / "limits.toml").write_text("".join(f'[[limit]]\nfamily = "{NAME}"\n{each}\n' for each in tables))
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=directory) as client:
        await provision.apply(client.connection, client.topology)
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
        await eventually(lambda: len({n for n, _ in seen}) == 30, within=5)


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
        await eventually(lambda: len(provider.calls) == 6, within=5)


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
            await eventually(lambda: any(each.key.key for each in session.puller.lanes), within=5)
            await client.resume(NAME, key="m")
            await eventually(lambda: len(provider.calls) == 6, within=5)


async def test_idle_lanes_of_other_keys_take_no_place_of_a_tenant_with_few(account: Account, tmp_path: Path) -> None:
    provider = Provider()
    async with (
        connecting(account, tmp_path, "requests = 1000", consumer="max_ack_pending = 2") as client,
        calling(provider).running(client),
    ):
        for n in range(4):
            await fill(client, 1, model=f"m{n}")
        await eventually(lambda: len(provider.calls) == 4, within=5)
        await asyncio.sleep(0.5)
        await fill(client, 20, model="busy")
        await eventually(lambda: len(provider.calls) == 24, within=5)
