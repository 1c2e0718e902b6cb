"""``server``: run the directory's embedded server in the foreground."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import BadInput
from . import output
from .options import ServerOptions, add_command

if TYPE_CHECKING:
    from ..server import EmbeddedServer

CHECK_EVERY_S = 5.0


def register(app: typer.Typer) -> None:
    """Register the command."""
    add_command(app, "server", only=("profile", "streams", "directory"))(server)


def server(
    options: ServerOptions,
    *,
    port: Annotated[
        int | None,
        typer.Option(metavar="PORT", help="Port to listen on. Default: random at first, then kept.", min=1, max=65_535),
    ] = None,
    print_url: Annotated[
        bool,
        typer.Option(
            "--print-url", metavar="", help="Print the URL, with its password, of the server that runs, and exit."
        ),
    ] = False,
) -> None:
    """Run the embedded NATS server of this directory until Ctrl-C or SIGTERM.

    Commands that store or run jobs start the embedded server automatically. It stops when the last of these commands
    ends. This command keeps it running.
    """
    import asyncio  # noqa: PLC0415

    if print_url:
        if port is not None:
            raise BadInput("--port is for a server that is started, and --print-url starts none: give one of them")
        _print_url(options)
        return
    asyncio.run(_serve(options, port))


def _print_url(options: ServerOptions) -> None:
    from ..server import EmbeddedServer  # noqa: PLC0415

    with EmbeddedServer.acquire(options.settings(embedded=True).directory, start=False) as held:
        output.print_line(f"nats://{held.user}:{held.password}@{held.url.removeprefix('nats://')}")


async def _serve(options: ServerOptions, port: int | None) -> None:
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from ..errors import EmbeddedError  # noqa: PLC0415
    from ..server import EmbeddedServer  # noqa: PLC0415

    client = options.client(embedded=True)
    held = await asyncio.to_thread(EmbeddedServer.acquire, client.settings.directory, port=port)
    try:
        await client.open()  # declares the streams; the server stays up, because `held` holds it
        version = client.connection.server_version
        await client.close()
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        with contextlib.suppress(output.OutputFailed):  # the server runs without a reader too
            _print_address(held, version)
        url = held.url
        while not stop.is_set():
            try:
                async with asyncio.timeout(CHECK_EVERY_S):
                    await stop.wait()
            except TimeoutError:
                try:
                    await asyncio.to_thread(held.ensure)
                except EmbeddedError as error:
                    output.print_line(f"warning: {error}", err=True)
                if held.url != url:
                    url = held.url
                    output.print_notice(f"the server was restarted at {url}")
        output.print_notice("\nstopping; the server ends with the last process that uses it")
    finally:
        held.release()


def _print_address(held: EmbeddedServer, version: str) -> None:
    state = held.directory / "state.json"
    output.print_line(f"nats-server {version} is running at {output.apply_style(held.url, 'bold')}")
    output.print_fields(
        [
            ("user", held.user),
            ("password", f"in {state} (only you can read it)"),
            ("data", str(held.directory)),
            ("log", str(held.logfile)),
        ]
    )
    output.print_line("\naiqueue finds it automatically in this directory and below. From elsewhere:")
    output.print_line(f"  aiqueue --directory {held.directory} inspect")
    output.print_line("From the nats CLI, or with the same URL and credentials from any NATS client:")
    output.print_line(f'  nats -s {held.url} --user {held.user} --password "$(jq -r .password {state})" stream ls')
    output.print_line("\nPress Ctrl-C to stop.")
