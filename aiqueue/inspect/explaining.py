"""Reads what says why a job waits, and has `reasons` decide."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import headers, subjects
from ..connection import Connection, Stored
from ..enqueue import ASIDE_KEY, FORWARDER, Enqueued, ParkedJob
from ..errors import AccessDenied, JobState, NotFound, Unavailable
from ..journal import RETRY, TRIAL, Entry
from ..subjects import Lane
from ..topology import Family, Topology
from .explanation import REMEDIES, Explanation, JobEvidence, LaneEvidence
from .found_job import FoundJob, has_declared_lane, is_cancelled, is_written_by, lane_and_kind
from .lane_evidence import LaneReader
from .lookup import JobStats, describe_found, find_and_describe, find_enqueued
from .reasons import choose, decide, describe
from .stream_reads import count_messages
from .ticks import explain_tick
from .worker_stats import WorkerStats
from .workers import ASK_S, Holder, ask_holder

if TYPE_CHECKING:
    from ..limits import Rules

ENDED: JobState = "ended"
STREAM_INFO_S = 1.0
NAMED_S = 1.0  # how long a worker is waited for whose record lists the job: its event loop may be busy
SOON_S = 0.09  # how long the holder, and then perhaps one worker by name, is waited for in an error of a timeout
SEQ_MAX = 2**63 - 1
STRANDED_MAX = 10_000  # notices of the server about one lane that are read


async def explain(
    connection: Connection,
    topology: Topology,
    job_id: str,
    *,
    family: str | None = None,
    tenant: str | None = None,
    rules: Rules | None = None,
    lanes: LaneReader | None = None,
) -> Explanation:
    """Find a job as `stats.job` does, and return why it waits, or what else it does. `rules`: the declared limits.

    Raises what `stats.job` raises, but for a stream that does not answer: that is an explanation, too. What this user
    may not read is named in `unknown`, except the job itself: AccessDenied.
    """
    lanes = lanes or LaneReader(connection, topology, rules)
    await connection.clock.ensure(topology.parked_stream.name)
    try:
        stats, found = await find_and_describe(connection, topology, job_id, family=family, tenant=tenant)
    except Unavailable as error:
        return await _explain_silence(connection, topology, job_id, family, tenant, error)
    except NotFound:
        if (holding := await _find_result(connection, topology, job_id, family, tenant)) is not None:
            return decide(holding)
        if (tick := await explain_tick(connection, topology, job_id, tenant=tenant)) is not None:
            return tick
        raise
    evidence = await _read(connection, topology, lanes, stats, found)
    if evidence.stats.state == ENDED != stats.state:
        with contextlib.suppress(NotFound):
            stats, found = await find_and_describe(connection, topology, job_id, family=family, tenant=tenant)
            evidence = await _read(connection, topology, lanes, stats, found)
    return decide(evidence)


async def explain_job(
    connection: Connection, topology: Topology, stats: JobStats, found: FoundJob, rules: Rules | None = None
) -> Explanation:
    """As `explain`, of a job that was found already."""
    return decide(await _read(connection, topology, LaneReader(connection, topology, rules), stats, found))


async def explain_enqueued(
    connection: Connection, topology: Topology, lanes: LaneReader, family: Family, job: Enqueued
) -> Explanation | None:
    """As `explain`, of a job whose place is known, so that nothing is searched. None: it is not there any more.

    A job that was parked, or moved, comes back to a lane at a sequence that its journal says when it starts. Until then
    its lane alone is looked at. Raises AccessDenied, Unavailable, NotFound (a stream is missing).
    """
    found = await find_enqueued(connection, topology, family, job)
    if found.is_empty:
        return None
    head, is_here = found.head, found.stored is not None or bool(found.parked)
    if not is_here and head is not None and head.event == RETRY:
        return await explain_lane(connection, lanes, family, _lane_after(head, job.lane), job.job_id, SEQ_MAX)
    stats = await describe_found(connection, topology, found, job.job_id)
    evidence = await _read(connection, topology, lanes, stats, found, ask_s=SOON_S)
    if evidence.stats.state == ENDED and evidence.holder is None and head is not None and not head.final:
        return None  # it may be elsewhere
    return decide(evidence)


def _lane_after(head: Entry, lane: Lane) -> Lane:
    """Return the lane to which a job comes back after a `retry`: that of another priority, if it was moved."""
    priority = head.data.get("priority") if isinstance(head.data, dict) else None
    return lane._replace(priority=priority) if isinstance(priority, str) and priority else lane


async def explain_lane(
    connection: Connection, lanes: LaneReader, family: Family, lane: Lane, job_id: str, seq: int
) -> Explanation | None:
    """Return why a job waits as far as its lane and its sequence there say, with no request of its own. None: nothing
    could be read of the lane.
    """
    evidence = await lanes.read(family, lane)
    if evidence.consumer is None:
        return None
    delivered = seq <= evidence.consumer.get("delivered", {}).get("stream_seq", 0)
    stats = JobStats(job_id, family.name, lane.tenant, "in_flight" if delivered else "queued", lane.priority)
    known = JobEvidence(stats, connection.clock.now(), lane=evidence, seq=seq, delivered=delivered)
    if delivered not in evidence.said:
        evidence.said[delivered] = choose(known)
    return describe(known, evidence.said[delivered])


async def _read(
    connection: Connection, topology: Topology, lanes: LaneReader, stats: JobStats, found: FoundJob,
    ask_s: float = ASK_S,
) -> JobEvidence:  # fmt: skip
    """Return the evidence about a job that was found."""
    known = JobEvidence(stats, connection.clock.now(), error=_error_of(found))
    if stats.state in ("done", "failed", "cancelled"):
        return known
    if stats.state in ("ended", "unknown"):
        holder, unknown = await _ask(connection, stats)
        return replace(known, holder=holder, unknown=unknown)
    lane, _ = lane_and_kind(found)
    own = lane or Lane(stats.family, stats.tenant, "*")
    if found.stored is None and found.parked:
        return await _read_parked(connection, topology, lanes, known, found.parked[-1], own)
    if found.stored is None:
        return known
    stored, family = found.stored, found.family
    known = replace(
        known, seq=stored.seq, delivered=found.delivered, is_declared=has_declared_lane(found, stored),
        deadline=_deadline_of(stored), claimed_by=_claimed_by(found, stored),
        on_trial=found.run_head is not None and found.run_head.event == TRIAL,
    )  # fmt: skip
    if not known.is_declared or is_cancelled(found):
        return known
    evidence, (holder, unknown), stranded = await asyncio.gather(
        lanes.read(family, own, found.limit_key),
        _ask(connection, stats, ask_s) if found.delivered else _nobody(),
        _is_stranded(connection, topology, family, own, stored) if found.delivered else _no(),
    )
    place, silent, has_asked = None, None, found.delivered and not unknown
    if not found.delivered:
        place = await _find_place(connection, evidence, stored)
    elif has_asked and holder is None:
        named_s = NAMED_S if ask_s == ASK_S else ask_s
        holder, silent = await _ask_by_name(connection, evidence, stats, stored.seq, named_s)
        if holder is None and await _is_gone(connection, family, stored):
            return replace(known, stats=replace(stats, state=ENDED, note="it has ended while it was looked at"))
    return replace(
        known, lane=evidence, place=place, holder=holder, has_asked=has_asked, silent=silent, stranded=stranded,
        unknown=unknown,
    )  # fmt: skip


async def _is_gone(connection: Connection, family: Family, stored: Stored) -> bool:
    with contextlib.suppress(AccessDenied, Unavailable):
        return await connection.get(family.stream, stored.seq) is None
    return False


async def _ask_by_name(
    connection: Connection, lane: LaneEvidence, stats: JobStats, seq: int, within_s: float
) -> tuple[Holder | None, WorkerStats | None]:
    """Ask the worker whose record lists a job that nobody holds: it may have given the job back since. Returns the
    holder, should it have the job again, and the worker if it does not answer.
    """
    for each in lane.workers or ():
        if any((job.seq, job.family) == (seq, stats.family) for job in each.jobs):
            if not each.answers:
                return None, each
            holder = await ask_holder(
                connection, stats.family, stats.tenant, stats.job_id, worker=each.name, within_s=within_s
            )
            return (None, each) if holder is None else (None if holder.state == "absent" else holder, None)
    return None, None


async def _read_parked(
    connection: Connection, topology: Topology, lanes: LaneReader, known: JobEvidence, job: ParkedJob, lane: Lane
) -> JobEvidence:
    job_headers, family = job.stored.headers, topology.family(lane.family)
    evidence = await lanes.read(family, lane, headers.limit_key(job_headers))
    since, hops = None, 0
    if job.subject.dedup_key == ASIDE_KEY and not job.subject.is_due:
        first_ms, _, number = job_headers.get(headers.UNKNOWN, "").partition(" ")
        since, hops = headers.number(first_ms) / 1000 or job.stored.time, headers.number(number)
        since = min(since, job.stored.time)
    has_forwarder = None
    if job.subject.is_due:
        with contextlib.suppress(AccessDenied, Unavailable):
            has_forwarder = await _asks(connection, topology.parked_stream.name, FORWARDER)
    return replace(
        known, lane=evidence, due=job.subject.is_due, has_forwarder=has_forwarder,
        waited=headers.number(job_headers.get(headers.WAITED, "")), dead_full=job_headers.get(headers.REASON, ""),
        is_retry=headers.ATTEMPT in job_headers, aside_since=since, hops=hops,
    )  # fmt: skip


async def _asks(connection: Connection, stream: str, consumer: str) -> bool:
    """Return whether somebody asks for the messages of a consumer, or holds some."""
    try:
        info = await connection.api(f"CONSUMER.INFO.{stream}.{consumer}")
    except NotFound:
        return False
    return bool(info.get("num_waiting") or info.get("num_ack_pending"))


async def _ask(
    connection: Connection, stats: JobStats, within_s: float = ASK_S
) -> tuple[Holder | None, tuple[str, ...]]:
    """Ask the workers who holds the job. Returns that, and what cannot be known."""
    try:
        return await ask_holder(connection, stats.family, stats.tenant, stats.job_id, within_s=within_s), ()
    except AccessDenied as error:
        return None, (f"whether a worker holds it: {error}",)


async def _nobody() -> tuple[Holder | None, tuple[str, ...]]:
    return None, ()


async def _no() -> bool:
    return False


async def _is_stranded(connection: Connection, topology: Topology, family: Family, lane: Lane, stored: Stored) -> bool:
    """Return whether the server has said that it gave the job up, and no worker has acted on that yet."""
    consumer = family.lane_name(lane.tenant, lane.priority, lane.key)
    subject = subjects.stranded(family.stream).removesuffix("*") + consumer
    read = 0
    with contextlib.suppress(NotFound, AccessDenied, Unavailable):
        async for notice in connection.read(topology.stranded_stream.name, subject):
            read += 1
            if f'"stream_seq":{stored.seq},'.encode() in notice.data.replace(b" ", b"") or read > STRANDED_MAX:
                return read <= STRANDED_MAX
    return False


async def _find_place(connection: Connection, lane: LaneEvidence, stored: Stored) -> int | None:
    """Return how many jobs of the lane are before this one, and undelivered."""
    own = lane.lane._replace(tenant="*") if lane.family.lanes == "shared" else lane.lane
    subject = subjects.lane(*own)
    try:
        from_here = await count_messages(connection, lane.family.stream, subject, seq=stored.seq)
        if lane.consumer:
            all_waiting: int | None = lane.consumer.get("num_pending", 0)
        else:
            all_waiting = await count_messages(connection, lane.family.stream, subject)
    except (AccessDenied, Unavailable):
        return None
    return None if from_here is None or all_waiting is None else max(0, all_waiting - from_here)


async def _find_result(
    connection: Connection, topology: Topology, job_id: str, family: str | None, tenant: str | None
) -> JobEvidence | None:
    """Return the evidence about a job of which nothing is stored, if a worker holds its result. Needs the tenant."""
    if tenant is None:
        return None
    job_id = subjects.job_id(job_id)
    names = [family] if family is not None else [each.name for each in topology.work_families]
    stats = [JobStats(job_id, name, tenant, "ended") for name in names]
    for each, (holder, unknown) in zip(
        stats, await asyncio.gather(*(_ask(connection, one) for one in stats)), strict=True
    ):
        if holder is not None:
            return JobEvidence(each, connection.clock.now(), holder=holder, unknown=unknown)
    return None


async def _explain_silence(
    connection: Connection, topology: Topology, job_id: str, family: str | None, tenant: str | None, error: Unavailable
) -> Explanation:
    """A stream does not answer: say which one has no leader. Raises `error` if the server itself is away."""
    if not connection.connected or (family is not None and family not in topology.families):
        raise error
    names = [topology.family(family).stream] if family is not None else [each.stream for each in topology.work_families]
    names += [topology.journal_stream.name, topology.parked_stream.name, topology.dead_stream.name]
    silent = [
        name
        for name, has in zip(
            names, await asyncio.gather(*(_has_leader(connection, each) for each in names)), strict=True
        )
        if not has
    ]
    if not silent:
        raise error
    text = f"stream {silent[0]} does not answer: it has no leader"
    if len(silent) > 1:
        text = f"streams {', '.join(silent)} do not answer: they have no leader"
    stats = JobStats(subjects.job_id(job_id), family or "", tenant or "", "unknown")
    return replace(
        decide(JobEvidence(stats, connection.clock.now())), reason="no_answer", text=text, evidence=(str(error),),
        remedy=REMEDIES["no_answer"], unknown=("everything about the job: it cannot be read",),
    )  # fmt: skip


async def _has_leader(connection: Connection, stream: str) -> bool:
    try:
        info = await connection.api(f"STREAM.INFO.{stream}", timeout=STREAM_INFO_S)
    except NotFound:
        return True
    except Unavailable:
        return False
    cluster = info.get("cluster") or {}
    return bool(cluster.get("leader")) or not cluster.get("replicas")


def _error_of(found: FoundJob) -> str:
    """Return the error of the last failed attempt."""
    head = found.head
    if head is not None and head.event == RETRY and isinstance(head.data, dict):
        return str(head.data.get("error") or "")
    return ""


def _deadline_of(stored: Stored) -> float | None:
    deadline_ms = headers.decimal(stored.headers.get(headers.DEADLINE, ""))
    return deadline_ms / 1000 if deadline_ms else None


def _claimed_by(found: FoundJob, stored: Stored) -> int:
    """Return the run of the id that is under way in place of this message; 0: none."""
    head = found.head
    if not found.family.claim or head is None or head.final or not head.run or is_written_by(head, stored):
        return 0
    return head.run
