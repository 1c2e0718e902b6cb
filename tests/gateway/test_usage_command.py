"""`aiqueue gateway usage` shows totals, what is held, and what is left of budgets; a tenant sees one tenant."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

import aiqueue
from aiqueue.gateway import Budget, Budgets, UsageLedger, UsageStore, format_usd
from aiqueue.gateway.ledger import month_of

from .running import RunCommand
from .test_ledger import lost, record_of

NOW = time.time()
MONTH = month_of(NOW)


@pytest.fixture
async def spent(client: aiqueue.Client) -> Budgets:
    """Tenant acme has a budget of $10, of which $3.50 is spent, $2 held and $1 reserved; globex has none."""
    store = UsageStore(client.connection, client.topology)
    ledger = UsageLedger(store)
    budgets = Budgets(store, ledger, [Budget("acme", 10_000_000)])
    for call, cost, outcome in (("a", 3_500_000, "ok"), ("b", None, "possibly_billed"), ("c", None, "under way")):
        reserved = {"a": 4_000_000, "b": 2_000_000, "c": 1_000_000}[call]
        await budgets.reserve("acme", call, reserved)
        if outcome == "ok":
            await ledger.record(record_of(call, "acme", started_at=NOW, cost_micros=cost, reserved_micros=reserved))
            assert cost is not None
            await budgets.settle("acme", call, cost)
        elif outcome == "possibly_billed":
            await ledger.record(lost(call, "acme", started_at=NOW, reserved_micros=reserved))
            await budgets.hold("acme", call)
    for call, model, cost in (("d", "gpt-4o", 250_000), ("e", "own", None)):
        await ledger.record(record_of(call, "globex", model=model, started_at=NOW, cost_micros=cost))
    return budgets


async def test_usage_is_shown_by_tenant_and_model_with_what_is_left_of_budgets(run: RunCommand, spent: Budgets) -> None:
    del spent
    done = await run("usage")
    assert done.exit_code == 0, done.output
    totals, budgets = done.stdout.split("\n\n")
    rows = [line.split() for line in totals.splitlines()]
    assert rows[0] == ["tenant", "model", "calls", "failed", "prompt", "completion", "cached", "cost", "held"]
    assert rows[1] == ["acme", "gpt-4o", "2", "0", "100", "50", "10", "$3.50", "$2.00"]
    assert rows[2] == ["globex", "gpt-4o", "1", "0", "100", "50", "10", "$0.25"]
    assert rows[3] == ["globex", "own", "1", "0", "100", "50", "10", "$0.00"]
    assert rows[4] == ["(all)", "4", "0", "300", "150", "30", "$3.75", "$2.00"]
    assert totals.splitlines()[5:] == [
        "held: what 1 possibly billed call can have cost",
        "not in the cost: 1 call of models whose price is unknown",
    ]
    head, row = (line.split() for line in budgets.splitlines())
    assert head[:6] == ["tenant", "budget", "left", "spent", "held", "reserved"]
    assert row[:6] == ["acme", "$10.00", "$3.50", "$3.50", "$2.00", "$1.00"]
    assert " ".join(row[6:]).endswith("1 call")


async def test_usage_is_shown_of_one_tenant_or_model_and_by_day(run: RunCommand, spent: Budgets) -> None:
    del spent
    day = time.strftime("%Y-%m-%d", time.gmtime(NOW))
    one = (await run("usage", "--tenant", "globex", "--model", "gpt-4o", "--days")).stdout.splitlines()
    assert [line.split() for line in one][1:] == [
        ["globex", day, "gpt-4o", "1", "0", "100", "50", "10", "$0.25"],
    ]
    assert (await run("usage", "--month", "2001-01")).stdout == "no calls of models in 2001-01\n"
    assert (await run("usage", "--tenant", "nobody")).stdout == f"no calls of models in {MONTH} by tenant nobody\n"
    none = (await run("usage", "--tenant", "globex", "--model", "gpt-5")).stdout.splitlines()
    assert none[0] == f"no calls of model gpt-5 in {MONTH} by tenant globex"


async def test_usage_as_json_has_whole_micro_dollars_and_a_rebuild_changes_nothing(
    run: RunCommand, spent: Budgets
) -> None:
    shown = json.loads((await run("usage", "--json")).stdout)
    assert shown["month"] == MONTH
    assert [(each["tenant"], each["model"], each["sums"]["cost_micros"]) for each in shown["totals"]] == [
        ("acme", "gpt-4o", 3_500_000), ("globex", "gpt-4o", 250_000), ("globex", "own", 0),
    ]  # fmt: skip
    (budget,) = shown["budgets"]
    assert (budget["spent_micros"], budget["held_micros"], budget["reserved_calls"]) == (3_500_000, 2_000_000, 1)
    assert json.loads((await run("usage", "--json", "--rebuild")).stdout) == shown
    await spent.settle("acme", "c", 500_000)
    (budget,) = json.loads((await run("usage", "--json", "--tenant", "acme")).stdout)["budgets"]
    assert format_usd(budget["spent_micros"]) == "$4.00"
    assert budget["oldest_at"] is None


async def test_wrong_arguments_are_one_line(run: RunCommand, client: aiqueue.Client) -> None:
    for arguments, problem in ((("--month", "11"), "'11' is no month"), (("--tenant", "a.b"), "tenant 'a.b' must be")):
        done = await run("usage", *arguments)
        assert done.exit_code == 2
        assert problem in done.stderr
        assert len(done.stderr.splitlines()) == 1
    await client.connection.api("STREAM.DELETE.AI_GATEWAY_USAGE")
    done = await run("usage")
    assert (done.exit_code, len(done.stderr.splitlines())) == (1, 1)
    assert "there is no stream AI_GATEWAY_USAGE: run `aiqueue apply` first" in done.stderr


def test_neither_the_gateway_nor_its_command_imports_what_only_workers_need() -> None:
    code = "import sys, aiqueue.gateway, aiqueue.cli.gateway; print({'litellm', 'aiohttp'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "set()"
