"""Jobs by what they have in common: calls of the client that list them, and act on all that a filter selects."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from typing import TypedDict, Unpack

from ..codec import secret_paths
from ..config import Redact
from ..connection import Connection
from ..enqueue import DeadLetters
from ..inspect import (
    JobPage,
    ListedJob,
    ListedState,
    OutcomePage,
    OutcomeState,
    list_all,
    list_outcomes,
    list_page,
    make_filter,
    make_outcome_filter,
)
from ..topology import Topology
from ..units import Duration
from .act_many import ActMany, ActOutcome
from .auditing import Audit, AuditedAct, check_by
from .cancel import Canceller
from .job_plans import ACTS_ON, Act, JobPlan, OnSearched, make_plan


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
    error: str | None


class OutcomeOptions(TypedDict, total=False):
    """Which outcomes, as `Jobs.outcomes` explains."""

    family: str | None
    tenant: str | None
    kind: str | None
    state: OutcomeState | Collection[OutcomeState] | None
    newer: Duration | None
    slower: Duration | None


class Jobs:
    """The stored jobs of a client's server: those that wait, run, are parked, or have failed.

    A method raises BadInput (InvalidToken, UnknownFamily), AccessDenied, Unavailable.
    """

    def __init__(
        self,
        connection: Connection,
        topology: Topology,
        *,
        canceller: Canceller,
        dead: DeadLetters,
        audit: Audit,
        redact: Callable[[], Redact | None],
    ) -> None:
        self._connection = connection
        self._topology = topology
        self._canceller = canceller
        self._dead = dead
        self._audit = audit
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
        - `error`: failed jobs with this text in their reason or error, such as "ValueError"; case does not count.
        - `payloads=False` leaves the messages' data out.

        A page looks at 10,000 stored jobs at most. So it may hold fewer than `limit`, and have a cursor all the same.
        """
        wanted = make_filter(self._topology, **which)
        return await list_page(
            self._connection,
            self._topology,
            wanted,
            limit=limit,
            cursor=cursor,
            payloads=payloads,
            redact=self._redact(),
        )

    def list(self, *, payloads: bool = True, **which: Unpack[FilterOptions]) -> AsyncGenerator[ListedJob, None]:
        """Yield all jobs of a filter, page by page. The arguments are those of `page`."""
        wanted = make_filter(self._topology, **which)
        return list_all(self._connection, self._topology, wanted, payloads=payloads, redact=self._redact())

    async def outcomes(
        self, *, limit: int = 50, cursor: str = "", results: bool = True, **which: Unpack[OutcomeOptions]
    ) -> OutcomePage:
        """Return the next `limit` outcomes (1 to 1,000) of jobs that have ended, the newest first, after a cursor, the
        one of the page before. They are kept as long as the family keeps journals, for a day by default.

        - `family`, `tenant`, `kind`: None matches all.
        - `state`: one or several of "done", "failed", "cancelled".
        - `newer` (a duration): ended at most so long ago. `slower`: the last attempt has run for at least so long.
        - `results=False` leaves the results out.

        Jobs whose handlers keep no result (``result=False``) are in the list if they have failed. A page looks at
        10,000 journal entries at most, as `page` does. Raises also NotFound: the stream is missing.
        """
        wanted = make_outcome_filter(self._topology, **which)
        return await list_outcomes(
            self._connection, self._topology, wanted, limit=limit, cursor=cursor, results=results
        )

    async def plan(
        self,
        act: Act,
        *,
        to: str = "",
        until: str = "",
        on_searched: OnSearched = lambda _: None,
        **which: Unpack[FilterOptions],
    ) -> JobPlan:
        """Find the jobs that an act would be for, and change nothing: its `count` and `until` are a dry run.

        - `act`: "cancel" (queued, in_flight, parked, retrying, waiting), "replay" and "purge" (failed: dead letters),
          "run_now" (parked, retrying), "move" (queued) to the lanes of the priority `to`, in the families that have it.
        - `until`: that of an earlier plan: jobs that were stored since then are left out.
        - `on_searched` is called with how many further stored jobs were looked at.

        The filter is that of `page`; without a `state`, all that the act is for. A plan that is `unreadable` or has
        `missing` streams is not whole: see `JobPage`, also for `behind`. It takes some 300 bytes of memory a job.
        """
        if which.get("state") is None and act in ACTS_ON:
            which["state"] = ACTS_ON[act]
        wanted = make_filter(self._topology, **which)
        return await make_plan(
            self._connection, self._topology, act, wanted, to=to, until=until, on_searched=on_searched
        )

    async def act(
        self, plan: JobPlan, *, by: str | None = None, on_done: Callable[[int], None] = lambda _: None
    ) -> ActOutcome:
        """Act on the jobs of a plan, and on no other. Each is then done, or named as ended or failed.

        Safe while workers run, and if this process dies: a job is cancelled or done and never both; one that is
        replayed, moved or due now runs once more. Acting again goes on with what is left.

        - `by`: the operator who does it; then the audit gets a line. None: a program does it, and there is none.
        - `on_done` is called with how many further jobs are settled.

        Raises AccessDenied, Unavailable: what was done until then holds, the rest is as it was.
        """
        check_by(by)
        acting = ActMany(self._connection, self._topology, self._canceller, self._dead, plan)
        if by is None:
            return await acting.run(on_done)
        async with self._audit.act(f"jobs.{plan.act}", describe_plan(plan), by=by) as audited:
            outcome = await run_audited(acting, audited, on_done)
        outcome.unaudited = audited.problem
        return outcome


def describe_plan(plan: JobPlan) -> dict[str, object]:
    """Return what the audit says of a plan. A value that no message has may be that of a secret field: it is masked."""
    moved_to = {"to": plan.to} if plan.to else {}
    said = plan.filter.describe()
    if not plan.count:
        said |= {name: secret_paths.MASK for name in said if name.startswith("where ")}
    return {**said, **moved_to, "matched": plan.count, "until": plan.until}


async def run_audited(acting: ActMany, audited: AuditedAct, on_done: Callable[[int], None]) -> ActOutcome:
    """Carry out a plan, and have its line say what came of it, also if it fails on the way."""
    try:
        return await acting.run(on_done)
    finally:
        outcome = acting.outcome
        audited.count = outcome.done
        audited.details = {"ended": len(outcome.ended), "failed": len(outcome.failed), "left": outcome.left}
