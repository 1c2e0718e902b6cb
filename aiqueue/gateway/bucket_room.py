"""Keeps a part of a bucket free for updates: a full stream with `discard = "new"` refuses these, too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from ..errors import QueueFull

if TYPE_CHECKING:
    from ..connection import Connection

USED_PART_MAX: Final = 0.9  # of a bucket, for what is new


async def check_room(connection: Connection, stream: str, what: str, updates: str) -> None:
    """Raise QueueFull if there is room for `updates` only, in a bucket of `what`. Raises NotFound, Unavailable,
    AccessDenied.
    """
    info = await connection.api(f"STREAM.INFO.{stream}")
    most, used = info["config"]["max_bytes"], info["state"]["bytes"]
    if 0 < most * USED_PART_MAX < used:
        reason = f"{used:,} bytes are used, and its last tenth is for {updates}"
        raise QueueFull(f"the bucket of {what}, {stream}", reason, limit=most)
