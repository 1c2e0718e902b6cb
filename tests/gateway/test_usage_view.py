"""The totals are what a recount of the records finds, whoever counts, stops half-way, or counts from the beginning."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue.errors import BadInput, Conflict, NotFound
from aiqueue.gateway import Sums, UsageLedger, UsageRecord, UsageStore, UsageTotal, UsageView, usage_view
from aiqueue.gateway.ledger import month_of, month_start
from aiqueue.gateway.usage_view import MonthTotals, day_of

from ..support import Account
from .test_ledger import lost, record_of

NOW = time.time()
MONTH = month_of(NOW)
BEFORE = month_of(month_start(MONTH) - 1)
DAY_S = 86_400


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    """On an account of its own: a view is over all tenants."""
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        spec = client.topology.usage_stream
        await client.connection.api(f"STREAM.CREATE.{spec.name}", {**spec.config, "storage": "memory"})
        yield client


@pytest.fixture
def view(store: UsageStore, ledger: UsageLedger) -> UsageView:
    return UsageView(store, ledger)


def some_records(count: int, seed: int) -> list[UsageRecord]:
    """Records of two months, three tenants and two models; some of one call, of which the first is possibly billed."""
    chance = random.Random(seed)
    found: list[UsageRecord] = []
    for number in range(count):
        at = month_start(chance.choice([MONTH, BEFORE])) + chance.random() * DAY_S
        given: dict[str, Any] = {"model": chance.choice(["m1", "m2"]), "started_at": at}
        call, tenant = f"c{number}", chance.choice(["a", "b", "all"])
        if chance.random() < 0.3:
            found.append(lost(call, tenant, reserved_micros=chance.randint(0, 99), **given))
        if chance.random() < 0.8:
            cost, outcome = chance.choice([None, chance.randint(0, 99)]), chance.choice(["ok", "ok", "failed"])
            found.append(record_of(call, tenant, outcome=outcome, cost_micros=cost, **given))
    return found


async def same(view: UsageView) -> list[UsageTotal]:
    """The totals of both months, which are those of a recount."""
    found = []
    for month in (BEFORE, MONTH):
        totals = await view.totals(month)
        assert totals == await view.recount(month)
        found += totals
    return found


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 9)), max_size=40), st.data())
def test_totals_are_the_sums_of_the_records_that_stand_in_whatever_parts_they_are_counted(
    writes: list[tuple[int, bool, int]], data: st.DataObject
) -> None:
    """Also if a possibly billed record was replaced before anybody had counted it, and after a lost answer."""
    standing: dict[str, tuple[int, UsageRecord]] = {}
    totals = MonthTotals(1)
    for seq, (number, is_open, amount) in enumerate(writes, 1):
        call = f"c{number}"
        if call in standing and (is_open or standing[call][1].outcome != "possibly_billed"):
            continue
        record = lost(call, reserved_micros=amount) if is_open else record_of(call, cost_micros=amount)
        standing[call] = seq, replace(record, model=f"m{number % 2}")
        if data.draw(st.booleans()):
            for stored_seq, each in sorted(standing.values(), key=lambda pair: pair[0]):
                totals.add(stored_seq, each)
            totals = MonthTotals.parse(json.loads(json.dumps(totals.plain())))
    counted = MonthTotals(1)
    for stored_seq, each in sorted(standing.values(), key=lambda pair: pair[0]):
        totals.add(stored_seq, each)
        counted.add(stored_seq, each)
    assert totals == counted


async def test_totals_are_by_tenant_day_and_model(ledger: UsageLedger, view: UsageView) -> None:
    assert await view.totals(MONTH) == []
    started = month_start(MONTH)
    for number, (tenant, model, cost) in enumerate([("a", "m1", 5), ("a", "m1", 7), ("a", "m2", 1), ("b", "m1", None)]):
        await ledger.record(record_of(f"c{number}", tenant, model=model, cost_micros=cost, started_at=started))
    await ledger.record(lost("c9", "a", model="m1", started_at=started + 0.5, reserved_micros=90))
    await ledger.record(record_of("c8", "a", started_at=month_start(MONTH) - 1))
    day = day_of(started)
    two = Sums(3, 0, 1, 0, 200, 100, 20, cost_micros=12, held_micros=90)
    one = Sums(1, 0, 0, 0, 100, 50, 10, cost_micros=1)
    unpriced = Sums(1, 0, 0, 1, 100, 50, 10)
    totals = [UsageTotal("a", day, "m1", two), UsageTotal("a", day, "m2", one), UsageTotal("b", day, "m1", unpriced)]
    assert await view.totals(MONTH) == totals
    assert await view.totals(MONTH, tenant="a", model="m2") == [totals[1]]
    assert await view.totals(MONTH, tenant="c") == []
    assert await same(view)


async def test_a_call_that_was_given_up_before_it_was_made_is_in_no_total(ledger: UsageLedger, view: UsageView) -> None:
    """One that was noted only, and one that was begun, and counted, before."""
    unmade: dict[str, Any] = {"outcome": "failed", "cost_micros": 0, "attempt": 0, "prompt_tokens": 0}
    unmade |= {"completion_tokens": 0, "cached_tokens": 0, "started_at": NOW}
    await ledger.record(record_of("c1", "a", **unmade))
    assert await same(view) == []
    await ledger.begin(lost("c2", "a", started_at=NOW, reserved_micros=90))
    assert [each.sums.calls for each in await same(view)] == [1]
    await ledger.record(record_of("c2", "a", **unmade))
    assert await same(view) == []


@pytest.mark.parametrize("seed", range(4))
async def test_a_view_that_is_read_now_and_then_equals_a_recount(
    ledger: UsageLedger, store: UsageStore, view: UsageView, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """By several readers at once, who store what they have counted after every few records."""
    monkeypatch.setattr(usage_view, "FLUSH_RECORDS", 7)
    monkeypatch.setattr(usage_view, "JITTER_S", 0.002)
    others, chance = [UsageView(store, ledger) for _ in range(2)], random.Random(seed)
    for record in some_records(60, seed):
        await ledger.record(record)
        if chance.random() < 0.2:
            await asyncio.gather(view.totals(MONTH), *(each.totals(MONTH) for each in others))
    found = await same(view)
    await view.rebuild()
    assert await same(view) == found


async def test_a_reader_that_is_cut_off_anywhere_spoils_nothing(
    ledger: UsageLedger, store: UsageStore, view: UsageView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_view, "FLUSH_RECORDS", 5)
    put, left = UsageStore.put, 0

    async def put_some(self: UsageStore, *args: Any, **kwargs: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise asyncio.CancelledError
        return await put(self, *args, **kwargs)

    for at, record in enumerate(some_records(40, 1)):
        await ledger.record(record)
        if at % 4 == 0:
            with monkeypatch.context() as patch:
                patch.setattr(UsageStore, "put", put_some)
                left = at // 4
                with contextlib.suppress(asyncio.CancelledError):
                    await (view.rebuild() if at % 12 == 0 else view.totals(MONTH))
    assert await same(view)


async def test_a_rebuild_counts_anew_what_is_stored_wrongly(
    ledger: UsageLedger, store: UsageStore, view: UsageView, client: aiqueue.Client
) -> None:
    for record in some_records(60, 3):
        await ledger.record(record)
    right = await same(view)
    for subject in (f"ai.gateway.totals.a.{MONTH}", f"ai.gateway.totals.b.{MONTH}", "ai.gateway.totals.all.position"):
        stored = await store.get(subject)
        assert stored is not None
        days = {day_of(NOW): {"m1": [1] * 9}}
        content = {**stored.content, "days": days} if "days" in stored.content else {"odd": 1}
        await store.put(subject, content, expected=stored.seq)
        await view.rebuild()
        assert await same(view) == right
    stored = await store.get(f"ai.gateway.totals.a.{MONTH}")
    assert stored is not None
    await client.connection.delete(store.stream, stored.seq)
    await view.rebuild()
    assert await same(view) == right


async def test_readers_and_a_rebuild_at_once_end_with_what_is_right(
    ledger: UsageLedger, store: UsageStore, view: UsageView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_view, "JITTER_S", 0.002)
    for record in some_records(40, 5):
        await ledger.record(record)
    right = await view.recount(MONTH)
    views = [UsageView(store, ledger) for _ in range(6)]
    done = await asyncio.gather(*(each.rebuild() for each in views[:2]), *(each.totals(MONTH) for each in views))
    assert all(each == right for each in done[2:])
    assert await same(view)


async def test_days_whose_records_expire_are_left_out_of_view_and_recount(
    ledger: UsageLedger, store: UsageStore, view: UsageView
) -> None:
    store.kept_s = 10 * DAY_S
    starts = {"old": NOW - 9.99 * DAY_S, "new": NOW - 8.5 * DAY_S}
    for call, at in starts.items():
        await ledger.record(record_of(call, "a", started_at=at))
    found = await same(view)
    kept = {each.day for each in found}
    assert kept <= {day_of(starts["new"])}
    store.kept_s = 0
    assert {each.day for each in await same(view)} == {day_of(at) for at in starts.values() if month_of(at) >= BEFORE}


async def test_totals_of_no_month_and_no_stream_are_errors_of_one_line(view: UsageView, client: aiqueue.Client) -> None:
    with pytest.raises(BadInput, match="is no month: give one such as 2026-11"):
        await view.totals("november")
    await client.connection.api("STREAM.DELETE.AI_GATEWAY_USAGE")
    for call in (view.totals(MONTH), view.recount(MONTH), view.rebuild()):
        with pytest.raises(NotFound, match="run `aiqueue apply`"):
            await call


async def test_a_view_that_others_write_all_the_time_is_given_up(
    ledger: UsageLedger, view: UsageView, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_view, "JITTER_S", 0)
    await ledger.record(record_of("c", "a", started_at=NOW))

    async def refuse(*_: Any, **__: Any) -> int:
        raise Conflict("")

    monkeypatch.setattr(UsageStore, "put", refuse)
    with pytest.raises(Conflict, match=r"try again later, or run `aiqueue gateway usage --rebuild`"):
        await view.totals(MONTH)
