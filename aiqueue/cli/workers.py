"""``workers``: who works, on what, and since when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..units import short_size
from . import output
from .options import FAILED, Json, ServerOptions, add_command, print_error
from .output import Column
from .pause import print_pauses

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import WorkerStats

WIDE = 140  # columns of a terminal from which on everything is shown
STATES = {"running": "green", "draining": "yellow", "stalled": "red", "disconnected": "red", "silent": "red"}
NAME_MAX = 80  # characters of a name that is not found
NAMES_MAX = 3  # of families, kinds and tenants in a cell
SHOWN_MAX = 200  # of them, where one worker is shown


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "workers",
        examples=(
            "  aiqueue workers                                    all workers",
            "  aiqueue workers --family agent.tasks --tenant acme  those that take jobs of a tenant",
            "  aiqueue workers vm-10129                           one, with what it runs",
        ),
    )(workers)


def workers(
    options: ServerOptions,
    worker: Annotated[
        str | None, typer.Argument(metavar="WORKER", help="Show the worker of this name, with what it runs.")
    ] = None,
    *,
    family: Annotated[str | None, typer.Option(metavar="FAMILY", help="Only workers of this family.")] = None,
    tenant: Annotated[
        str | None, typer.Option(metavar="TENANT", help="Only workers that take jobs of this tenant.")
    ] = None,
    json: Json = False,
) -> None:
    """Show the workers: state, slots, oldest running job, memory, families, kinds, tenants, version, host.

    A worker that was killed is listed for up to 20 seconds. Reads only, changes nothing.

    Exit codes: 0 shown, 1 there is no worker of this name.
    """

    async def read(client: Client) -> list[WorkerStats]:
        return await client.workers(family=family, tenant=tenant)

    found = options.run_with_client(read, reads=True)
    if worker is not None:
        _show_worker(worker, [each for each in found if each.name == worker], json)
        return
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
            each.name, each.state, format_slots(each), format_oldest(each, whole=True), _format_memory(each),
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
    output.print_table(columns, rows, below=[describe_worker(each) for each in found])


def _print_narrow(found: Sequence[WorkerStats]) -> None:
    rows = [
        [
            each.name, each.state, format_slots(each), format_oldest(each, whole=False), _format_memory(each),
            _format_started(each), _format_names(each.families),
        ]
        for each in found
    ]  # fmt: skip
    columns = [
        Column("worker", shrink=True), Column("state"), Column("slots", right=True), Column("oldest", right=True),
        Column("memory", right=True), Column("up", right=True), Column("families", shrink=True, prose=True),
    ]  # fmt: skip
    below = [
        describe_worker(each)
        or f"{_format_kinds(each)} of {_format_tenants(each)}, version {each.version or '?'}, {each.host} {each.pid}"
        for each in found
    ]
    output.print_table(columns, rows, below=below)


def _show_worker(name: str, found: Sequence[WorkerStats], json: bool) -> None:
    if not found:
        print_error(f"no worker {name[:NAME_MAX]!r} is running; `aiqueue workers` lists all")
        raise typer.Exit(FAILED)
    one = found[0]
    if json:
        output.print_json(plain_worker(one))
        return
    print_worker(one)


def print_worker(one: WorkerStats) -> None:
    """Print one worker, with what it runs."""
    output.print_line(output.escape_controls(f"worker {one.name}: {one.state}"))
    waiting = f", {output.format_count(one.waiting, 'job')} waiting" if one.waiting else ""
    lines = [f"; {count:,} of {family} in line" for family, count in one.in_line.items() if count]
    kinds = [f"{family}: {_format_names(names, SHOWN_MAX)}" for family, names in one.kinds.items()]
    output.print_fields(
        [
            ("why", describe_worker(one)),
            ("process", f"pid {one.pid or '?'} on {one.host}, version {one.version or '?'}"),
            ("up", f"{_format_started(one)}, last heard of {output.format_ago(one.heard_at)}"),
            ("memory", _format_memory(one)),
            ("slots", f"{one.running:,} of {one.slots:,} in use{waiting}"),
            ("done", f"{output.format_count(one.done, 'delivery', 'deliveries')} since its start"),
            ("lanes", f"pulls on {one.lanes:,}{''.join(lines)}"),
            ("families", _format_names(one.families, SHOWN_MAX)),
            ("kinds", "\n".join(kinds).replace("*", "every kind") or "none: it takes no more jobs"),
            ("tenants", "all tenants" if one.tenants is None else _format_names(one.tenants, SHOWN_MAX)),
        ]
    )
    if one.jobs:
        _print_running(one)
    if one.pauses:
        output.print_line("")
        print_pauses(list(one.pauses))


def _print_running(one: WorkerStats) -> None:
    """Print the jobs that a worker's record names: the oldest of those that run."""
    more = one.running - len(one.jobs)
    output.print_line(f"\nruns{f', and {more:,} later ones' if more > 0 else ''}")
    columns = [Column("job"), Column("lane", shrink=True), Column("kind", shrink=True), Column("for", right=True)]
    rows = [
        [
            each.job_id or "?", f"{each.family} {each.tenant}/{each.priority}", each.kind or "?",
            output.format_age(each.age_s),
        ]
        for each in one.jobs
    ]  # fmt: skip
    output.print_table(columns, rows)


def format_slots(found: WorkerStats) -> str:
    """Return how many slots are taken, how many jobs wait for one, and how many there are: "3+1/10"."""
    waiting = f"+{found.waiting:,}" if found.waiting else ""
    return f"{found.running:,}{waiting}/{found.slots:,}"


def format_oldest(found: WorkerStats, *, whole: bool) -> str:
    """Return how long the oldest job runs, and with `whole` which one it is."""
    if found.oldest is None:
        return "-"
    age = output.format_age(found.oldest.age_s)
    return f"{age} {found.oldest.kind} {found.oldest.job_id}" if whole else age


def _format_memory(found: WorkerStats) -> str:
    return "?" if found.rss_bytes is None else short_size(found.rss_bytes)


def _format_started(found: WorkerStats) -> str:
    return output.format_age(time.time() - found.started_at) if found.started_at else "?"


def _format_names(names: Sequence[str], at_most: int = NAMES_MAX) -> str:
    more = f" and {len(names) - at_most:,} more" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _format_kinds(found: WorkerStats) -> str:
    kinds = sorted({kind for kinds in found.kinds.values() for kind in kinds})
    return _format_names(["every kind" if kind == "*" else kind for kind in kinds]) or "no kinds"


def _format_tenants(found: WorkerStats) -> str:
    return "all tenants" if found.tenants is None else _format_names(found.tenants)


def describe_worker(found: WorkerStats) -> str:
    """Return why a worker does not run jobs; "" if it does."""
    ago = output.format_age(time.time() - found.heard_at)
    match found.state:
        case "stalled" if found.blocked_at:
            oldest = "" if found.oldest is None else f"; its oldest job is {found.oldest.kind} {found.oldest.job_id}"
            return f"its event loop is blocked for {output.format_age(found.stalled_s)}, at {found.blocked_at}{oldest}"
        case "stalled":
            return f"lanes hold jobs and slots are free, and nothing arrives for {output.format_age(found.stalled_s)}"
        case "silent":
            return f"not heard of for {ago}: it was killed, or has lost the server"
        case "draining":
            return "takes no more jobs, and ends when those that run have ended"
        case "disconnected":
            return f"no server answered it {ago} ago: it reconnects by itself, do not restart it"
        case _ if found.late_s:
            return (
                f"not heard of for {output.format_age(found.late_s)}: its event loop may be blocked, or it was killed"
            )
        case _:
            paused = ", ".join(str(each.scope) for each in found.pauses)
            return f"paused: {paused}" if paused else ""
