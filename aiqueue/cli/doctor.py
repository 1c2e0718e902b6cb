"""``doctor``: check the server's durability, limits, streams and lanes."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import FAILED, Json, ServerOptions, add_command

if TYPE_CHECKING:
    from ..client import Client
    from ..inspect import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(app, "doctor")(doctor)


def doctor(
    options: ServerOptions,
    *,
    monitor: Annotated[
        str | None,
        typer.Option(metavar="URL", help="The server's monitoring endpoint, such as http://127.0.0.1:8222."),
    ] = None,
    json: Json = False,
) -> None:
    """Check the server: version, storage, durability, streams, lanes, limits and clock.

    Reads only, changes nothing.

    Exit codes: 0 ok or warnings only, 1 a finding of the level `fail`.
    """
    from ..inspect import Subject, examine  # noqa: PLC0415
    from ..server import find_directory  # noqa: PLC0415

    async def run_checks(client: Client) -> list[Finding]:
        directory = (client.settings.directory or find_directory()) if client.embedded else None
        subject = Subject(client.connection, client.topology, directory, monitor, client.limit_rules)
        return [finding async for finding in examine(subject)]

    found = options.run_with_client(run_checks, reads=True)
    if json:
        output.print_json([asdict(each) for each in found])
    else:
        for each in found:
            level = output.apply_style(f"{each.level:<4}", _COLOURS[each.level])
            output.print_line(f"{level}  {output.escape_controls(_format_finding(each))}")
    if any(each.level == "fail" for each in found):
        raise typer.Exit(FAILED)


def _format_finding(finding: Finding) -> str:
    return f"{finding.check}: {finding.text}" + (f" -> {finding.remedy}" if finding.remedy else "")
