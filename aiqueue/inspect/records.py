"""The records of workers, for views."""

from __future__ import annotations

from ..connection import Connection
from ..errors import AccessDenied, NotFound
from ..lanes import Record, WorkerRecords
from ..topology import Topology


async def read_records_if_allowed(connection: Connection, topology: Topology) -> list[Record]:
    """Return the records of workers, none where their stream is missing or this user may not read it."""
    try:
        return await WorkerRecords(connection, topology).read()
    except (NotFound, AccessDenied):
        return []
