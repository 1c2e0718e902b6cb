"""Mends counters that nats-server has broken: the rest of a flush that a kill of the server had cut in two.

A server that is killed while it stores an atomic batch stores the rest of the batch when it starts again, but as the
batch was sent: without the sums (nats-server 2.15.1, a stream with one replica). Such a message has an increment and
no value, is the newest of its subject, and the server refuses each further increment of it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

from .. import headers
from ..connection import Connection, Stored, read_last

BROKEN = 10172  # err_code: the newest message of a counter has no value


async def mend_counters(
    connection: Connection, stream: str, subjects: Sequence[str]
) -> AsyncGenerator[tuple[str, int], None]:
    """Remove what breaks any of these counters, and yield each increment that goes with it: the caller adds it.

    A counter then has the value that it had before, which the stream keeps (`max_msgs_per_subject = 2`). Where several
    workers mend at once, one of them gets an increment. Raises Unavailable, AccessDenied.
    """
    for stored in await read_last(connection, stream, subjects):
        if _is_broken(stored) and await connection.delete(stream, stored.seq):
            yield stored.subject, int(stored.headers[headers.INCREMENT])


def _is_broken(stored: Stored) -> bool:
    return not stored.data and headers.INCREMENT in stored.headers
