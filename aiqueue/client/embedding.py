"""The use of the directory's embedded server by a client."""

from __future__ import annotations

import asyncio
import logging

from ..config import Settings
from ..connection import Connection
from ..errors import ConfigMismatch, DataLossRefused, EmbeddedError, SettingsError
from ..server import EmbeddedServer, find_container, find_directory
from ..topology import Topology, provision

log = logging.getLogger(__name__)

SET = "set NATS_URL, or url in aiqueue.toml"


def settings_of(server: EmbeddedServer, settings: Settings) -> Settings:
    """Return the settings with the address and the credentials of an embedded server."""
    values = {"url": server.url, "user": server.user, "password": Settings.secret(server.password)}
    if all(getattr(settings, name) == value for name, value in values.items()):
        return settings
    return settings.model_copy(update=values)


async def acquire(settings: Settings, *, start: bool) -> EmbeddedServer:
    """Use the directory's server; with `start`, start it if none runs. If this is cancelled, the thread lets go of it.

    Raises EmbeddedError, and SettingsError where no server may be started behind the user's back.
    """
    acquired: list[EmbeddedServer] = []
    cancelled = False

    def acquire_in_thread() -> EmbeddedServer:
        acquired.append(acquire_here(settings, start=start))
        if cancelled:
            acquired[0].release()
        return acquired[0]

    try:
        return await asyncio.to_thread(acquire_in_thread)
    except asyncio.CancelledError:
        cancelled = True
        for server in acquired:
            server.release()
        raise


def acquire_here(settings: Settings, *, start: bool) -> EmbeddedServer:
    """As `acquire`, and blocks."""
    if settings.embedded == "never":
        raise SettingsError(f'no server address is set, and embedded is "never" ({settings.source("embedded")}): {SET}')
    directory = settings.directory or find_directory()
    container = None if settings.directory else find_container(directory)
    try:
        return EmbeddedServer.acquire(directory, start=start and container is None)
    except EmbeddedError:
        if container is None:
            raise
        raise SettingsError(
            f"no server address is set, and in a container ({container}) no embedded server is started: {SET}; to "
            "start one in a directory that outlives the container, set AIQUEUE_DIRECTORY"
        ) from None


async def declare_streams(connection: Connection, topology: Topology) -> None:
    """Create or update the streams of the embedded server, as far as that is safe."""
    try:
        await provision.apply(connection, topology)
    except (ConfigMismatch, DataLossRefused) as error:
        log.warning("the streams of the embedded server are not updated, see `aiqueue plan`: %s", error)
        await provision.create_missing(connection, topology)
