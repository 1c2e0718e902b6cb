"""Reads through the stored jobs that a filter selects: in lanes, parked, and dead letters, the oldest first in each."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

from .. import headers, subjects
from ..attempt import RawJob, decode_body, decode_headers_or_defaults
from ..codec import secret_paths
from ..connection import Connection, Stored, wait_current
from ..enqueue import DeadLetter, DeadLetters, ParkedJob, parse_parked_job
from ..errors import BadInput, NotFound
from ..subjects import Lane
from ..topology import Family, Topology
from .found_job import state_when_parked
from .job_filter import IN_LANES, IN_PARKING, ListedState, ListFilter
from .stream_reads import list_consumers
from .timeline import run_and_enqueued_at

BATCH = 256
EVERYTHING = ">"  # with each page, the server counts what follows it: at once for this, a block long for other filters
SEQ_MAX = 2**63 - 1


class Source(NamedTuple):
    """Where jobs of one sort are stored: a stream, and the filter over its subjects. `family`: of lanes."""

    what: Literal["lanes", "parked", "dead"]
    stream: str
    subject: str
    family: Family | None = None


class ListCursor(NamedTuple):
    """Where a list goes on: at this sequence of this stream, and in the streams after it."""

    stream: str
    seq: int

    def __str__(self) -> str:
        return f"{self.stream}.{self.seq}"

    @classmethod
    def parse(cls, text: str) -> ListCursor:
        """Read what `str` returns. Raises BadInput."""
        stream, dot, seq = text.rpartition(".") if isinstance(text, str) else ("", "", "")
        if not dot or not subjects.TOKEN.fullmatch(stream) or not (seq.isascii() and seq.isdigit() and len(seq) < 19):
            raise BadInput(f"a cursor is what a list before has returned, such as AI_AGENT_TASKS.17, not {text!r:.80}")
        return cls(stream, int(seq))


class Match(NamedTuple):
    """A stored job that a filter selects.

    - `run`: the sequence of its run in the work stream, 0 for one that was not there yet. `parking_id`: of one from
      parking.
    - `at`: when it was enqueued or, of a dead letter, failed (seconds since the epoch).
    - `state`: None for a job in a lane of which nobody has asked whether it was delivered.
    - `data`: of its message, secrets masked. None: not read, or it cannot be; then `problem` says why.
    """

    source: Source
    stored: Stored
    lane: Lane
    job_id: str
    kind: str
    state: ListedState | None
    run: int
    parking_id: str
    at: float
    data: Mapping[str, Any] | None = None
    problem: str = ""
    parked: ParkedJob | None = None
    letter: DeadLetter | None = None

    @property
    def identity(self) -> tuple[str, ...]:
        """What the job is called wherever it is stored."""
        return self.lane.family, self.lane.tenant, self.job_id


def list_sources(topology: Topology, wanted: ListFilter) -> list[Source]:
    """Return where the jobs of a filter are stored, in the order in which they are listed."""
    found: list[Source] = []
    tenant, priority = wanted.tenant or "*", wanted.priority or "*"
    takes_all = wanted.tenant is None and wanted.priority is None
    families = topology.work_families if wanted.family is None else (topology.family(wanted.family),)
    if wanted.states & IN_LANES:
        for family in families:
            rest = ">" if family.limit_key else priority
            subject = EVERYTHING if takes_all else f"ai.{family.name}.{tenant}.{rest}"
            found.append(Source("lanes", family.stream, subject, family))
    if wanted.states & IN_PARKING:
        lane = Lane(wanted.family or "*.*", tenant, priority)
        both = subjects.parked(lane, is_due=False).replace(".at.", ".*.", 1)
        subject = EVERYTHING if takes_all and wanted.family is None else both
        found.append(Source("parked", topology.parked_stream.name, subject))
    if "failed" in wanted.states:
        letters = subjects.dead(wanted.family or "*.*", tenant)
        subject = EVERYTHING if takes_all and wanted.family is None else letters
        found.append(Source("dead", topology.dead_stream.name, subject))
    return found


class JobScan:
    """One pass through the sources of a filter.

    `searched`: how many stored messages were looked at. `unreadable`: how many of them may match, but their body, which
    decides, cannot be read. `missing`: streams that the server does not have. `behind`: streams of which a server has
    answered that lacked the newest deletions: jobs that have ended may be among those that match. `position`: where the
    next one is read.
    """

    def __init__(self, connection: Connection, topology: Topology, wanted: ListFilter) -> None:
        self.searched = self.unreadable = 0
        self.missing: list[str] = []
        self.behind: list[str] = []
        self.position: ListCursor | None = None
        self.sources = list_sources(topology, wanted)
        self._connection = connection
        self._topology = topology
        self._wanted = wanted
        self._dead = DeadLetters(connection, topology)
        self._delivered: dict[Lane, int] = {}  # of lanes that have a consumer, if the state decides
        self._decides_state = not wanted.states >= IN_LANES

    async def read(
        self, start: ListCursor | None = None, *, until: Mapping[str, int] | None = None, batch: int = BATCH
    ) -> AsyncGenerator[Match | None, None]:
        """Yield each job that matches, and None for each message that does not. `until`: the last sequences, by stream.

        Raises BadInput for a cursor of another filter, AccessDenied, Unavailable.
        """
        streams = [each.stream for each in self.sources]
        if start is not None and start.stream not in streams:
            raise BadInput(f"the cursor {start} is of a list with another filter: start from its beginning")
        await self._connection.clock.ensure(self._topology.parked_stream.name)
        for source in self.sources[streams.index(start.stream) if start is not None else 0 :]:
            first = max(1, start.seq) if start is not None and source.stream == start.stream else 1
            try:
                async with contextlib.aclosing(self.read_source(source, first, until=until, batch=batch)) as found:
                    async for each in found:
                        yield each
            except NotFound:
                self.missing.append(source.stream)
        self.position = None

    async def read_source(
        self, source: Source, first: int, *, until: Mapping[str, int] | None = None, batch: int = BATCH
    ) -> AsyncGenerator[Match | None, None]:
        """As `read`, for one source, from the sequence `first`. Raises NotFound if its stream is missing."""
        last = SEQ_MAX if until is None else until.get(source.stream, 0)
        if not await wait_current(self._connection, source.stream) and source.stream not in self.behind:
            self.behind.append(source.stream)
        if self._decides_state and source.family is not None:
            low, high = await self._read_delivered(source.family)
            if "in_flight" in self._wanted.states:  # and not "queued": nothing before and behind these is in flight
                first, last = max(first, low), min(last, high)
        now = self._connection.clock.now()
        if first > last:
            return
        read = self._connection.read(source.stream, source.subject, seq=first, batch=batch, ahead=batch >= BATCH)
        async with contextlib.aclosing(read) as messages:
            async for stored in messages:
                if stored.seq > last:
                    return
                self.searched += 1
                self.position = ListCursor(source.stream, stored.seq)
                yield await self.match(source, stored, now)

    async def match(self, source: Source, stored: Stored, now: float) -> Match | None:
        """Return the job in a message, if it matches at this time (seconds since the epoch)."""
        if source.what == "dead":
            letter = await self._dead.complete(stored)
            found = None if letter is None else self._of_letter(source, stored, letter)
        elif source.what == "parked":
            found = self._of_parked(source, stored)
        else:
            found = self._of_lane(source, stored)
        if found is None or not self._matches_headers(found, now):
            return None
        if not self._wanted.reads_bodies:
            return found
        found = self.with_data(found)
        if found.data is None:
            self.unreadable += 1
            return None
        return found if self._wanted.matches_data(found.data) else None

    def _matches_headers(self, found: Match, now: float) -> bool:
        wanted = self._wanted
        return (
            wanted.priority in (None, found.lane.priority)
            and wanted.kind in (None, found.kind)
            and (found.state is None or found.state in wanted.states)
            and wanted.matches_age(found.at, now)
            and (wanted.error is None or (found.letter is not None and found.letter.has_error(wanted.error)))
        )

    async def _read_delivered(self, family: Family) -> tuple[int, int]:
        """Read which sequences were delivered, by lane. Return the first and the last that may be in flight."""
        low, high = SEQ_MAX, 0
        async for name, info in list_consumers(self._connection, family.stream):
            lane = family.lane_of(name)
            if lane is None:
                continue
            if info is None:  # a server of a cluster has not reported it: ask for it alone
                try:
                    info = await self._connection.api(f"CONSUMER.INFO.{family.stream}.{name}")  # noqa: PLW2901
                except NotFound:
                    continue
            self._delivered[lane] = info["delivered"]["stream_seq"]
            if info.get("num_ack_pending"):
                low = min(low, info["ack_floor"]["stream_seq"] + 1)
                high = max(high, self._delivered[lane])
        return low, high

    def _state_of(self, lane: Lane, seq: int) -> ListedState | None:
        if not self._decides_state:
            return None
        delivered = self._delivered.get(lane, self._delivered.get(lane._replace(tenant="*"), 0))
        return "in_flight" if seq <= delivered else "queued"

    # -- what is stored

    def _of_lane(self, source: Source, stored: Stored) -> Match | None:
        lane, family = subjects.parse_lane(stored.subject), source.family
        if lane is None or family is None or lane.family != family.name:
            return None
        job_headers = stored.headers
        run, at = headers.run(job_headers, stored.seq, stored.time)
        job_id, kind = job_headers.get(headers.JOB_ID, ""), job_headers.get(headers.KIND, "")
        if not job_id or not kind or not subjects.TOKEN.fullmatch(job_id):
            raw = _raw(family, lane, stored, at)
            decoded = decode_headers_or_defaults(raw) if headers.DOCUMENT in raw.headers else decode_body(raw)
            job_id, kind = decoded.job_id, decoded.kind
        state, parking_id = self._state_of(lane, stored.seq), headers.parking_id(job_headers)
        return Match(source, stored, lane, job_id, kind, state, run, parking_id, at)

    def _of_parked(self, source: Source, stored: Stored) -> Match | None:
        job = parse_parked_job(stored)
        if job is None:
            return None
        _, at = run_and_enqueued_at(stored)
        state = cast("ListedState", state_when_parked(job)[0])
        lane, kind = job.subject.lane, job.kind
        family = self._topology.families.get(lane.family)
        if not kind and family is not None:
            kind = decode_body(_raw(family, lane, stored, at)).kind
        return Match(source, stored, lane, job.subject.job_id, kind, state, job.run, job.parking_id, at, parked=job)

    def _of_letter(self, source: Source, stored: Stored, letter: DeadLetter) -> Match:
        run = headers.number(letter.headers.get(headers.RESUMES, "").partition("-")[0])
        stored = stored._replace(data=letter.body)  # of a letter in two messages, the whole body
        return Match(
            source, stored, letter.lane, letter.job_id, letter.kind, "failed", run, "", letter.failed_at, letter=letter
        )

    def with_data(self, found: Match) -> Match:
        """Return the match with the data of its message, secrets masked, or with why it cannot be read."""
        stored, family = found.stored, self._topology.families.get(found.lane.family)
        if headers.DOCUMENT in stored.headers:
            size = headers.number(stored.headers.get(headers.DOCUMENT_SIZE, ""))
            return found._replace(problem=f"stored as a document of {size:,} bytes")
        if family is None:
            return found._replace(problem=f"family {found.lane.family} is not declared here")
        decoded = decode_body(_raw(family, found.lane, stored, found.at))
        if decoded.data is None:
            return found._replace(problem=f"cannot be decoded: {decoded.problem}")
        secrets = dict(stored.headers)
        headers.restore_case(secrets)
        return found._replace(data=secret_paths.mask(decoded.data, secrets.get(headers.SECRET, "")))


def _raw(family: Family, lane: Lane, stored: Stored, at: float) -> RawJob:
    job_headers = dict(stored.headers)
    headers.restore_case(job_headers)
    return RawJob(family, lane.tenant, lane.priority, stored.seq, at, job_headers, stored.data, stored.time)


async def read_sequences(
    connection: Connection, stream: str, subject: str, wanted: Sequence[int], *, gap_max: int = 1_000
) -> AsyncGenerator[tuple[int, Stored | None], None]:
    """Yield the message at each of these sequences, which ascend; None: it is gone, or this server has it not yet.

    Where `gap_max` other messages lie between two of them, reading begins anew.
    """
    at = 0
    while at < len(wanted):
        read = connection.read(stream, subject, seq=wanted[at], batch=BATCH, ahead=True)
        async with contextlib.aclosing(read) as messages:
            passed = 0
            async for stored in messages:
                while at < len(wanted) and wanted[at] < stored.seq:
                    yield wanted[at], None
                    at += 1
                if at == len(wanted):
                    return
                if stored.seq == wanted[at]:
                    yield wanted[at], stored
                    at, passed = at + 1, 0
                    continue
                passed += 1
                if passed > gap_max:
                    break
            else:
                for seq in wanted[at:]:
                    yield seq, None
                return
