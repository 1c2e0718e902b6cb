"""``doctor``: what the connected server does about durability and limits, and what is about to go wrong."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import FAILED, Json, Where, verb

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "doctor")(doctor)


def doctor(
    where: Where,
    *,
    monitor: Annotated[
        str | None, typer.Option(metavar="URL", help="The server's monitoring, such as http://127.0.0.1:8222.")
    ] = None,
    json: Json = False,
) -> None:
    """Examine the server: version, room, durability, streams, lanes, clock. Changes nothing.

    Exit code 1 if anything fails; what is only worth knowing warns.
    """
    from ..inspect import Subject, examine  # noqa: PLC0415
    from ..server import find_directory  # noqa: PLC0415

    async def look(client: Client) -> list[Finding]:
        directory = (client.settings.directory or find_directory()) if client.embedded else None
        subject = Subject(client.connection, client.topology, directory, monitor)
        return [finding async for finding in examine(subject)]

    found = where.drive(look)
    if json:
        output.say_json([asdict(each) for each in found])
    else:
        for each in found:
            output.say(f"{output.styled(f'{each.level:<4}', _COLOURS[each.level])}  {output.clean(_line(each))}")
    if any(each.level == "fail" for each in found):
        raise typer.Exit(FAILED)


def _line(finding: Finding) -> str:
    return f"{finding.check}: {finding.says}" + (f" -> {finding.do}" if finding.do else "")
