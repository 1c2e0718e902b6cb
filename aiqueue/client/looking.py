"""Who works: a call of the client."""

from __future__ import annotations

from ..inspect import WorkerStats, read_workers
from .scheduling import ScheduleCalls


class LookCalls(ScheduleCalls):
    """The part of `Client` that looks at workers."""

    async def workers(self, *, family: str | None = None, tenant: str | None = None) -> list[WorkerStats]:
        """Return the workers that are alive, or died less than 20 s ago, sorted by name: those of a family and a
        tenant, or all (None).

        Raises BadInput (UnknownFamily, InvalidToken), NotFound (the stream is missing: run `aiqueue apply`),
        AccessDenied, Unavailable.
        """
        return await read_workers(self.connection, self.topology, family=family, tenant=tenant)
