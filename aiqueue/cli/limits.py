"""``limits``: set and unset rules of limits, and show which hold and what uses them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import AIQueueError, BadInput
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
KNOWN_SHOWN = 5  # keys or tenants that a mistyped one may have meant

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
    window: Annotated[
        float | None, duration_option("Length of the window, of requests and cost. Default: as now; of a new limit 1m.")
    ] = None,
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

    Limits that are not given stay as they hold for the key now. Requests and cost share one window: where the one that
    is not given would change its window, nothing is set; give both.
    """
    whom, warnings = _whom(tenant, each_tenant), list[str]()

    async def run(client: Client, audited: AuditedAct) -> LimitStats:
        set_to = await client.set_limit(
            family, key, tenant=whom, requests=requests, cost=cost, window=window, in_flight=in_flight,
            unlimited=unlimited, duration=for_s, by=author,
        )  # fmt: skip
        audited.count = 1
        with contextlib.suppress(AIQueueError):  # only the warning is left out
            warnings.extend(await _find_unknown(client, set_to))
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
    for each in warnings:
        output.print_line(output.escape_controls(f"note: {each}"), err=True)


async def _find_unknown(client: Client, set_to: LimitStats) -> list[str]:
    """Return notes about a key or tenant of a rule that no job, use or other rule has: it may be mistyped."""
    from ..inspect import stats  # noqa: PLC0415
    from ..limits import matches  # noqa: PLC0415

    limits = await client.limits(set_to.family)
    rules = [each for each in limits if (each.key, each.tenant) != (set_to.key, set_to.tenant)]
    lanes = await stats.lanes(client.connection, client.topology, set_to.family)
    uses = [use for each in limits for use in each.uses]
    keys = {use.key for use in uses} | {rule.key for rule in rules} | {lane.key for lane in lanes}
    keys = {key for key in keys if key and "*" not in key}
    tenants = {use.tenant for use in uses} | {rule.tenant for rule in rules} | {lane.tenant for lane in lanes}
    known_tenants = {tenant for tenant in tenants if tenant not in (None, "*")}
    found = []
    if not any(matches(set_to.key, each) for each in keys):
        found.append(f"no job of {set_to.family} with such a key is known{_list_known(set_to.key, keys)}")
    if set_to.tenant is not None and set_to.tenant not in ("*", *known_tenants):
        known = _list_known(set_to.tenant, {str(each) for each in known_tenants})
        found.append(f"no job of tenant {set_to.tenant} is known in {set_to.family}{known}")
    return found


def _list_known(given: str, known: Collection[str]) -> str:
    """Return the names that are most like the given one, for the end of a note."""
    import difflib  # noqa: PLC0415

    close = difflib.get_close_matches(given, known, n=KNOWN_SHOWN, cutoff=0.4) or sorted(known)[:KNOWN_SHOWN]
    return f"; known: {', '.join(close)}" if close else ""


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
    which = f"{family}, key {key!r}, {name_whom(whom)}"
    if json:
        output.print_json({"removed": removed, "now": None if found is None else asdict(found)})
    elif removed:
        general = _find_general(left, family, key, whom) if found is None else None
        now = found.limit if found is not None else "no limit"
        now = f"{general.limit}, by the rule for {general}" if general is not None else now
        output.print_line(output.escape_controls(f"{which}: the override is removed; now: {now}"))
    else:
        others = "; ".join(str(each) for each in left if each.is_override)
        print_error(f"{which}: there is no such override" + (f"; there are: {others}" if others else ""))
    if not removed:
        raise typer.Exit(FAILED)


def _find_general(rules: Sequence[LimitStats], family: str, key: str, whom: str | None) -> LimitStats | None:
    """Return the rule that holds for what a rule that is not there would be for. None: there is no limit."""
    from ..limits import Rule, RuleId, Rules  # noqa: PLC0415

    known = {RuleId(each.family, each.key, each.tenant): each for each in rules}
    made = [Rule(which, each.requests, each.cost, each.in_flight, each.window_s) for which, each in known.items()]
    general = Rules(made).more_general(RuleId(family, key, whom), time.time())
    return None if general is None else known[general.id]


def ls(
    options: ServerOptions,
    family: Annotated[str | None, typer.Argument(metavar="FAMILY", help="Family. Default: all.")] = None,
    *,
    json: Json = False,
) -> None:
    """List the rules, what each value of the key uses of them, and what is paused.

    Declared rules are those of the limits.toml that this command reads. Workers keep what they read at their start:
    those that have other rules are named, with these.
    """
    from ..inspect import read_key_pauses  # noqa: PLC0415

    notes: list[str] = []

    async def fetch(client: Client) -> tuple[list[LimitStats], list[Pause]]:
        found = await client.limits(family), await read_key_pauses(client.connection, client.topology)
        with contextlib.suppress(AIQueueError):  # only the notes are left out
            notes.extend(await _compare_workers(client, family))
        return found

    found, pauses = options.run_with_client(fetch, reads=True)
    for each in notes:
        output.print_line(output.escape_controls(f"note: {each}"), err=True)
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


async def _compare_workers(client: Client, family: str | None) -> list[str]:
    """Return notes about workers that have other declared rules than this command, of one family or of all."""
    workers = await client.workers(family=family)
    own = client.limit_rules.describe_declared({name for each in workers for name in each.limits})
    others: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for each in workers:
        for name, rules in each.limits.items():
            if family in (None, name) and tuple(own[name]) != rules:
                others.setdefault((name, rules), []).append(each.name)
    return [
        f"other rules hold in {_list_workers(names)} until a restart: {'; '.join(rules) or f'none for {name}'}"
        for (name, rules), names in sorted(others.items())
    ]


def _list_workers(names: Sequence[str]) -> str:
    more = f" and {len(names) - KNOWN_SHOWN:,} more" if len(names) > KNOWN_SHOWN else ""
    noun = "worker" if len(names) == 1 else "workers"
    return f"{noun} {', '.join(names[:KNOWN_SHOWN])}{more}"


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


def name_whom(tenant: str | None) -> str:
    """Return whose use counts together, as `LimitStats.whom` does."""
    return {None: "all tenants together", "*": "each tenant"}.get(tenant, f"tenant {tenant}")


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
