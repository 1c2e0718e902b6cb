"""``plan`` and ``apply``: what is declared, and what the server has."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import DRIFT, Json, Where, verb

if TYPE_CHECKING:
    from ..client import Client
    from ..topology import provision

_COLOURS = {"+": "green", "~": "yellow", "-": "red", "!": "red"}


def register(app: typer.Typer) -> None:
    """Add these verbs."""
    verb(app, "plan")(plan)
    verb(app, "apply")(apply)


def plan(where: Where, *, json: Json = False) -> None:
    """Show what apply would change on the server. Exit code 3 if there is anything."""
    from ..topology import provision  # noqa: PLC0415

    async def look(client: Client) -> tuple[provision.Plan, int]:
        return await provision.plan(client.connection, client.topology), len(client.topology.streams)

    found, streams = where.drive(look, declare=False)
    if json:
        output.say_json({"drift": found.drift, "changes": [asdict(each) for each in found.changes]})
    elif not found.drift:
        output.say(f"nothing to change: {output.count(streams, 'stream')} as declared")
    else:
        _show(found)
        output.say(f"\n{_summary(found)}")
    if found.drift:
        raise typer.Exit(DRIFT)


def apply(
    where: Where,
    *,
    allow_data_loss: Annotated[
        bool, typer.Option("--allow-data-loss", help="Also changes that delete messages.")
    ] = False,
    json: Json = False,
) -> None:
    """Make the server as it is declared. Repeating it changes nothing; messages are never deleted unasked."""
    from ..topology import provision  # noqa: PLC0415

    async def change(client: Client) -> tuple[provision.Plan, int]:
        made = await provision.apply(client.connection, client.topology, allow_data_loss=allow_data_loss)
        return made, len(client.topology.streams)

    made, streams = where.drive(change, declare=False)
    if json:
        output.say_json({"changes": [asdict(each) for each in made.changes]})
    elif not made.drift:
        output.say(f"nothing to change: {output.count(streams, 'stream')} as declared")
    else:
        _show(made)
        output.say(f"\n{output.count(len(made.changes), 'change')} made")


def _show(found: provision.Plan) -> None:
    edge = output.width()
    for line in found.lines():
        parts = textwrap.wrap(line, edge, subsequent_indent="    ", break_on_hyphens=False) if edge else [line]
        for part in parts:
            output.say(output.styled(output.clean(part), _COLOURS.get(line[:1], "")))


def _summary(found: provision.Plan) -> str:
    text = output.count(len(found.changes), "change")
    if found.refusals:
        return f"{text}; {len(found.refusals)} cannot be made in place, and apply would refuse them all"
    if found.losses:
        return f"{text}; {len(found.losses)} would delete messages: `aiqueue apply --allow-data-loss`, if that is meant"
    return f"{text}: `aiqueue apply` makes {'it' if len(found.changes) == 1 else 'them'}"
