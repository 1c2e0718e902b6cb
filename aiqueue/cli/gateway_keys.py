"""``gateway keys``: add, list and revoke tenants' API keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BadInput, TopologyError
from . import output
from .audit import run_counted
from .options import Json, ServerOptions, add_command, split_names
from .output import Column

if TYPE_CHECKING:
    from ..client import Client
    from ..gateway import ApiKey, BudgetStats

app = typer.Typer(no_args_is_help=True, help="Add, list and revoke tenants' API keys.")


def add(
    options: ServerOptions,
    tenant: Annotated[str, typer.Argument(metavar="TENANT", help="Whose requests the key makes.")],
    *,
    name: Annotated[str, typer.Option(metavar="TEXT", help="What the key is for, shown by `ls`.")] = "",
    model: Annotated[
        list[str] | None, typer.Option(metavar="MODEL", help="Only these models; may be repeated. Default: all.")
    ] = None,
    priority: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only these priorities; may be repeated. Default: all.")
    ] = None,
    requests: Annotated[int | None, typer.Option(metavar="N", help="Requests a minute at most.", min=1)] = None,
    tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens a minute at most.", min=1)] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="USD", help="What its calls may cost in a month, besides the tenant's budget.")
    ] = None,
    json: Json = False,
) -> None:
    """Add an API key of a tenant, and print its token. The token is stored nowhere: it is shown this once."""
    from ..gateway import parse_usd, to_micros  # noqa: PLC0415

    try:
        micros = None if budget is None else to_micros(parse_usd(budget))
    except ValueError as error:
        raise BadInput(f"--budget {error}") from None
    if micros == 0:
        raise BadInput("--budget must be above 0: to stop an API key, revoke it")
    models = split_names(model)
    if models is not None:
        _check_models(models, options)

    async def run(client: Client) -> tuple[ApiKey, str]:
        from ..gateway import ApiKeys  # noqa: PLC0415

        return await ApiKeys(client).add(
            tenant, name=name, models=models, priorities=split_names(priority),
            budget_micros=micros, requests_per_minute=requests,
            tokens_per_minute=tokens,
        )  # fmt: skip

    target = {
        "tenant": tenant,
        "name": name,
        "models": models,
        "requests": requests,
        "tokens": tokens,
        "budget": budget,
    }
    key, token = run_counted(options, "gateway.keys.add", target, run, creates=True)
    if json:
        output.print_json({**key.plain(), "token": token})
        return
    output.print_line(f"API key {key.id} of tenant {key.tenant} is added. Its token, which is not shown again:")
    output.print_line(token)


def _check_models(models: Sequence[str], options: ServerOptions) -> None:
    """Refuse a model that gateway.toml does not name. Where no file can be read, keys may be added all the same."""
    from ..gateway import load  # noqa: PLC0415

    try:
        config = load(settings=options.settings())
    except TopologyError as error:
        output.print_line(f"warning: --model is not checked: {error}", err=True)
        return
    for each in models:
        try:
            config.find_model(each)
        except BadInput as error:
            raise BadInput(f"--model: {error} ({config.file})") from None


def ls(
    options: ServerOptions,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Only of this tenant.")] = None,
    json: Json = False,
) -> None:
    """List API keys, what they may do, and what is left of their budgets of this month. No token is shown."""

    async def fetch(client: Client) -> tuple[list[ApiKey], dict[str, BudgetStats]]:
        from ..gateway import ApiKeys, Budgets, UsageLedger, UsageStore, month_of  # noqa: PLC0415

        keys = await ApiKeys(client).list(tenant)
        if all(each.budget is None for each in keys):
            return keys, {}
        store = UsageStore(client.connection, client.topology)
        month, whom = month_of(await store.now()), "*" if tenant is None else tenant
        found = await Budgets(store, UsageLedger(store)).stats(month, whom, keys=True)
        return keys, {each.key: each for each in found}

    keys, budgets = options.run_with_client(fetch, reads=True)
    if json:
        shown = [{**each.plain(), "budget": asdict(budgets[each.id]) if each.id in budgets else None} for each in keys]
        output.print_json(shown)
    elif keys:
        _print_keys(keys, budgets)
    else:
        whose = "" if tenant is None else f" of tenant {tenant}"
        output.print_line(f"no API keys{whose}; `aiqueue gateway keys add TENANT` adds one")


def _print_keys(keys: Sequence[ApiKey], budgets: Mapping[str, BudgetStats]) -> None:
    columns = [
        Column("id"), Column("tenant", shrink=True), Column("name", shrink=True), Column("models", shrink=True),
        Column("priorities", shrink=True), Column("a minute", prose=True), Column("budget", right=True),
        Column("left", right=True), Column("state"),
    ]  # fmt: skip
    output.print_table(columns, [[output.escape_controls(cell) for cell in _cells(each, budgets)] for each in keys])


def _cells(key: ApiKey, budgets: Mapping[str, BudgetStats]) -> list[str]:
    from ..gateway import format_usd  # noqa: PLC0415

    counts = ((key.requests_per_minute, "request"), (key.tokens_per_minute, "token"))
    limits = ", ".join(output.format_count(each, what) for each, what in counts if each is not None)
    budget = left = ""
    if key.budget_micros is not None:
        charged = budgets[key.id].charged_micros if key.id in budgets else 0
        budget, left = format_usd(key.budget_micros), format_usd(key.budget_micros - charged)
    state = f"revoked {output.format_ago(key.revoked_at)}" if key.revoked_at is not None else "valid"
    return [
        key.id, key.tenant, key.name, ", ".join(key.models or ("all",)), ", ".join(key.priorities or ("all",)), limits,
        budget, left, state,
    ]  # fmt: skip


def revoke(
    options: ServerOptions,
    key: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as `ls` shows it.")],
    *,
    json: Json = False,
) -> None:
    """Revoke an API key: within a second, all processes refuse it. Requests that were accepted go on."""

    async def run(client: Client) -> ApiKey:
        from ..gateway import ApiKeys  # noqa: PLC0415

        return await ApiKeys(client).revoke(key)

    revoked = run_counted(options, "gateway.keys.revoke", {"key": key}, run)
    if json:
        plain: dict[str, Any] = revoked.plain()
        output.print_json(plain)
    else:
        output.print_line(f"API key {revoked.id} of tenant {revoked.tenant} is revoked")


add_command(
    app,
    "add",
    examples=(
        "  aiqueue gateway keys add acme --name chat-app",
        "  aiqueue gateway keys add acme --model small --priority batch --budget 50",
        "  aiqueue gateway keys add acme --requests 60 --tokens 100000 --json",
    ),
)(add)
add_command(app, "ls", examples=("  aiqueue gateway keys ls --tenant acme",))(ls)
add_command(app, "revoke", examples=("  aiqueue gateway keys revoke 3f6c1d0a9b27e845",))(revoke)
