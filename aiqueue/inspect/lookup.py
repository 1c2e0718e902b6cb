"""Finds one job wherever it is: in its lane, parked, in its journal, among the dead letters."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .. import subjects
from ..codec import secret_paths
from ..connection import Connection, Stored, is_still_stored, timestamp
from ..documents import Documents
from ..enqueue import DeadLetters, Enqueued, Filter, Parking
from ..errors import AccessDenied, AIQueueError, BadInput, JobState, NotFound
from ..journal import CANCELLED, FAILED, RESULT, STARTED, ChildRecord, Entry, entry_from_stored
from ..lanes import LEASE_PARTS, ActivePauses, Pause, Record, has_line
from ..topology import Family, Topology
from .children import ChildStats, TreeBudget, describe_children, find_parent
from .found_job import (
    FoundJob,
    has_declared_lane,
    is_cancelled,
    is_written_by,
    lane_and_kind,
    state_in_lane,
    state_when_parked,
)
from .lane_scan import LaneScan
from .pauses import read_pauses_if_allowed
from .records import read_records_if_allowed
from .timeline import ENQUEUED_EVENTS, TimelineEvent, build_timeline

ENTRIES_MAX = 1_000  # journal entries of a job that are read, the oldest first
ENTRIES_BYTES_MAX = 16 * 1024 * 1024  # of those entries: chunks may be large
SEARCHES = 2  # a job that moved between two reads of the first search is found by the second


@dataclass(frozen=True, slots=True)
class JobStats:
    """What is known of one job. Times are seconds since the epoch.

    `state` is one of:

    - **queued**: never delivered since its lane's consumer was created
    - **parked**: delayed, outside of its lane until `next_attempt_at`
    - **in_flight**: delivered and not settled. It runs, or waits to be delivered again
    - **retrying**: an attempt failed, and the next is at `next_attempt_at`
    - **waiting**: parked until its children have ended. It looks after them by itself at `next_attempt_at`
    - **done**: `result` is its result, fetched if it is large; its entry in `entries` is a reference then
    - **cancelled**
    - **failed**: `failure` has reason and error. `dead_seq` is its dead letter, None once that is gone
    - **ended**: it began, is not stored any more, and left no result: its handler keeps none, or it was purged
    - **unknown**: it has a journal, but is not among the stored jobs that were read

    `unique` is the caller's key, of which `job_id` is a hash; "" if the id is the key itself, or nothing names it any
    more. `parent` is the id of the job that has enqueued it; None: none, or the job has ended with a result.
    `children`: of a job that has not ended with a result, at most CHILDREN_SHOWN of the tree; `child_count`: how many
    it has itself.

    `key`: the value of the message's field `limit_key`, such as "gpt-4o" of "model", if the job is or was in the lane
    of a limited value. Both are empty otherwise.

    `schedule`, `scheduled_for`: the schedule that has enqueued the job or the first of its ancestors, and the time of
    its tick; "" and None for other jobs, and for those whose end an older version has written.

    `pause`: the job is paused, and no worker starts its next attempt before the end of the pause.

    `note` is a sentence for a state that alone would mislead. `entries` is the journal, the oldest first: at most
    ENTRIES_MAX entries and ENTRIES_BYTES_MAX bytes, and the newest entry. `entries_cut`: some are left out in between,
    of the timeline too.
    """

    job_id: str
    family: str
    tenant: str
    state: JobState
    """What the job does now, such as queued, in_flight, parked, done or failed."""
    priority: str | None = None
    kind: str | None = None
    attempt: int | None = None
    enqueued_at: float | None = None
    next_attempt_at: float | None = None
    """When the next attempt is due; None: the job does not wait for a time."""
    result: Any = None
    """What the handler has returned; None: none yet, or none is kept."""
    failure: Mapping[str, Any] | None = None
    """Why the job failed: `reason` in one word, `error` in one line; None: it did not."""
    dead_seq: int | None = None
    """Number of its dead letter; None: there is none."""
    timeline: tuple[TimelineEvent, ...] = ()
    """What happened to the job, the oldest first."""
    entries: tuple[Entry, ...] = ()
    """The job's journal, the oldest first, at most ENTRIES_MAX entries and the newest one."""
    entries_cut: bool = False
    note: str = ""
    """A sentence where the state alone would mislead; empty: it does not."""
    unique: str = ""
    """Key of the caller, of which `job_id` is a hash; empty: the id is the key, or none is known."""
    parent: str | None = None
    """Id of the job that has enqueued this one; None: none, or it is not known any more."""
    children: tuple[ChildStats, ...] = ()
    child_count: int = 0
    pause: Pause | None = None
    limit_key: str = ""
    """Field of the message whose values are limited; empty: the job's lane is of no value."""
    key: str = ""
    schedule: str = ""
    scheduled_for: float | None = None


async def job(
    connection: Connection, topology: Topology, job_id: str, *, family: str | None = None, tenant: str | None = None
) -> JobStats:
    """Find a job, in all families and tenants or the given ones, and return what is known of it.

    The journals, the parked jobs and the dead letters have an index by job id, the lanes have none:

    1. A job with a result is not looked for in its lane. An id that was used again shows its last result until the new
       job's journal has an entry.
    2. A job without a journal is looked for among the first SCAN_JOBS_MAX stored jobs and SCAN_BYTES_MAX bytes, and
       before them among those that were stored when its id was made, if aiqueue made the id.

    Raises NotFound, UnknownFamily, InvalidToken, and BadInput if several tenants or families have this id.
    """
    return (await _describe(connection, topology, _Search(connection, topology, job_id, family, tenant)))[0]


async def find_and_describe(
    connection: Connection, topology: Topology, job_id: str, *, family: str | None = None, tenant: str | None = None
) -> tuple[JobStats, FoundJob]:
    """As `job`, and return also the stored messages that were found. With family and tenant, a job is looked for among
    50 times as many.
    """
    search = _Search(connection, topology, job_id, family, tenant, deep=family is not None and tenant is not None)
    return await _describe(connection, topology, search)


async def _describe(connection: Connection, topology: Topology, search: _Search) -> tuple[JobStats, FoundJob]:
    found = await search.run()
    stats = await search.describe(found, TreeBudget())
    if stats.state not in ("queued", "parked", "retrying"):
        return stats, found
    pauses = ActivePauses(await read_pauses_if_allowed(connection, topology))
    key = subjects.hashed(stats.key) if stats.key else ""
    return replace(stats, pause=pauses.of_job(stats.family, stats.tenant, stats.kind or "", key)), found


async def find_enqueued(connection: Connection, topology: Topology, family: Family, job: Enqueued) -> FoundJob:
    """Return what is stored of a job that is where it was enqueued, or parked, or has written to its journal.

    Raises NotFound (a stream is missing), AccessDenied, Unavailable.
    """
    found = FoundJob(family, job.lane.tenant)
    if not job.parking_id:
        found.stored = await connection.get(family.stream, job.seq)
    if family.journal is not None:
        subject = subjects.journal(family.journal, job.lane.tenant, job.job_id)
        newest = await connection.last(topology.journal_stream.name, subject)
        found.entries = [] if newest is None else [entry_from_stored(newest).masked()]
    head = found.head
    if found.stored is None and head is not None and head.event == STARTED and isinstance(head.data, dict):
        seq = head.data.get("seq")  # of a job that has come back to a lane
        found.stored = await connection.get(family.stream, seq) if isinstance(seq, int) and seq > 0 else None
    if found.stored is None:
        found.parked = await Parking(connection, topology).find_all(job.lane._replace(key=""), job.job_id)
    return found


async def describe_found(connection: Connection, topology: Topology, found: FoundJob, job_id: str) -> JobStats:
    """Return what is known of a job of which this is stored, but not whether its lane stands in line. Raises
    AccessDenied, Unavailable.
    """
    search = _Search(connection, topology, job_id, found.family.name, found.tenant)
    search.records = []  # with many workers, reading all records for each job would be most of the work
    return await search.describe(found, TreeBudget())


async def find_job(
    connection: Connection, topology: Topology, job_id: str, *, family: str | None = None, tenant: str | None = None
) -> FoundJob:
    """Find a job as `job` does, and return its stored messages. Raises the same.

    With `tenant`, only the newest entry of its journal is read: the journal of a job that streams has thousands.
    """
    return await _Search(connection, topology, job_id, family, tenant, whole=tenant is None).run()


async def look_up(
    connection: Connection, topology: Topology, job_id: str, *, family: str, tenant: str, since: float
) -> FoundJob | None:
    """As `find_job`, for a job that was stored after `since`, seconds since the epoch, if it was. None: it is nowhere.

    Of a job for which there are too many to look through, an empty `FoundJob` is returned.
    """
    search = _Search(connection, topology, job_id, family, tenant, since)
    try:
        return await search.run()
    except NotFound:
        return FoundJob(topology.family(family), tenant, limited=True) if search.limited else None


class _Search:
    """One search for a job id: what was found by family and tenant, and how much of the lanes may still be read."""

    def __init__(
        self, connection: Connection, topology: Topology, job_id: str, family: str | None, tenant: str | None,
        since: float | None = None, *, whole: bool = True, deep: bool = False,
    ) -> None:  # fmt: skip
        """`since`: when the job was stored at the earliest, if its id does not say it. `whole`: read all of a
        journal, and not the newest entry alone, for which the tenant must be known. `deep`: as of LaneScan.
        """
        self.records: list[Record] | None = None  # of workers, read once where a lane has no consumer
        self._connection = connection
        self._topology = topology
        self._job_id = subjects.job_id(job_id)
        self._named = job_id if job_id == self._job_id else f"{job_id[:80]!r} ({self._job_id})"
        self._tenant = None if tenant is None else subjects.token("tenant", tenant)
        self._families = topology.work_families if family is None else (topology.family(family),)
        if self._families[0].role != "work":
            raise BadInput(f"family {family} has inboxes and no jobs: name a family of jobs")
        self._family = family
        self._found: dict[tuple[str, str], FoundJob] = {}
        self._scan = LaneScan(connection, self._job_id, since, deep=deep)
        self._whole = whole

    @property
    def limited(self) -> bool:
        """Whether the lanes had more jobs than were read."""
        return self._scan.limited

    async def run(self) -> FoundJob:
        """Read all streams that may hold the job. Raises NotFound, and BadInput if it is there more than once."""
        for _ in range(SEARCHES):
            for each in self._families:
                await self._read_journal(each)
            await self._read_parked()
            await self._read_dead_letters()
            self._refuse_several()
            if not any(found.is_complete for found in self._found.values()):
                await self._read_lanes()
                self._refuse_several()
            if self._found or self._scan.limited:
                break
        if not self._found:
            raise NotFound(self._not_found_text())
        found, *_ = self._found.values()
        found.limited = self._scan.limited
        return found

    def _found_in(self, family: str, tenant: str) -> FoundJob:
        return self._found.setdefault((family, tenant), FoundJob(self._topology.family(family), tenant))

    def _refuse_several(self) -> None:
        if len(self._found) > 1:
            where = ", ".join(f"{name} of {tenant}" for name, tenant in sorted(self._found))
            several = f"there are several jobs with the id {self._named} ({where})"
            raise BadInput(f"{several}: name the family and the tenant")

    def _not_found_text(self) -> str:
        where = f" of {self._tenant}" if self._tenant else ""
        where += f" in {self._family}" if self._family else ""
        if self._scan.limited:
            hint = f"only {self._scan.searched} were searched, and there are more"
            hint += "" if self._tenant and self._family else "; name its family and tenant"
        else:
            hint = "it was never stored, or it ended and its result has expired or was not kept"
        return f"no trace of job {self._named}{where}: {hint}"

    # -- reading

    async def _read_journal(self, family: Family) -> None:
        if family.journal is None:
            return
        stream = self._topology.journal_stream.name
        subject = subjects.journal(family.journal, self._tenant or "*", self._job_id)
        if not self._whole:
            with contextlib.suppress(NotFound):
                newest = await self._connection.last(stream, subject)
                if newest is not None:
                    self._found_in(family.name, self._tenant or "").entries = [entry_from_stored(newest).masked()]
            return
        count = size_bytes = 0
        with contextlib.suppress(NotFound):
            async for stored in self._connection.read(stream, subject):
                tenant, _ = subjects.parse_journal(stored.subject)
                found = self._found_in(family.name, tenant)
                if count >= ENTRIES_MAX or size_bytes >= ENTRIES_BYTES_MAX:
                    last = await self._connection.last(stream, stored.subject)
                    found.entries_cut = True
                    if last is not None:
                        found.entries.append(entry_from_stored(last).masked())
                    return
                count, size_bytes = count + 1, size_bytes + len(stored.data)
                found.entries.append(entry_from_stored(stored).masked())

    async def _read_kept(self, found: FoundJob) -> list[Entry]:
        """Return what the runs of the job keep, the oldest first, at most ENTRIES_MAX entries."""
        kept: list[Entry] = []
        subject = subjects.checkpoints(found.family.name, found.tenant, self._job_id, "*")
        with contextlib.suppress(NotFound, AccessDenied):
            async for stored in self._connection.read(self._topology.checkpoints_stream.name, subject):
                kept.append(entry_from_stored(stored).masked())
                if len(kept) >= ENTRIES_MAX:
                    break
        return kept

    async def _read_parked(self) -> None:
        lane = subjects.Lane(self._family or "*.*", self._tenant or "*", "*")
        with contextlib.suppress(NotFound):
            for each in await Parking(self._connection, self._topology).find_all(lane, self._job_id):
                found_lane = each.subject.lane
                if found_lane.family in self._topology.families:
                    self._found_in(found_lane.family, found_lane.tenant).parked.append(each)

    async def _read_dead_letters(self) -> None:
        wanted = Filter(family=self._family, tenant=self._tenant, job_id=self._job_id)
        with contextlib.suppress(NotFound):
            async for letter in DeadLetters(self._connection, self._topology).find(wanted):
                if letter.lane.family in self._topology.families and await is_still_stored(
                    self._connection, self._topology.dead_stream.name, letter.seq
                ):
                    self._found_in(letter.lane.family, letter.lane.tenant).letter = letter  # the newest replaces others

    async def _read_lanes(self) -> None:
        """Find the job in its lane.

        1. The journal names its sequence: read that message. Or it says that the job was moved to the lane of its
           limited key: look there.
        2. Otherwise read through the lanes of the families and tenants that have traces of the job, or of all.
        """
        known = list(self._found.items())
        for (name, tenant), found in known:
            if found.head is not None and found.head.run:
                family = self._topology.family(name)
                found.stored = await self._scan.get(family, found.head.run, tenant)
                key = found.head.data.get("limit_key") if isinstance(found.head.data, dict) else None
                if found.stored is None and isinstance(key, str) and family.limit_key:
                    found.stored = await self._scan.find_moved(family, tenant, key, found.head.time)
        if any(found.stored for _, found in known):
            return
        if known:
            pairs = [(self._topology.family(name), tenant) for (name, tenant), _ in known]
        else:
            pairs = [(family, self._tenant or "*") for family in self._families]
        for family, tenant in pairs:
            stored = await self._scan.find(family, tenant)
            if stored is not None and await is_still_stored(self._connection, family.stream, stored.seq):
                self._found_in(family.name, subjects.tenant_of(stored.subject)).stored = stored

    async def _read_delivery(self, found: FoundJob, stored: Stored) -> None:
        """Read from the lane's consumer whether the job was delivered, and when. No consumer: never since it went."""
        lane = subjects.parse_lane(stored.subject)
        if lane is None:
            return
        try:
            name = found.family.lane_name(found.tenant, lane.priority, lane.key)
            info = await self._connection.api(f"CONSUMER.INFO.{found.family.stream}.{name}")
        except NotFound:
            if self.records is None:
                self.records = await read_records_if_allowed(self._connection, self._topology)
            found.in_line = not lane.key and has_line(self.records, found.family.name, found.tenant)
            return
        found.has_consumer = True
        delivered_seq = info["delivered"]["stream_seq"]
        found.delivered = stored.seq <= delivered_seq
        last_active = info["delivered"].get("last_active")  # missing after a restart of the server, until it delivers
        if stored.seq == delivered_seq and not info["num_redelivered"] and last_active:
            active_at = timestamp(last_active)
            if active_at - stored.time < found.family.ack_wait_s / LEASE_PARTS:  # later, it may be a lease's extension
                found.delivered_at = active_at

    # -- describing

    async def _read_result(self, entry: Entry) -> tuple[Any, str]:
        """Return a result without its secrets. One that is stored as a document and cannot be read: None, and why."""
        if entry.document is None:
            return entry.data, ""
        try:
            value = await Documents(self._connection, self._topology).read_result(entry.document)
        except AIQueueError as error:
            return None, f"its result cannot be read: {error}"
        return secret_paths.mask(value, entry.secrets) if entry.secrets else value, ""

    async def _describe_child(
        self, tenant: str, budget: TreeBudget, child: ChildRecord
    ) -> tuple[JobState, tuple[ChildStats, ...]]:
        """Return the state of a child, and its own children. Raises NotFound."""
        search = _Search(self._connection, self._topology, child.job_id, child.family, tenant, child.noted_at)
        found = await search.describe(await search.run(), budget)
        return found.state, found.children

    async def describe(self, found: FoundJob, budget: TreeBudget) -> JobStats:
        """Return what is known of the job that was found. Reads its lane's consumer if the state depends on that."""
        head, letter, stored = found.head, found.letter, found.stored
        if stored is not None and not is_cancelled(found) and has_declared_lane(found, stored):
            await self._read_delivery(found, stored)
        state, note, next_attempt_at = self._state(found)
        kept = [] if state == "done" else await self._read_kept(found)  # a job that is done has deleted them
        result, problem = await self._read_result(head) if head is not None and state == "done" else (None, "")
        timeline = build_timeline(
            self._job_id, found.entries, kept=kept, stored=stored, parked=found.parked, letter=letter,
            delivered=found.delivered, delivered_at=found.delivered_at, unique=found.unique,
        )  # fmt: skip
        children, child_count = await describe_children(
            kept, partial(self._describe_child, found.tenant, budget), budget
        )
        lane, kind = lane_and_kind(found)
        attempt = head.attempt if head else letter.attempt if letter else None
        message = stored or (found.parked[-1].stored if found.parked else None)
        if head is not None and message is not None and not is_written_by(head, message):
            attempt = None
        failure: Mapping[str, Any] | None = None
        if state == "failed" and letter is not None:
            failure = {"reason": letter.reason, "error": letter.error}
        elif state == "failed" and head is not None and isinstance(head.data, dict):
            failure = {name: head.data.get(name) for name in ("reason", "error")}
        schedule, scheduled_for = found.tick
        return JobStats(
            job_id=self._job_id, family=found.family.name, tenant=found.tenant, state=state,
            priority=lane.priority if lane else None, kind=kind, attempt=attempt,
            enqueued_at=next((each.at for each in reversed(timeline) if each.event in ENQUEUED_EVENTS), None),
            next_attempt_at=next_attempt_at,
            result=result, failure=failure,
            dead_seq=letter.seq if letter else None, timeline=timeline, entries=tuple(found.entries),
            entries_cut=found.entries_cut, note=note or problem, unique=found.unique,
            parent=find_parent([message, letter]), children=children, child_count=child_count,
            limit_key=(found.limit_key and found.family.limit_key) or "", key=found.limit_key,
            schedule=schedule, scheduled_for=scheduled_for,
        )  # fmt: skip

    def _state(self, found: FoundJob) -> tuple[JobState, str, float | None]:
        """Return the state, its note, and the time of the next attempt if one is planned."""
        if found.stored is not None:
            return state_in_lane(found, found.stored)
        if found.parked:
            return state_when_parked(found.parked[-1])
        if found.letter is not None:
            return "failed", "", None
        last = found.head.event if found.head else ""
        if last == RESULT:
            return "done", "", None
        if last == CANCELLED:
            return "cancelled", "", None
        if last == FAILED:
            return "failed", "its dead letter is gone: replayed or purged", None
        if self._scan.limited:
            return "unknown", f"not among {self._scan.searched}; there are more, which were not searched", None
        return "ended", "it is not stored any more and left no result: its handler keeps none, or it was purged", None
