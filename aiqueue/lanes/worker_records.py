"""The records of running workers: who they are, what they can run, and what they run now.

Each worker has one key in the presence bucket, ``worker.{name}``, which expires after TTL_S unless it is written again.
docs/decisions/explain.md says who writes the record of a worker whose event loop is blocked.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic_core import from_json

from .. import headers, subjects
from ..connection import Connection, Stored
from ..errors import AIQueueError
from ..job import ANY_KIND
from ..topology import Topology

PREFIX = "worker"
EVERY_S = 5.0  # between two writes of a record
TTL_S = 20.0
WRITE_S = REMOVE_S = 2.0
READ_AT_ONCE = 1000
_NOT_IN_KEYS = re.compile(r"[^A-Za-z0-9_-]")
_KEY_MAX = 128

# plain data, as `Session.vitals`; `kinds` has lists of kinds by family, "*" for every kind: none if the worker drains
Record = Mapping[str, Any]


class WorkerRecords:
    """Reads all records, and writes the record of one worker."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._stream = topology.presence_stream.name
        self.written_seq = 0
        self._writing = False  # a write has no PubAck yet

    async def read(self) -> list[Record]:
        """Return the records of all workers that are alive, or that died less than TTL_S ago.

        Raises Unavailable, NotFound, AccessDenied.
        """
        found: list[Record] = []
        for stored in await self.read_stored():
            try:
                record = from_json(stored.data)
            except ValueError:
                continue  # another program's
            if isinstance(record, dict):
                found.append(record)
        return found

    async def read_stored(self) -> list[Stored]:
        """As `read`, as they are stored. A record that is written again meanwhile is there once, as it is then."""
        found: dict[str, Stored] = {}
        everything = subjects.bucket(self._stream, PREFIX, "*")
        async for stored in self._connection.read(self._stream, everything, batch=READ_AT_ONCE):
            found[stored.subject] = stored
        return [each for each in found.values() if headers.KV_OPERATION not in each.headers]  # others are removed

    async def write(self, name: str, record: Record) -> None:
        """Write a worker's record. Raises Unavailable, NotFound, QueueFull, AccessDenied."""
        fields = {headers.MSG_ID: subjects.new_id(), headers.TTL: f"{TTL_S:g}s"}
        body = json.dumps(record).encode()
        self._writing = True
        ack = await self._connection.store(self._subject(name), body, fields, timeout_s=WRITE_S)
        self.written_seq, self._writing = ack.seq, False

    async def remove(self, name: str) -> None:
        """Remove the record, unless another worker of this name has written it since. It expires if this fails."""
        if not (self.written_seq or self._writing) or not self._connection.connected:
            return
        request: dict[str, Any] = {"filter": self._subject(name)}
        if not self._writing:
            request["seq"] = self.written_seq + 1
        with contextlib.suppress(AIQueueError):
            await self._connection.api(f"STREAM.PURGE.{self._stream}", request, timeout=REMOVE_S)

    def _subject(self, name: str) -> str:
        return subjects.bucket(self._stream, PREFIX, _NOT_IN_KEYS.sub("_", name)[:_KEY_MAX])


def without_key_lanes(records: Iterable[Record]) -> dict[str, list[str]]:
    """Return the names of the workers that serve no lanes of limited keys, by family: those of a former version."""
    found: dict[str, list[str]] = {}
    for record in records:
        kinds = record.get("kinds")
        if record.get("key_lanes") is not True and isinstance(kinds, dict):
            for family in kinds:
                found.setdefault(family, []).append(str(record.get("worker")))
    return found


def has_line(records: Iterable[Record], family: str, tenant: str) -> bool:
    """Return whether lanes of a family stand in line at a worker that serves a tenant, as its record says."""
    for record in records:
        in_line, tenants = record.get("in_line"), record.get("tenants")
        is_served = tenants is None or (isinstance(tenants, list) and tenant in tenants)
        if is_served and isinstance(in_line, dict) and in_line.get(family):
            return True
    return False


def serves(record: Record, family: str, kind: str, tenant: str) -> bool:
    """Return whether a worker can run a job, as its record says: it lists the job's kind, or ANY_KIND."""
    kinds, tenants = record.get("kinds"), record.get("tenants")
    if not isinstance(kinds, dict) or not isinstance(names := kinds.get(family), list):
        return False
    if kind not in names and ANY_KIND not in names:
        return False
    return tenants is None or (isinstance(tenants, list) and tenant in tenants)
