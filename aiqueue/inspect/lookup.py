"""One job, wherever it is: in its queue, in its journal, among the dead letters. Read by `stats`."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .. import codec, headers, subjects
from ..connection import Connection, Stored, timestamp
from ..enqueue import DeadLetter, DeadLetters, Enqueued, Filter, Parking, Waiting
from ..errors import BadInput, DecodeError, NotFound
from ..journal import CANCELLED, FAILED, RESULT, RETRY, Entry, entry_of
from ..topology import Family, Topology
from .timeline import BORN, Step, timeline

ENTRIES_MAX = 1_000  # journal entries of a job that are read, from its first on
ENTRIES_BYTES_MAX = 16 * 1024 * 1024  # and so much of them: chunks may be large
SCAN_JOBS_MAX = 10_000  # stored jobs looked at for one without a journal, over all families
SCAN_BYTES_MAX = 64 * 1024 * 1024
LOOKS = 2  # a job that moved from one place to another between two reads is found by the second look

State = Literal["queued", "parked", "in_flight", "retrying", "done", "failed", "cancelled", "ended", "unknown"]

_STREAM_ID = re.compile(r"s(\d{1,19})-([0-9a-f]{1,16})")  # a plain publisher's job without a key: see runner


@dataclass(frozen=True, slots=True)
class JobStats:
    """What is known of one job.

    `state`: **queued** (never delivered since its lane was made); **parked** (delayed: waits outside of its lane until
    `next_attempt_at`); **in_flight** (delivered and not settled: it runs,
    or waits to be delivered again); **retrying** (failed, next attempt at `next_attempt_at`); **done** (`result`);
    **cancelled**; **failed** (`failure` has reason and error; `dead_seq` is its dead letter, None once that is gone);
    **ended** (it began, is stored no more, and left no result); **unknown** (its journal is there, the job was not
    found among those looked at). `note` is a sentence where the state alone would mislead.

    `timeline` is what happened to it. `entries` is its journal, the oldest first, at most ENTRIES_MAX and
    ENTRIES_BYTES_MAX, and the last one (`entries_cut`: some are left out, of the timeline too). Times are seconds since
    the epoch.
    """

    job_id: str
    family: str
    tenant: str
    state: State
    priority: str | None = None
    kind: str | None = None
    attempt: int | None = None
    enqueued_at: float | None = None
    next_attempt_at: float | None = None
    result: Any = None
    failure: Mapping[str, Any] | None = None
    dead_seq: int | None = None
    timeline: tuple[Step, ...] = ()
    entries: tuple[Entry, ...] = ()
    entries_cut: bool = False
    note: str = ""


async def job(
    connection: Connection, topology: Topology, job_id: str, *, family: str | None = None, tenant: str | None = None
) -> JobStats:
    """One job, looked for in the journals, the dead letters and the queues, everywhere or where `family` and `tenant`
    say. Queues are not indexed by job: a job without a journal is looked for among the first SCAN_JOBS_MAX stored
    jobs and SCAN_BYTES_MAX bytes, and one with a result not at all: an id that was used again is told by its last
    result until its journal says more.

    Raises NotFound, UnknownFamily, InvalidToken, and BadInput where several tenants or families have this id.
    """
    search = _Search(connection, topology, job_id, family, tenant)
    return await search.tell(await search.run())


async def find(
    connection: Connection, topology: Topology, job_id: str, *, family: str | None = None, tenant: str | None = None
) -> Found:
    """The same search, and what it found itself."""
    return await _Search(connection, topology, job_id, family, tenant).run()


@dataclass(slots=True)
class Found:
    """What was found of the job in one family and tenant."""

    family: Family
    tenant: str
    parked: list[Waiting] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    cut: bool = False
    letter: DeadLetter | None = None
    stored: Stored | None = None
    delivered: bool = False  # the stored job, at some time
    delivered_at: float | None = None  # where the server knows that it was this one

    @property
    def head(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    @property
    def over(self) -> bool:
        """Whether it needs no look at the queue: a failed job without a dead letter may have been replayed."""
        return bool(self.parked or self.letter) or (self.head is not None and self.head.event == RESULT)

    def enqueued(self, job_id: str, parking: str) -> Enqueued:
        """The job as whoever enqueued it knows it; `parking` is the stream of parked jobs."""
        lane = subjects.Lane(self.family.name, self.tenant, "*")
        if self.stored is not None:
            run, _ = headers.run(self.stored.headers, self.stored.seq, self.stored.time)
            lane = subjects.parse_lane(self.stored.subject) or lane
            return Enqueued(job_id, lane, self.family.stream, run, True)
        if self.parked:
            last = self.parked[-1]
            if last.run:
                return Enqueued(job_id, last.place.lane, self.family.stream, last.run, True)
            return Enqueued(job_id, last.place.lane, parking, last.stored.seq, True, last.due, last.word)
        if self.head is not None and not self.head.run:  # it was taken back before it had a place
            return Enqueued(job_id, lane, self.family.stream, 0, True, None, self.head.word)
        run = self.head.run if self.head is not None else 1
        return Enqueued(job_id, self.letter.lane if self.letter else lane, self.family.stream, run, True)


class _Search:
    def __init__(
        self, connection: Connection, topology: Topology, job_id: str, family: str | None, tenant: str | None
    ) -> None:
        self._connection = connection
        self._topology = topology
        self._job_id = subjects.token("job id", job_id)
        self._tenant = None if tenant is None else subjects.token("tenant", tenant)
        self._families = topology.work_families if family is None else (topology.family(family),)
        if self._families[0].role != "work":
            raise BadInput(f"family {family} has mailboxes and no jobs")
        self._family = family
        self._places: dict[tuple[str, str], Found] = {}
        self._jobs_left, self._bytes_left = SCAN_JOBS_MAX, SCAN_BYTES_MAX
        self._limited = False  # there were more jobs to look at than the bounds allow

    async def run(self) -> Found:
        for _ in range(LOOKS):
            for each in self._families:
                await self._read_journal(each)
            await self._read_parked()
            await self._read_dead()
            self._refuse_several()
            if not any(place.over for place in self._places.values()):
                await self._read_queues()
                self._refuse_several()
            if self._places or self._limited:
                break
        if not self._places:
            raise NotFound(self._nothing())
        place, *_ = self._places.values()
        return place

    def _place(self, name: str, tenant: str) -> Found:
        return self._places.setdefault((name, tenant), Found(self._topology.family(name), tenant))

    def _refuse_several(self) -> None:
        if len(self._places) > 1:
            where = ", ".join(f"{name} of {tenant}" for name, tenant in sorted(self._places))
            raise BadInput(f"job {self._job_id} is there more than once ({where}): name the family and the tenant")

    def _nothing(self) -> str:
        where = f" of {self._tenant}" if self._tenant else ""
        where += f" in {self._family}" if self._family else ""
        if self._limited:
            looked = SCAN_JOBS_MAX - self._jobs_left
            hint = f"only the first {looked:,} stored jobs were looked at, and there are more"
            hint += "" if self._tenant and self._family else "; name its family and tenant"
        else:
            hint = "it was never stored, or it ended and its result has expired or was not kept"
        return f"no trace of job {self._job_id}{where}: {hint}"

    async def _read_journal(self, declared: Family) -> None:
        if declared.journal is None:
            return
        stream = self._topology.journal_stream.name
        subject = subjects.journal(declared.journal, self._tenant or "*", self._job_id)
        count = size_bytes = 0
        with contextlib.suppress(NotFound):
            async for stored in self._connection.read(stream, subject):
                place = self._place(declared.name, stored.subject.split(".")[-2])
                if count >= ENTRIES_MAX or size_bytes >= ENTRIES_BYTES_MAX:
                    last = await self._connection.last(stream, stored.subject)
                    place.cut = True
                    if last is not None:
                        place.entries.append(entry_of(last))
                    return
                count, size_bytes = count + 1, size_bytes + len(stored.data)
                place.entries.append(entry_of(stored))

    async def _read_parked(self) -> None:
        lane = subjects.Lane(self._family or "*.*", self._tenant or "*", "*")
        with contextlib.suppress(NotFound):
            for each in await Parking(self._connection, self._topology).of(lane, self._job_id):
                if each.place.lane.family in self._topology.families:
                    self._place(each.place.lane.family, each.place.lane.tenant).parked.append(each)

    async def _read_dead(self) -> None:
        wanted = Filter(family=self._family, tenant=self._tenant, job_id=self._job_id)
        with contextlib.suppress(NotFound):
            async for letter in DeadLetters(self._connection, self._topology).find(wanted):
                if letter.lane.family in self._topology.families:
                    self._place(letter.lane.family, letter.lane.tenant).letter = letter  # the newest

    async def _read_queues(self) -> None:
        """Where the journal names the stored job, or the id does, one request; else a look through the queue."""
        known = list(self._places.items())
        for (name, tenant), place in known:
            declared = self._topology.family(name)
            if place.head is not None and place.head.run:
                place.stored = await self._stored(declared, place.head.run, tenant)
        if any(place.stored for _, place in known):
            return
        if known:
            pairs = [(self._topology.family(name), tenant) for (name, tenant), _ in known]
        else:
            pairs = [(declared, self._tenant or "*") for declared in self._families]
        for declared, tenant in pairs:
            stored = await self._scan(declared, tenant)
            if stored is not None:
                self._place(declared.name, stored.subject.split(".")[3]).stored = stored

    async def _stored(self, declared: Family, seq: int, tenant: str) -> Stored | None:
        try:
            stored = await self._connection.get(declared.stream, seq)
        except NotFound:
            return None
        ours = stored is not None and tenant in ("*", stored.subject.split(".")[3])
        return stored if ours and stored and _is(stored, declared, self._job_id) else None

    async def _scan(self, declared: Family, tenant: str) -> Stored | None:
        if by_place := _STREAM_ID.fullmatch(self._job_id):
            return await self._stored(declared, int(by_place[1]), tenant)
        subject = f"ai.{declared.name}.{tenant}.*"
        with contextlib.suppress(NotFound):
            async for stored in self._connection.read(declared.stream, subject):
                if self._jobs_left <= 0 or self._bytes_left <= 0:
                    self._limited = True
                    return None
                self._jobs_left -= 1
                self._bytes_left -= len(stored.data)
                if _is(stored, declared, self._job_id):
                    return stored
        return None

    async def tell(self, place: Found) -> JobStats:
        declared, tenant = place.family, place.tenant
        head, letter, stored = place.head, place.letter, place.stored
        state, note, due = await self._state(declared, tenant, place)
        steps = timeline(
            self._job_id, place.entries, stored=stored, parked=place.parked, letter=letter,
            delivered=place.delivered, delivered_at=place.delivered_at,
        )  # fmt: skip
        lane: subjects.Lane | None
        kind: str | None
        if stored is not None:
            lane, kind = subjects.parse_lane(stored.subject), stored.headers.get(headers.KIND) or declared.default_kind
        elif place.parked:
            stored = place.parked[-1].stored
            lane, kind = place.parked[-1].place.lane, stored.headers.get(headers.KIND) or declared.default_kind
        else:
            lane, kind = (letter.lane, letter.kind) if letter else (None, None)
        attempt = head.attempt if head else letter.attempt if letter else None
        if head is not None and stored is not None and not _of_this_run(head, stored):
            attempt = None
        failure: Mapping[str, Any] | None = None
        if state == "failed" and letter is not None:
            failure = {"reason": letter.reason, "error": letter.error}
        elif state == "failed" and head is not None and isinstance(head.data, dict):
            failure = {name: head.data.get(name) for name in ("reason", "error")}
        return JobStats(
            job_id=self._job_id, family=declared.name, tenant=tenant, state=state,
            priority=lane.priority if lane else None, kind=kind, attempt=attempt,
            enqueued_at=next((step.at for step in reversed(steps) if step.event in BORN), None), next_attempt_at=due,
            result=head.data if head is not None and state == "done" else None, failure=failure,
            dead_seq=letter.seq if letter else None, timeline=steps, entries=tuple(place.entries),
            entries_cut=place.cut, note=note,
        )  # fmt: skip

    async def _state(self, declared: Family, tenant: str, place: Found) -> tuple[State, str, float | None]:
        if place.stored is not None:
            return await self._state_stored(declared, tenant, place, place.stored, place.head)
        if place.parked:
            return _state_parked(place.parked[-1])
        if place.letter is not None:
            return "failed", "", None
        last = place.head.event if place.head else ""
        if last == RESULT:
            return "done", "", None
        if last == CANCELLED:
            return "cancelled", "", None
        if last == FAILED:
            return "failed", "its dead letter is gone: replayed or purged", None
        if self._limited:
            looked = SCAN_JOBS_MAX - self._jobs_left
            return "unknown", f"not among the first {looked:,} stored jobs, and more were not looked at", None
        return "ended", "it is stored no more and left no result: its handler keeps none", None

    async def _state_stored(
        self, declared: Family, tenant: str, place: Found, stored: Stored, head: Entry | None
    ) -> tuple[State, str, float | None]:
        if head is not None and head.event == CANCELLED and _of_this_run(head, stored):
            return "cancelled", "a worker will take it out of its lane", None
        lane = subjects.parse_lane(stored.subject)
        if lane is None or lane.priority not in declared.priorities:
            return "queued", "in a lane that its family does not declare: no worker will take it", None
        try:
            name = declared.lane_name(tenant, lane.priority)
            info = await self._connection.api(f"CONSUMER.INFO.{declared.stream}.{name}")
        except NotFound:
            return "queued", "no worker serves its lane at the moment", None
        if stored.seq > info["delivered"]["stream_seq"]:
            return "queued", "", None
        place.delivered = True
        if stored.seq == info["delivered"]["stream_seq"] and not info["num_redelivered"]:
            place.delivered_at = timestamp(info["delivered"]["last_active"])
        if head is not None and _of_this_run(head, stored) and head.event == RETRY and isinstance(head.data, dict):
            delay_s = head.data.get("delay_s")
            if isinstance(delay_s, int | float) and 0 <= delay_s < 1e9:  # a stranger may have written anything
                due = head.time + delay_s
                if due > time.time():
                    return "retrying", "", due
        return "in_flight", "delivered to a worker and not settled: it runs, or waits to be delivered again", None


def _of_this_run(head: Entry, stored: Stored) -> bool:
    """Whether an entry was written by this stored job, and not by an earlier one of the same id."""
    told = stored.headers
    if head.word and head.word == headers.word(told):
        return True
    run = headers.number(told.get(headers.RUN, "")) or stored.seq
    return head.run == run and head.time >= (_born(stored) or 0.0)


def _born(stored: Stored | None) -> float | None:
    """When a job was enqueued. One that has been parked between two attempts says it, having been stored anew."""
    if stored is None:
        return None
    return headers.decimal(stored.headers.get(headers.ENQUEUED, "")) or stored.time


def _state_parked(found: Waiting) -> tuple[State, str, float | None]:
    if found.place.due:
        return "parked", "its time has come: a worker is to bring it to its lane", found.due
    if headers.WAITED in found.stored.headers:
        return "parked", "its time has come, and its lane is full: it is tried again within a minute", found.due
    if headers.REASON in found.stored.headers:
        return "parked", "it ended badly, and there was no room for its dead letter", found.due
    return "retrying" if headers.ATTEMPT in found.stored.headers else "parked", "", found.due


def _is(stored: Stored, declared: Family, job_id: str) -> bool:
    """Whether a stored job has this id: the library's header, else the caller's key in a header or the body."""
    told = stored.headers
    found: Any = told.get(headers.JOB_ID)
    if not found and declared.key:
        found = told.get(declared.key) or _key_in_body(stored, declared, declared.key)
    if isinstance(found, str | int) and str(found):
        return subjects.foreign_id(str(found)) == job_id
    by_place = _STREAM_ID.fullmatch(job_id)
    if by_place is None or int(by_place[1]) != stored.seq:
        return False
    return abs(int(by_place[2], 16) - stored.time * 1e6) < 2  # microseconds, rounded either way


def _key_in_body(stored: Stored, declared: Family, key: str) -> Any:
    try:
        incoming = codec.read(
            stored.data,
            content_type=stored.headers.get(headers.CONTENT_TYPE, ""),
            kind=stored.headers.get(headers.KIND, ""),
            default_kind=declared.default_kind,
            aliases=declared.aliases,
        )
    except DecodeError:
        return None
    return incoming.data.get(key)
