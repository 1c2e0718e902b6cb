"""The budget of an API key: besides that of its tenant, over all that dies, and for fallbacks too."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, JobFailed
from aiqueue.gateway import (
    ApiKey,
    ApiKeys,
    Budget,
    Budgets,
    BudgetSpent,
    BudgetStats,
    Gateway,
    PriceUnknown,
    UsageLedger,
    UsageStore,
    load,
    month_of,
)
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ..support import Account, Eventually, create_streams
from .running import PRICE, ask, billed, child, records, running, shorten_leases, write_config

BUDGET = '[[budget]]\ntenant = "acme"\nmonth = 1\n'
KEY = Budget("acme", 100, key="k1")


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


async def stats(client: aiqueue.Client, *, keys: bool) -> list[BudgetStats]:
    store = UsageStore(client.connection, client.topology)
    return await Budgets(store, UsageLedger(store)).stats(month_of(await store.now()), keys=keys)


async def charged(client: aiqueue.Client, *, keys: bool) -> tuple[int, int, int]:
    (found,) = await stats(client, keys=keys)
    return found.spent_micros, found.held_micros, found.reserved_micros


async def test_a_call_needs_room_in_both_budgets_and_a_refused_one_leaves_nothing(client: aiqueue.Client) -> None:
    store = UsageStore(client.connection, client.topology)
    budgets = Budgets(store, UsageLedger(store), [Budget("acme", 150)])
    other = Budget("acme", 1_000, key="k2")
    for _ in range(2):
        assert await budgets.reserve("acme", "a", 80, of_key=KEY) is not None
    with pytest.raises(BudgetSpent, match=r"API key k1 of tenant acme has a budget of \$0.0001 for .* use a key with"):
        await budgets.reserve("acme", "b", 40, of_key=KEY)
    with pytest.raises(BudgetSpent, match=r"tenant acme has a budget of .* raise the budget in gateway.toml") as caught:
        await budgets.reserve("acme", "c", 90, of_key=other)
    assert caught.value.key == ""
    assert await charged(client, keys=False) == (0, 0, 80)
    by_key = {each.key: each.reserved_micros for each in await stats(client, keys=True)}
    assert by_key == {"k1": 80, "k2": 0}
    assert await budgets.hold("acme", "a", key="k1")
    assert await budgets.settle("acme", "a", 30, key="k1")
    assert not await budgets.settle("acme", "a", 30, key="k1")
    await budgets.reserve("acme", "d", 20, of_key=KEY)
    assert await budgets.release("acme", "d", key="k1")
    assert await charged(client, keys=False) == (30, 0, 0)
    assert [each.spent_micros for each in await stats(client, keys=True)] == [30, 0]


async def test_a_key_with_a_budget_of_a_tenant_without_one_is_held_to_it(client: aiqueue.Client) -> None:
    store = UsageStore(client.connection, client.topology)
    budgets = Budgets(store, UsageLedger(store))
    asked = [budgets.reserve("acme", f"call {number}", 30, of_key=KEY) for number in range(5)]
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(each, BudgetSpent) for each in ends) == 2
    assert await stats(client, keys=False) == []
    with pytest.raises(PriceUnknown):
        await budgets.reserve("acme", "x", None, model="small", of_key=KEY)


async def add(client: aiqueue.Client, **options: Any) -> ApiKey:
    key, _ = await ApiKeys(client).add("acme", **options)
    return key


async def test_what_a_key_asks_for_is_charged_to_it_also_by_a_fallback(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn, config: Path
) -> None:
    del config
    path = write_config(tmp_path, standin.url, small='fallbacks = ["large"]', more=BUDGET)
    key, other = await add(client, budget_micros=1_000_000), await add(client)
    gateway = Gateway(client, load(path))
    standin.order(Fault(400, message="no", model="small-1", count=2))
    async with running(client, path):
        asked = [await gateway.enqueue(ask(), tenant="acme", api_key=each) for each in (key, other, key)]
        answers: list[Any] = [await each.result(timeout=20) for each in asked]
        await (await gateway.enqueue(ask(), tenant="acme")).result(timeout=20)
    assert [each["aiqueue"].get("fallback_of") for each in answers].count("small") == 2
    found = await records(client)
    by_key = dict.fromkeys((key.id, other.id, ""), 0)
    for each in found:
        by_key[each.api_key] += each.cost_micros or 0
    assert by_key[key.id] == 2 * by_key[other.id] == 2 * by_key[""]
    assert await charged(client, keys=True) == (by_key[key.id], 0, 0)
    assert await charged(client, keys=False) == (billed(standin), 0, 0)


async def test_a_request_above_the_keys_budget_is_refused_without_a_call(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    key = await add(client, budget_micros=20)
    gateway = Gateway(client, load(config))
    async with running(client, config):
        handle = await gateway.enqueue(ask(), tenant="acme", api_key=key)
        with pytest.raises(JobFailed, match=f"API key {key.id} of tenant acme has a budget of"):
            await handle.result(timeout=20)
    assert standin.calls == []
    assert await records(client) == []


async def test_a_key_of_another_tenant_is_neither_charged_nor_named(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    key = await add(client, budget_micros=1)
    async with running(client, config):
        for named in (key.id, "nobody", "a.b", ">"):
            handle = await client.enqueue(ask(), tenant="globex", headers={"Gateway-Api-Key": named})
            await handle.result(timeout=20)
    assert len(standin.calls) == 4
    assert {each.api_key for each in await records(client)} == {""}
    assert await stats(client, keys=True) == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_worker_killed_in_a_call_leaves_it_held_by_both_budgets(
    client: aiqueue.Client, account: Account, tmp_path: Path, standin: StandIn, eventually: Eventually, config: Path,
    *, stream: bool,
) -> None:  # fmt: skip
    del config
    path = write_config(tmp_path, standin.url, more=BUDGET)
    key = await add(client, budget_micros=1_000_000)
    await shorten_leases(client)
    standin.behaviour = Behaviour(token_s=0.1)
    handle = await Gateway(client, load(path)).enqueue(ask(stream=stream), tenant="acme", api_key=key)
    standin.order(Fault(delay_s=30))
    with child(account, path, tmp_path / "log"):
        await eventually(lambda: len(standin.calls) == 1)
    async with running(client, path):
        answer: Any = await handle.result(timeout=20)
    assert answer["aiqueue"]["possibly_billed"] == 1
    lost, made = await records(client)
    assert (lost.api_key, made.api_key) == (key.id, key.id)
    assert (lost.outcome, made.outcome) == ("possibly_billed", "ok")
    assert await charged(client, keys=True) == (made.cost_micros, lost.reserved_micros, 0)
    assert await charged(client, keys=False) == (made.cost_micros, lost.reserved_micros, 0)


async def test_a_budget_of_a_key_that_is_made_anew_counts_the_records_of_the_key_only(
    client: aiqueue.Client, config: Path
) -> None:
    key = await add(client, budget_micros=1_000_000)
    gateway = Gateway(client, load(config))
    async with running(client, config):
        for whose in (key, None):
            await (await gateway.enqueue(ask(), tenant="acme", api_key=whose)).result(timeout=20)
    cost = (await records(client))[0].cost_micros
    stream = client.topology.usage_stream.name
    (stored,) = [each async for each in client.connection.read(stream, "ai.gateway.budget.*.*.*")]
    await client.connection.delete(stream, stored.seq)
    async with running(client, config):
        await (await gateway.enqueue(ask(), tenant="acme", api_key=key)).result(timeout=20)
    assert cost is not None
    assert await charged(client, keys=True) == (2 * cost, 0, 0)


async def test_what_a_key_may_not_ask_for_is_refused_in_one_line_before_it_is_stored(
    client: aiqueue.Client, tmp_path: Path, standin: StandIn, config: Path
) -> None:
    unpriced = config.read_text().replace(f"price = {PRICE}", "", 1)
    (tmp_path / "unpriced.toml").write_text(unpriced)
    gateway = Gateway(client, load(config))
    narrow = await add(client, models=["large"], priorities=["low", "batch"])
    with pytest.raises(BadInput, match=f"API key {narrow.id} may not use model 'small', but large"):
        await gateway.enqueue(ask(), tenant="acme", api_key=narrow)
    with pytest.raises(BadInput, match=f"API key {narrow.id} may not use priority 'normal', but low, batch"):
        await gateway.enqueue(ask(model="large"), tenant="acme", api_key=narrow)
    with pytest.raises(BadInput, match=f"API key {narrow.id} is of tenant acme, not of 'globex'"):
        await gateway.enqueue(ask(model="large"), tenant="globex", priority="low", api_key=narrow)
    with pytest.raises(PriceUnknown):
        await Gateway(client, load(tmp_path / "unpriced.toml")).enqueue(
            ask(), tenant="acme", api_key=await add(client, budget_micros=5)
        )
    assert standin.calls == []


async def test_requests_of_a_key_wait_while_an_older_version_has_declared_the_stream_of_usage(
    client: aiqueue.Client, config: Path, standin: StandIn, eventually: Eventually, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not take budgets of API keys then. `aiqueue apply` of this version mends that."""
    key, _ = await ApiKeys(client).add("acme", budget_micros=1_000)
    stream = client.topology.usage_stream.name
    declared = (await client.connection.api(f"STREAM.INFO.{stream}"))["config"]
    older = [each for each in declared["subjects"] if not each.startswith("ai.gateway.budget.*.*.*")]
    await client.connection.api(f"STREAM.UPDATE.{stream}", {**declared, "subjects": older})
    handle = await Gateway(client, load(config)).enqueue(ask(), tenant="acme", api_key=key)

    def warned() -> list[str]:
        return [each.message for each in caplog.records if each.message.startswith("requests wait: ")]

    async with running(client, config):
        await eventually(warned)
        assert standin.calls == []
        await client.connection.api(f"STREAM.UPDATE.{stream}", declared)
        await handle.result(timeout=20)
    month = month_of(await UsageStore(client.connection, client.topology).now())
    subject = f"ai.gateway.budget.acme.{month}.{key.id}"
    problem = f"there is no stream {stream}, or it does not take {subject}"
    assert warned() == [f"requests wait: {problem}: run `aiqueue apply` of the newest version that is in use"]
    assert len(standin.calls) == 1
