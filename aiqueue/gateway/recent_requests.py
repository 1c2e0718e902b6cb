"""Which job a client's request has become, for the minutes in which the client may send that request again by itself.

OpenAI's clients repeat a request after a timeout or a lost connection, without a key to know it by: the repetition is
found by its API key and body, from any process. docs/decisions/gateway-front.md tells why.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from .. import headers, subjects
from ..topology import Topology

if TYPE_CHECKING:
    from ..connection import Connection

STORE_S: Final = 5.0


class RecentRequests:
    """The stream of recent requests on one server."""

    def __init__(self, connection: Connection, topology: Topology) -> None:
        self._connection = connection
        self._stream = topology.recent_stream.name

    async def find(self, tenant: str, key_id: str, fingerprint: str) -> str | None:
        """Return the job of the newest request of this API key and body; None: none in the last 20 minutes.

        Raises Unavailable, NotFound, AccessDenied.
        """
        stored = await self._connection.last(self._stream, self._subject(tenant, key_id, fingerprint))
        job_id = stored.data.decode("ascii", "replace") if stored is not None else ""
        return job_id if subjects.TOKEN.fullmatch(job_id) else None

    async def note(self, tenant: str, key_id: str, fingerprint: str, job_id: str) -> None:
        """Remember a request's job, in place of an earlier one. Raises Unavailable, NotFound, AccessDenied."""
        subject = self._subject(tenant, key_id, fingerprint)
        await self._connection.store(subject, job_id.encode(), {headers.MSG_ID: subjects.new_id()}, timeout_s=STORE_S)

    @staticmethod
    def _subject(tenant: str, key_id: str, fingerprint: str) -> str:
        return subjects.recent(tenant, hashlib.sha256(f"{key_id} {fingerprint}".encode()).hexdigest()[:32])
