"""``top``: options, and whether it is a screen, lines, or one look."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import BadInput
from .. import output
from ..options import WATCH_MIN_S, ServerOptions, add_command, duration_option

if TYPE_CHECKING:
    from ...client import Client


VIEWS = ("families", "jobs", "dead", "workers", "kinds", "pauses")  # the first are lanes where there is a family


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "top",
        examples=(
            "  aiqueue top                            all families, every 2 seconds",
            "  aiqueue top agent.tasks --tenant acme  the lanes of a tenant",
            "  aiqueue top --view dead                dead letters of all families",
            "  aiqueue top --lines                    lines instead of a screen, until Ctrl-C",
        ),
    )(top)


def top(
    options: ServerOptions,
    family: Annotated[str | None, typer.Argument(metavar="FAMILY", help="Begin with the lanes of this family.")] = None,
    *,
    tenant: Annotated[str | None, typer.Option(metavar="TENANT", help="Begin with this tenant of the family.")] = None,
    view: Annotated[
        str | None, typer.Option(metavar="VIEW", help=f"Begin with this view: {', '.join(VIEWS)}. Default: the first.")
    ] = None,
    interval: Annotated[float, duration_option("How often to read.", metavar="TIME")] = "2s",  # type: ignore[assignment]  # typer passes defaults to the parser too
    lines: Annotated[
        bool, typer.Option("--lines", metavar="", help="Print lines at each interval, without moving the cursor.")
    ] = False,
) -> None:
    """Watch families, lanes, jobs and workers in the terminal. Keys look closer, pause, resume, replay: ? lists them.

    On a terminal that cannot move its cursor (TERM=dumb) it prints lines at each interval. Into a pipe or a file it
    prints one look and ends, unless there is --lines.
    """
    from ... import subjects  # noqa: PLC0415
    from ..live import run_view  # noqa: PLC0415
    from .app import TopApp  # noqa: PLC0415
    from .place import Place  # noqa: PLC0415

    if tenant is not None:
        subjects.token("tenant", tenant)
        if family is None:
            raise BadInput("--tenant needs a family, such as `aiqueue top agent.tasks --tenant acme`")
    if interval < WATCH_MIN_S:
        raise BadInput(f"--interval must be at least {WATCH_MIN_S:g}s")
    if view is not None and view not in VIEWS:
        raise BadInput(f"--view {view!r:.40}: name one of {', '.join(VIEWS)}")
    once = not lines and not sys.stdout.isatty()

    async def show(client: Client) -> None:
        if family is not None and client.topology.family(family).role != "work":
            raise BadInput(f"family {family} has inboxes and no lanes: `aiqueue inbox ls` shows them")
        place = Place("lanes", family, tenant or "") if family is not None else Place()
        place = place.tab(VIEWS.index(view) + 1 if view is not None else 1) or place
        app = TopApp(client, place, interval)
        if once:
            await app.read_once()
            output.print_line("\n".join(app.lines()))
            return
        try:
            await run_view(app, plain=lines)
        finally:
            await app.stop()

    options.run_with_client(show, reads=True)
