"""Removes the counters of minutes after some hours. Those of hours stay for as long as their stream keeps them."""

from __future__ import annotations

from typing import Any

from ..connection import Connection
from .metric_subjects import metric_filter, parse_metric

MINUTES_S = 6 * 3600.0  # twice what `aiqueue history` shows: each kind has 900 of them an hour, and 15 of an hour
LATE_S = 3600.0  # at least so many more are removed at once


async def drop_old_minutes(connection: Connection, stream: str) -> bool:
    """Remove the counters of minutes before the last MINUTES_S, if there are enough of them. Returns whether it did.

    Several at once do no harm. Raises Unavailable, NotFound, AccessDenied.
    """
    minutes = metric_filter("minute")
    oldest = await connection.first(stream, minutes)
    key = None if oldest is None else parse_metric(oldest.subject)
    now = connection.clock.now()
    if key is None or key.at >= now - MINUTES_S - LATE_S:
        return False
    request: dict[str, Any] = {"filter": minutes}
    async for stored in connection.read(stream, minutes, since=now - MINUTES_S, batch=1):
        request["seq"] = stored.seq  # those before it go
        break
    await connection.api(f"STREAM.PURGE.{stream}", request)
    return True
