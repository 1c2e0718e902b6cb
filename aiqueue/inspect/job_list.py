"""Lists of jobs, page by page: what is stored of each, with its message as far as it may be shown."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from .. import headers
from ..config import Redact
from ..connection import Connection
from ..errors import BadInput, NotFound
from ..subjects import Lane
from ..topology import Topology
from ..units import whole_number
from .job_filter import ListedState, ListFilter
from .job_scan import BATCH, JobScan, ListCursor, Match
from .shown_payload import show_payload

PAGE_MAX = 1_000  # jobs of one page
SEARCHED_MAX = 10_000  # stored messages that are looked at for one page
REQUESTS_AT_ONCE = 16
ERROR_MAX = 500  # characters of an error that are shown


@dataclass(frozen=True, slots=True)
class ListedJob:
    """One job of a list. Times are seconds since the epoch.

    `state` is one of:

    - **queued**: in its lane, never delivered since the lane's consumer was created
    - **in_flight**: delivered and not settled: it runs, or waits in its lane for another delivery
    - **parked**: outside of its lane until `due_at`. **retrying**: the same, until its next attempt
    - **waiting**: parked until its children have ended
    - **failed**: a dead letter, with `reason` and `error`; `seq` is its number for `aiqueue dead`

    `stream`, `seq`: where it is stored. `payload`: the message's data, its secrets masked, after the client's `redact`,
    and cut to a bounded size. None: it cannot be shown, and `payload_problem` says why; "" if it was not asked for.
    `key`: the value of the family's `limit_key`, of a job in the lane of one. `size_bytes`: of the body as stored, or
    of the document that is the body.
    """

    job_id: str
    family: str
    tenant: str
    priority: str
    kind: str
    state: ListedState
    """What the job does now: queued, in_flight, parked, retrying, waiting or failed."""
    stream: str
    seq: int
    enqueued_at: float | None
    due_at: float | None = None
    """When the job enters its lane; None: it does not wait for a time."""
    attempt: int = 0
    unique: str = ""
    """Key of the caller, of which `job_id` is a hash; empty: the id is the key, or none is known."""
    key: str = ""
    size_bytes: int = 0
    payload: Any = None
    payload_problem: str = ""
    """Why the message is not shown; empty: it is, or was not asked for."""
    failed_at: float | None = None
    """When the job failed for good; None: it has not."""
    reason: str = ""
    """Why the job failed, in one word; empty: it has not."""
    error: str = ""
    """What the last attempt raised, in one line; empty: it has not failed."""


@dataclass(frozen=True, slots=True)
class JobPage:
    """One page of a list.

    `cursor`: where the next page starts; "": there is none, all was looked at. `searched`: how many stored messages
    were looked at for this page, SEARCHED_MAX at most, so that a page may hold fewer jobs than asked for, and still
    have a cursor. `unreadable`: how many of them may match, but their bodies, on which that depends, cannot be read.
    `missing`: streams that the server does not have. `behind`: streams that a server of a cluster has answered for that
    lacks the newest deletions: some of the jobs may have ended.
    """

    jobs: tuple[ListedJob, ...]
    cursor: str
    searched: int
    unreadable: int = 0
    missing: tuple[str, ...] = ()
    behind: tuple[str, ...] = ()


async def list_page(
    connection: Connection,
    topology: Topology,
    wanted: ListFilter,
    *,
    limit: int = 50,
    cursor: str = "",
    payloads: bool = True,
    redact: Redact | None = None,
) -> JobPage:
    """Return the next `limit` jobs (1 to PAGE_MAX) of a filter, the oldest first in each stream, after a cursor.

    The order: the lanes of each family, parked jobs, dead letters. Jobs move while they are listed: one may be on two
    pages, or on none. Raises BadInput, AccessDenied, Unavailable.
    """
    whole_number("limit", limit, 1, PAGE_MAX)
    start = ListCursor.parse(cursor) if cursor else None
    scan = JobScan(connection, topology, wanted)
    found: list[Match] = []
    next_at: ListCursor | None = None
    batch = BATCH if wanted.reads_messages else min(limit + 1, BATCH)
    async with contextlib.aclosing(scan.read(start, batch=batch)) as matches:
        async for match in matches:
            if match is not None and len(found) == limit:
                next_at = scan.position
                break
            if match is not None:
                found.append(match)
            if scan.searched >= SEARCHED_MAX and scan.position is not None:
                next_at = scan.position._replace(seq=scan.position.seq + 1)
                break
    jobs = await describe_jobs(connection, scan, found, payloads=payloads, redact=redact)
    cursor = str(next_at) if next_at else ""
    return JobPage(tuple(jobs), cursor, scan.searched, scan.unreadable, tuple(scan.missing), tuple(scan.behind))


async def list_all(
    connection: Connection,
    topology: Topology,
    wanted: ListFilter,
    *,
    payloads: bool = True,
    redact: Redact | None = None,
) -> AsyncGenerator[ListedJob, None]:
    """Yield all jobs of a filter. Raises as `list_page`."""
    cursor, more = "", True
    while more:
        page = await list_page(
            connection, topology, wanted, limit=BATCH - 1, cursor=cursor, payloads=payloads, redact=redact
        )
        for job in page.jobs:
            yield job
        cursor, more = page.cursor, bool(page.cursor)


async def describe_jobs(
    connection: Connection, scan: JobScan, found: Iterable[Match], *, payloads: bool, redact: Redact | None
) -> list[ListedJob]:
    """Return what a list says of each match. Asks the consumer of each lane once whether its jobs were delivered."""
    matches = list(found)
    delivered = await read_delivered(connection, _lanes(matches))
    jobs = []
    for match in matches:
        state = match.state
        if state is None:
            state = "in_flight" if match.stored.seq <= delivered.get(match.lane, 0) else "queued"
        jobs.append(_describe(scan, match, state, payloads, redact))
    return jobs


def _lanes(matches: Iterable[Match]) -> dict[Lane, tuple[str, str]]:
    """Return stream and consumer of the lanes of which it must be asked what was delivered."""
    found: dict[Lane, tuple[str, str]] = {}
    for each in matches:
        family, lane = each.source.family, each.lane
        if each.state is None and family is not None:
            with contextlib.suppress(BadInput):  # a plain publisher's, of a tenant or priority that nobody serves
                found[lane] = family.stream, family.lane_name(*lane[1:])
    return found


async def read_delivered(connection: Connection, lanes: dict[Lane, tuple[str, str]]) -> dict[Lane, int]:
    """Return the last delivered sequence of each lane that has a consumer. `lanes`: their streams and consumers."""
    gate = asyncio.Semaphore(REQUESTS_AT_ONCE)
    found: dict[Lane, int] = {}

    async def ask(lane: Lane, stream: str, consumer: str) -> None:
        async with gate:
            with contextlib.suppress(NotFound):
                info = await connection.api(f"CONSUMER.INFO.{stream}.{consumer}")
                found[lane] = int(info["delivered"]["stream_seq"])

    await asyncio.gather(*(ask(lane, *where) for lane, where in lanes.items()))
    return found


def _describe(scan: JobScan, match: Match, state: ListedState, payloads: bool, redact: Redact | None) -> ListedJob:
    job_headers, letter, parked = match.stored.headers, match.letter, match.parked
    payload, problem = None, ""
    if payloads:
        match = match if match.data is not None else scan.with_data(match)
        problem = match.problem
        if match.data is not None:
            payload, problem = show_payload(redact, match.lane.family, match.kind, match.data)
    return ListedJob(
        job_id=match.job_id, family=match.lane.family, tenant=match.lane.tenant, priority=match.lane.priority,
        kind=match.kind, state=state, stream=match.source.stream, seq=match.stored.seq,
        enqueued_at=match.at if letter is None else letter.enqueued_at,
        due_at=parked.due_at if parked is not None else None,
        attempt=letter.attempt if letter is not None else headers.number(job_headers.get(headers.ATTEMPT, "")),
        unique=headers.unique_key(job_headers), key=headers.limit_key(job_headers),
        size_bytes=headers.number(job_headers.get(headers.DOCUMENT_SIZE, "")) or len(match.stored.data),
        payload=payload, payload_problem=problem,
        failed_at=letter.failed_at if letter is not None else None,
        reason=letter.reason if letter is not None else "",
        error=letter.error[:ERROR_MAX] if letter is not None else "",
    )  # fmt: skip
