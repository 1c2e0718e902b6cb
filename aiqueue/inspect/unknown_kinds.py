"""Jobs that are parked aside until a worker knows their kind, and whether there is such a worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from .. import subjects
from ..connection import Connection
from ..enqueue import ASIDE_KEY, parse_parked_job
from ..errors import AccessDenied, NotFound, Unavailable
from ..lanes import ActivePauses, Record, WorkerRecords, serves
from ..subjects import Lane
from ..topology import Family, Topology
from .pauses import read_pauses_if_allowed

READ_MAX = 1_000  # parked jobs of one family that are read
UNKNOWN = "(not stated)"  # the kind of a job whose headers do not say which


@dataclass(frozen=True, slots=True)
class WaitingKind:
    """Jobs of one kind that a worker of their family did not know.

    `workers`: how many live workers run such jobs of at least one of the tenants. `unserved`: jobs of tenants that none
    of them serves. A worker without the permission to announce itself is not counted.
    `paused`: jobs that are parked aside because they are paused.
    `partial`: more jobs of the family wait than READ_MAX, so `jobs` may be too low.
    """

    family: str
    kind: str
    jobs: int
    workers: int
    unserved: int = 0
    partial: bool = False
    paused: int = 0


def describe_waiting(waiting: WaitingKind) -> str:
    """Return a sentence, such as "1,200 jobs wait for a worker that knows summarise: none is running"."""
    jobs = "1 job waits" if waiting.jobs == 1 else f"{waiting.jobs:,} jobs wait"
    least = "at least " if waiting.partial else ""
    if waiting.paused >= waiting.jobs:
        return f"{least}{jobs} for the end of a pause: {waiting.kind} is paused"
    workers = (
        f"{waiting.workers:,} are running"
        if waiting.workers > 1
        else f"{'1' if waiting.workers else 'none'} is running"
    )
    beside = f", not for the tenants of {waiting.unserved:,}" if waiting.workers and waiting.unserved else ""
    paused = f"; {waiting.paused:,} of the jobs are paused" if waiting.paused else ""
    return f"{least}{jobs} for a worker that knows {waiting.kind}: {workers}{beside}{paused}"


async def read_waiting_kinds(
    connection: Connection, topology: Topology, families: Collection[Family]
) -> list[WaitingKind]:
    """Return the kinds with jobs that are parked aside, that with most jobs first. Raises Unavailable, AccessDenied."""
    counted = await asyncio.gather(*(_count_kinds(connection, topology, family) for family in families))
    if not any(counts for counts, _ in counted):
        return []
    records: list[Record] = []
    with contextlib.suppress(NotFound, AccessDenied):
        records = await WorkerRecords(connection, topology).read()
    pauses = ActivePauses(await read_pauses_if_allowed(connection, topology))
    found: list[WaitingKind] = []
    for family, (counts, partial) in zip(families, counted, strict=True):
        for kind in sorted({kind for kind, _ in counts}):
            tenants = {tenant: jobs for (each, tenant), jobs in counts.items() if each == kind}
            serving = [[each for each in records if serves(each, family.name, kind, tenant)] for tenant in tenants]
            unserved = sum(jobs for jobs, workers in zip(tenants.values(), serving, strict=True) if not workers)
            workers = len({id(each) for some in serving for each in some})
            jobs = sum(tenants.values())
            paused = sum(count for tenant, count in tenants.items() if pauses.of_job(family.name, tenant, kind))
            found.append(WaitingKind(family.name, kind or UNKNOWN, jobs, workers, unserved, partial, paused))
    return sorted(found, key=lambda each: -each.jobs)


async def _count_kinds(
    connection: Connection, topology: Topology, family: Family
) -> tuple[Counter[tuple[str, str]], bool]:
    """Count a family's jobs that are parked aside, by kind and tenant. True: there may be more."""
    counts: Counter[tuple[str, str]] = Counter()
    filter_subject = subjects.parked(Lane(family.name, "*", "*"), dedup_key=ASIDE_KEY, is_due=False)
    try:
        async for stored in connection.read(topology.parked_stream.name, filter_subject):
            job = parse_parked_job(stored)
            if job is not None:
                counts[job.kind, job.subject.lane.tenant] += 1
            if counts.total() >= READ_MAX:
                return counts, True
    except NotFound:
        return counts, False
    except (AccessDenied, Unavailable):
        return counts, True
    return counts, False
