"""``respond``: run a responder, which answers requests with the results of their jobs."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import BadInput
from . import output
from .options import ServerOptions, add_command, duration_option, split_names


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(app, "respond")(respond)


def respond(
    options: ServerOptions,
    *,
    families: Annotated[
        list[str] | None, typer.Option(metavar="FAMILY,...", help="Only requests of these families; repeatable.")
    ] = None,
    tenants: Annotated[
        list[str] | None, typer.Option(metavar="TENANT,...", help="Only requests of these tenants; repeatable.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="N", help="Maximum number of requests waiting for results.", min=1, max=100_000)
    ] = 1_000,
    drain_timeout: Annotated[
        float | None,
        duration_option("How long to wait for open requests on shutdown. Default: 5s."),
    ] = None,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM.

    Plain NATS clients send requests to subjects such as ai.rag.results.TENANT. A request
    contains the id of a job, or a message to enqueue. The reply is the result, sent when the job has ended.

    Workers run the jobs. Several responders share the requests.
    """
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from ..worker import Responder  # noqa: PLC0415

    if families is not None and split_names(families) is None:
        raise BadInput("--families is empty: name at least one family or leave the option out")
    if tenants is not None and split_names(tenants) is None:
        raise BadInput("--tenants is empty: name at least one tenant or leave the option out")
    responder = Responder(families=split_names(families), tenants=split_names(tenants), concurrency=concurrency)
    if drain_timeout is not None:
        responder.drain_timeout_s = drain_timeout

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with options.client() as client, responder.running(client) as service:
            whose = ", ".join(responder.tenants) if responder.tenants else "all tenants"
            subjects = ", ".join(f"{each.journal}" for each in responder.answered(client))
            output.print_notice(f"responder: {subjects} of {whose}, at {client.connection.server}")
            await stop.wait()
            if service.running:
                left = output.format_count(service.running, "request")
                output.print_line(f"responder: draining {left}, for up to {responder.drain_timeout_s:g} s", err=True)
        output.print_notice("responder: stopped")

    asyncio.run(serve())
