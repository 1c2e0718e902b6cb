"""``gateway``: the gateway over HTTP and its API keys, what calls of models have used, budgets, and a demo."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import gateway_keys, output
from .audit import run_counted
from .gateway_batch import batch, batches
from .gateway_serve import serve
from .options import Json, ServerOptions, add_command
from .output import Column

if TYPE_CHECKING:
    from ..client import Client
    from ..gateway import BudgetStats, Sums, UsageTotal

app = typer.Typer(no_args_is_help=True, help="Serve the gateway over HTTP, answer files, manage API keys, show usage.")
app.add_typer(gateway_keys.app, name="keys")


def usage(
    options: ServerOptions,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only this tenant.")] = None,
    month: Annotated[str | None, typer.Option(metavar="YYYY-MM", help="Month (UTC). Default: this one.")] = None,
    model: Annotated[str | None, typer.Option(metavar="MODEL", help="Only this model.")] = None,
    days: Annotated[bool, typer.Option("--days", metavar="", help="Show each day by itself.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", metavar="", help="First count all records again, from the beginning.")
    ] = False,
    json: Json = False,
) -> None:
    """Show what calls of models have used in a month, by tenant and model, and the budgets of tenants.

    Totals are counted from the records of calls, one for each call. Calls that were possibly billed count against a
    budget with what they had reserved: "held". "prompt", "completion" and "cached" are tokens, of which the cached ones
    are a part of the prompt.
    """

    async def fetch(client: Client) -> tuple[str, list[UsageTotal], list[BudgetStats]]:
        from ..gateway import Budgets, UsageLedger, UsageStore, UsageView, month_of  # noqa: PLC0415
        from ..subjects import token  # noqa: PLC0415

        store = UsageStore(client.connection, client.topology)
        ledger, whom = UsageLedger(store), "*" if tenant is None else token("tenant", tenant)
        when = month if month is not None else month_of(await store.now())
        view = UsageView(store, ledger)
        if rebuild:
            await view.rebuild()
        return (
            when,
            await view.totals(when, tenant=whom, model=model or ""),
            await Budgets(store, ledger).stats(when, whom),
        )

    if rebuild:
        when, totals, budgets = run_counted(options, "gateway.usage.rebuild", {"tenant": tenant, "month": month}, fetch)
    else:
        when, totals, budgets = options.run_with_client(fetch, reads=True)
    if json:
        output.print_json(
            {
                "month": when,
                "totals": [{**each._asdict(), "sums": each.sums._asdict()} for each in totals],
                "budgets": [_plain_budget(each) for each in budgets],
            }
        )
        return
    if totals:
        _print_totals(totals, days=days)
    else:
        whose = "models" if model is None else f"model {model}"
        output.print_line(f"no calls of {whose} in {when}" + ("" if tenant is None else f" by tenant {tenant}"))
    if budgets:
        output.print_line("")
        _print_budgets(budgets)


def _plain_budget(budget: BudgetStats) -> dict[str, Any]:
    from dataclasses import asdict  # noqa: PLC0415

    return asdict(budget)


def _print_totals(totals: Sequence[UsageTotal], *, days: bool) -> None:
    from ..gateway import Sums  # noqa: PLC0415

    by_row: dict[tuple[str, ...], Sums] = {}
    for each in totals:
        row = (each.tenant, each.day, each.model) if days else (each.tenant, each.model)
        by_row[row] = by_row.get(row, Sums()).plus(each.sums)
    whole = Sums()
    for sums in by_row.values():
        whole = whole.plus(sums)
    names = ("tenant", "day", "model") if days else ("tenant", "model")
    columns = [Column(each, shrink=each != "day") for each in names]
    columns += [
        Column(each, right=True) for each in ("calls", "failed", "prompt", "completion", "cached", "cost", "held")
    ]
    rows = [[*row, *_cells(sums)] for row, sums in sorted(by_row.items())]
    if len(rows) > 1:
        rows.append(["(all)", *[""] * (len(names) - 1), *_cells(whole)])
    output.print_table(columns, rows)
    if whole.possibly_billed:
        calls = output.format_count(whole.possibly_billed, "possibly billed call")
        output.print_line(f"held: what {calls} can have cost")
    if whole.unpriced:
        calls = output.format_count(whole.unpriced, "call")
        output.print_line(f"not in the cost: {calls} of models whose price is unknown")


def _cells(sums: Sums) -> list[str]:
    from ..gateway import format_usd  # noqa: PLC0415

    counts = (sums.calls, sums.failed, sums.prompt_tokens, sums.completion_tokens, sums.cached_tokens)
    held = format_usd(sums.held_micros) if sums.possibly_billed else ""
    return [*(f"{each:,}" for each in counts), format_usd(sums.cost_micros), held]


def _print_budgets(budgets: Sequence[BudgetStats]) -> None:
    from ..gateway import format_usd  # noqa: PLC0415

    columns = [
        Column("tenant", shrink=True), *(Column(each, right=True) for each in ("budget", "left", "spent")),
        Column("held", right=True), Column("reserved", right=True), Column("oldest reservation", prose=True),
    ]  # fmt: skip
    rows = []
    for each in budgets:
        left = each.limit_micros - each.charged_micros
        amounts = (each.limit_micros, left, each.spent_micros, each.held_micros, each.reserved_micros)
        calls = output.format_count(each.reserved_calls, "call") if each.reserved_calls else ""
        oldest = f"{output.format_ago(each.oldest_at)}, {calls}" if calls else ""
        rows.append([each.tenant, *map(format_usd, amounts), oldest])
    output.print_table(columns, rows)


add_command(
    app,
    "usage",
    examples=("  aiqueue gateway usage", "  aiqueue gateway usage --tenant acme --month 2026-11 --days"),
)(usage)


add_command(
    app,
    "serve",
    examples=("  aiqueue gateway serve", "  aiqueue gateway serve --host 0.0.0.0 --port 80 --processes 4"),
)(serve)
add_command(
    app,
    "batch",
    examples=(
        "  aiqueue gateway batch requests.jsonl --tenant acme",
        "  aiqueue gateway batch --resume batch_06h2hngsuua38k4n41ph05ahgg --tenant acme",
    ),
)(batch)
add_command(app, "batches", examples=("  aiqueue gateway batches --tenant acme",))(batches)


def demo(
    _options: ServerOptions,
    *,
    keep: Annotated[bool, typer.Option("--keep", metavar="", help="Keep the server's data for inspection.")] = False,
    json: Annotated[bool, typer.Option("--json", metavar="", help="Print only the report, as JSON.")] = False,
) -> None:
    """Run a demo: two tenants call models, with a limit, a refusal, a killed worker and a bill that adds up.

    A stand-in for a provider answers, so no key is needed. Runs on a private server, takes less than a minute, and
    cleans up after itself.

    Exit codes: 0 all was answered and the bill adds up, 1 not so.
    """
    from .demo.gateway import gateway_demo  # noqa: PLC0415  (a large module)

    gateway_demo(keep=keep, as_json=json)


add_command(app, "demo", only=())(demo)
