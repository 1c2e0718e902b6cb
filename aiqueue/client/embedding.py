"""The use of the directory's embedded server by a client."""

from __future__ import annotations

import asyncio
from pathlib import Path

from ..config import Settings
from ..server import EmbeddedServer


def settings_of(server: EmbeddedServer, settings: Settings) -> Settings:
    """Return the settings with the address and the credentials of an embedded server."""
    values = {"url": server.url, "user": server.user, "password": Settings.secret(server.password)}
    if all(getattr(settings, name) == value for name, value in values.items()):
        return settings
    return settings.model_copy(update=values)


async def acquire(directory: Path | None) -> EmbeddedServer:
    """Start to use the directory's server. If this is cancelled, the thread releases what it acquires."""
    acquired: list[EmbeddedServer] = []
    cancelled = False

    def acquire_in_thread() -> EmbeddedServer:
        acquired.append(EmbeddedServer.acquire(directory))
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
