"""The bucket of files and batches: a key ``{tenant}.file.{id}`` or ``{tenant}.batch.{id}`` for each, in JSON."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from ... import headers, subjects
from ...errors import ConfigMismatch, Conflict, NotFound
from ...topology import Topology
from ..bucket_room import check_room

if TYPE_CHECKING:
    from ...connection import Connection, Stored  # it imports nats, which imports aiohttp where that is installed

log = logging.getLogger(__name__)

VERSION: Final = 1
STORE_S: Final = 10.0
# How long the marker of a deleted key stays: longer than the key would have, which otherwise comes back after a kill -9
# of the server (docs/decisions/deleted-keys.md).
MARKER_S: Final = 600
ENDED_TTL: Final = "800h"  # of a key without a lifetime
What = Literal["file", "batch"]


class KeptDocument(NamedTuple):
    """What a key of the bucket holds. `at`: when it was written, in seconds since the epoch."""

    tenant: str
    id: str
    seq: int
    at: float
    content: dict[str, Any]


class BatchStore:
    """Reads and writes the bucket on one server. With `usage_store`, all of the gateway that knows the connection."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.stream = topology.batches_stream.name

    async def now(self) -> float:
        """Return the server's time, in seconds since the epoch."""
        await self._connection.clock.ensure(self.stream)
        return self._connection.clock.now()

    async def get(self, what: What, tenant: str, key: str) -> KeptDocument | None:
        """Return what a key holds now; None: nothing. Raises NotFound (no stream), Unavailable, AccessDenied, and
        ConfigMismatch for what this version cannot read.
        """
        stored = await self._last(self._subject(what, tenant, key))
        return None if stored is None else self._parse(stored)

    async def put(
        self, what: What, tenant: str, key: str, content: dict[str, Any], *, expected: int, keep_s: float | None = None
    ) -> int:
        """Store a document in place of the message `expected` (0: of none), and return its sequence.

        `keep_s`: how long it is kept; None: until it is deleted. Raises Conflict: another write came first. Raises
        NotFound, QueueFull, TooLarge, AccessDenied, Unavailable.
        """
        fields = {} if keep_s is None else {headers.TTL: f"{max(1, round(keep_s))}s"}
        body = json.dumps({"v": VERSION, **content}, separators=(",", ":"), ensure_ascii=False).encode()
        return await self._write(self._subject(what, tenant, key), body, expected, fields)

    async def add(
        self, what: What, tenant: str, key: str, content: dict[str, Any], *, keep_s: float | None = None
    ) -> int:
        """Store a new document of a caller. As `put`, and QueueFull where the bucket has room for updates only, without
        which no batch could end.
        """
        try:
            await check_room(self._connection, self.stream, "files and batches", "batches that run")
        except NotFound:
            raise NotFound(f"there is no stream {self.stream}: run `aiqueue apply` first") from None
        return await self.put(what, tenant, key, content, expected=0, keep_s=keep_s)

    async def delete(self, what: What, tenant: str, key: str, *, expected: int) -> None:
        """Delete a document whose sequence is `expected`. Raises as `put`."""
        subject, ttl = self._subject(what, tenant, key), ENDED_TTL
        stored = await self._last(subject)
        if stored is not None and stored.expires_at is not None:
            ttl = f"{max(0, math.ceil(stored.expires_at - await self.now())) + MARKER_S}s"
        fields = {headers.KV_OPERATION: "PURGE", headers.ROLLUP: "sub", headers.TTL: ttl}
        await self._write(subject, b"", expected, fields)

    async def read(self, what: What, tenant: str | None) -> AsyncIterator[KeptDocument]:
        """Yield what is kept for a tenant, or for all (None), in the order of writes. What cannot be read is logged,
        and left out.

        One server of a cluster may be behind. Raises NotFound, Unavailable, AccessDenied.
        """
        whose = "*" if tenant is None else subjects.token("tenant", tenant)
        pattern = subjects.bucket(self.stream, whose, what, "*")
        async for stored in self._connection.read(self.stream, pattern):
            try:
                found = self._parse(stored)
            except ConfigMismatch as error:
                log.warning("%s", error)
                continue
            if found is not None:
                yield found

    def _subject(self, what: What, tenant: str, key: str) -> str:
        return subjects.bucket(self.stream, subjects.token("tenant", tenant), what, subjects.token("id", key))

    async def _last(self, subject: str) -> Stored | None:
        try:
            return await self._connection.last(self.stream, subject)
        except NotFound:
            raise NotFound(f"there is no stream {self.stream}: run `aiqueue apply` first") from None

    async def _write(self, subject: str, body: bytes, expected: int, fields: dict[str, str]) -> int:
        fields = {headers.MSG_ID: subjects.new_id(), headers.EXPECTED: str(expected), **fields}
        try:
            return (await self._connection.store(subject, body, fields, timeout_s=STORE_S)).seq
        except NotFound:
            raise NotFound(f"there is no stream {self.stream}: run `aiqueue apply` first") from None
        except Conflict:
            stored = await self._last(subject)
            if stored is None or stored.headers.get(headers.MSG_ID) != fields[headers.MSG_ID]:
                raise
            return stored.seq  # an earlier try, whose PubAck was lost

    def _parse(self, stored: Stored) -> KeptDocument | None:
        if headers.KV_OPERATION in stored.headers:
            return None
        *_, tenant, _what, key = stored.subject.split(".")
        content: Any = None
        try:
            content = json.loads(stored.data)
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict) or content.pop("v", None) != VERSION:
            problem = f"what is stored on {stored.subject} in {self.stream} is nothing that this aiqueue can read"
            cure = f"update aiqueue, or delete it with `nats stream rmm {self.stream} {stored.seq}`"
            raise ConfigMismatch(f"{problem}: {cure}")
        return KeptDocument(tenant, key, stored.seq, stored.time, content)
