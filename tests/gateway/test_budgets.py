"""No call begins above its tenant's budget, whoever reserves, dies or is cut off in between; and no charge is lost."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import aiqueue
from aiqueue import subjects
from aiqueue.errors import BadInput, ConfigMismatch, QueueFull, Unavailable
from aiqueue.gateway import Budget, Budgets, BudgetSpent, BudgetStats, PriceUnknown, UsageLedger, UsageStore
from aiqueue.gateway import budgets as module
from aiqueue.gateway.budget_use import CALLS_MAX, BudgetUse
from aiqueue.gateway.ledger import month_of, month_start, next_month_start

from ..support import ROOT, Account, Eventually, NatsProcess, create_streams
from .test_ledger import lost, record_of

Open = Callable[..., Budgets]
USD = 1_000_000


# -- the document, without a server

CALLS = st.sampled_from([f"c{number}" for number in range(6)])
STEPS = st.lists(
    st.tuples(st.sampled_from(["reserve", "settle", "release", "hold"]), CALLS, st.integers(0, 60)), max_size=60
)


@given(STEPS, st.integers(0, 100))
def test_a_budget_admits_nothing_above_it_and_charges_each_call_once(
    steps: list[tuple[str, str, int]], limit: int
) -> None:
    use, spent, open_calls = BudgetUse(), 0, dict[str, int]()
    for step, call, amount in steps:
        if step == "reserve":
            before = use.charged
            match use.reserve(call, amount, 1, limit):
                case "reserved":
                    assert call not in open_calls
                    assert before + amount <= limit
                    open_calls[call] = amount
                case "spent":
                    assert before + amount > limit
                case "known":
                    assert call in open_calls
        elif step == "hold":
            use.hold(call)
        else:
            cost = min(amount, open_calls.get(call, 0)) if step == "settle" else 0
            assert (use.settle(call, cost) if step == "settle" else use.release(call)) == (call in open_calls)
            spent += cost if open_calls.pop(call, None) is not None else 0
        assert use.charged == spent + sum(open_calls.values()) <= limit
        assert use.reserved + use.held == sum(open_calls.values())
        assert BudgetUse.parse(json.loads(json.dumps(use.plain()))) == use


def test_a_possibly_billed_call_counts_until_its_cost_is_known() -> None:
    use = BudgetUse()
    use.reserve("a", 10, 1, 10)
    assert use.hold("a")
    assert not use.hold("a")
    assert (use.held, use.reserved) == (10, 0)
    assert use.reserve("b", 1, 1, 10) == "spent"
    assert use.settle("a", 4)
    assert (use.spent, use.charged) == (4, 4)


def test_a_reservation_that_is_older_than_any_call_is_held_when_its_room_is_wanted() -> None:
    """Its worker has died, and its job has ended without another execution: a refusal must not wait for it."""
    use, day = BudgetUse(), 24 * 3600
    assert use.reserve("a", 6, 1_000, 10) == use.reserve("b", 3, 1_000 + day, 10) == "reserved"
    assert use.reserve("c", 2, 1_000 + day, 10) == "spent"
    assert (use.reserved, use.held) == (9, 0)
    assert use.reserve("c", 2, 1_001 + 26 * 3600, 10) == "spent"
    assert (use.reserved, use.held, use.charged) == (3, 6, 9)
    assert use.settle("a", 1)  # if somebody is left after all
    assert use.charged == 4


def test_of_too_many_possibly_billed_calls_the_oldest_stay_spent() -> None:
    use = BudgetUse()
    for number in range(CALLS_MAX):
        assert use.reserve(f"c{number}", 2, number, 10**9) == "reserved"
    assert use.reserve("one more", 2, 9, 10**9) == "full"
    assert use.hold("c7")
    assert use.hold("c3")
    assert use.reserve("one more", 2, 9, 10**9) == "reserved"
    assert "c3" not in use.calls
    assert "c7" in use.calls
    assert (use.spent, use.held, use.charged) == (2, 2, 2 * CALLS_MAX + 2)


# -- on a server


@pytest.fixture
async def client(shared: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(shared.url, user=shared.user, password=shared.password) as client:
        yield client


@pytest.fixture
def ledger(client: aiqueue.Client) -> UsageLedger:
    return UsageLedger(UsageStore(client.connection, client.topology))


@pytest.fixture
async def open_budgets(client: aiqueue.Client, tenant: str) -> AsyncIterator[Open]:
    """Budgets of another process: what it knows is its own."""
    made = []

    def make(month_micros: int = 100, **given: Any) -> Budgets:
        store = UsageStore(client.connection, client.topology)
        made.append(Budgets(store, UsageLedger(store), [Budget(tenant, month_micros, **given)]))
        return made[-1]

    yield make
    for each in made:
        await each.close()


async def stats(budgets: Budgets, tenant: str) -> BudgetStats:
    (found,) = await budgets.stats(month_of(time.time()), tenant)
    return found


async def test_fifty_concurrent_calls_of_a_budget_that_admits_ten_are_ten_and_two_writes(
    open_budgets: Open, client: aiqueue.Client, tenant: str
) -> None:
    budgets = open_budgets(100)
    outcomes = await asyncio.gather(
        *(budgets.reserve(tenant, f"c{number}", 10) for number in range(50)), return_exceptions=True
    )
    assert sum(isinstance(each, BudgetSpent) for each in outcomes) == 40
    assert sum(not isinstance(each, BaseException) for each in outcomes) == 10
    found = await stats(budgets, tenant)
    assert (found.reserved_micros, found.reserved_calls, found.charged_micros) == (100, 10, 100)
    stored = await client.connection.last("AI_GATEWAY_USAGE", f"ai.gateway.budget.{tenant}.{found.month}")
    assert stored is not None
    first = await client.connection.first("AI_GATEWAY_USAGE", f"ai.gateway.budget.{tenant}.{found.month}")
    assert first == stored  # the stream keeps one
    tries = [budgets.settle(tenant, f"c{number}", 3) for number in range(50)]
    assert sum(await asyncio.gather(*tries)) == 10
    again = await client.connection.last("AI_GATEWAY_USAGE", f"ai.gateway.budget.{tenant}.{found.month}")
    assert again is not None
    assert again.seq - stored.seq <= 3
    assert (await stats(budgets, tenant)).spent_micros == 30


async def test_processes_that_reserve_at_once_stay_within_the_budget(open_budgets: Open, tenant: str) -> None:
    processes = [open_budgets(1_000) for _ in range(4)]
    charged = 0

    async def call(number: int) -> int:
        mine = processes[number % 4]
        try:
            await mine.reserve(tenant, f"c{number}", 20)
        except BudgetSpent:
            return 0
        cost = random.Random(number).randint(0, 20)
        match number % 5:
            case 0:
                await mine.hold(tenant, f"c{number}")
                return 20
            case 1:
                await mine.release(tenant, f"c{number}")
                return 0
        assert await mine.settle(tenant, f"c{number}", cost)
        return cost

    charged = sum(await asyncio.gather(*(call(number) for number in range(200))))
    found = await stats(processes[0], tenant)
    assert found.charged_micros == charged <= 1_000
    assert found.reserved_calls == 0
    assert charged > 300


async def test_a_refusal_is_of_what_is_stored_now_and_not_of_what_was_known(open_budgets: Open, tenant: str) -> None:
    one, two = open_budgets(10), open_budgets(10)
    await one.reserve(tenant, "a", 10)
    with pytest.raises(BudgetSpent):
        await two.reserve(tenant, "b", 1)
    await one.settle(tenant, "a", 9)
    assert await two.reserve(tenant, "b", 1) is not None
    assert not await one.settle(tenant, "never reserved", 5)


async def test_a_call_is_reserved_and_charged_once_however_often_it_is_asked(open_budgets: Open, tenant: str) -> None:
    one, two = open_budgets(10), open_budgets(10)
    first = await one.reserve(tenant, "a", 6)
    assert first is not None
    again = await two.reserve(tenant, "a", 9)
    assert again is not None
    assert (again.amount_micros, again.month, int(again.at)) == (6, first.month, int(first.at))
    assert await two.settle(tenant, "a", 5)
    assert [await each.settle(tenant, "a", 5) for each in (one, two)] == [False, False]
    assert not await one.hold(tenant, "a")
    assert not await one.release(tenant, "a")
    assert (await stats(one, tenant)).charged_micros == 5


async def test_a_process_reads_before_it_writes_while_others_write_too(
    open_budgets: Open, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    one, two = open_budgets(1_000), open_budgets(1_000)
    put, get, counts = UsageStore.put, UsageStore.get, {"put": 0, "get": 0}

    async def counted_put(self: UsageStore, *args: Any, **kwargs: Any) -> int:
        counts["put"] += 1
        return await put(self, *args, **kwargs)

    async def counted_get(self: UsageStore, *args: Any) -> Any:
        counts["get"] += 1
        return await get(self, *args)

    await one.reserve(tenant, "a", 1)
    await two.reserve(tenant, "b", 1)
    await one.reserve(tenant, "c", 1)
    monkeypatch.setattr(UsageStore, "put", counted_put)
    monkeypatch.setattr(UsageStore, "get", counted_get)
    for number in range(10):
        await (one, two)[number % 2].reserve(tenant, f"c{number}", 1)
    assert counts == {"put": 10, "get": 10}  # no write is rejected
    for number in range(10):
        await one.reserve(tenant, f"d{number}", 1)
    assert counts == {"put": 20, "get": 14}  # once nobody else writes, what is known is what is stored


async def test_a_refusal_says_the_figures_and_what_to_do(open_budgets: Open, tenant: str) -> None:
    budgets = open_budgets(10 * USD, when_spent="park")
    for call in ("a", "b", "c"):
        await budgets.reserve(tenant, call, 3 * USD)
    await budgets.settle(tenant, "a", 2_500_000)
    await budgets.hold(tenant, "b")
    with pytest.raises(BudgetSpent) as caught:
        await budgets.reserve(tenant, "d", 3 * USD)
    error, month = caught.value, month_of(time.time())
    following = month_of(next_month_start(month))
    assert str(error) == (
        f"tenant {tenant} has a budget of $10.00 for {month} ($2.50 spent, $3.00 reserved for calls under way, $3.00 "
        "held for calls that were possibly billed), and this call can cost up to $3.00: lower max_tokens, raise the "
        f"budget in gateway.toml, or wait until {following}"
    )
    assert (error.when_spent, error.may_fit_soon, error.is_too_dear, error.retryable) == ("park", True, False, True)
    assert error.resets_at == month_start(following)
    with pytest.raises(BudgetSpent, match=r"up to \$11.00: lower max_tokens, or raise the budget") as caught:
        await budgets.reserve(tenant, "e", 11 * USD)
    assert (caught.value.is_too_dear, caught.value.may_fit_soon, caught.value.retryable) == (True, False, False)


async def test_a_call_of_unknown_price_is_refused_where_there_is_a_budget(open_budgets: Open, tenant: str) -> None:
    budgets = open_budgets()
    with pytest.raises(PriceUnknown, match=r"the price of model m is unknown: give the model a price in gateway.toml"):
        await budgets.reserve(tenant, "a", None, model="m")
    assert await budgets.reserve(f"{tenant}-free", "a", None, model="m") is None
    assert not await budgets.settle(f"{tenant}-free", "a", 5)
    assert await budgets.stats(month_of(time.time()), f"{tenant}-free") == []


async def test_a_budget_for_each_tenant_is_of_those_without_their_own(open_budgets: Open, tenant: str) -> None:
    budgets = open_budgets()
    budgets.use_budgets([Budget("*", 5), Budget(tenant, 50)])
    assert await budgets.reserve(tenant, "a", 50) is not None
    assert await budgets.reserve(f"{tenant}-b", "a", 5) is not None
    for whom in (tenant, f"{tenant}-b"):
        with pytest.raises(BudgetSpent):
            await budgets.reserve(whom, "b", 1)
    budgets.use_budgets([Budget(tenant, 51)])
    assert await budgets.reserve(tenant, "b", 1) is not None
    assert await budgets.reserve(f"{tenant}-b", "b", 1) is None


async def test_a_budget_that_is_new_counts_what_was_spent_in_its_month_before(
    open_budgets: Open, ledger: UsageLedger, tenant: str
) -> None:
    now = time.time()
    await ledger.record(record_of("a", tenant, started_at=now, cost_micros=40))
    await ledger.record(lost("b", tenant, started_at=now, reserved_micros=50))
    await ledger.record(record_of("c", tenant, started_at=month_start(month_of(now)) - 1, cost_micros=10_000))
    budgets = open_budgets(100)
    assert not await budgets.settle(tenant, "unknown", 5)  # which makes no document
    with pytest.raises(BudgetSpent, match=r"\$0.00009 spent"):
        await budgets.reserve(tenant, "d", 11)
    assert await budgets.reserve(tenant, "d", 10) is not None


async def test_a_settlement_finds_the_reservation_of_the_month_before(
    open_budgets: Open, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    budgets, now = open_budgets(), time.time()
    before = month_of(month_start(month_of(now)) - 1)

    async def earlier(_: UsageStore) -> float:
        return month_start(before) + 5.0

    with monkeypatch.context() as patch:
        patch.setattr(UsageStore, "now", earlier)
        found = await budgets.reserve(tenant, "a", 10)
    assert found is not None
    assert (found.month, found.at) == (before, month_start(before) + 5)
    assert await budgets.settle(tenant, "a", 7)
    assert not await budgets.settle(tenant, "a", 7, month=before)
    (old,) = await budgets.stats(before, tenant)
    assert (old.spent_micros, old.reserved_calls) == (7, 0)
    assert await budgets.stats(month_of(now), tenant) == []


async def test_a_cancelled_reservation_is_given_back(open_budgets: Open, tenant: str) -> None:
    budgets = open_budgets(1_000)
    await budgets.reserve(tenant, "first", 1)
    asked = [asyncio.create_task(budgets.reserve(tenant, f"c{number}", 10)) for number in range(20)]
    for number, each in enumerate(asked):
        await asyncio.sleep(0.0002 * (number % 3))
        each.cancel()
    done = await asyncio.gather(*asked, return_exceptions=True)
    kept = sum(not isinstance(each, BaseException) for each in done)
    await budgets.reserve(tenant, "last", 1)  # written behind what undoes the others
    await budgets.settle(tenant, "last", 0)
    found = await stats(budgets, tenant)
    assert (found.reserved_calls, found.reserved_micros) == (kept + 1, 10 * kept + 1)


async def test_a_reservation_whose_caller_leaves_as_it_is_stored_is_given_back(
    open_budgets: Open, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    budgets, put = open_budgets(1_000), UsageStore.put
    task = asyncio.create_task(budgets.reserve(tenant, "a", 10))

    async def put_and_cancel(self: UsageStore, *args: Any, **kwargs: Any) -> int:
        seq = await put(self, *args, **kwargs)
        asyncio.get_running_loop().call_soon(task.cancel)  # before the task hears of it
        return seq

    with monkeypatch.context() as patch:
        patch.setattr(UsageStore, "put", put_and_cancel)
        await asyncio.wait([task])
    assert task.cancelled()
    await budgets.reserve(tenant, "b", 1)
    assert (await stats(budgets, tenant)).reserved_micros == 1


async def test_a_settlement_makes_room_for_a_reservation_that_waits_before_it(open_budgets: Open, tenant: str) -> None:
    budgets = open_budgets(10)
    first = await budgets.reserve(tenant, "a", 10)
    assert first is not None
    done = await asyncio.gather(budgets.reserve(tenant, "b", 10), budgets.settle(tenant, "a", 0, month=first.month))
    assert done[0] is not None


async def test_settlements_share_a_write_and_hold_up_no_reservation(
    open_budgets: Open, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    monkeypatch.setattr(module, "GATHER_S", 10)
    budgets, puts, put = open_budgets(), [], UsageStore.put

    async def counted(self: UsageStore, *args: Any, **kwargs: Any) -> int:
        puts.append(args)
        return await put(self, *args, **kwargs)

    for call in ("a", "b"):
        await budgets.reserve(tenant, call, 1)
    monkeypatch.setattr(UsageStore, "put", counted)
    settled = [asyncio.create_task(budgets.settle(tenant, call, 1)) for call in ("a", "b")]
    await asyncio.sleep(0.01)
    assert not puts
    async with asyncio.timeout(5):
        await budgets.reserve(tenant, "c", 1)
        assert await asyncio.gather(*settled) == [True, True]
    assert len(puts) == 1


async def test_a_settlement_whose_caller_has_left_is_written(open_budgets: Open, tenant: str) -> None:
    budgets = open_budgets(1_000)
    await budgets.reserve(tenant, "a", 10)
    task = asyncio.create_task(budgets.settle(tenant, "a", 7))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await budgets.reserve(tenant, "b", 1)
    assert (await stats(budgets, tenant)).spent_micros == 7


async def test_more_calls_than_a_document_holds_are_refused_for_now(
    open_budgets: Open, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    monkeypatch.setattr("aiqueue.gateway.budget_use.CALLS_MAX", 3)
    budgets = open_budgets()
    done = await asyncio.gather(*(budgets.reserve(tenant, f"c{n}", 1) for n in range(5)), return_exceptions=True)
    refused = [each for each in done if isinstance(each, QueueFull)]
    assert len(refused) == 2
    assert str(refused[0]).startswith(f"the budget of tenant {tenant} is full: 5,000 calls are under way")


async def test_a_document_that_is_no_budget_says_how_to_make_it_anew(
    open_budgets: Open, ledger: UsageLedger, client: aiqueue.Client, tenant: str
) -> None:
    await ledger.record(record_of("a", tenant, started_at=time.time(), cost_micros=40))
    budgets, month = open_budgets(), month_of(time.time())
    store = UsageStore(client.connection, client.topology)
    seq = await store.put(subjects.usage_month("budget", tenant, month), {"spent": -1}, expected=0)
    with pytest.raises(ConfigMismatch, match=rf"is no budget .*`nats stream rmm AI_GATEWAY_USAGE {seq}`: it is made"):
        await budgets.reserve(tenant, "b", 1)
    assert await client.connection.delete(store.stream, seq)
    await budgets.reserve(tenant, "b", 1)
    found = await stats(budgets, tenant)
    assert (found.spent_micros, found.reserved_micros) == (40, 1)


@pytest.mark.parametrize("amount", [-1, 1.5, True, None, 2**60])
async def test_what_is_no_amount_is_refused(open_budgets: Open, tenant: str, amount: Any) -> None:
    with pytest.raises(BadInput, match="whole number of micro-dollars"):
        await open_budgets().settle(tenant, "a", amount)
    with pytest.raises(BadInput):
        Budget(tenant, amount)
    with pytest.raises(BadInput, match="when_spent is refuse or park"):
        Budget(tenant, 1, "stop")  # type: ignore[arg-type]


async def test_closed_budgets_fail_what_waits_and_hold_nothing_up(open_budgets: Open, tenant: str) -> None:
    budgets = open_budgets(1_000)
    asked = [asyncio.create_task(budgets.reserve(tenant, f"c{number}", 1)) for number in range(3)]
    await asyncio.sleep(0)
    await budgets.close()
    done = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(each) for each in done} <= {Unavailable, module.Reservation}
    await budgets.close()


async def test_the_least_recently_used_documents_are_forgotten(
    open_budgets: Open, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    monkeypatch.setattr(module, "DOCUMENTS_MAX", 3)
    budgets = open_budgets()
    budgets.use_budgets([Budget("*", 10)])
    for number in range(6):
        await budgets.reserve(f"{tenant}-{number}", "a", 1)
    assert len(budgets._documents) == 3
    assert await budgets.settle(f"{tenant}-0", "a", 1)


# -- faults


async def test_a_server_that_is_killed_under_reservations_neither_loses_nor_exceeds(
    own_server: Callable[..., NatsProcess],
) -> None:
    """Also where the answer to a write was lost: whoever asks again finds the reservation."""
    server = own_server()
    limit, calls, amount = 2_000, 300, 10
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        store = UsageStore(client.connection, client.topology)
        await create_streams(client)
        processes = [Budgets(store, UsageLedger(store), [Budget("acme", limit)]) for _ in range(3)]
        costs: dict[int, int] = {}

        async def call(number: int) -> None:
            mine = processes[number % 3]
            await asyncio.sleep(number * 0.008)
            try:
                await _persist(lambda: mine.reserve("acme", f"c{number}", amount))
            except BudgetSpent:
                return
            costs[number] = number % (amount + 1)
            await _persist(lambda: mine.settle("acme", f"c{number}", costs[number]))

        async def kill() -> None:
            for _ in range(2):
                await asyncio.sleep(0.7)
                await asyncio.to_thread(server.kill)
                await asyncio.to_thread(server.start)

        await asyncio.gather(kill(), *(call(number) for number in range(calls)))
        (found,) = await processes[0].stats(month_of(time.time()))
        assert found.reserved_calls == 0
        assert found.spent_micros == sum(costs.values()) <= limit
        assert len(costs) > 100
        for each in processes:
            await each.close()


async def _persist(call: Callable[[], Any]) -> Any:
    while True:
        try:
            return await call()
        except Unavailable:
            await asyncio.sleep(0.05)


async def test_processes_killed_between_their_writes_never_exceed_the_budget_and_lose_no_charge(
    shared: Account, open_budgets: Open, ledger: UsageLedger, tenant: str, tmp_path: Path, eventually: Eventually
) -> None:
    """Each call is reserved, called, recorded and settled, and its process may die between any two of these. Another
    one goes on with it, as the next attempt of a job does: a call that was made and is not recorded was possibly
    billed.
    """
    limit, kills = 6_000, 8
    log = tmp_path / "provider.log"
    arguments = [shared.url, shared.user, shared.password, tenant, str(limit), str(log)]
    command = [sys.executable, "-m", "tests.gateway.spender", *arguments]
    chance = random.Random(7)

    def pids(number: int) -> list[int]:
        file = Path(f"{log}.{number}.pids")
        return [json.loads(line)["pid"] for line in file.read_text().splitlines()] if file.exists() else []

    def steps(number: int) -> int:
        notes = Path(f"{log}.{number}")
        return notes.read_bytes().count(b"\n") if notes.exists() else 0

    spenders = [subprocess.Popen([*command, str(number)], cwd=ROOT) for number in range(2)]
    generations = [1, 1]
    try:
        for kill in range(kills):
            number = kill % 2
            await eventually(lambda number=number: len(pids(number)) == generations[number])
            enough = steps(number) + chance.randint(1, 12)
            await eventually(lambda number=number, enough=enough: steps(number) >= enough)
            await asyncio.sleep(0.005 * chance.random())
            os.kill(pids(number)[-1], signal.SIGKILL)
            generations[number] += 1
        for number, each in enumerate(spenders):
            await eventually(lambda number=number: len(pids(number)) == generations[number])
            os.kill(pids(number)[-1], signal.SIGTERM)
            assert await asyncio.to_thread(each.wait, 30) == 0
    finally:
        for each in spenders:
            each.kill()
            each.wait()
    called = [json.loads(line) for line in log.read_text().splitlines()]
    by_call = {each["call"]: each for each in called}
    assert len(by_call) == len(called) > 12, "each call was made once"
    found = await stats(open_budgets(limit), tenant)
    records = {each.call_id: each async for _, each in ledger.records(tenant)}
    assert found.reserved_calls == 0
    assert found.charged_micros == sum(each.charged_micros for each in records.values()) <= limit
    assert found.held_micros == sum(each.charged_micros for each in records.values() if each.cost_micros is None)
    for call, each in by_call.items():
        if records[call].outcome == "ok":
            assert records[call].cost_micros == each["cost"]
    # what is not recorded as called was never called, and nothing that was called is missing
    assert by_call.keys() <= records.keys()
    assert sum(each.outcome == "possibly_billed" for each in records.values()) <= kills
