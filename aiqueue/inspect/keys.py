"""Which values of a limited key lanes are of. Their subjects have hashes only."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from .. import headers, subjects
from ..connection import Connection, Stored
from ..errors import AccessDenied, NotFound
from ..subjects import Lane
from ..topology import Family, Topology

KEYS_READ_MAX = 1_000  # values of a family's key that are read, one or two requests each
REQUESTS_AT_ONCE = 16


async def read_keys(
    connection: Connection, topology: Topology, family: Family, stored: Mapping[Lane, int]
) -> dict[str, str]:
    """Return the values of the key by their hashes. `stored`: how many jobs each lane has.

    A value is in the header of each job in its lane, and in the stored use of its limit. Left out: REST, whose jobs are
    of several values, a value that nothing names any more or that this user may not read, and those after the first
    KEYS_READ_MAX.
    """
    places: dict[str, Lane] = {}
    for lane, jobs in stored.items():
        if lane.key and lane.key != subjects.REST and (jobs or lane.key not in places):
            places[lane.key] = lane
    gate = asyncio.Semaphore(REQUESTS_AT_ONCE)
    found: dict[str, str] = {}

    async def read_key(lane: Lane) -> None:
        async with gate:
            value = ""
            if stored[lane]:
                value = key_of_message(await connection.last(family.stream, subjects.lane(*lane)))
            value = value or await _read_key_of_use(connection, topology, lane)
        if value and subjects.hashed(value) == lane.key:
            found[lane.key] = value

    await asyncio.gather(*(read_key(each) for each in list(places.values())[:KEYS_READ_MAX]))
    return found


def key_of_message(stored: Stored | None) -> str:
    """Return the value of the key in the header of a job; "" without one."""
    if stored is None:
        return ""
    job_headers = dict(stored.headers)
    headers.restore_case(job_headers)
    return headers.limit_key(job_headers)


async def _read_key_of_use(connection: Connection, topology: Topology, lane: Lane) -> str:
    from ..limits import StoredUse  # noqa: PLC0415  (few need the room of limits)

    stream = topology.limits_stream.name
    with contextlib.suppress(NotFound, AccessDenied):
        read = connection.read(stream, subjects.bucket(stream, "use", lane.family, lane.key, "*"), batch=1)
        async with contextlib.aclosing(read) as found:
            async for stored in found:
                with contextlib.suppress(ValueError):
                    return StoredUse.parse(stored.data).key
    return ""
