"""``plan`` and ``apply``: compare the server's streams with the declared ones, and change them."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import output
from .limits import describe_override
from .options import DRIFT, Json, ServerOptions, add_command

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

    Exit codes: 0 nothing to change, 3 the server differs from the declaration, or something stops a stream.
    """
    from ..inspect import read_overrides_if_allowed  # noqa: PLC0415
    from ..topology import provision  # noqa: PLC0415

    async def compare(client: Client) -> tuple[provision.Plan, int, list[LimitStats]]:
        link, topology = client.connection, client.topology
        overrides = await read_overrides_if_allowed(link, topology, client.limit_rules)
        return await provision.plan(link, topology), len(topology.streams), overrides

    found, streams, overrides = options.run_with_client(compare, reads=True)
    if json:
        output.print_json({"drift": found.drift, **_listed(found), "overrides": [asdict(each) for each in overrides]})
    else:
        _print_changes(found)
        if found.drift:
            output.print_line(f"\n{_summary(found)}")
        elif not found.problems:
            output.print_line(f"nothing to change: {output.format_count(streams, 'stream')} as declared")
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
    json: Json = False,
) -> None:
    """Create and update the server's streams as declared.

    Safe to repeat. Changes that would delete messages are refused without --allow-data-loss.
    """
    from ..topology import provision  # noqa: PLC0415

    async def apply_changes(client: Client) -> tuple[provision.Plan, int]:
        made = await provision.apply(client.connection, client.topology, allow_data_loss=allow_data_loss)
        return made, len(client.topology.streams)

    made, streams = options.run_with_client(apply_changes, declare=False)
    if json:
        output.print_json(_listed(made))
        return
    _print_changes(made)
    if made.drift:
        output.print_line(f"\n{output.format_count(len(made.changes), 'change')} made")
    elif not made.problems:
        output.print_line(f"nothing to change: {output.format_count(streams, 'stream')} as declared")
    _print_problems(made)


def _listed(found: provision.Plan) -> dict[str, list[dict[str, Any]]]:
    return {
        "changes": [asdict(each) for each in found.changes],
        "problems": [asdict(each) for each in found.problems],
    }


def _print_problems(found: provision.Plan) -> None:
    """Print how many problems of the plan `aiqueue apply` leaves. The lines themselves are those of the plan."""
    if found.problems:
        count = output.format_count(len(found.problems), "problem")
        output.print_line(f"\n{count} that `aiqueue apply` does not solve: see docs/troubleshooting.md")


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
    return f"{text}: run `aiqueue apply` to make {'it' if len(found.changes) == 1 else 'them'}"
