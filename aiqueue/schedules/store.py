"""The bucket of schedules: a key ``{tenant}.{id}`` for each. Writes are compared with what was read."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import NamedTuple

from .. import headers, subjects
from ..connection import Connection, Stored
from ..errors import AccessDenied, AIQueueError, Conflict, DecodeError, NotFound, StreamFull
from ..topology import Topology
from .document import ScheduleDocument

log = logging.getLogger(__name__)

ENDED_TTL = "240h"  # how long the marker of a removed schedule stays in a bucket of many keys, else for good
KEYS_MANY = 1_000
STORE_S = 5.0
GROWTH = 1_024  # bytes by which a document may grow as its schedule fires
SPARE_SHARE = 16  # of the bucket, one part of so many is left to schedules that others add at the same moment


class StoredSchedule(NamedTuple):
    """What a key of the bucket holds. `document` None: it was removed, or this version cannot read it."""

    tenant: str
    id: str
    seq: int
    document: ScheduleDocument | None
    problem: str = ""  # why it cannot be read


class ScheduleStore:
    """Reads and writes the stored schedules of one server. Without state of its own."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self.connection = connection
        self.stream = topology.schedules_stream.name

    def key(self, *tokens: str) -> str:
        """Return the subject of a key: of a schedule for tenant and id."""
        return subjects.bucket(self.stream, *tokens)

    async def get(self, tenant: str, schedule_id: str) -> ScheduleDocument | None:
        """Return a schedule as the stream's leader has it; None if there is none.

        Raises DecodeError (damaged, or newer than this version), NotFound (no stream), Unavailable, AccessDenied.
        """
        found = await self.find(tenant, schedule_id)
        if found.problem:
            raise DecodeError(found.problem)
        return found.document

    async def find(self, tenant: str, schedule_id: str) -> StoredSchedule:
        """Return what a key holds; `seq` is 0 if nothing was ever stored there. Raises as `get`, but no DecodeError."""
        stored = await self.last(self.key(tenant, schedule_id))
        return StoredSchedule(tenant, schedule_id, 0, None) if stored is None else parse(stored)

    async def last(self, subject: str) -> Stored | None:
        """Return what is stored on a subject of the bucket, as the stream's leader has it. Raises as `get`."""
        try:
            return await self.connection.last(self.stream, subject)
        except NotFound:
            raise NotFound(f"there is no stream {self.stream}: run `aiqueue apply` first") from None

    async def put(self, document: ScheduleDocument, *, timeout_s: float = STORE_S) -> ScheduleDocument:
        """Store a schedule in place of the message `document.seq` (0: of none), and return it with its new `seq`.

        Raises Conflict: another write came first. Raises NotFound, QueueFull, AccessDenied, Unavailable.
        """
        subject = self.key(document.tenant, document.id)
        seq = await self.write(subject, document.seq, document.encode(), {}, timeout_s)
        return replace(document, seq=seq)

    async def require_room(self, document: ScheduleDocument) -> None:
        """Raises StreamFull for one more schedule than the bucket has room for: a full one also refuses what ticks
        write, so that no schedule would fire any more. A user who may not ask for the bucket's state is not refused.
        """
        with contextlib.suppress(AccessDenied):
            info = await self.connection.api(f"STREAM.INFO.{self.stream}")
            limit, state = info["config"].get("max_bytes", -1), info["state"]
            needed = state["bytes"] + len(document.encode()) + GROWTH * (state["messages"] + 1)
            if 0 < limit < needed + limit // SPARE_SHARE:
                why = f"no room is left for schedule {document.name}: remove others, or raise its max_bytes"
                raise StreamFull("schedules", why, limit=limit)

    async def delete(self, found: StoredSchedule) -> None:
        """Remove a schedule, also one that cannot be read. Raises as `put`."""
        fields = {headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub", **await self._marker_ttl()}
        await self.write(self.key(found.tenant, found.id), found.seq, b"", fields, STORE_S)

    async def _marker_ttl(self) -> dict[str, str]:
        """Return the lifetime of a marker: where it expires, a former version of the schedule may come back after a
        kill -9 of the server. A bucket in which much is written soon loses former versions for good
        (docs/decisions/deleted-keys.md).
        """
        with contextlib.suppress(AIQueueError):
            info = await self.connection.api(f"STREAM.INFO.{self.stream}")
            if info["state"]["messages"] > KEYS_MANY:
                return {headers.TTL: ENDED_TTL}
        return {}

    async def write(self, subject: str, expected: int, body: bytes, fields: dict[str, str], timeout_s: float) -> int:
        """Store a key in place of the message `expected`, and return the new sequence. Raises as `put`."""
        fields = {headers.MSG_ID: subjects.new_id(), headers.EXPECTED: str(expected), **fields}
        try:
            return (await self.connection.store(subject, body, fields, timeout_s=timeout_s)).seq
        except Conflict:
            stored = await self.last(subject)
            if stored is None or stored.headers.get(headers.MSG_ID) != fields[headers.MSG_ID]:
                raise
            return stored.seq  # an earlier try, whose PubAck was lost

    async def read(self, tenant: str = "*", *, seq: int = 1) -> AsyncIterator[StoredSchedule]:
        """Yield what the keys of a tenant (``*``: of all) hold, in the order of writes, from the message `seq` on.

        One server of a cluster may be behind. Raises NotFound, Unavailable, AccessDenied.
        """
        async for stored in self.connection.read(self.stream, self.key(tenant, "*"), seq=seq, ahead=True):
            yield parse(stored)


def parse(stored: Stored) -> StoredSchedule:
    """Return what a key holds."""
    *_, tenant, schedule_id = stored.subject.split(".")
    if headers.KV_OPERATION in stored.headers:
        return StoredSchedule(tenant, schedule_id, stored.seq, None)
    try:
        document = ScheduleDocument.decode(tenant, schedule_id, stored.data, stored.seq)
    except DecodeError as error:
        return StoredSchedule(tenant, schedule_id, stored.seq, None, str(error))
    return StoredSchedule(tenant, schedule_id, stored.seq, document)
