"""``metrics``: an exporter for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import FAILED, ServerOptions, add_command, print_error

if TYPE_CHECKING:
    from ..client import Client

PORT = 9464


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(
        app,
        "metrics",
        examples=(
            "  aiqueue metrics                   serve http://127.0.0.1:9464/metrics",
            "  aiqueue metrics --host 0.0.0.0    for a Prometheus on another host",
            "  aiqueue metrics --once            print the metrics, and end",
        ),
    )(metrics)


def metrics(
    options: ServerOptions,
    *,
    host: Annotated[str, typer.Option(metavar="HOST", help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="PORT", help="The port to listen on; 0: any free one.", min=0, max=65535)
    ] = PORT,
    tenants: Annotated[
        bool, typer.Option("--tenants", metavar="", help="Count by tenant, too: more series, and more work to read.")
    ] = False,
    once: Annotated[bool, typer.Option("--once", metavar="", help="Print the metrics once, and end.")] = False,
) -> None:
    """Serve metrics for Prometheus at /metrics until Ctrl-C or SIGTERM: jobs by family, workers, what became of jobs.

    One exporter is enough for all workers. It reads only, and has no access control of its own: keep it inside.
    While a source cannot be read, its metrics are left out. /healthz answers while the exporter runs.

    Exit codes: 0 stopped; --once: 0 all was read, 1 a source was not.
    """
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from ..inspect import MetricsExporter  # noqa: PLC0415

    async def print_once(client: Client) -> bool:
        found = await MetricsExporter(client.connection, client.topology, tenants=tenants).scrape()
        output.write(found.text)
        for source, problem in found.failed.items():
            print_error(f"{source}: {problem}")
        return not found.failed

    async def serve(client: Client) -> bool:
        from .metrics_server import MetricsServer  # noqa: PLC0415

        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        exporter = MetricsExporter(client.connection, client.topology, tenants=tenants)
        server = MetricsServer(exporter)
        try:
            chosen = await server.start(host, port)
            shown = f"[{host}]" if ":" in host else host
            output.print_notice(f"metrics: http://{shown}:{chosen}/metrics, of {client.connection.server}")
            await stop.wait()
        finally:
            await server.stop()
            await exporter.stop()
        output.print_notice("metrics: stopped")
        return True

    if not options.run_with_client(print_once if once else serve, reads=True):
        raise typer.Exit(FAILED)
