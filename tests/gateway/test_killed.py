"""A worker is killed in a call: the answer comes, and says which calls may have been billed besides."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import Conflict
from aiqueue.gateway import Budgets, UsageLedger, UsageStore
from aiqueue.gateway.ledger import month_of
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ..support import Account, Eventually
from .running import KEY, KEY_VARIABLE, ask, billed, child, records, running, shorten_leases, write_config

BUDGET = '[[budget]]\ntenant = "acme"\nmonth = 1.0\n'


@pytest.fixture
def config(tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    return write_config(tmp_path, standin.url, more=BUDGET)


async def kill_in_call(account: Account, config: Path, standin: StandIn, eventually: Eventually, calls: int) -> None:
    """Have a worker process killed once it has begun so many calls."""
    with child(account, config, config.with_suffix(".log")) as process:
        await eventually(lambda: len(standin.calls) == calls)
        process.kill()
        await asyncio.to_thread(process.wait)


async def test_a_call_under_way_at_a_kill_is_made_again_and_reported_with_its_reservation(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    await shorten_leases(client)
    standin.order(Fault(delay_s=60))
    handle = await client.enqueue(ask(), tenant="acme")
    await kill_in_call(account, config, standin, eventually, 1)
    async with running(client, config):
        answer: Any = await handle.result(timeout=20)
    assert len(standin.calls) == 2
    assert (answer["aiqueue"]["possibly_billed"], answer["aiqueue"]["attempts"]) == (1, 2)
    lost, made = await records(client)
    assert [each.call_id for each in (lost, made)] == [each.idempotency_key for each in standin.calls]
    assert (lost.outcome, made.outcome) == ("possibly_billed", "ok")
    store = UsageStore(client.connection, client.topology)
    (stats,) = await Budgets(store, UsageLedger(store)).stats(month_of(time.time()))
    assert (stats.spent_micros, stats.held_micros) == (made.cost_micros, lost.reserved_micros)
    assert stats.reserved_micros == 0
    assert lost.reserved_micros >= (made.cost_micros or 0) > 0


@pytest.mark.parametrize("tenant", ["acme", "globex"])  # with a budget, and without
async def test_a_worker_that_was_stopped_before_its_call_never_makes_it_after_another_one_has(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually, tenant: str
) -> None:
    """It may be stopped and not dead, as by a pause of its machine. So its call could not be begun any more."""
    await shorten_leases(client)
    log = config.with_suffix(".log")
    log.touch()
    with child(account, config, log, {"GATEWAY_TEST_HANG": "begin"}) as process:
        handle = await client.enqueue(ask(), tenant=tenant)
        await eventually(lambda: b"hangs" in log.read_bytes())
        process.kill()
        await asyncio.to_thread(process.wait)
    async with running(client, config):
        answer: Any = await handle.result(timeout=20)
    assert (answer["aiqueue"]["possibly_billed"], answer["aiqueue"]["attempts"]) == (0, 1)
    fenced, made = await records(client)
    assert [(each.outcome, each.attempt) for each in (fenced, made)] == [("failed", 0), ("ok", 1)]
    store = UsageStore(client.connection, client.topology)
    with pytest.raises(Conflict):
        await UsageLedger(store).begin(replace(fenced, outcome="possibly_billed", attempt=1))
    if tenant == "acme":
        (stats,) = await Budgets(store, UsageLedger(store)).stats(month_of(time.time()))
        assert (stats.spent_micros, stats.reserved_micros, stats.held_micros) == (made.cost_micros, 0, 0)


async def test_a_call_under_way_at_a_kill_is_held_by_the_budget_though_its_model_is_removed(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    await shorten_leases(client)
    standin.order(Fault(delay_s=60))
    handle = await client.enqueue(ask(), tenant="acme")
    await kill_in_call(account, config, standin, eventually, 1)
    config.write_text(config.read_text().replace('name = "small"', 'name = "other"'))
    async with running(client, config):
        with pytest.raises(aiqueue.JobFailed, match="unknown model 'small'"):
            await handle.result(timeout=20)
    (lost,) = await records(client)
    store = UsageStore(client.connection, client.topology)
    (stats,) = await Budgets(store, UsageLedger(store)).stats(month_of(time.time()))
    assert (stats.reserved_micros, stats.held_micros) == (0, lost.reserved_micros)


async def test_a_streamed_answer_that_was_stored_to_its_end_is_rebuilt_without_a_call(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    """The worker is stopped before it can record the call, by a ledger that does not answer: then it is killed."""
    await shorten_leases(client)
    handle = await client.enqueue(ask(stream=True), tenant="acme")
    log = config.with_suffix(".log")
    log.touch()
    command_environment = {"GATEWAY_TEST_HANG": "end"}
    with child(account, config, log, command_environment) as process:
        async with aclosing(handle.stream(timeout=20)) as items:
            async for item in items:
                if item.event == "chunk" and item.data.get("usage"):
                    break  # the last one is stored
        await eventually(lambda: b"hangs" in log.read_bytes())
        process.kill()
        await asyncio.to_thread(process.wait)
    async with running(client, config):
        answer: Any = await handle.result(timeout=20)
    assert len(standin.calls) == 1
    assert answer["choices"][0]["message"]["content"] == "one two three one two"
    assert answer["aiqueue"]["possibly_billed"] == 0
    (record,) = await records(client)
    assert (record.outcome, record.cost_micros) == ("ok", billed(standin))
    events, text = [], ""
    async with aclosing(handle.stream(timeout=10)) as items:
        async for item in items:
            if item.event in ("restart", "result"):
                events.append(item.event)
                text = text if item.event == "result" else ""
            elif item.event == "chunk":
                text += "".join(each["delta"].get("content") or "" for each in item.data["choices"])
    assert events == ["restart", "result"]
    assert text == "one two three one two"


async def test_a_stream_cut_by_a_kill_begins_again_behind_a_restart(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn, eventually: Eventually
) -> None:
    await shorten_leases(client)
    standin.behaviour = Behaviour(token_s=0.3)
    handle = await client.enqueue(ask(stream=True), tenant="acme")
    with child(account, config, config.with_suffix(".log")) as process:
        async with aclosing(handle.stream(timeout=20)) as items:
            async for item in items:
                if item.event == "chunk" and item.data["choices"][0]["delta"].get("content"):
                    break
        process.kill()
        await asyncio.to_thread(process.wait)
    standin.behaviour = Behaviour()
    async with running(client, config):
        answer: Any = await handle.result(timeout=20)
    assert len(standin.calls) == 2
    assert answer["aiqueue"]["possibly_billed"] == 1
    text = ""
    async with aclosing(handle.stream(timeout=10)) as items:
        async for item in items:
            if item.event == "restart":
                text = ""
            elif item.event == "chunk":
                text += "".join(each["delta"].get("content") or "" for each in item.data["choices"])
    assert text == answer["choices"][0]["message"]["content"]


@pytest.mark.slow
async def test_under_kills_every_request_is_answered_once_and_ledger_budget_and_provider_agree(
    client: aiqueue.Client, account: Account, tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    config = write_config(tmp_path, standin.url, more=BUDGET)
    await shorten_leases(client)
    standin.behaviour = Behaviour(first_token_s=0.3)
    handles = [await client.enqueue(ask(stream=n % 3 == 0, request_id=f"r{n}"), tenant="acme") for n in range(600)]
    waiting = asyncio.gather(*(each.result(timeout=100) for each in handles))
    while not waiting.done():
        with child(account, config, tmp_path / "log", {"GATEWAY_TEST_CONCURRENCY": "20"}) as process:
            await asyncio.wait([waiting], timeout=3.0)
            process.kill()
            await asyncio.to_thread(process.wait)
    answers: Any = await waiting
    found = {each.call_id: each for each in await records(client)}
    calls = {each.idempotency_key: each for each in standin.calls}
    assert len(calls) == len(standin.calls)
    assert calls.keys() <= found.keys()
    open_ones = {call for call, each in found.items() if each.outcome == "possibly_billed"}
    ended = [each for each in found.values() if each.outcome == "ok"]
    assert sum(each.cost_micros or 0 for each in ended) == sum(
        calls[each.call_id].prompt_tokens + 2 * calls[each.call_id].completion_tokens for each in ended
    )
    assert len(calls) - 600 <= sum(each["aiqueue"]["possibly_billed"] for each in answers)
    never_made = open_ones - calls.keys()
    assert len(never_made) <= 0.05 * 600
    store = UsageStore(client.connection, client.topology)
    (stats,) = await Budgets(store, UsageLedger(store)).stats(month_of(time.time()))
    assert stats.spent_micros == sum(each.cost_micros or 0 for each in found.values())
    assert stats.held_micros + stats.reserved_micros == sum(found[call].reserved_micros for call in open_ones)
    assert stats.reserved_micros == 0
