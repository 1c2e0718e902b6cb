"""Who works, and why a job waits: calls of the client."""

from __future__ import annotations

from ..inspect import Explanation, WorkerStats, read_workers
from .scheduling import ScheduleCalls


class LookCalls(ScheduleCalls):
    """The part of `Client` that looks at workers and jobs."""

    async def workers(self, *, family: str | None = None, tenant: str | None = None) -> list[WorkerStats]:
        """Return the workers that are alive, or died less than 20 s ago, sorted by name: those of a family and a
        tenant, or all (None).

        Raises BadInput (UnknownFamily, InvalidToken), NotFound (the stream is missing: run `aiqueue apply`),
        AccessDenied, Unavailable.
        """
        return await read_workers(self.connection, self.topology, family=family, tenant=tenant)

    async def explain(self, job_id: str, *, family: str | None = None, tenant: str | None = None) -> Explanation:
        """Return why a job waits, or what else it does: one reason, its evidence, and what to do.

        `job_id`: the job's id, or its `unique`. `family` and `tenant` narrow the search; a `unique` needs both beyond
        the journals, the dead letters and the first 10,000 stored jobs. What this user may not read is in `unknown`.

        Raises NotFound if nothing is known of the job, BadInput if several tenants or families have this id,
        AccessDenied, Unavailable.
        """
        from ..inspect import explain  # noqa: PLC0415  (only who asks needs what decides)

        return await explain(
            self.connection, self.topology, job_id, family=family, tenant=tenant, rules=self.limit_rules
        )
