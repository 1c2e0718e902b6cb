"""`client.schedules`: what it stores and shows, and what it refuses."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pydantic
import pytest

import aiqueue
from aiqueue import Calendar, Cron, Every, Once
from aiqueue.errors import BadInput, InvalidToken, NotFound
from aiqueue.schedules import FiredTick

from ..support import Account

pytestmark = pytest.mark.families("agent.tasks")


class Report(aiqueue.Message, kind="report"):
    n: int = 0
    password: pydantic.SecretStr = pydantic.SecretStr("")


class Scan(aiqueue.Message, kind="scan"):
    source: aiqueue.Document | None = None


async def test_a_schedule_is_added_shown_and_removed(client: aiqueue.Client) -> None:
    schedules = client.schedules
    added = await schedules.add("report", Cron("0 6 * * mon-fri", tz="Europe/Berlin"), Report(n=1), tenant="acme")
    assert added.action == "added"
    found = await schedules.get("report", tenant="acme")
    assert (found.tenant, found.id, found.when) == ("acme", "report", "at 06:00 on Monday to Friday, Europe/Berlin")
    assert (found.outcome, found.last_at, found.problem, found.paused) == ("", None, "", False)
    assert [each.document for each in await schedules.list(tenant="acme")] == [found.document]
    assert await schedules.list(tenant="globex") == []
    times = await schedules.next_times("report", 3, tenant="acme")
    assert times[0].timestamp() == found.next_at
    assert {each.strftime("%H:%M") for each in times} == {"06:00"}
    assert await schedules.remove("report", tenant="acme")
    assert not await schedules.remove("report", tenant="acme")
    with pytest.raises(NotFound, match="aiqueue schedule ls"):
        await schedules.get("report", tenant="acme")


async def test_next_times_have_the_offsets_of_the_zone(client: aiqueue.Client) -> None:
    await client.schedules.add("report", Cron("30 2 * * *", tz="Europe/Berlin"), Report(), tenant="acme")
    begin = datetime(2027, 3, 26, 12, tzinfo=UTC)
    times = await client.schedules.next_times("report", 3, tenant="acme", after=begin)
    assert [each.isoformat() for each in times] == [
        "2027-03-27T02:30:00+01:00", "2027-03-28T03:30:00+02:00", "2027-03-29T02:30:00+02:00",
    ]  # fmt: skip


async def test_a_pause_stops_ticks_and_says_by_whom(client: aiqueue.Client) -> None:
    await client.schedules.add("report", Every("1h"), Report(), tenant="acme")
    await client.schedules.pause("report", tenant="acme", reason="too slow", by="anna")
    found = await client.schedules.get("report", tenant="acme")
    assert found.paused
    assert found.next_at is None
    assert found.summary()["paused"]["reason"] == "too slow"
    await client.schedules.resume("report", tenant="acme")
    resumed = await client.schedules.get("report", tenant="acme")
    assert resumed.next_at is not None
    assert resumed.next_at > time.time()


async def test_the_last_outcome_is_what_the_job_s_journal_says(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Report)
    async def report(job: aiqueue.Job[Report]) -> int:
        if job.message.n:
            raise aiqueue.Reject("not wanted")
        return 1

    async def outcome_after_run(n: int) -> tuple[str, str]:
        await client.schedules.add(f"report-{n}", Every("1h"), Report(n=n), tenant="acme")
        asked = await client.schedules.run_now(f"report-{n}", tenant="acme")
        document = await client.schedules.engine.get("acme", f"report-{n}")
        last = FiredTick(asked.tick_ms, asked.job_id, "agent.tasks", 1, time.time())
        await client.schedules.engine.store.put(replace(document, last=last))
        queued = await client.schedules.get(f"report-{n}", tenant="acme")
        assert queued.outcome == "queued" or n
        async with worker.running(client):
            with pytest.raises(aiqueue.JobFailed) if n else contextlib.nullcontext():
                await (await client.job(asked.job_id)).result(20)
        found = await client.schedules.get(f"report-{n}", tenant="acme")
        return found.outcome, found.error

    assert await outcome_after_run(0) == ("done", "")
    outcome, error = await outcome_after_run(1)
    assert outcome == "failed"
    assert "not wanted" in error


async def test_backfill_makes_each_tick_s_job_once(client: aiqueue.Client) -> None:
    await client.schedules.add("report", Every("1h"), Report(), tenant="acme")
    begin = datetime.fromtimestamp(time.time() // 3600 * 3600 - 3 * 3600, UTC)
    end = begin.replace(minute=30).timestamp() + 3_600
    first = await client.schedules.backfill("report", begin, end, tenant="acme")
    assert [each.duplicate for each in first] == [False, False]
    again = await client.schedules.backfill("report", begin, end, tenant="acme")
    assert [(each.job_id, each.duplicate) for each in again] == [(each.job_id, True) for each in first]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda add: add("a b", Every("1h"), Report()), "schedule"),
        (lambda add: add("report", "0 6 * * *", Report()), "recurrence must be a Cron"),
        (lambda add: add("report", Every("1h"), {"n": 1}), "message"),
        (lambda add: add("report", Once(1.0), Report()), "never fires"),
        (lambda add: add("report", Every("1h"), Report(), misfire="later"), "misfire must be one of"),
        (lambda add: add("report", Every("1h"), Report(), priority="urgent"), "urgent"),
        (lambda add: add("report", Every("1h"), Report(), grace="soon"), "grace"),
        (lambda add: add("report", Every("1h"), Report(), deadline="-1s"), "deadline"),
    ],
)
async def test_what_cannot_be_stored_is_refused_and_leaves_nothing(
    client: aiqueue.Client, make: Callable[[Any], Any], said: str
) -> None:
    async def add(*arguments: Any, **options: Any) -> Any:
        return await client.schedules.add(*arguments, tenant="acme", **options)

    with pytest.raises(BadInput, match=said) as refused:
        await make(add)
    assert "\n" not in str(refused.value)
    assert await client.schedules.list() == []


async def test_a_message_with_a_document_is_refused(client: aiqueue.Client) -> None:
    document = await client.documents.put(b"text", tenant="acme")
    with pytest.raises(BadInput, match="cannot have documents"):
        await client.schedules.add("scan", Every("1h"), Scan(source=document), tenant="acme")


async def test_a_declared_schedule_is_removed_only_by_its_owner_s_name(client: aiqueue.Client) -> None:
    added = await client.schedules.add("report", Every("1h"), Report(), tenant="acme")
    await client.schedules.engine.store.put(replace(added.document, owner="billing"))
    with pytest.raises(BadInput, match="declared by 'billing'"):
        await client.schedules.remove("report", tenant="acme")
    with pytest.raises(BadInput, match="declared by 'billing'"):
        await client.schedules.add("report", Every("2h"), Report(), tenant="acme")
    assert await client.schedules.remove("report", tenant="acme", owner="billing")


async def test_prune_removes_what_find_undeclared_has_shown(client: aiqueue.Client) -> None:
    schedules = client.schedules
    await schedules.add("by-hand", Every("1h"), Report(), tenant="acme")
    added = await schedules.add("gone", Every("1h"), Report(), tenant="acme")
    await schedules.engine.store.put(replace(added.document, owner="billing"))
    with pytest.raises(NotFound, match="no worker with owner 'billing' ran"):
        await schedules.prune("billing")
    with pytest.raises(InvalidToken):
        await schedules.prune("a.b")
    worker = aiqueue.Worker(owner="billing")
    worker.handle(Report)(_do_nothing)
    worker.schedule("1h", Report(), tenant="acme", id="kept")
    async with worker.running(client):
        found = await schedules.find_undeclared("billing")
        assert [(each.id, each.declared_at, each.ended_at) for each in found] == [("gone", None, None)]
        assert len(await schedules.list()) == 3
        assert [each.id for each in await schedules.prune("billing")] == ["gone"]
        assert await schedules.prune("billing") == []
    assert [each.id for each in await schedules.list()] == ["by-hand", "kept"]


async def _do_nothing(job: aiqueue.Job[Report]) -> None:
    pass


async def test_a_document_that_cannot_be_read_can_be_removed(client: aiqueue.Client) -> None:
    store = client.schedules.engine.store
    await store.write(store.key("acme", "report"), 0, b"no CBOR", {}, 5)
    with pytest.raises(BadInput, match="remove the schedule first"):
        await client.schedules.add("report", Every("1h"), Report(), tenant="acme")
    assert await client.schedules.remove("report", tenant="acme")
    assert (await client.schedules.add("report", Every("1h"), Report(), tenant="acme")).action == "added"


async def test_a_wrong_tenant_is_refused(client: aiqueue.Client) -> None:
    with pytest.raises(InvalidToken):
        await client.schedules.list(tenant="a.b")


def test_a_client_without_asyncio_has_them_too(account: Account, client: aiqueue.Client) -> None:
    with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as sync:
        schedules = sync.schedules
        added = schedules.add("report", Calendar(months=1, time="06:00"), Report(), tenant="acme", misfire="skip")
        assert (added.action, added.document.misfire) == ("added", "skip")
        assert schedules.pause("report", tenant="acme").paused is not None
        assert schedules.resume("report", tenant="acme").paused is None
        assert len(schedules.next_times("report", 2, tenant="acme")) == 2
        assert schedules.run_now("report", tenant="acme").job_id.startswith("report-")
        assert schedules.backfill("report", 1_577_836_800, 1_577_923_200, tenant="acme")[0].tick_ms == 1_577_858_400_000
        assert [each.id for each in schedules.list()] == ["report"]
        for prune in (schedules.find_undeclared, schedules.prune):
            with pytest.raises(NotFound, match="no worker with owner 'billing' ran"):
                prune("billing")
        assert schedules.get("report", tenant="acme").document.fired == 0
        assert schedules.remove("report", tenant="acme")


def test_who_has_no_schedules_does_not_import_them() -> None:
    code = "import sys, aiqueue.client; print([n for n in sys.modules if n.startswith(('aiqueue.schedules', 'apsch'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
