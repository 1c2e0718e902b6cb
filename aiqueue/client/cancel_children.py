"""Cancels the children of a job that was cancelled.

The canceller ends what the run keeps with a `cancelled` entry. After that no attempt of the run can keep a further
child, and each child that starts reads the entry, and ends. So a child that is just being stored, or that cannot be
found, does not run either (docs/decisions/children.md).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from .. import codec, headers, subjects
from ..connection import Connection
from ..enqueue import Enqueued
from ..errors import AccessDenied, AIQueueError, NotFound, Unavailable
from ..journal import CANCELLED, ChildRecord, EndsRecord, children_of_entry, entry_from_stored
from ..subjects import Lane
from ..topology import Topology

log = logging.getLogger(__name__)

AT_ONCE = 16  # children that are cancelled at the same time

CancelChild = Callable[[Enqueued | None, ChildRecord, str], Awaitable[None]]


@dataclass
class _Kept:
    """What the runs of one job id keep of their children. `runs`: the subjects of those that have some."""

    children: list[ChildRecord] = field(default_factory=list)
    ends: EndsRecord = field(default_factory=EndsRecord)
    runs: set[str] = field(default_factory=set)


async def cancel_children(
    connection: Connection, topology: Topology, family: str, tenant: str, job_id: str, cancel: CancelChild
) -> bool:
    """Cancel all children of a job that have not ended. `cancel`: called for each, with where it is if that is known.

    Return whether the job has children. Raises Unavailable; cancelling the job again is safe then.
    """
    stream, subject = topology.checkpoints_stream.name, subjects.checkpoints(family, tenant, job_id, "*")
    try:
        kept = await _read(connection, stream, subject)
        if not kept.children:
            return False
        for run in kept.runs:
            fields = {
                headers.CONTENT_TYPE: codec.CBOR,
                headers.EVENT: CANCELLED,
                headers.MSG_ID: f"{run}/{subjects.new_id()}",
            }
            await connection.store(run, b"", fields)
        kept = await _read(connection, stream, subject)  # those that were kept meanwhile
    except (NotFound, AccessDenied) as error:
        log.debug("children of job %s: %s", job_id, error)
        return False
    limit = asyncio.Semaphore(AT_ONCE)

    async def cancel_one(record: ChildRecord) -> None:
        lane = Lane(record.family, tenant, record.priority)
        seq = kept.ends.stored.get(record.job_id, 0)
        stream = topology.family(record.family).stream
        where = Enqueued(record.job_id, lane, stream, seq, True) if seq else None
        async with limit:
            await cancel(where, record, tenant)

    open_children = [each for each in kept.children if each.job_id not in kept.ends.ends]
    outcomes = await asyncio.gather(*(cancel_one(each) for each in open_children), return_exceptions=True)
    failed = [each for each in outcomes if isinstance(each, BaseException)]
    if failed:
        if not isinstance(failed[0], AIQueueError):
            raise failed[0]
        raise Unavailable(f"{len(failed)} of {len(open_children)} children of job {job_id}: {failed[0]}")
    with contextlib.suppress(AIQueueError):  # what is left expires
        for run in kept.runs:
            await connection.api(f"STREAM.PURGE.{stream}", {"filter": run, "keep": 1})
            await connection.api(f"STREAM.PURGE.{stream}", {"filter": f"{run}-ended"})
    return True


async def _read(connection: Connection, stream: str, subject: str) -> _Kept:
    kept = _Kept()
    async for stored in connection.read(stream, subject):
        if stored.subject.endswith("-ended"):
            kept.ends.note(stored)
        elif stored.headers.get(headers.EVENT) == "children":
            kept.children += children_of_entry(entry_from_stored(stored))
            kept.runs.add(stored.subject)
    return kept
