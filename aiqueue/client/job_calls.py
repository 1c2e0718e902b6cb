"""Jobs by what they have in common: calls of the client that list them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping
from typing import TypedDict, Unpack

from ..config import Redact
from ..connection import Connection
from ..inspect import JobPage, ListedJob, ListedState, list_all, list_page, make_filter
from ..topology import Topology
from ..units import Duration


class FilterOptions(TypedDict, total=False):
    """Which jobs, as `Jobs.page` explains."""

    family: str | None
    tenant: str | None
    kind: str | None
    priority: str | None
    state: ListedState | Collection[ListedState] | None
    older: Duration | None
    newer: Duration | None
    where: Mapping[str, str | int | float | bool | None] | None


class Jobs:
    """The stored jobs of a client's server: those that wait, run, are parked, or have failed.

    A method raises BadInput (InvalidToken, UnknownFamily), AccessDenied, Unavailable.
    """

    def __init__(self, connection: Connection, topology: Topology, redact: Redact | None) -> None:
        self._connection = connection
        self._topology = topology
        self._redact = redact

    async def page(
        self, *, limit: int = 50, cursor: str = "", payloads: bool = True, **which: Unpack[FilterOptions]
    ) -> JobPage:
        """Return the next `limit` jobs (1 to 1,000) after a cursor, the one of the page before.

        - `family`, `tenant`, `kind`, `priority`: None matches all.
        - `state`: one or several of "queued", "in_flight", "parked", "retrying", "waiting", "failed": see `ListedJob`.
        - `older`, `newer` (durations): enqueued at least, or at most, so long ago; of failed jobs, failed.
        - `where`: fields of the message and the values that they must have, such as ``{"doc": 42, "user.id": "anna"}``.
          A job whose body is a document, or cannot be decoded, is counted as unreadable. Secret fields match nothing.
        - `payloads=False` leaves the messages' data out.

        A page looks at 10,000 stored jobs at most. So it may hold fewer than `limit`, and have a cursor all the same.
        """
        wanted = make_filter(self._topology, **which)
        return await list_page(
            self._connection, self._topology, wanted, limit=limit, cursor=cursor, payloads=payloads, redact=self._redact
        )

    def list(self, *, payloads: bool = True, **which: Unpack[FilterOptions]) -> AsyncGenerator[ListedJob, None]:
        """Yield all jobs of a filter, page by page. The arguments are those of `page`."""
        wanted = make_filter(self._topology, **which)
        return list_all(self._connection, self._topology, wanted, payloads=payloads, redact=self._redact)
