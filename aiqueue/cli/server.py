"""``server``: the directory's embedded server, in the foreground."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from . import output
from .options import Where, verb

if TYPE_CHECKING:
    from ..server import EmbeddedServer

LOOK_EVERY_S = 5.0


def register(app: typer.Typer) -> None:
    """Add this verb."""
    verb(app, "server", only=("profile", "streams", "directory"))(server)


def server(
    where: Where,
    *,
    port: Annotated[
        int | None,
        typer.Option(help="The port to listen on. Default: a random one, kept afterwards.", min=1, max=65_535),
    ] = None,
) -> None:
    """Run this directory's own server until Ctrl-C. Other verbs start it by themselves; this keeps it up."""
    import asyncio  # noqa: PLC0415

    asyncio.run(_serve(where, port))


async def _serve(where: Where, port: int | None) -> None:
    import asyncio  # noqa: PLC0415
    import signal  # noqa: PLC0415

    from ..errors import EmbeddedError  # noqa: PLC0415
    from ..server import EmbeddedServer  # noqa: PLC0415

    client = where.client(embedded=True)
    held = await asyncio.to_thread(EmbeddedServer.acquire, client.settings.directory, port=port)
    try:
        await client.open()  # declares the streams, and shares the hold
        version = client.connection.server_version
        await client.close()
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        _announce(held, version)
        url = held.url
        while not stop.is_set():
            try:
                async with asyncio.timeout(LOOK_EVERY_S):
                    await stop.wait()
            except TimeoutError:
                try:
                    await asyncio.to_thread(held.ensure)
                except EmbeddedError as error:
                    output.say(f"warning: {error}", err=True)
                if held.url != url:
                    url = held.url
                    output.say(f"it came back at {url}")
        output.say("\nstopping: the server ends when nobody uses it any more")
    finally:
        held.release()


def _announce(held: EmbeddedServer, version: str) -> None:
    state = held.directory / "state.json"
    output.say(f"nats-server {version} runs at {output.styled(held.url, 'bold')}")
    output.fields(
        [
            ("user", held.user),
            ("password", f"in {state} (only you can read it)"),
            ("data", str(held.directory)),
            ("log", str(held.logfile)),
        ]
    )
    output.say("\nIn this directory and below aiqueue finds it by itself. From elsewhere:")
    output.say(f"  aiqueue --directory {held.directory} inspect")
    output.say("With the nats command line tool, or any NATS client:")
    output.say(f'  nats -s {held.url} --user {held.user} --password "$(jq -r .password {state})" stream ls')
    output.say("\nCtrl-C stops it.")
