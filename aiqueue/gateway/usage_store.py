"""Reads and writes the stream of usage: JSON by subject, each write with the sequence that it replaces."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import headers, subjects
from ..errors import ConfigMismatch, NotFound
from ..topology import Topology

if TYPE_CHECKING:
    from ..connection import Connection, Stored  # it imports nats, which imports aiohttp where that is installed

log = logging.getLogger(__name__)

VERSION = 1
STORE_S = 10.0


class NoUsageStream(NotFound):
    """The stream of usage is missing, or does not take a subject. It was declared by another version of aiqueue, or is
    yet to be: nothing was stored, and later it can be.
    """


class StoredUsage(NamedTuple):
    """A stored record or document. `seq`: its sequence."""

    subject: str
    seq: int
    content: dict[str, Any]


class UsageStore:
    """The stream of usage on one server. The only module of the gateway that knows the connection."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self.stream = topology.usage_stream.name
        self.kept_s = float(topology.usage_stream.config.get("max_age", 0)) / 1e9  # 0: for ever

    async def now(self) -> float:
        """Return the server's time, in seconds since the epoch."""
        await self._connection.clock.ensure(self.stream)
        return self._connection.clock.now()

    async def put(self, subject: str, content: dict[str, Any], *, expected: int) -> int:
        """Store `content` if the subject's last sequence is `expected` (0: nothing is stored), and return the new one.

        Raises Conflict, QueueFull, TooLarge, NotFound, AccessDenied, and Unavailable: whether it was stored is unknown
        if `maybe_stored` says so.
        """
        told = {headers.MSG_ID: subjects.new_id(), headers.EXPECTED: str(expected)}
        body = json.dumps({"v": VERSION, **content}, separators=(",", ":"), ensure_ascii=False).encode()
        try:
            return (await self._connection.store(subject, body, told, timeout_s=STORE_S)).seq
        except NotFound:  # perhaps an older version has declared the stream
            problem = f"there is no stream {self.stream}, or it does not take {subject}"
            raise NoUsageStream(f"{problem}: run `aiqueue apply` of the newest version that is in use") from None

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Meanwhile, all that is stored in one turn of the event loop goes to the server in one write. Else the first
        is written at once, and the server is busy with it before the others are sent.
        """
        window = self._connection.window
        window.patient += 1
        try:
            yield
        finally:
            window.patient -= 1

    async def get(self, subject: str) -> StoredUsage | None:
        """Return what is stored on a subject now. Raises NotFound, Unavailable, AccessDenied, ConfigMismatch."""
        with self._explaining():
            stored = await self._connection.last(self.stream, subject)
        return None if stored is None else self._parse(stored)

    async def read(self, pattern: str, *, seq: int = 1, since: float | None = None) -> AsyncIterator[StoredUsage]:
        """Yield what is stored on these subjects, in order from a sequence, or from what was stored at a time or later.

        What cannot be read is logged, and left out. Raises NotFound, Unavailable, AccessDenied.
        """
        async for stored in self._connection.read(self.stream, pattern, seq=seq, since=since):
            try:
                yield self._parse(stored)
            except ConfigMismatch as error:
                log.warning("%s", error)

    def _parse(self, stored: Stored) -> StoredUsage:
        content: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(stored.data)
        if not isinstance(content, dict) or content.pop("v", None) != VERSION:
            problem = f"what is stored on {stored.subject} in {self.stream} is nothing that this aiqueue can read"
            cure = f"update aiqueue, or delete it with `nats stream rmm {self.stream} {stored.seq}`"
            raise ConfigMismatch(f"{problem}: {cure}")
        return StoredUsage(stored.subject, stored.seq, content)

    @contextlib.contextmanager
    def _explaining(self) -> Iterator[None]:
        try:
            yield
        except NotFound:
            raise NoUsageStream(f"there is no stream {self.stream}: run `aiqueue apply` first") from None
