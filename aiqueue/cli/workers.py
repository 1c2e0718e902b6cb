"""``workers``: who works, on what, and since when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..units import short_size
from . import output
from .options import Json, ServerOptions, add_command
from .output import Column
from .pause import print_pauses

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import WorkerStats

WIDE = 140  # columns of a terminal from which on everything is shown
_STATES = {"running": "green", "draining": "yellow", "stalled": "red", "disconnected": "red", "silent": "red"}
NAMES_MAX = 3  # of families, kinds and tenants in a cell


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "workers",
        examples=(
            "  aiqueue workers                                    all workers",
            "  aiqueue workers --family agent.tasks --tenant acme those that take jobs of a tenant",
        ),
    )(workers)


def workers(
    options: ServerOptions,
    *,
    family: Annotated[str | None, typer.Option(metavar="FAMILY", help="Only workers of this family.")] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Only workers that take jobs of this tenant.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the workers: state, slots, oldest running job, memory, families, kinds, tenants, version, host.

    A worker that was killed is listed for up to 20 seconds. Reads only, changes nothing.
    """

    async def read(client: Client) -> list[WorkerStats]:
        return await client.workers(family=family, tenant=tenant)

    found = options.run_with_client(read, reads=True)
    if json:
        output.print_json([plain_worker(each) for each in found])
        return
    if not found:
        scope = " ".join(part for part in (family and f"of {family}", tenant and f"for {tenant}") if part)
        output.print_line(f"no worker {scope} is running: `aiqueue work MODULE:WORKER` starts one".replace("  ", " "))
        return
    width = output.terminal_width()
    if width is None or width >= WIDE:
        _print_wide(found)
    else:
        _print_narrow(found)
    if pauses := list(dict.fromkeys(pause for each in found for pause in each.pauses)):
        output.print_line("")
        print_pauses(pauses)


def plain_worker(found: WorkerStats) -> dict[str, Any]:
    """Return a worker as plain data, for ``--json``."""
    return asdict(found) | {"oldest": asdict(found.oldest) if found.oldest is not None else None}


def _print_wide(found: Sequence[WorkerStats]) -> None:
    rows = [
        [
            each.name, each.state, _format_slots(each), _format_oldest(each, whole=True), _format_memory(each),
            _format_names(each.families), _format_kinds(each), _format_tenants(each), _format_started(each),
            each.version or "?", each.host, str(each.pid or "?"),
        ]
        for each in found
    ]  # fmt: skip
    titles = ("families", "kinds", "tenants")
    columns = [
        Column("worker", shrink=True), Column("state"), Column("slots", right=True),
        Column("oldest job", shrink=True, prose=True), Column("memory", right=True),
        *(Column(title, shrink=True, prose=True) for title in titles),
        Column("up", right=True), Column("version", shrink=True), Column("host", shrink=True),
        Column("pid", right=True),
    ]  # fmt: skip
    output.print_table(columns, rows, below=[_describe_state(each) for each in found])


def _print_narrow(found: Sequence[WorkerStats]) -> None:
    rows = [
        [
            each.name, each.state, _format_slots(each), _format_oldest(each, whole=False), _format_memory(each),
            _format_started(each), _format_names(each.families),
        ]
        for each in found
    ]  # fmt: skip
    columns = [
        Column("worker", shrink=True), Column("state"), Column("slots", right=True), Column("oldest", right=True),
        Column("memory", right=True), Column("up", right=True), Column("families", shrink=True, prose=True),
    ]  # fmt: skip
    below = [
        _describe_state(each)
        or f"{_format_kinds(each)} of {_format_tenants(each)}, version {each.version or '?'}, {each.host} {each.pid}"
        for each in found
    ]
    output.print_table(columns, rows, below=below)


def _format_slots(found: WorkerStats) -> str:
    waiting = f"+{found.waiting:,}" if found.waiting else ""
    return f"{found.running:,}{waiting}/{found.slots:,}"


def _format_oldest(found: WorkerStats, *, whole: bool) -> str:
    if found.oldest is None:
        return "-"
    age = output.format_age(found.oldest.age_s)
    return f"{age} {found.oldest.kind} {found.oldest.job_id}" if whole else age


def _format_memory(found: WorkerStats) -> str:
    return "?" if found.rss_bytes is None else short_size(found.rss_bytes)


def _format_started(found: WorkerStats) -> str:
    return output.format_age(time.time() - found.started_at) if found.started_at else "?"


def _format_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_MAX} more" if len(names) > NAMES_MAX else ""
    return ", ".join(names[:NAMES_MAX]) + more


def _format_kinds(found: WorkerStats) -> str:
    kinds = sorted({kind for kinds in found.kinds.values() for kind in kinds})
    return _format_names(["every kind" if kind == "*" else kind for kind in kinds]) or "no kinds"


def _format_tenants(found: WorkerStats) -> str:
    return "all tenants" if found.tenants is None else _format_names(found.tenants)


def _describe_state(found: WorkerStats) -> str:
    """Return why a worker does not run jobs; "" if it does."""
    ago = output.format_age(time.time() - found.heard_at)
    match found.state:
        case "stalled" if found.blocked_at:
            return f"its event loop is blocked for {output.format_age(found.stalled_s)}, at {found.blocked_at}"
        case "stalled":
            return f"lanes hold jobs and slots are free, and nothing arrives for {output.format_age(found.stalled_s)}"
        case "silent":
            return f"not heard of for {ago}: it was killed, or has lost the server"
        case "draining":
            return "takes no more jobs, and ends when those that run have ended"
        case "disconnected":
            return f"not connected, {ago} ago"
        case _:
            paused = ", ".join(str(each.scope) for each in found.pauses)
            return f"paused: {paused}" if paused else ""
