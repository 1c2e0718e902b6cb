"""No call of a worker begins above its tenant's budget; a request that does not fit is refused, or waits."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import Backoff, JobFailed
from aiqueue.gateway import Budgets, UsageLedger, UsageStore, handler
from aiqueue.gateway.ledger import month_of, next_month_start
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ..support import Eventually
from .running import KEY, KEY_VARIABLE, ask, billed, records, running, write_config


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(handler, "_BUDGET_BACKOFF", Backoff(first="20ms", cap="100ms"))


def budget(usd: float, when_spent: str = "refuse") -> str:
    return f'[[budget]]\ntenant = "acme"\nmonth = {usd:.6f}\nwhen_spent = "{when_spent}"\n'


async def test_fifty_concurrent_requests_never_exceed_a_budget_that_admits_ten(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.1)
    cost = 8 + 2 * 5  # what the stand-in bills for each
    async with running(client, write_config(tmp_path, standin.url, more=budget(1))):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    (first,) = await records(client)
    assert first.cost_micros == cost
    limit = first.cost_micros + 9 * cost + first.reserved_micros  # the last one fits with its whole reservation
    async with running(client, write_config(tmp_path, standin.url, more=budget(limit / 1e6))):
        handles = [await client.enqueue(ask(), tenant="acme") for _ in range(50)]
        ends = await asyncio.gather(*(each.result(timeout=30) for each in handles), return_exceptions=True)
    ran = [each for each in ends if not isinstance(each, BaseException)]
    assert len(ran) == 10
    assert all(isinstance(each, JobFailed) and "has a budget of" in each.error for each in ends if each not in ran)
    assert len(standin.calls) == 11
    assert billed(standin) <= limit
    assert sum(each.cost_micros or 0 for each in await records(client)) == billed(standin)


async def test_a_request_that_is_dearer_than_the_budget_is_refused_with_the_figures(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn
) -> None:
    async with running(client, write_config(tmp_path, standin.url, more=budget(0.00001, "park"))):
        handle = await client.enqueue(ask(), tenant="acme")
        with pytest.raises(JobFailed) as failed:
            await handle.result(timeout=10)
    assert "budget of $0.00001" in failed.value.error
    assert "lower max_tokens" in failed.value.error
    assert standin.calls == []


async def test_a_request_without_max_tokens_reserves_the_model_s_maximum(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn
) -> None:
    standin.behaviour = Behaviour(completion_tokens=500)  # the provider's own maximum is above that of the file
    async with running(client, write_config(tmp_path, standin.url, more=budget(1))):
        await (await client.enqueue(ask(max_tokens=None), tenant="acme")).result(timeout=10)
    (record,) = await records(client)
    assert record.completion_tokens == 100  # max_output_tokens
    assert record.reserved_micros > 2 * 100
    assert record.cost_micros == billed(standin) < record.reserved_micros


async def test_a_tenant_with_a_budget_does_not_call_a_model_whose_price_is_unknown(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn
) -> None:
    path = write_config(tmp_path, standin.url, more=budget(1))
    path.write_text(path.read_text().replace("price = { input = 1, output = 2 }", "", 1))
    async with running(client, path):
        with pytest.raises(JobFailed, match="price"):
            await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
        free: Any = await (await client.enqueue(ask(), tenant="globex")).result(timeout=10)
    assert "cost" not in free["aiqueue"]
    assert len(standin.calls) == 1


async def test_a_request_that_does_not_fit_any_more_is_parked_until_the_month_s_end_and_uses_no_call(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn, eventually: Eventually
) -> None:
    async with running(client, write_config(tmp_path, standin.url, more=budget(1))):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    (first,) = await records(client)
    path = write_config(tmp_path, standin.url, more=budget(first.reserved_micros / 1e6, "park"))
    async with running(client, path):
        handle = await client.enqueue(ask(), tenant="acme")

        async def is_parked() -> bool:
            return (await handle.status()).state == "retrying"

        await eventually(is_parked)
    status = await handle.status()
    resets_at = next_month_start(month_of(time.time()))
    assert status.next_attempt_at is not None
    assert resets_at - 1 <= status.next_attempt_at <= resets_at + 60
    assert len(standin.calls) == 1


async def _attempted(handle: Any, more_than: int = 0) -> int:
    """Wait until a request is parked, and return after how many attempts."""
    while True:
        status = await handle.status()
        if status.state == "retrying" and status.attempt > more_than and status.next_attempt_at > time.time() + 60:
            return int(status.attempt)
        await asyncio.sleep(0.02)


async def test_a_request_is_parked_for_one_month_and_refused_when_the_next_one_is_spent_too(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(client, write_config(tmp_path, standin.url, more=budget(1))):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    (first,) = await records(client)
    path = write_config(tmp_path, standin.url, more=budget(first.reserved_micros / 1e6, "park"))
    ahead_s, now = 0.0, UsageStore.now

    async def later(store: UsageStore) -> float:
        return await now(store) + ahead_s

    monkeypatch.setattr(UsageStore, "now", later)
    async with running(client, path), asyncio.timeout(20):
        handle = await client.enqueue(ask(), tenant="acme")
        attempts = await _attempted(handle)
        await handle.run_now()  # too early: parked again
        await _attempted(handle, more_than=attempts)
        this = month_of(time.time())
        ahead_s = next_month_start(this) - time.time() + 60
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)  # the next month is spent by others
        await handle.run_now()
        with pytest.raises(JobFailed, match=f"parked since {this}, and a request is parked for one month only"):
            await handle.result(timeout=10)
        await _attempted(await client.enqueue(ask(), tenant="acme"))  # of the new month
    assert len(standin.calls) == 2


async def test_calls_that_were_refused_before_do_not_use_up_the_waits_for_room_in_a_budget(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch, eventually: Eventually
) -> None:
    monkeypatch.setattr(handler, "BACKOFF", Backoff(first="10ms", cap="10ms"))
    monkeypatch.setattr(handler, "WAITS_MAX", 8)
    monkeypatch.setattr(handler, "_BUDGET_BACKOFF", Backoff(first="100ms", cap="100ms", jitter=0))
    async with running(client, write_config(tmp_path, standin.url, more=budget(1))):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    (first,) = await records(client)
    standin.order(Fault(429, model="small-1", count=9))
    standin.order(Fault(500, model="small-1", retry_after_s=0.3))
    standin.order(Fault(model="large-1", delay_s=0.7))
    limit = (first.cost_micros or 0) * 2 + first.reserved_micros
    async with running(client, write_config(tmp_path, standin.url, more=budget(limit / 1e6))):
        refused = await client.enqueue(ask(), tenant="acme")
        await eventually(lambda: len(standin.calls) == 11 and standin.calls[-1].ended_at is not None)
        busy = await client.enqueue(ask(model="large"), tenant="acme")
        await asyncio.gather(*(each.result(timeout=20) for each in (refused, busy)))
    assert [each.model for each in standin.calls[-2:]] == ["large-1", "small-1"]


async def test_a_request_waits_for_calls_under_way_that_may_leave_room(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn
) -> None:
    async with running(client, write_config(tmp_path, standin.url, more=budget(1))):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    (first,) = await records(client)
    limit = (first.cost_micros or 0) * 2 + first.reserved_micros
    standin.order(Fault(delay_s=0.3))
    async with running(client, write_config(tmp_path, standin.url, more=budget(limit / 1e6))):
        handles = [await client.enqueue(ask(), tenant="acme") for _ in range(2)]
        await asyncio.gather(*(each.result(timeout=20) for each in handles))
    assert len(standin.calls) == 3


async def test_the_usage_that_a_provider_does_not_state_costs_what_was_reserved(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn
) -> None:
    standin.order(Fault(skip_usage=True))
    async with running(client, write_config(tmp_path, standin.url, more=budget(1))):
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
    (record,) = await records(client)
    assert record.cost_micros == record.reserved_micros
    assert record.completion_tokens == 5
    store = UsageStore(client.connection, client.topology)
    (stats,) = await Budgets(store, UsageLedger(store)).stats(month_of(time.time()))
    assert stats.spent_micros == record.reserved_micros
