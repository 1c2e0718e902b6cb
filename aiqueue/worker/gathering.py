"""Children of the jobs that a worker runs: stored once for a run of their parent, and gathered without holding a slot.

The parent's run keeps which children it is about to store, stores them, and reads how they have ended. While some have
not, it writes that it waits, and is parked. How it is woken: `enqueue.Parents` (docs/decisions/children.md).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

from .. import codec, headers, subjects
from ..client import Client
from ..enqueue import ChildJobs, inherited_headers
from ..errors import AccessDenied, BadInput, NotFound, Stale
from ..inspect import look_up
from ..job import Child, ChildOutcome, ChildSpec, Wait
from ..journal import (
    CANCELLED,
    CHILDREN_MAX,
    LOST,
    RESULT,
    Checkpoints,
    ChildEnd,
    ChildEnds,
    ChildRecord,
    EndsRecord,
    WakeAt,
    Writer,
)
from ..lanes import Delivery
from ..subjects import ParentRun
from .opening import OpenedJob

AT_ONCE = 64  # children that are stored at the same time
LOOKS_AT_ONCE = 16
WAIT_TRIES_MAX = 200
LAG_S = 0.02  # a replica that is read may lag behind the leader, which refuses the write then
FALLBACK_S, FALLBACK_MAX_S = 300.0, 3_600.0  # a job looks after its children by itself after as long as it waits
CONFIRM_S = 2.0  # a child that is found nowhere is looked for again after so long: it may be on its way
WINDOW_SLACK_S = 15.0  # below the duplicate window: clocks differ, and storing takes time


def wait_key(delivery: Delivery) -> str:
    """Return the key under which a run is parked while it waits: one message for each run."""
    return f"w{subjects.run_key(delivery.run, delivery.enqueued_at)}"


class ChildrenResources:
    """What the attempts of one worker share to have children."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.jobs = ChildJobs(client.connection, client.topology, client.key_lanes, client.tracing)
        self.stream = client.topology.checkpoints_stream.name

    async def is_parent_cancelled(self, job_headers: Mapping[str, str], tenant: str) -> bool:
        """Return whether the run that has enqueued a job was cancelled: then the job must not start."""
        parent = ParentRun.parse(job_headers.get(headers.PARENT, ""))
        if parent is None:
            return False
        try:
            newest = await self.client.connection.last(self.stream, parent.checkpoints(tenant))
        except (NotFound, AccessDenied):
            return False
        return newest is not None and newest.headers.get(headers.EVENT) == CANCELLED

    @property
    def checkpoints_kept_s(self) -> float:
        """Return for how long a run's checkpoints are kept; 0: without limit."""
        return float(self.client.topology.checkpoints_stream.config.get("max_age", 0)) / 1e9

    def duplicate_window_s(self, family: str) -> float:
        """Return for how long the stream of a family knows the ids that it has stored."""
        topology = self.client.topology
        nanoseconds = topology.streams[topology.family(family).stream].config.get("duplicate_window", 0)
        return float(nanoseconds) / 1e9


class Gathering:
    """The children of one attempt's job."""

    def __init__(
        self,
        resources: ChildrenResources,
        delivery: Delivery,
        opened: OpenedJob,
        checkpoints: Checkpoints,
        parent: ParentRun,
        writer: Writer | None,
    ) -> None:
        self._resources = resources
        self._connection = resources.client.connection
        self._delivery = delivery
        self._tenant = delivery.tenant
        self._checkpoints = checkpoints
        self._parent = parent
        self._writer = writer
        raw = opened.raw
        self._replays = headers.number(raw.headers.get(headers.REPLAY, ""))
        self._headers: Mapping[str, str] = raw.headers
        self._deadline = raw.deadline
        self._ends = ChildEnds(self._connection, resources.stream, parent.child_ends(delivery.tenant))
        self._record = EndsRecord()
        self._stored: dict[str, int] = {}  # by child id, as `EndsRecord.stored`: what this attempt has stored
        self._is_read = False  # the record, once
        self._has_lost_children: bool | None = None
        self._is_live = False  # the run was seen not to be cancelled, after it had kept a child
        self._lock = asyncio.Lock()

    async def enqueue(self, specs: Sequence[ChildSpec]) -> list[Child]:
        """See `Job.enqueue`."""
        async with self._lock:
            found = await self._store_once(specs)
        return [
            Child(record.name, record.job_id, record.family, self._tenant, record.priority, duplicate)
            for record, duplicate in found
        ]

    async def gather(self, specs: Sequence[ChildSpec], names: Sequence[str]) -> list[ChildOutcome] | Wait:
        """See `Job.gather`. `names`: of all children that are gathered."""
        async with self._lock:
            await self._store_once(specs)
            known = self._checkpoints.children
            if missing := next((name for name in names if name not in known), None):
                raise BadInput(f"there is no child {missing!r}: enqueue it, or pass its name and its message")
            wanted = [known[name] for name in names]
            wait = await self._wait_for(wanted)
            return wait or [await self._outcome(record) for record in wanted]

    # -- storing

    async def _store_once(self, specs: Sequence[ChildSpec]) -> list[tuple[ChildRecord, bool]]:
        """Store the children that are not stored yet. Return all, and whether an earlier attempt has made them.

        First the run keeps what it is about to store: an attempt that finds that stores it again under the same ids.
        """
        jobs, checkpoints = self._resources.jobs, self._checkpoints
        lanes = [jobs.lane_of(spec, self._tenant, self._delivery.lane.key.priority) for spec in specs]
        inherited = inherited_headers(self._parent, self._headers, self._deadline)
        await checkpoints.load_past()
        earlier = dict(checkpoints.children)
        if earlier:
            await self._read_once()
        new = [
            self._make_record(spec, lane)
            for spec, lane in zip(specs, lanes, strict=True)
            if spec.name not in earlier or self._must_be_made_anew(earlier[spec.name])
        ]
        if new and self._may_have_lost_children():
            new = self._without_lost(new)
        if new:
            if len(earlier.keys() | {each.name for each in new}) > CHILDREN_MAX:
                raise BadInput(f"a run has at most {CHILDREN_MAX:,} children: give one child several items")
            await checkpoints.keep_children(new)
            await self._raise_if_cancelled()
        made = {each.name for each in new if checkpoints.children[each.name] is each}
        if len(made) < len(new):  # another attempt had kept them
            await self._read_once()
        limit = asyncio.Semaphore(AT_ONCE)

        async def store(spec: ChildSpec, lane: subjects.Lane) -> tuple[ChildRecord, bool]:
            record = checkpoints.children[spec.name]
            async with limit:
                if spec.name in made or await self._must_be_stored(record):
                    stored = await jobs.store(spec, lane, record.job_id, inherited)
                    self._stored[record.job_id] = stored.seq
            return record, spec.name not in made

        tasks = [asyncio.ensure_future(store(spec, lane)) for spec, lane in zip(specs, lanes, strict=True)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _make_record(self, spec: ChildSpec, lane: subjects.Lane) -> ChildRecord:
        job_id = self._parent.child_id(self._tenant, spec.name, self._replays)
        return ChildRecord(
            spec.name, job_id, spec.family, spec.kind, lane.priority, self._replays, bool(spec.delay_s),
            self._connection.clock.now(),
        )  # fmt: skip

    def _may_have_lost_children(self) -> bool:
        """Return whether the run has waited for children of which it may keep nothing more: purged, or expired."""
        if self._has_lost_children is None:
            kept_s = self._resources.checkpoints_kept_s
            is_old = 0 < kept_s < self._connection.clock.now() - self._delivery.enqueued_at
            self._has_lost_children = headers.GATHER in self._headers and (is_old or not self._checkpoints.children)
        return self._has_lost_children

    def _without_lost(self, new: Sequence[ChildRecord]) -> list[ChildRecord]:
        """Note that unknown children are lost, which may have run. Return the others: they are made anew."""
        known = self._checkpoints.children
        for each in new:
            if each.name not in known:
                error = "the job has waited for its children, and what it kept of them has expired or was purged"
                self._record.ends[each.job_id] = ChildEnd(each.job_id, LOST, reason=LOST, error=error)
        left = [each for each in new if each.name in known]
        known.update({each.name: each for each in new if each.name not in known})
        return left

    def _must_be_made_anew(self, record: ChildRecord) -> bool:
        """Return whether a child of a run before this replay has failed or was cancelled."""
        end = self._record.ends.get(record.job_id)
        return end is not None and end.event != RESULT and record.generation < self._replays

    async def _must_be_stored(self, record: ChildRecord) -> bool:
        """Return whether a child that an earlier attempt has kept must be stored (again).

        Within the duplicate window the server drops what it has stored already. After that the child is looked for.
        """
        if record.job_id in self._record.ends or record.job_id in self._record.stored or record.job_id in self._stored:
            return False
        window_s = self._resources.duplicate_window_s(record.family) - WINDOW_SLACK_S
        if not record.delayed and self._connection.clock.now() - record.noted_at < window_s:
            return True
        found = await look_up(
            self._connection, self._resources.client.topology, record.job_id, family=record.family,
            tenant=self._tenant, since=record.noted_at,
        )  # fmt: skip
        return found is None or found.is_empty

    async def _raise_if_cancelled(self) -> None:
        """Raise Stale if the job was cancelled before it kept its first child, and so before anybody saw its children.

        After that the canceller sees them, and fences what the run keeps (`client.cancel_children`).
        """
        if not self._is_live:
            if self._writer is not None and await self._writer.is_run_ended():
                raise Stale("the job was cancelled", ended=True)
            self._is_live = True

    # -- waiting

    async def _read_once(self) -> None:
        if not self._is_read:
            await self._ends.read_on(self._record)
            self._is_read = True

    async def _wait_for(self, wanted: Sequence[ChildRecord]) -> Wait | None:
        """Write that the run waits until all `wanted` children have ended. None: they have."""
        record, now = self._record, self._connection.clock.now()
        may_be_lost = self._is_read and 0.0 < record.waited_at <= now - FALLBACK_S / 2
        for _ in range(WAIT_TRIES_MAX):
            missing = [each for each in wanted if each.job_id not in record.ends]
            if missing and may_be_lost:
                may_be_lost = False
                await self._look_for(missing)
                continue
            if not missing:
                return None
            wake_at = WakeAt(record.count + len(missing), self._delivery.lane.key.priority, wait_key(self._delivery))
            number = await self._ends.wait(record, self._stored, wake_at)
            if number:
                waited_s = now - min(each.noted_at for each in missing)
                return Wait(number, len(missing), min(FALLBACK_MAX_S, max(FALLBACK_S, waited_s)))
            head_seq = record.head_seq
            await self._ends.read_on(record)
            self._is_read = True
            if record.head_seq == head_seq:
                await asyncio.sleep(LAG_S)
        raise Stale(f"{self._ends.subject}: others wrote first, {WAIT_TRIES_MAX} times", ended=False)

    async def _outcome(self, record: ChildRecord) -> ChildOutcome:
        """Return how a child has ended, with its result, also one that only its journal has."""
        end = self._record.ends[record.job_id]
        result = end.result
        if end.large:
            found = await self._read_large_result(record, end)
            if found is None:
                return ChildOutcome(record.job_id, LOST, None, LOST, "its result has expired", end.attempt)
            result = found
        return ChildOutcome(record.job_id, end.event, result, end.reason, end.error, end.attempt)

    async def _read_large_result(self, record: ChildRecord, end: ChildEnd) -> bytes | None:
        client = self._resources.client
        family = client.topology.family(record.family)
        if family.journal is None:
            return None
        subject = subjects.journal(family.journal, self._tenant, record.job_id)
        entry = (await client.journal.read_run(subject, end.run, end.enqueued_at)).newest
        if entry is None or entry.event != RESULT:
            return None
        if entry.document is not None:
            with contextlib.suppress(NotFound):
                return await client.documents.read_result_body(entry.document)
            return None
        return codec.encode(entry.data)

    # -- children that were not heard of

    async def _look_for(self, missing: Sequence[ChildRecord]) -> None:
        """Find out what became of children whose ends the run was not told of for long. Note what is found."""
        absent = await self._look_once(missing)
        if absent:
            await asyncio.sleep(CONFIRM_S)
            await self._ends.read_on(self._record)
            absent = await self._look_once([each for each in absent if each.job_id not in self._record.ends])
        for each in absent:
            self._record.ends[each.job_id] = ChildEnd(each.job_id, LOST, reason=LOST, error="it is stored nowhere")

    async def _look_once(self, missing: Sequence[ChildRecord]) -> list[ChildRecord]:
        """Look for children, and note the ends of those that have ended. Return those that are nowhere."""
        limit = asyncio.Semaphore(LOOKS_AT_ONCE)

        async def look(record: ChildRecord) -> bool:
            async with limit:
                return await self._is_absent(record)

        absent = await asyncio.gather(*(look(each) for each in missing))
        return [each for each, is_absent in zip(missing, absent, strict=True) if is_absent]

    async def _is_absent(self, record: ChildRecord) -> bool:
        """Return whether a child is nowhere. If it has ended, note how."""
        client = self._resources.client
        family = client.topology.family(record.family)
        if seq := self._record.stored.get(record.job_id):
            with contextlib.suppress(NotFound):
                stored = await self._connection.get(family.stream, seq)
                if stored is not None and stored.headers.get(headers.JOB_ID) == record.job_id:
                    return False
        found = await look_up(
            self._connection, client.topology, record.job_id, family=record.family, tenant=self._tenant,
            since=record.noted_at,
        )  # fmt: skip
        if found is None:
            return True
        head, letter = found.head, found.letter
        if found.stored is not None or found.parked:
            return False
        if head is not None and head.event == RESULT:  # whose secrets are masked here
            self._record.ends[record.job_id] = ChildEnd(record.job_id, RESULT, large=True, run=head.run)
        elif head is not None and head.final:
            self._record.ends[record.job_id] = ChildEnd.of_entry(record.job_id, head, 0.0)
        elif letter is not None:
            self._record.ends[record.job_id] = ChildEnd(
                record.job_id, "failed", reason=letter.reason, error=letter.error, attempt=letter.attempt
            )
        else:
            return not found.limited
        return False
