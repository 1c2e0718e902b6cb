"""``plan`` and ``apply``: compare the server's streams with the declared ones, and change them."""

from __future__ import annotations

import shutil
import signal
import textwrap
import threading
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..units import short_size
from . import output
from .limits import describe_override
from .options import DRIFT, FAILED, Json, ServerOptions, add_command, print_error

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import LimitStats
    from ..topology import provision

_COLOURS = {"+": "green", "~": "yellow", "-": "red", "!": "red"}


def register(app: typer.Typer) -> None:
    """Register the commands."""
    add_command(app, "plan")(plan)
    add_command(app, "apply")(apply)


def plan(options: ServerOptions, *, json: Json = False) -> None:
    """Show what `apply` would change, problems that `apply` cannot solve, and limits that operators have set.

    For streams that differ, also who applied them last, and how much the streams set aside on the server.

    Exit codes: 0 nothing to change, 3 the server differs from the declaration, or something stops a stream.
    """
    from ..inspect import read_overrides_if_allowed  # noqa: PLC0415
    from ..topology import provision  # noqa: PLC0415

    async def compare(client: Client) -> tuple[provision.Plan, Client, list[LimitStats]]:
        link, topology = client.connection, client.topology
        overrides = await read_overrides_if_allowed(link, topology, client.limit_rules)
        found = await provision.plan(link, topology)
        if not json:
            _print_sums(found, client)
        return found, client, overrides

    found, client, overrides = options.run_with_client(compare, reads=True)
    if json:
        output.print_json({"drift": found.drift, **_listed(found), "overrides": [asdict(each) for each in overrides]})
    else:
        _print_changes(found)
        _print_authors(found, client)
        if found.drift:
            output.print_line(f"\n{_summary(found)}")
        elif not found.problems:
            _print_as_declared(client)
        _print_problems(found)
        _print_overrides(overrides)
    if found.drift or found.problems:
        raise typer.Exit(DRIFT)


def apply(
    options: ServerOptions,
    *,
    allow_data_loss: Annotated[
        bool, typer.Option("--allow-data-loss", metavar="", help="Also make changes that delete messages.")
    ] = False,
    allow_full: Annotated[
        bool, typer.Option("--allow-full", metavar="", help="Also lower limits below what is stored.")
    ] = False,
    json: Json = False,
) -> None:
    """Create and update the server's streams as declared, all of them or none.

    Safe to repeat. Changes that would delete messages are refused without --allow-data-loss, and limits below what a
    stream stores, so that it would take no further job, without --allow-full.
    """
    import asyncio  # noqa: PLC0415

    from ..errors import ConfigMismatch, DataLossRefused  # noqa: PLC0415
    from ..topology import provision  # noqa: PLC0415

    refused: tuple[str, ...] = ()

    def show(found: provision.Plan, client: Client) -> None:
        nonlocal refused
        refused = found.refusals
        refused += () if allow_data_loss else tuple(f"{each} (--allow-data-loss permits it)" for each in found.losses)
        refused += () if allow_full else tuple(f"{each} (--allow-full permits it)" for each in found.stops)
        if not json:
            _print_sums(found, client)

    async def apply_changes(client: Client) -> tuple[provision.Plan, Client]:
        if threading.current_thread() is threading.main_thread() and (task := asyncio.current_task()) is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # undoes all, as Ctrl-C does
        made = await provision.apply(
            client.connection, client.topology, allow_data_loss=allow_data_loss, allow_full=allow_full,
            on_plan=lambda found: show(found, client),
        )  # fmt: skip
        return made, client

    try:
        made, client = options.run_with_client(apply_changes, declare=False)
    except asyncio.CancelledError:
        raise typer.Exit(128 + signal.SIGTERM) from None
    except (ConfigMismatch, DataLossRefused) as error:
        for each in refused or (str(error),):
            print_error(each)
        raise typer.Exit(FAILED) from None
    if json:
        output.print_json(_listed(made))
        return
    _print_changes(made)
    _print_authors(made, client)
    if made.drift:
        output.print_line(f"\n{output.format_count(len(made.changes), 'change')} made")
    elif not made.problems:
        _print_as_declared(client)
    _print_problems(made)


def _listed(found: provision.Plan) -> dict[str, Any]:
    sums = [asdict(each) for each in found.sums]
    return {
        "changes": [asdict(each) for each in found.changes],
        "sum": {each.pop("storage"): each for each in sums},
        "problems": [asdict(each) for each in (*found.shortages, *found.problems)],
        "applied": [asdict(each) for each in found.applied],
    }


def _print_as_declared(client: Client) -> None:
    streams = output.format_count(len(client.topology.streams), "stream")
    output.print_line(f"nothing to change: {streams} as declared")


def _print_sums(found: provision.Plan, client: Client) -> None:
    """Print what the streams set aside on the server, where that is to change, and the free disk of an embedded one."""
    from ..server import find_directory  # noqa: PLC0415

    sums = [each for each in found.sums if each.added]
    for each in sums:
        output.print_line(each.line())
    if sums and client.embedded:
        directory = client.settings.directory or find_directory()
        free = short_size(shutil.disk_usage(directory).free)
        output.print_line(f"the disk of {directory} has {free} free, of which the streams take what they store")


def _print_authors(found: provision.Plan, client: Client) -> None:
    """Print who applied the streams last that differ."""
    if authors := found.authors(client.settings.name):
        output.print_line("")
    for line in authors:
        output.print_line(output.escape_controls(line))


def _print_problems(found: provision.Plan) -> None:
    """Print how many problems of the plan `aiqueue apply` leaves. The lines themselves are those of the plan."""
    if found.problems:
        count = output.format_count(len(found.problems), "problem")
        output.print_line(f"\n{count} that `aiqueue apply` does not solve: see docs/operations/findings.md")


def _print_overrides(overrides: list[LimitStats]) -> None:
    if overrides:
        output.print_line("\nlimits that operators have set, and that `aiqueue apply` keeps:")
    for each in overrides:
        line = f"{each}: {each.declared or 'not declared'} -> {each.limit}, {describe_override(each)}"
        output.print_line(output.escape_controls(line))


def _print_changes(found: provision.Plan) -> None:
    edge = output.terminal_width()
    for line in found.lines():
        parts = textwrap.wrap(line, edge, subsequent_indent="    ", break_on_hyphens=False) if edge else [line]
        for part in parts:
            output.print_line(output.apply_style(output.escape_controls(part), _COLOURS.get(line[:1], "")))


def _summary(found: provision.Plan) -> str:
    text = output.format_count(len(found.changes), "change")
    if found.refusals:
        return f"{text}; {len(found.refusals)} cannot be made in place, so `aiqueue apply` would make none"
    if found.losses:
        return f"{text}; {len(found.losses)} would delete messages: to make them, run `aiqueue apply --allow-data-loss`"
    if found.stops:
        return f"{text}; {len(found.stops)} would stop a stream: to make them, run `aiqueue apply --allow-full`"
    return f"{text}: run `aiqueue apply` to make {'it' if len(found.changes) == 1 else 'them'}"
