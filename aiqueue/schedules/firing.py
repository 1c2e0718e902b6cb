"""What happens at a tick: its job is stored, the schedule's document says so, and its next tick is parked.

The order of these writes, and what a crash between two of them does, is in docs/decisions/schedules.md.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ..connection import Connection
from ..errors import AIQueueError, BadInput, Conflict, NotFound, QueueFull, Unavailable
from ..headers import ascii_line
from ..lanes import WarnOnce
from ..topology import Topology
from ..units import Backoff
from . import attendance
from .attendance import Attendance
from .document import FiredTick, Missed, ScheduleDocument, next_ms, tick_job_id
from .jobs import MakerFailed, NoMaker, TickJobs
from .recurrence import Recurrence, iso_time, to_ms
from .store import ScheduleStore
from .ticks import DueTick, Ticks

log = logging.getLogger(__name__)

READY_S = 0.004  # how long before a tick its schedule is read, and its job made
SURE_S = 1.0  # a tick that is later than this may have been another worker's, and its job may be stored
STILL_S = 60.0  # a process that stands still for so long between its look and its write looks again
STEP_S = 0.25  # how often a catch-up is noted; a pause or a change takes effect then
COUNT_MAX = 1_000  # missed ticks that are counted
CONFLICTS_MAX = 8
HANDED_BACK_MAX = 10  # deliveries of a tick to workers that lack its family, about 10 s
FULL = Backoff(first=1, factor=2, cap=30, jitter=0.5)  # how long a tick waits whose lane is full


class Decision(NamedTuple):
    """Which ticks get a job, oldest first, and up to which tick this decides. All in milliseconds.

    `missed`: how many ticks were missed, 0 for a tick in time. `more`: there were more than were counted.
    """

    fire: list[int]
    through: int
    missed: int = 0
    more: bool = False


def decide(document: ScheduleDocument, recurrence: Recurrence, now: float, *, is_in_time: bool = False) -> Decision:
    """Decide about the next tick of a schedule, whose time has come, and about all that are due since then.

    A tick that is later than the grace was missed. Then the policy holds for all ticks up to now. `is_in_time`:
    it was not missed, however late it is.
    """
    tick = document.next_ms
    assert tick is not None

    def fires_at(tick_ms: int) -> float:
        return recurrence.jittered(document.name, tick_ms / 1000)

    if is_in_time or now - fires_at(tick) <= document.grace_s:
        return Decision([tick], tick)
    newest = [to_ms(each) for each in recurrence.latest_before(now, 2, since=tick / 1000)]
    through = max([tick, *(each for each in newest if fires_at(each) <= now)])
    count, more = _count(recurrence, tick, through)
    fire: list[int] = []
    if document.misfire == "once":
        fire = [through]
    elif document.misfire == "all":
        found = recurrence.latest_before(through / 1000, document.bound, since=tick / 1000)
        fire = [tick, *map(to_ms, found)][-document.bound :]
    return Decision(fire, through, count, more)


def _count(recurrence: Recurrence, first: int, last: int) -> tuple[int, bool]:
    """Return how many ticks there are from one to another, and whether there are more than COUNT_MAX."""
    count, tick = 1, first
    while count < COUNT_MAX and (after := next_ms(recurrence, tick / 1000)) is not None and after <= last:
        count, tick = count + 1, after
    return count, tick < last


@dataclass
class TickOutcome:
    """What became of the ticks of a decision, up to `through`, or to before `rest`, the first that is left.

    `is_full`: the lane of `rest` was full. `missed`: the misfire that begins with these ticks. `is_missed`: they belong
    to a misfire, which may have begun before.
    """

    through: int
    missed: Missed | None = None
    is_missed: bool = False
    fired: list[FiredTick] = field(default_factory=list)
    misfired: int = 0
    skipped: int = 0
    failed: int = 0
    error: str = ""
    rest: int | None = None
    is_full: bool = False

    def apply(self, document: ScheduleDocument) -> ScheduleDocument:
        """Return the schedule after these ticks."""
        # `rest` is the following tick itself, unless the schedule was changed meanwhile
        after = self.through / 1000 if self.rest is None else self.rest / 1000 - 0.001
        missed = self.missed or document.missed
        if self.is_missed and missed is not None:
            missed = missed._replace(fired=missed.fired + len(self.fired))
        return replace(
            document,
            next_ms=next_ms(document.recurrence, after),
            waiting_ms=self.rest if self.is_full else document.waiting_ms,
            last=self.fired[-1] if self.fired else document.last,
            missed=missed,
            fired=document.fired + len(self.fired),
            misfired=document.misfired + self.misfired,
            skipped=document.skipped + self.skipped,
            failed=document.failed + self.failed,
            error=self.error or ("" if self.fired else document.error),
        )


def note_missed(document: ScheduleDocument, decision: Decision, now: float) -> Missed:
    """Return what a schedule says of a misfire, without the jobs that its ticks will have. A misfire whose last ticks
    are left over, because a worker stopped, goes on.
    """
    first, former = document.next_ms or 0, document.missed
    found = Missed(first, decision.through, decision.missed, 0, round(now, 3), decision.more)
    if former is None or first > former.to_ms:
        return found
    counted, more = _count(document.recurrence, first, min(former.to_ms, decision.through))
    ticks = former.ticks + max(0, decision.missed - counted)
    return found._replace(
        from_ms=former.from_ms, ticks=ticks, fired=former.fired, more=found.more or former.more or more
    )


class Firing:
    """Fires the ticks that this worker has taken, until `stopping`: then later ones are left to other workers."""

    def __init__(
        self, connection: Connection, topology: Topology, jobs: TickJobs, taken: Attendance, stopping: asyncio.Event
    ) -> None:
        self._stopping = stopping
        self._attendance = taken
        self._clock = connection.clock
        self._families = topology.families
        self._store = ScheduleStore(connection, topology)
        self._ticks = Ticks(connection, topology)
        self._jobs = jobs
        self._warn_once = WarnOnce(log)
        self._may_write = False  # it is known that this user may write documents

    async def fire(self, due: DueTick) -> None:
        """Fire a tick whose time comes within READY_S, and those after it that are due too; then park the next one.

        The tick may be acknowledged when this returns. Raises NoMaker, BadInput (this worker cannot read the schedule),
        Unavailable and others: the tick has to come again.
        """
        document = await self._store.get(due.tenant, due.schedule_id)
        if document is None:
            return
        if due.job_id:
            await self._fire_asked(document, due)
            return
        if document.next_ms != due.tick_ms or document.route != due.route:
            await self._ticks.park(document)  # another one is the next by now, or others make its jobs
            return
        document = await self._check_rights(document)
        may_be_stored = due.tries == 0 or due.deliveries > 1  # not when it comes anew, because its lane was full
        while document is not None and document.paused is None and document.next_ms is not None:
            now, recurrence = self._clock.now(), document.recurrence
            fire_at = recurrence.jittered(document.name, document.next_ms / 1000)
            if fire_at > now + READY_S:
                break
            decision = decide(document, recurrence, now, is_in_time=await self._is_in_time(document, due, fire_at))
            if decision.fire:
                is_late = may_be_stored and now - fire_at > SURE_S
                self._hand_back_unknown(document, due.deliveries, is_late=is_late)
            document, is_full = await self._carry_out(document, decision)
            if is_full:
                if document is not None:
                    await self._wait_for_room(document, due)
                return
            may_be_stored = False
            if self._stopping.is_set():
                break
        if document is not None:
            await self._ticks.park(document)

    def _hand_back_unknown(self, document: ScheduleDocument, deliveries: int, *, is_late: bool) -> None:
        """Raises NotFound, so that the tick comes again, if a job has to be looked for in a family that this worker's
        stream files lack: another worker's may have it. After HANDED_BACK_MAX deliveries the tick fires without that.
        """
        wanted = {document.family} if is_late else set[str]()
        if document.overlap == "skip" and document.last is not None:
            wanted.add(document.last.family)
        for each in sorted(wanted - set(self._families)):
            unknown = f"schedule {document.name}: this worker's stream files have no family {each}"
            if deliveries <= HANDED_BACK_MAX:
                raise NotFound(f"{unknown}: another worker is to take the tick")
            self._warn_once(
                f"{unknown}, and no worker with this family takes ticks: its ticks are enqueued without looking for "
                "former jobs, so one may overlap or be enqueued twice"
            )

    async def _is_in_time(self, document: ScheduleDocument, due: DueTick, fire_at: float) -> bool:
        """Return whether the next tick of a schedule is late because its lane was full, or because it waited behind
        others for its turn: it was due in time, and workers took ticks then.

        One that comes for the third time has waited for something else. The ticks behind it count from their own times.
        """
        if document.waiting_ms == document.next_ms:
            return True
        if document.next_ms != due.tick_ms or self._clock.now() - fire_at <= attendance.LATE_S:
            return False
        since = await self._attendance.since(due.route)
        limit = fire_at + document.grace_s
        return document.grace_s >= attendance.BREAK_S and due.deliveries <= 2 and max(due.stored_at, since) <= limit

    async def _carry_out(self, document: ScheduleDocument, decision: Decision) -> tuple[ScheduleDocument | None, bool]:
        """Store the jobs of a decision, and note them in the schedule, after each STEP_S.

        Ends early when the ticker stops or the schedule is paused, changed or removed; the next tick is then the first
        that is left. Returns the schedule as it is then, None if it was removed, and whether a lane was full.
        """
        goes_on = document.missed is not None and (document.next_ms or 0) <= document.missed.to_ms
        outcome = TickOutcome(decision.through, is_missed=decision.missed > 0 or goes_on)
        if decision.missed:
            outcome.misfired = decision.missed - min(decision.missed, len(decision.fire))
            outcome.missed = note_missed(document, decision, self._clock.now())
            log.warning(
                "schedule %s: %s%d ticks from %s to %s were missed; policy %s enqueues %d of them", document.name,
                "more than " if decision.more else "", decision.missed, iso_time(document.next_ms or 0),
                iso_time(decision.through), document.misfire, len(decision.fire),
            )  # fmt: skip
        stored = dict[str, int]()
        if decision.fire:
            oldest = document.recurrence.jittered(document.name, decision.fire[0] / 1000)
            stored = await self._jobs.list_forgotten(document, oldest)
        todo = deque(decision.fire)
        while True:
            await self._enqueue(document, todo, outcome, stored)
            after = await self._note(document, outcome)
            if outcome.rest is None or outcome.is_full or self._stopping.is_set() or after is None:
                return after, outcome.is_full
            if after.paused is not None or (after.version, after.next_ms) != (document.version, outcome.rest):
                return after, False
            document, outcome = after, TickOutcome(decision.through, is_missed=outcome.is_missed)

    async def _check_rights(self, document: ScheduleDocument) -> ScheduleDocument | None:
        """Write the document as it is, once: who may not write documents is not to store jobs, again and again.

        Raises AccessDenied.
        """
        if self._may_write:
            return document
        try:
            stored: ScheduleDocument | None = await self._store.put(document)
        except Conflict:
            stored = await self._store.get(document.tenant, document.id)
            return None if stored is None or stored.next_ms != document.next_ms else stored
        self._may_write = True
        return stored

    async def _enqueue(
        self, document: ScheduleDocument, todo: deque[int], outcome: TickOutcome, stored: Mapping[str, int]
    ) -> None:
        """Store the jobs of ticks, oldest first, for about STEP_S, until the ticker stops, or until a lane is full."""
        last, first, until = document.last, todo[0] if todo else 0, time.monotonic() + STEP_S
        while todo:
            tick_ms = todo[0]
            if tick_ms != first and (self._stopping.is_set() or time.monotonic() > until):
                outcome.rest = tick_ms
                return
            job_id = tick_job_id(document.id, tick_ms)
            if (
                document.overlap == "skip"
                and last is not None
                and last.job_id != job_id
                and await self._jobs.is_unfinished(document.tenant, last)
            ):
                outcome.skipped += 1
                todo.popleft()
                continue
            try:
                seq = await self._enqueue_once(document, tick_ms, job_id, stored)
            except (QueueFull, NotFound) as error:
                log.debug("schedule %s: its lane takes no job: %s", document.name, error)
                outcome.rest, outcome.is_full = tick_ms, True
                return
            except AIQueueError as error:
                if not isinstance(error, BadInput):
                    raise
                self._note_failure(document, outcome, tick_ms, error)
            except NoMaker:
                raise
            except Exception as error:  # noqa: BLE001  (of the owner's function)
                self._note_failure(document, outcome, tick_ms, error)
            else:
                last = FiredTick(tick_ms, job_id, document.family, seq, round(self._clock.now(), 3))
                outcome.fired.append(last)
                outcome.error = ""
            todo.popleft()

    async def _enqueue_once(
        self, document: ScheduleDocument, tick_ms: int, job_id: str, stored: Mapping[str, int]
    ) -> int:
        """Store the job of a tick, unless it is known to have been stored: it has a journal, which knows it once it has
        ended, or an attempt of it; or it is one of `stored`. Return its sequence.
        """
        fire_at = document.recurrence.jittered(document.name, tick_ms / 1000)
        if self._clock.now() - fire_at > SURE_S:
            found = await self._jobs.find_in_journal(document, job_id)
            found = stored.get(job_id) if found is None else found
            if found is not None:
                return found
        looked_at = time.time()  # not the monotonic clock, which a suspended machine stops
        spec = await self._jobs.make(document, tick_ms)
        while (early_s := fire_at - self._clock.now()) > 0:  # noqa: ASYNC110  (uvloop wakes up to 1 ms too early)
            await asyncio.sleep(early_s)
        if time.time() - looked_at > STILL_S:  # the stream may have forgotten the ids of jobs that others have stored
            raise Unavailable(f"{job_id}: this process stood still, and another one may have had the tick")
        return (await self._jobs.store(document, spec, tick_ms, job_id)).seq

    @staticmethod
    def _note_failure(document: ScheduleDocument, outcome: TickOutcome, tick_ms: int, error: Exception) -> None:
        outcome.failed += 1
        text = str(error) if isinstance(error, MakerFailed) else f"{type(error).__name__}: {error}"
        outcome.error = ascii_line(text)
        log.error("schedule %s: the tick %s has no job: %s", document.name, iso_time(tick_ms), outcome.error)

    async def _note(self, document: ScheduleDocument, outcome: TickOutcome) -> ScheduleDocument | None:
        """Store what became of the ticks, and return the schedule as it is then; None if it was removed meanwhile."""
        if outcome.is_full and outcome.rest == document.next_ms == document.waiting_ms:
            return document
        before: ScheduleDocument | None = document
        tick_ms = document.next_ms
        for _ in range(CONFLICTS_MAX):
            if before is None or before.next_ms != tick_ms:
                return before  # another worker had the tick too and was first, or its schedule has another next one
            try:
                return await self._store.put(outcome.apply(before))
            except Conflict:
                before = await self._store.get(document.tenant, document.id)
        raise Conflict(f"schedule {document.name}: other programs wrote before each of {CONFLICTS_MAX} tries")

    async def _wait_for_room(self, document: ScheduleDocument, due: DueTick) -> None:
        """Have a tick come again whose lane is full."""
        if document.next_ms == document.waiting_ms:
            tries = 1 + (due.tries if due.tick_ms == document.next_ms else 0)
            await self._ticks.park(document, at=self._clock.now() + FULL.delay_s(tries), tries=tries)
        else:
            await self._ticks.park(document)

    async def _fire_asked(self, document: ScheduleDocument, due: DueTick) -> None:
        """Enqueue one job that somebody has asked for. A full lane is tried again. The schedule goes on as it was."""
        try:
            if await self._jobs.find_in_journal(document, due.job_id) is not None:
                return  # a message that came again, or was asked for twice
            spec = await self._jobs.make(document, due.tick_ms)
            await self._jobs.store(document, spec, due.tick_ms, due.job_id)
        except (QueueFull, NoMaker):
            raise
        except AIQueueError as error:
            if not isinstance(error, BadInput):
                raise
            log.error("schedule %s: the job %s that was asked for: %s", document.name, due.job_id, error)  # noqa: TRY400
        except Exception:
            log.exception("schedule %s: making the job %s that was asked for failed", document.name, due.job_id)
