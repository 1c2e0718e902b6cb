"""What is stored of one job, and the state that follows from it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .. import headers, subjects
from ..connection import Stored
from ..enqueue import DeadLetter, Enqueued, ParkedJob
from ..errors import JobState
from ..journal import CANCELLED, RESULT, RETRY, Entry
from ..topology import Family


@dataclass(slots=True)
class FoundJob:
    """Everything that is stored of a job id in one family and tenant.

    `stored` is the job in its lane. If it was delivered at least once, `delivered` is set, and `delivered_at` if the
    server still knows when. `has_consumer`: the lane has one; `in_line`: it has none because others have their turn.
    Who describes the job reads these four. `limited`: lanes had more jobs than were read.
    """

    family: Family
    tenant: str
    parked: list[ParkedJob] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    entries_cut: bool = False
    letter: DeadLetter | None = None
    stored: Stored | None = None
    has_consumer: bool = False
    in_line: bool = False
    delivered: bool = False
    delivered_at: float | None = None
    limited: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no trace of the job."""
        return not (self.parked or self.entries or self.letter or self.stored)

    @property
    def head(self) -> Entry | None:
        """The newest entry of the journal, of any run."""
        return self.entries[-1] if self.entries else None

    @property
    def run_head(self) -> Entry | None:
        """The newest entry of the journal, if the job in the lane wrote it."""
        head = self.head
        return head if head is not None and self.stored is not None and is_written_by(head, self.stored) else None

    @property
    def unique(self) -> str:
        """The caller's key, as far as anything that is stored names it."""
        messages = [each.stored.headers for each in self.parked] + ([self.stored.headers] if self.stored else [])
        keys = [headers.unique_key(each) for each in messages] + ([self.letter.unique] if self.letter else [])
        return next(filter(None, [*keys, *(each.unique for each in reversed(self.entries))]), "")

    @property
    def tick(self) -> tuple[str, float | None]:
        """The schedule that has enqueued the job, and the time of its tick, as far as anything that is stored names
        them; "" and None otherwise.
        """
        messages = [each.stored.headers for each in self.parked] + ([self.stored.headers] if self.stored else [])
        messages += [self.letter.headers] if self.letter else []
        found = [(each.get(headers.SCHEDULED_BY, ""), each.get(headers.SCHEDULED_FOR, "")) for each in messages]
        ticks = [(schedule, headers.decimal(tick)) for schedule, tick in found]
        ticks += [(each.schedule, each.scheduled_for) for each in reversed(self.entries)]
        return next((each for each in ticks if each[0]), ("", None))

    @property
    def limit_key(self) -> str:
        """The value of the family's `limit_key`, as the header of a stored message names it; "" without one."""
        messages = [self.stored.headers] if self.stored else [each.stored.headers for each in reversed(self.parked)]
        messages += [self.letter.headers] if self.letter else []
        return next(filter(None, map(headers.limit_key, messages)), "")

    @property
    def is_complete(self) -> bool:
        """Whether the lane need not be searched. A failed job without a dead letter may have been replayed."""
        return bool(self.parked or self.letter) or (self.head is not None and self.head.event == RESULT)

    def to_enqueued(self, job_id: str, parking_stream: str) -> Enqueued:
        """Return the job as the client that enqueued it knows it."""
        lane = subjects.Lane(self.family.name, self.tenant, "*")
        if self.stored is not None:
            run, _ = headers.run(self.stored.headers, self.stored.seq, self.stored.time)
            lane = subjects.parse_lane(self.stored.subject) or lane
            return Enqueued(job_id, lane, self.family.stream, run, True)
        if self.parked:
            last = self.parked[-1]
            if last.run:
                return Enqueued(job_id, last.subject.lane, self.family.stream, last.run, True)
            seq = last.stored.seq
            return Enqueued(job_id, last.subject.lane, parking_stream, seq, True, last.due_at, last.parking_id)
        if self.head is not None and not self.head.run:  # delayed, and cancelled before it was due
            return Enqueued(job_id, lane, self.family.stream, 0, True, None, self.head.parking_id)
        run = self.head.run if self.head is not None else 1
        return Enqueued(job_id, self.letter.lane if self.letter else lane, self.family.stream, run, True)


def is_cancelled(found: FoundJob) -> bool:
    """Whether the job in the lane is cancelled, and only its message is left."""
    return found.run_head is not None and found.run_head.event == CANCELLED


def has_declared_lane(found: FoundJob, stored: Stored) -> bool:
    """Whether the lane of a stored job is one that its family declares."""
    lane = subjects.parse_lane(stored.subject)
    if lane is None or lane.priority not in found.family.priorities:
        return False
    return not lane.key or found.family.limit_key is not None


def state_in_lane(found: FoundJob, stored: Stored) -> tuple[JobState, str, float | None]:
    """Return the state of a job in its lane, after the lane's consumer was read."""
    if is_cancelled(found):
        return "cancelled", "a worker will remove it from its lane", None
    if not has_declared_lane(found, stored):
        return "queued", "in a lane that its family does not declare: no worker will run it", None
    if found.in_line:
        return "queued", "its lane stands in line: workers have more lanes with jobs than they pull on at a time", None
    if not found.has_consumer:
        return "queued", "no worker serves its lane at the moment", None
    if not found.delivered:
        return "queued", "", None
    head = found.run_head
    if head is not None and head.event == RETRY and isinstance(head.data, dict):
        delay_s = head.data.get("delay_s")
        if isinstance(delay_s, int | float) and 0 <= delay_s < 1e9:  # other programs can write to a journal
            due_at = head.time + delay_s
            if due_at > time.time():
                return "retrying", "", due_at
    return "in_flight", "delivered to a worker and not settled: it runs, or waits to be delivered again", None


def state_when_parked(job: ParkedJob) -> tuple[JobState, str, float | None]:
    """Return the state of a parked job, a note, and when it is due."""
    if job.subject.is_due:
        return "parked", "due: waits for a worker to move it to its lane", job.due_at
    if headers.WAITED in job.stored.headers:
        return "parked", "due, and its lane is full: tried again within a minute", job.due_at
    if headers.REASON in job.stored.headers:
        return "parked", "it failed, and there was no space for its dead letter", job.due_at
    if job.subject.dedup_key.startswith("w") and headers.GATHER in job.stored.headers:
        return "waiting", "for its children", job.due_at
    return "retrying" if headers.ATTEMPT in job.stored.headers else "parked", "", job.due_at


def lane_and_kind(found: FoundJob) -> tuple[subjects.Lane | None, str | None]:
    """Return the lane and the kind of a job, as far as what is stored names them."""
    default = found.family.default_kind
    if found.stored is not None:
        return subjects.parse_lane(found.stored.subject), found.stored.headers.get(headers.KIND) or default
    if found.parked:
        last = found.parked[-1]
        return last.subject.lane, last.stored.headers.get(headers.KIND) or default
    if found.letter is not None:
        return found.letter.lane, found.letter.kind
    return None, (found.head.kind or None) if found.head is not None else None


def is_written_by(entry: Entry, stored: Stored) -> bool:
    """Whether an entry was written by this stored job, and not by an earlier one of the same id."""
    job_headers = stored.headers
    if entry.parking_id and entry.parking_id == headers.parking_id(job_headers):
        return True
    run = headers.number(job_headers.get(headers.RUN, "")) or stored.seq
    enqueued_at = headers.decimal(job_headers.get(headers.ENQUEUED, "")) or stored.time
    return entry.run == run and entry.time >= enqueued_at
