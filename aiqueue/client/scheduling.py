"""Schedules: calls of the client that add, show, pause, run and remove them."""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING

from .. import subjects
from ..connection import Connection
from ..enqueue import KeyLanes
from ..errors import BadInput
from ..inspect import ScheduleStats, describe_schedule, list_times, read_schedules
from ..job import MakeHeaders, Message, make_child_spec
from ..topology import Topology
from ..units import Duration, Time, parse_duration, parse_time, whole_number
from .limiting import name_user
from .pausing import PauseCalls

if TYPE_CHECKING:  # only who uses schedules imports their room, which takes some milliseconds
    from ..schedules import (
        Added,
        AskedJob,
        Misfire,
        Overlap,
        Recurrence,
        ScheduleDocument,
        Schedules,
        UndeclaredSchedule,
    )

TIMES_MAX = 10_000  # that `next_times` returns


class ClientSchedules:
    """The schedules of a client's server: jobs that come again and again, each at its time, while workers run.

    Unless a method says otherwise, it raises BadInput (InvalidToken), NotFound (there is no such schedule, or the
    streams are missing: run `aiqueue apply`), Conflict (other programs change the schedule all the time), AccessDenied,
    QueueFull, Unavailable.
    """

    def __init__(
        self, connection: Connection, topology: Topology, key_lanes: KeyLanes, make_headers: MakeHeaders | None
    ) -> None:
        self._connection = connection
        self._topology = topology
        self._key_lanes = key_lanes
        self._make_headers = make_headers

    @property
    def engine(self) -> Schedules:
        """What stores schedules; for aiqueue's own modules."""
        from ..schedules import Schedules  # noqa: PLC0415

        return Schedules(self._connection, self._topology, self._key_lanes)

    async def add(  # noqa: PLR0913  (what a schedule is)
        self,
        schedule_id: str,
        recurrence: Recurrence,
        message: Message,
        *,
        tenant: str,
        priority: str = subjects.NORMAL,
        deadline: Duration | None = None,
        headers: Mapping[str, str] | None = None,
        misfire: Misfire = "once",
        bound: int = 100,
        grace: Duration = "10s",
        overlap: Overlap = "run",
    ) -> Added:
        """Store a schedule: at each of its ticks a job with this message is enqueued, once, while workers run.

        - `schedule_id`: a token, once in its tenant. A schedule of this id that a client has added is changed, and
          keeps its pause and its counts.
        - `recurrence`: a Cron, an Every, a Calendar or a Once of `aiqueue`.
        - `deadline` (a duration): a job that has not started so long after its tick was enqueued becomes a dead letter.
        - `misfire`: what becomes of ticks that are more than `grace` late, because no worker ran: "skip" them, enqueue
          the newest "once", or "all", the newest `bound` (up to 10,000).
        - `overlap`: "run", or "skip" a tick while the job of the one before has not ended.

        Returns the stored document, and whether the schedule was "added", "changed" or is "unchanged". Raises BadInput
        also for the id of a schedule that a worker's code declares, for one that never fires, and for a message with
        documents; TooLarge above 64 KiB.
        """
        from ..schedules import ScheduleSpec  # noqa: PLC0415

        child = make_child_spec("tick", message, deadline=deadline, headers=headers, make_headers=self._make_headers)
        if child.documents:
            raise BadInput("a schedule's message cannot have documents, which expire: have its handler put them")
        spec = ScheduleSpec(
            tenant=tenant, id=schedule_id, recurrence=recurrence, family=child.family, kind=child.kind, body=child.body,
            priority=priority, deadline_s=child.deadline_s, headers=child.headers,
            secrets=next(iter(child.secrets.values()), ""), misfire=misfire, bound=bound,
            grace_s=parse_duration("grace", grace), overlap=overlap,
        )  # fmt: skip
        return await self.engine.add(spec)

    async def get(self, schedule_id: str, *, tenant: str) -> ScheduleStats:
        """Return a schedule, and the outcome of its last tick. Raises DecodeError too: it cannot be read here."""
        document = await self.engine.get(tenant, schedule_id)
        return await describe_schedule(self._connection, self._topology, document)

    async def list(self, *, tenant: str | None = None, owner: str | None = None) -> builtins.list[ScheduleStats]:
        """Return the schedules of a tenant and an owner (None: of all; "": those that clients have added), sorted by
        tenant and id, without those that this version cannot read.
        """
        return (await read_schedules(self._connection, self._topology, tenant=tenant, owner=owner))[0]

    async def remove(self, schedule_id: str, *, tenant: str, owner: str = "") -> bool:
        """Remove a schedule; jobs that it has enqueued stay. Return False if there is none.

        `owner`: of a schedule that a worker's code declares. Without it, BadInput is raised for such a schedule, which
        the next worker that declares it would add again.
        """
        engine = self.engine
        subjects.token("tenant", tenant)
        found = await engine.store.find(tenant, subjects.token("schedule", schedule_id))
        if found.document is not None and found.document.owner != owner:
            whose = f"declared by {found.document.owner!r}" if found.document.owner else "of no owner"
            raise BadInput(f"schedule {schedule_id} of {tenant} is {whose}: name that owner to remove it all the same")
        return await engine.remove(tenant, schedule_id)

    async def find_undeclared(self, owner: str) -> builtins.list[UndeclaredSchedule]:
        """Return the schedules of an owner that its workers' code declares no more, sorted by tenant and id: what
        `prune` would remove.

        Workers that run or ran within 90 seconds decide; if there are none, the newest ones. Raises NotFound also if no
        worker of this owner ran in the last 30 days.
        """
        return [*await self.engine.find_undeclared(owner)]

    async def prune(self, owner: str) -> builtins.list[UndeclaredSchedule]:
        """Remove the schedules that `find_undeclared` returns, and return them. Jobs that they have enqueued stay.

        Raises as `find_undeclared`.
        """
        return [*await self.engine.prune(owner)]

    async def pause(
        self, schedule_id: str, *, tenant: str, reason: str = "", by: str | None = None
    ) -> ScheduleDocument:
        """Have a schedule enqueue no more jobs until it is resumed. Jobs that are enqueued stay.

        `reason` and `by` (default: the user and host of this process) are shown to operators.
        """
        return await self.engine.pause(tenant, schedule_id, by=name_user() if by is None else by, reason=reason)

    async def resume(self, schedule_id: str, *, tenant: str) -> ScheduleDocument:
        """Have a schedule fire again, from its next tick after now. Ticks of the pause are not misfires.

        A schedule that is not paused stays as it is; if its next tick is missing, the tick is parked again.
        """
        return await self.engine.resume(tenant, schedule_id)

    async def run_now(self, schedule_id: str, *, tenant: str) -> AskedJob:
        """Enqueue a job of a schedule at once, also while it is paused. Its ticks stay as they are."""
        return await self.engine.run_now(tenant, schedule_id)

    async def backfill(
        self, schedule_id: str, start: Time, end: Time, *, tenant: str, limit: int = 1_000
    ) -> builtins.list[AskedJob]:
        """Enqueue the jobs of a schedule's ticks from `start` to before `end`, oldest first.

        Ticks that have a job are left out, as far as the job's stream or journal still knows it: journals are kept for
        a day. Raises BadInput for an end in the future, and for more than `limit` ticks (up to 10,000).
        """
        begin, until = parse_time("start", start), parse_time("end", end)
        return [*await self.engine.backfill(tenant, schedule_id, begin, until, limit=limit)]

    async def next_times(
        self, schedule_id: str, count: int = 5, *, tenant: str, after: Time | None = None
    ) -> builtins.list[datetime]:
        """Return the next `count` ticks (1 to 10,000) after a time, by default now, in the schedule's time zone.

        Also those that a pause would leave out. Fewer if it ends.
        """
        whole_number("count", count, 1, TIMES_MAX)
        engine = self.engine
        await self._connection.clock.ensure(engine.store.stream)
        begin = self._connection.clock.now() if after is None else parse_time("after", after)
        return list_times((await engine.get(tenant, schedule_id)).recurrence, count, begin)


class ScheduleCalls(PauseCalls):
    """The part of `Client` that schedules."""

    make_headers: MakeHeaders | None

    @property
    def key_lanes(self) -> KeyLanes:
        raise NotImplementedError

    @property
    def schedules(self) -> ClientSchedules:
        """Schedules: `add`, `get`, `list`, `remove`, `find_undeclared`, `prune`, `pause`, `resume`, `run_now`,
        `backfill`, `next_times`.
        """
        return ClientSchedules(self.connection, self.topology, self.key_lanes, self.make_headers)
