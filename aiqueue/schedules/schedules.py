"""What operators and programs do with schedules: add and change them, pause and resume, run and backfill."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

from .. import subjects
from ..connection import Connection, block
from ..enqueue import KeyLanes
from ..errors import AIQueueError, BadInput, Conflict, NotFound, TooLarge
from ..job import KIND
from ..topology import Topology
from ..units import parse_duration, text, whole_number
from .declarations import DeclaredSets, UndeclaredSchedule, find_undeclared
from .document import (
    ANY_ROUTE,
    BOUND_MAX,
    FiredTick,
    Misfire,
    Overlap,
    ScheduleDocument,
    SchedulePause,
    ScheduleSpec,
    next_ms,
    tick_job_id,
)
from .jobs import TickJobs
from .recurrence import Recurrence, to_ms
from .store import ScheduleStore, StoredSchedule
from .ticks import Ticks

BODY_MAX = 64 * 1024
HEADERS_MAX = 32 * 1024  # of the caller, in a job: aiqueue's own are beside them
BACKFILL_MAX = 10_000
GRACE_MAX_S = 7 * 86_400.0
TEXT_MAX = 500  # characters of a name, and of why a schedule is paused
DUE_SOON_S = 2.0  # above how early a tick is due (EARLY_S), and how long it takes to park one
TRIES_MAX = 8  # of a write that others' writes come before
ASKED_S = 30.0  # for storing a job that was asked for, also while its lane is full

Change = Callable[[ScheduleDocument], ScheduleDocument]


class Added(NamedTuple):
    """What `Schedules.add` has done."""

    document: ScheduleDocument
    action: Literal["added", "changed", "unchanged"]


class AskedJob(NamedTuple):
    """A job of `run_now`, `backfill` or `pass_tick`. `duplicate`: the tick had one before.

    `by_owner`: the owner's code makes its message, so a worker of the owner enqueues it. `seq`: in its work stream, if
    it was stored here.
    """

    job_id: str
    tick_ms: int
    duplicate: bool = False
    by_owner: bool = False
    seq: int = 0


class Schedules:
    """The schedules of one server. Without state of its own.

    Unless a method says otherwise, it raises BadInput (InvalidToken), NotFound (there is no such schedule, or the
    streams are missing: run `aiqueue apply`), Conflict (other programs write all the time), AccessDenied, QueueFull,
    Unavailable.
    """

    def __init__(self, connection: Connection, topology: Topology, key_lanes: KeyLanes | None = None) -> None:
        self._connection = connection
        self._topology = topology
        self.store = ScheduleStore(connection, topology)
        self.ticks = Ticks(connection, topology)
        self._jobs = TickJobs(connection, topology, key_lanes)

    # -- reading

    async def get(self, tenant: str, schedule_id: str) -> ScheduleDocument:
        """Return a schedule. Raises DecodeError too: it is damaged, or of a newer version."""
        subjects.token("tenant", tenant)
        found = await self.store.get(tenant, subjects.token("schedule", schedule_id))
        if found is None:
            raise NotFound(f"there is no schedule {schedule_id} of {tenant}: `aiqueue schedule ls` lists all")
        return found

    async def list(self, *, tenant: str | None = None, owner: str | None = None) -> list[ScheduleDocument]:
        """Return the schedules of a tenant and an owner (None: of all), sorted by tenant and id, without those that
        this version cannot read. `store.read` has these too.
        """
        filtered = "*" if tenant is None else subjects.token("tenant", tenant)
        found: dict[tuple[str, str], ScheduleDocument] = {}
        async for each in self.store.read(filtered):
            found.pop((each.tenant, each.id), None)
            if each.document is not None and owner in (None, each.document.owner):
                found[each.tenant, each.id] = each.document
        return [found[name] for name in sorted(found)]

    # -- writing

    async def add(self, spec: ScheduleSpec, *, replaces: bool = True) -> Added:
        """Store a schedule, and park its first tick. One of the same id and owner is changed (`replaces`) or refused.

        A change keeps the pause, the counts, and, if it still is one, the next tick. A schedule that does the same
        already stays as it is. Raises BadInput for a schedule of another owner.
        """
        self.check(spec)
        await self._connection.clock.ensure(self.store.stream)
        for _ in range(TRIES_MAX):
            found = await self.store.find(spec.tenant, spec.id)
            if found.problem:
                raise BadInput(f"{found.problem}, or remove the schedule first")
            now = self._connection.clock.now()
            wanted = ScheduleDocument.of_spec(spec, now)
            former = found.document
            if former is not None:
                _check_owner(former, spec.owner)
                if former.fingerprint == wanted.fingerprint and former.generation == wanted.generation:
                    await self._park_again(former, now)
                    return Added(former, "unchanged")
                if not replaces:
                    raise BadInput(f"there is a schedule {spec.id} of {spec.tenant} already: choose another id")
                wanted = _changed(former, wanted, spec.recurrence, now)
            if wanted.next_ms is None and (former is None or former.next_ms is not None):
                raise BadInput(f"schedule {spec.id} never fires: {spec.recurrence.describe()} has no time after now")
            if former is None or len(wanted.body or b"") > len(former.body or b""):
                await self.store.require_room(wanted)
            try:
                stored = await self.store.put(replace(wanted, seq=found.seq))
            except Conflict:
                continue
            if former is not None and (former.next_ms, former.route) != (stored.next_ms, stored.route):
                await self._unpark(former)
            try:
                await self.ticks.park(stored)
            except NotFound:  # there is no stream of ticks: without one, this schedule is not to begin some day
                if former is None:
                    await self.store.delete(StoredSchedule(stored.tenant, stored.id, stored.seq, stored))
                raise
            return Added(stored, "added" if former is None else "changed")
        raise _always_conflicts(spec.tenant, spec.id)

    async def _park_again(self, document: ScheduleDocument, now: float) -> None:
        """Park the next tick of a schedule that has not changed, in case it was lost. One whose time comes is left to
        the reconciler: it may be due already, where parking does not find it, and would fire twice.
        """
        if document.next_ms is not None and document.next_ms / 1000 > now + DUE_SOON_S:
            await self.ticks.park(document)

    async def remove(self, tenant: str, schedule_id: str, *, owner: str | None = None) -> bool:
        """Remove a schedule; jobs that it has enqueued stay. Return False if there is none. `owner`: only if it is of
        this owner, else BadInput.
        """
        subjects.token("tenant", tenant)
        for _ in range(TRIES_MAX):
            found = await self.store.find(tenant, subjects.token("schedule", schedule_id))
            if found.document is None and not found.problem:
                return False
            if owner is not None and found.document is not None:
                _check_owner(found.document, owner)
            try:
                await self.store.delete(found)
            except Conflict:
                continue
            if found.document is not None:
                await self._unpark(found.document)
            return True
        raise _always_conflicts(tenant, schedule_id)

    async def _unpark(self, former: ScheduleDocument) -> None:
        """Remove the parked tick of a schedule that has changed or is removed. Another program that has since made this
        tick the next one again has found it parked: then it is parked anew. Never raises.
        """
        await self.ticks.unpark(former)
        with contextlib.suppress(AIQueueError):
            now = (await self.store.find(former.tenant, former.id)).document
            if now is not None and (now.next_ms, now.route) == (former.next_ms, former.route):
                await self.ticks.park(now)

    async def pause(self, tenant: str, schedule_id: str, *, by: str = "", reason: str = "") -> ScheduleDocument:
        """Have a schedule fire no more until it is resumed. One that is paused stays paused since then."""
        for name, value in (("by", by), ("reason", reason)):
            if len(text(name, value)) > TEXT_MAX:
                raise BadInput(f"{name} has {len(value):,} characters, above the limit of {TEXT_MAX}")

        def pause(document: ScheduleDocument) -> ScheduleDocument:
            since = round(self._connection.clock.now(), 3) if document.paused is None else document.paused.since
            return replace(document, paused=SchedulePause(since, by, reason))

        return await self._edit(tenant, schedule_id, pause)

    async def resume(self, tenant: str, schedule_id: str) -> ScheduleDocument:
        """Have a paused schedule fire again, from its next tick after now. Ticks of the pause are not misfires."""

        def resume(document: ScheduleDocument) -> ScheduleDocument:
            if document.paused is None:
                return document
            return replace(document, paused=None, next_ms=next_ms(document.recurrence, self._connection.clock.now()))

        document = await self._edit(tenant, schedule_id, resume)
        await self.ticks.park(document)
        return document

    async def _edit(self, tenant: str, schedule_id: str, change: Change) -> ScheduleDocument:
        await self._connection.clock.ensure(self.store.stream)
        for _ in range(TRIES_MAX):
            document = await self.get(tenant, schedule_id)
            changed = change(document)
            if changed == document:
                return document
            try:
                return await self.store.put(changed)
            except Conflict:
                continue
        raise _always_conflicts(tenant, schedule_id)

    # -- schedules that are declared no more

    async def find_undeclared(self, owner: str) -> Sequence[UndeclaredSchedule]:
        """Return the schedules of an owner that its code declares no more, sorted by tenant and id: what `prune` would
        remove.

        Its workers that run or ran within 90 seconds decide; if there are none, the newest ones. Raises NotFound: no
        worker of this owner ran in the last 30 days.
        """
        subjects.token("owner", owner)
        await self._connection.clock.ensure(self.store.stream)
        stored = await self.list()  # before the sets: a worker stores its set first, and then its schedules
        sets = await DeclaredSets(self.store).list(owner)
        documents = [each for each in stored if each.owner == owner]
        if sets:
            return find_undeclared(sets, documents, self._connection.clock.now())
        unknown = f"no worker with owner {owner!r} ran in the last 30 days"
        if documents:
            advice = f"remove its schedules one by one: `aiqueue schedule rm ID --tenant TENANT --owner {owner}`"
            raise NotFound(f"{unknown}, so what it declares is unknown: start one, or {advice}")
        owners = ", ".join(sorted({each.owner for each in stored} - {""})) or "none"
        raise NotFound(f"{unknown}, and it has no schedules: check the name (owners with schedules: {owners})")

    async def prune(self, owner: str) -> Sequence[UndeclaredSchedule]:
        """Remove these schedules, and return those that were removed. Raises as `find_undeclared`."""
        removed = []
        for each in await self.find_undeclared(owner):
            with contextlib.suppress(BadInput):  # it has become another owner's
                if await self.remove(each.tenant, each.id, owner=owner):
                    removed.append(each)
        return removed

    # -- jobs that are asked for

    async def run_now(self, tenant: str, schedule_id: str) -> AskedJob:
        """Enqueue a job of a schedule at once, for the time of now, also while it is paused. Its ticks stay.

        While its lane is full, this waits up to 30 seconds.
        """
        await self._connection.clock.ensure(self.store.stream)
        document = await self.get(tenant, schedule_id)
        tick_ms = to_ms(self._connection.clock.now())
        return await self._ask(document, tick_ms, tick_job_id(document.id, tick_ms, "-now"))

    async def backfill(
        self, tenant: str, schedule_id: str, start: float, end: float, *, limit: int = 1_000
    ) -> Sequence[AskedJob]:
        """Enqueue the jobs of a schedule's ticks from `start` to before `end`, seconds since the epoch, oldest first.

        Those that have a job are left out, as far as the job's stream or journal still knows it. Raises BadInput for an
        end in the future, and for more than `limit` ticks (up to 10,000); UnknownFamily, because jobs of a family that
        the stream files lack cannot be looked for.
        """
        whole_number("limit", limit, 1, BACKFILL_MAX)
        await self._connection.clock.ensure(self.store.stream)
        document = await self.get(tenant, schedule_id)
        if not start < end <= self._connection.clock.now():
            raise BadInput("a backfill must start before it ends, and end in the past")
        ticks = list_ticks(document.recurrence, start, end, limit + 1)
        if len(ticks) > limit:
            raise BadInput(f"there are more than {limit:,} ticks: backfill a shorter time, or raise the limit")
        self._topology.family(document.family)
        stored = await self._jobs.find_in_lanes(document, max(start, 1.0))
        ids = {each: tick_job_id(document.id, each) for each in ticks}
        return [await self._ask(document, tick, each, is_stored=each in stored) for tick, each in ids.items()]

    async def _ask(self, document: ScheduleDocument, tick_ms: int, job_id: str, *, is_stored: bool = False) -> AskedJob:
        if is_stored or await self._jobs.find_in_journal(document, job_id) is not None:
            return AskedJob(job_id, tick_ms, duplicate=True)
        if document.body is None:
            await self.ticks.ask(document, tick_ms, job_id)
            return AskedJob(job_id, tick_ms, by_owner=True)
        spec = await self._jobs.make(document, tick_ms)
        child = await self._jobs.store(document, spec, tick_ms, job_id, on_full="wait", timeout_s=ASKED_S)
        return AskedJob(job_id, tick_ms, child.duplicate, seq=child.seq)

    async def pass_tick(self, tenant: str, schedule_id: str) -> AskedJob | None:
        """Enqueue the job of a schedule's next tick before its time, and go on to the tick after it; for tests.

        None: the schedule is paused, has no next tick, or skips it because the former job has not ended.
        """
        clock = self._connection.clock
        await clock.ensure(self.store.stream)
        document = await self.get(tenant, schedule_id)
        tick_ms, last = document.next_ms, document.last
        if tick_ms is None or document.paused is not None:
            return None
        is_skipped = document.overlap == "skip" and last is not None and await self._jobs.is_unfinished(tenant, last)
        asked = None if is_skipped else await self._ask(document, tick_ms, tick_job_id(document.id, tick_ms))

        def go_on(found: ScheduleDocument) -> ScheduleDocument:
            if found.next_ms != tick_ms:
                return found  # a worker has fired it meanwhile
            after = replace(found, next_ms=next_ms(found.recurrence, tick_ms / 1000))
            if asked is None:
                return replace(after, skipped=after.skipped + 1)
            fired = FiredTick(tick_ms, asked.job_id, found.family, asked.seq, round(clock.now(), 3))
            return replace(after, last=fired, fired=after.fired + 1)

        after = await self._edit(tenant, schedule_id, go_on)
        await self.ticks.unpark(document)
        await self.ticks.park(after)
        return asked

    # -- checks

    def check(self, spec: ScheduleSpec) -> None:
        """Raises BadInput for a schedule that could not be stored, or whose jobs could not. Asks no server."""
        subjects.token("tenant", spec.tenant)
        subjects.token("schedule", spec.id)
        if not isinstance(spec.recurrence, Recurrence):
            raise BadInput(
                'recurrence must be a Cron, an Every, a Calendar or a Once, such as Cron("@daily"), '
                f"not {spec.recurrence!r:.80}"
            )
        if spec.owner:
            subjects.token("owner", spec.owner)
        if spec.owner == ANY_ROUTE:
            raise BadInput(f"owner {ANY_ROUTE!r} is reserved for aiqueue: choose another name")
        if not isinstance(spec.kind, str) or not KIND.fullmatch(spec.kind):
            raise BadInput(f"kind {spec.kind!r} must be 1 to 128 characters of A-Z a-z 0-9 _ . : -")
        if spec.body is None and not spec.owner:
            raise BadInput(f"schedule {spec.id} needs a message, or an owner whose code makes one for each tick")
        if spec.body is not None and len(spec.body) > BODY_MAX:
            advice = "have the handler read large data, or schedule a function of the tick that makes the message"
            raise TooLarge(len(spec.body), BODY_MAX, advice=advice)
        for name, value, known in (
            ("misfire", spec.misfire, get_args(Misfire)),
            ("overlap", spec.overlap, get_args(Overlap)),
        ):
            if value not in known:
                raise BadInput(f"{name} must be one of {', '.join(known)}, not {value!r:.80}")
        if spec.misfire == "all" and spec.overlap == "skip":
            raise BadInput('misfire="all" and overlap="skip" contradict each other: use misfire="once"')
        if spec.deadline_s is not None:
            parse_duration("deadline", spec.deadline_s)
        whole_number("bound", spec.bound, 1, BOUND_MAX)
        if not 0 <= spec.grace_s <= GRACE_MAX_S:
            raise BadInput(f"grace must be from 0 to {GRACE_MAX_S / 86_400:g} days, not {spec.grace_s:g} s")
        if (size := len(block(dict(spec.headers)))) > HEADERS_MAX:
            raise TooLarge(size, HEADERS_MAX, headers=True)
        text("priority", spec.priority)
        self._jobs.check(ScheduleDocument.of_spec(spec, 0.0))


def list_ticks(recurrence: Recurrence, start: float, end: float, count: int) -> list[int]:
    """Return the first `count` ticks from `start` to before `end`, in milliseconds."""
    found: list[int] = []
    at = start - 0.001
    while len(found) < count and (tick := recurrence.next_after(at)) is not None and tick < end:
        found.append(to_ms(tick))
        at = tick
    return found


def _check_owner(document: ScheduleDocument, owner: str) -> None:
    if document.owner != owner:
        whose = f"is declared by {document.owner!r}" if document.owner else "was added by a client"
        raise BadInput(f"schedule {document.id} of {document.tenant} {whose}: choose another id, or remove it first")


def _changed(
    former: ScheduleDocument, wanted: ScheduleDocument, recurrence: Recurrence, now: float
) -> ScheduleDocument:
    """Return a schedule that does what is wanted from now on. A tick that is being fired, and still is one, stays."""
    following = wanted.next_ms
    if former.recurrence_document == wanted.recurrence_document:
        following = former.next_ms
    elif former.next_ms is not None and former.next_ms / 1000 <= now and former.paused is None:
        kept = next_ms(recurrence, former.next_ms / 1000 - 0.001)
        following = kept if kept == former.next_ms else following
    return replace(
        wanted, next_ms=following, version=former.version + 1, created_at=former.created_at, paused=former.paused,
        waiting_ms=former.waiting_ms,
        last=former.last, missed=former.missed, fired=former.fired, misfired=former.misfired, skipped=former.skipped,
        failed=former.failed, error=former.error, extra=former.extra,
    )  # fmt: skip


def _always_conflicts(tenant: str, schedule_id: str) -> Conflict:
    return Conflict(
        f"schedule {schedule_id} of {tenant}: other programs wrote before each of {TRIES_MAX} tries: try again"
    )
