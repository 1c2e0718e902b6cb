"""``limits``: set and unset rules of limits, and show which hold and what uses them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BadInput
from . import output
from .audit import run_audited
from .options import FAILED, Json, ServerOptions, add_command, duration_option, print_error
from .output import Column
from .pause import print_pauses

if TYPE_CHECKING:
    from ..client import AuditedAct, Client
    from ..inspect import LimitStats, LimitUse
    from ..lanes import Pause

USES_SHOWN = 50  # of each rule

app = typer.Typer(no_args_is_help=True, help="Set, unset and list rules of limits by key.")

Family = Annotated[str, typer.Argument(metavar="FAMILY", help="Family, with a limit_key.")]
Key = Annotated[str, typer.Argument(metavar="KEY", help="A value of the key, or a pattern such as 'gpt-*'.")]
Tenant = Annotated[str | None, typer.Option(metavar="TENANT", help="A limit of this tenant. Default: of all together.")]
EachTenant = Annotated[bool, typer.Option("--each-tenant", metavar="", help="A limit of each tenant by itself.")]


def set_limit(  # noqa: PLR0913  (the options of a rule)
    options: ServerOptions,
    family: Family,
    key: Key,
    *,
    tenant: Tenant = None,
    each_tenant: EachTenant = False,
    requests: Annotated[int | None, typer.Option(metavar="N", help="Jobs that start in any window.")] = None,
    cost: Annotated[float | None, typer.Option(metavar="N", help="What they cost together, such as tokens.")] = None,
    window: Annotated[float | None, duration_option("Length of the window. Default: 1m.")] = None,
    in_flight: Annotated[int | None, typer.Option(metavar="N", help="Jobs that run at once.")] = None,
    unlimited: Annotated[
        bool, typer.Option("--unlimited", metavar="", help="Lift the rule that holds for this key.")
    ] = False,
    for_s: Annotated[
        float | None, duration_option("End the override by itself after this time, at most 366 days.", "--for")
    ] = None,
    author: Annotated[
        str | None, typer.Option(metavar="NAME", help="Shown to other operators. Default: user@host.")
    ] = None,
    json: Json = False,
) -> None:
    """Override a rule of limits.toml, or set one that is not declared, within a second and for all processes.

    Limits that are not given stay as they hold for the key now.
    """
    whom = _whom(tenant, each_tenant)

    async def run(client: Client, audited: AuditedAct) -> LimitStats:
        set_to = await client.set_limit(
            family, key, tenant=whom, requests=requests, cost=cost, window=window, in_flight=in_flight,
            unlimited=unlimited, duration=for_s, by=author,
        )  # fmt: skip
        audited.count = 1
        return set_to

    target = {
        "family": family, "key": key, "tenant": whom, "requests": requests, "cost": cost, "window": window,
        "in flight": in_flight, "unlimited": unlimited, "for": for_s, "author": author,
    }  # fmt: skip
    set_to = run_audited(options, "limits.set", target, run, creates=True)
    if json:
        output.print_json(asdict(set_to))
    else:
        output.print_line(output.escape_controls(f"{set_to}: {set_to.limit}, {_describe_source(set_to)}"))


def unset_limit(
    options: ServerOptions,
    family: Family,
    key: Key,
    *,
    tenant: Tenant = None,
    each_tenant: EachTenant = False,
    json: Json = False,
) -> None:
    """Remove an override: the declared rule holds again, or none. Name key and tenant as it was set.

    Exit codes: 0 removed; 1 there is no such override.
    """
    whom = _whom(tenant, each_tenant)

    async def run(client: Client, audited: AuditedAct) -> tuple[bool, list[LimitStats]]:
        removed = await client.unset_limit(family, key, tenant=whom)
        audited.count = int(removed)
        declared = client.topology.families.get(family)
        return removed, await client.limits(family if declared is not None and declared.limit_key else None)

    removed, left = run_audited(options, "limits.unset", {"family": family, "key": key, "tenant": whom}, run)
    left = [each for each in left if each.family == family]
    found = next((each for each in left if (each.key, each.tenant) == (key, whom)), None)
    if json:
        output.print_json({"removed": removed, "now": None if found is None else asdict(found)})
    elif removed:
        now = found.limit if found is not None else "no limit of its own"
        output.print_line(output.escape_controls(f"{family}, key {key!r}: the override is removed; now: {now}"))
    else:
        others = "; ".join(str(each) for each in left if each.is_override)
        print_error(f"{family}, key {key!r} has no such override" + (f"; there are: {others}" if others else ""))
    if not removed:
        raise typer.Exit(FAILED)


def ls(
    options: ServerOptions,
    family: Annotated[str | None, typer.Argument(metavar="FAMILY", help="Family. Default: all.")] = None,
    *,
    json: Json = False,
) -> None:
    """List the rules, what each value of the key uses of them, and what is paused.

    Declared rules are those of the limits.toml that this command reads. Workers keep what they read at their start.
    """
    from ..inspect import read_key_pauses  # noqa: PLC0415

    async def fetch(client: Client) -> tuple[list[LimitStats], list[Pause]]:
        return await client.limits(family), await read_key_pauses(client.connection, client.topology)

    found, pauses = options.run_with_client(fetch, reads=True)
    if json:
        output.print_json([asdict(each) for each in found])
        return
    if found:
        _print_rules(found)
        _print_uses(found)
    else:
        output.print_line("no limits: declare rules in limits.toml, or `aiqueue limits set`")
    if pauses := [each for each in pauses if family in (None, each.family)]:
        output.print_line("")
        print_pauses(pauses)


def _print_rules(found: Sequence[LimitStats]) -> None:
    rows = [[each.family, each.key, _format_tenant(each.tenant), each.limit, _shorten_source(each)] for each in found]
    columns = [
        Column("family", shrink=True), Column("key", shrink=True), Column("tenant", shrink=True),
        Column("limit", prose=True), Column("source", shrink=True, prose=True),
    ]  # fmt: skip
    output.print_table(columns, rows)


def _print_uses(found: Sequence[LimitStats]) -> None:
    rows, left = [], 0
    for rule in found:
        rows += [_use_row(rule, each) for each in rule.uses[:USES_SHOWN]]
        left += max(0, len(rule.uses) - USES_SHOWN)
    if not rows:
        output.print_line("\nno limited key is in use; `aiqueue inspect FAMILY` shows the jobs of ordinary lanes")
        return
    output.print_line("")
    columns = [
        Column("family", shrink=True), Column("key", shrink=True), Column("tenant", shrink=True),
        Column("requests", right=True), Column("cost", right=True), Column("in flight", right=True),
        Column("waiting", right=True), Column(""),
    ]  # fmt: skip
    output.print_table(columns, rows)
    if left:
        output.print_line(f"{output.format_count(left, 'more value')}: `aiqueue limits ls --json` shows them all")


def _use_row(rule: LimitStats, use: LimitUse) -> list[str]:
    return [
        rule.family, use.key, _format_tenant(use.tenant),
        _format_use(use.requests, rule.requests), _format_use(use.cost, rule.cost),
        _format_use(use.in_flight, rule.in_flight), f"{use.waiting:,}", "paused" if use.pause is not None else "",
    ]  # fmt: skip


def _format_tenant(tenant: str | None) -> str:
    return {None: "(all)", "*": "(each)"}.get(tenant, str(tenant))


def _format_use(used: float, limit: float | None) -> str:
    return "-" if limit is None else f"{used:,.10g}/{limit:,.10g}"


def _whom(tenant: str | None, each_tenant: bool) -> str | None:
    if tenant is not None and each_tenant:
        raise BadInput("--tenant and --each-tenant: give one of them")
    return "*" if each_tenant else tenant


def _describe_source(found: LimitStats) -> str:
    """Return where a rule comes from: "declared", or what `describe_override` says, and what the override replaces."""
    if not found.is_override:
        return "declared"
    return describe_override(found) + (f", declared: {found.declared}" if found.declared is not None else "")


def _shorten_source(found: LimitStats) -> str:
    """As `_describe_source`, for a table, which cuts the end off: the end of the override comes first."""
    if not found.is_override:
        return "declared"
    left = f"for another {output.format_age(found.expires_at - time.time())}, " if found.expires_at is not None else ""
    ago = output.format_age(time.time() - (found.set_at or 0.0))
    declared = f", declared: {found.declared}" if found.declared is not None else ""
    return f"{left}set by {found.by} {ago} ago{declared}"


def describe_override(found: LimitStats) -> str:
    """Return who has set a rule, when and until when: "set by anna 3m ago (2026-11-23 07:05:01) until …"."""
    until = "" if found.expires_at is None else f" until {output.format_time(found.expires_at)}"
    return f"set by {found.by} {output.format_ago(found.set_at)}{until}"


add_command(
    app,
    "set",
    examples=(
        "  aiqueue limits set llm.calls 'gpt-*' --requests 100 --for 2h",
        "  aiqueue limits set llm.calls gpt-4o --tenant acme --cost 10000 --window 1m",
        "  aiqueue limits set crawl.pages example.org --unlimited --for 10m",
    ),
)(set_limit)
add_command(app, "unset")(unset_limit)
add_command(app, "ls")(ls)
