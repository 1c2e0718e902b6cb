"""``respond``: answer requests until told to stop."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import BadInput
from . import output
from .options import Where, duration, names, verb


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "respond")(respond)


def respond(
    where: Where,
    *,
    families: Annotated[
        list[str] | None, typer.Option(help="Only these families' requests; commas or repeated.")
    ] = None,
    tenants: Annotated[list[str] | None, typer.Option(help="Only these tenants' requests; commas or repeated.")] = None,
    concurrency: Annotated[
        int, typer.Option(help="How many requests may wait for their answers.", min=1, max=100_000)
    ] = 1_000,
    drain_timeout: Annotated[
        float | None,
        typer.Option(
            parser=duration, metavar="DURATION", help="What waiting requests get when told to stop. Default: 5s."
        ),
    ] = None,
) -> None:
    """Answer requests (ai.gateway.responses.{tenant}, ai.rag.results.{tenant}) until Ctrl-C or SIGTERM.

    A request names a job by its id, or is a whole message that is enqueued once; it is answered when the job has ended.
    Run workers beside it, and as many responders as you like: they share the requests.
    """
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from ..responder import Responder  # noqa: PLC0415

    if families is not None and names(families) is None:
        raise BadInput("--families names no family")
    if tenants is not None and names(tenants) is None:
        raise BadInput("--tenants names no tenant")
    responder = Responder(families=names(families), tenants=names(tenants), concurrency=concurrency)
    if drain_timeout is not None:
        responder.drain_timeout_s = drain_timeout

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with where.client() as client, responder.running(client) as service:
            whose = ", ".join(responder.tenants) if responder.tenants else "all tenants"
            on = ", ".join(f"{each.journal}" for each in responder.answered(client))
            output.say(f"responder: {on} of {whose}, at {client.connection.server}")
            await stop.wait()
            if service.running:
                left = output.count(service.running, "request")
                output.say(f"responder: {left} under way, up to {responder.drain_timeout_s:g} s more", err=True)
        output.say("responder: stopped")

    asyncio.run(serve())
