"""Ticks of families that only some workers' stream files have: the others fire them, but cannot look for their jobs."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.errors import UnknownFamily
from aiqueue.payload import encode_message
from aiqueue.schedules import Every, ScheduleSpec, firing, tick_job_id

from ..support import Account, create_streams, eventually
from .chain import hourly, jobs, make_late, schedules_of, spec, ticking
from .test_policies import Small

HANDED_BACK = "have no family small.jobs: another worker is to take the tick"


def small(recurrence: Every, **more: object) -> ScheduleSpec:
    fields = {"family": "small.jobs", "kind": "small", "body": encode_message(Small())}
    return spec("report", recurrence, **fields, **more)


@pytest.fixture
async def knowing(account: Account, streams: Path) -> AsyncIterator[aiqueue.Client]:
    """A client whose stream files have the family."""
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        yield client


@contextlib.asynccontextmanager
async def handing_back(account: Account, caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """A worker without the family, which has handed a tick back."""

    async def handed_back() -> None:
        assert HANDED_BACK in caplog.text

    with caplog.at_level(logging.DEBUG, "aiqueue.schedules.ticker"):
        async with ticking(account):
            await eventually(handed_back)
            yield


async def test_with_overlap_skip_a_worker_without_the_family_leaves_the_tick_to_one_that_can_look(
    knowing: aiqueue.Client, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    schedules = schedules_of(knowing)
    await schedules.add(small(Every("1s", starting=time.time() - 0.6), overlap="skip"))

    async def counts(fired: int, skipped: int) -> None:
        document = await schedules.get("acme", "report")
        assert document.fired == fired
        assert document.skipped >= skipped

    async with ticking(account):
        await eventually(lambda: counts(1, 0))  # the first has none before it, whose job could be looked for
    async with handing_back(account, caplog), ticking(None, knowing):
        await eventually(lambda: counts(1, 1))


async def test_a_late_tick_goes_to_a_worker_that_can_look_for_its_job(
    knowing: aiqueue.Client, account: Account, caplog: pytest.LogCaptureFixture
) -> None:
    schedules = schedules_of(knowing)
    added = (await schedules.add(small(hourly()))).document
    late = await make_late(knowing, added, 2, grace_s=7200.0)
    job_id = tick_job_id("report", late.next_ms or 0)
    fields = {headers.MSG_ID: "x", headers.EVENT: "result", headers.RUN: "7", headers.CONTENT_TYPE: codec.CBOR}
    journal = subjects.journal(knowing.topology.family("small.jobs").journal or "", "acme", job_id)
    await knowing.connection.store(journal, codec.encode(None), fields)

    async def noted() -> None:
        document = await schedules.get("acme", "report")
        assert document.last is not None
        assert (document.last.job_id, document.last.seq) == (job_id, 7)

    async with handing_back(account, caplog), ticking(None, knowing):
        await eventually(noted)
    assert await jobs(knowing, family="small.jobs") == []


async def test_where_no_worker_has_the_family_a_tick_is_enqueued_in_the_end_and_a_warning_says_so(
    knowing: aiqueue.Client, account: Account, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firing, "HANDED_BACK_MAX", 1)
    schedules = schedules_of(knowing)
    added = (await schedules.add(small(hourly()))).document
    late = await make_late(knowing, added, 2, grace_s=7200.0)

    async def fired() -> None:
        assert (await schedules.get("acme", "report")).fired == 1

    async with handing_back(account, caplog):
        await eventually(fired)
    assert await jobs(knowing, family="small.jobs") == [("report", (late.next_ms or 0) / 1000)]
    assert "no worker with this family takes ticks" in caplog.text


async def test_a_backfill_without_the_family_is_refused_because_jobs_would_be_enqueued_twice(
    knowing: aiqueue.Client, account: Account
) -> None:
    await schedules_of(knowing).add(small(Every("1m")))
    now = time.time()
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        with pytest.raises(UnknownFamily, match=r"unknown family 'small\.jobs'"):
            await client.schedules.backfill("report", tenant="acme", start=now - 120, end=now - 1)
        assert (await client.schedules.run_now("report", tenant="acme")).job_id
    assert len(await jobs(knowing, family="small.jobs")) == 1
