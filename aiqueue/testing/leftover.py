"""Says which jobs a drain has left, and what holds them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Collection

from .. import headers, subjects
from ..client import Client
from ..connection import Stored
from ..enqueue import parse_parked_job
from ..errors import AIQueueError
from ..subjects import Lane

SHOWN_MAX = 3  # subjects that are described: each costs some requests
EXPLAIN_S = 5.0


async def describe_left(client: Client, left: Collection[str]) -> str:
    """Return what is stored under these subjects: the kind, the lane, and why the oldest job of each waits."""
    found = [each for each in [await _describe(client, subject) for subject in sorted(left)[:SHOWN_MAX]] if each]
    more = f"; and {len(left) - SHOWN_MAX} more" if len(left) > SHOWN_MAX else ""
    return f"{'; '.join(found) or 'what was left has ended just now'}{more}"


async def _describe(client: Client, subject: str) -> str:
    """Return what is stored under a subject; empty if that has ended. The subject itself where no more can be read."""
    with contextlib.suppress(AIQueueError):
        if (lane := subjects.parse_lane(subject)) is not None and lane.family in client.topology.families:
            stored = await client.connection.first(client.topology.family(lane.family).stream, subject)
            return "" if stored is None else await _describe_job(client, lane, stored)
        if subjects.parse_parked(subject) is not None:
            stored = await client.connection.first(client.parking.stream, subject)
            parked = None if stored is None else parse_parked_job(stored)
            return "" if parked is None else await _describe_job(client, parked.subject.lane, parked.stored)
    return subject


async def _describe_job(client: Client, lane: Lane, stored: Stored) -> str:
    job_id = stored.headers.get(headers.JOB_ID, "")
    text = f"{headers.stated_kind(stored.headers) or 'a job'} {job_id} of {lane.without_key}"
    with contextlib.suppress(AIQueueError, TimeoutError):
        async with asyncio.timeout(EXPLAIN_S):
            text += f": {(await client.explain(job_id, family=lane.family, tenant=lane.tenant)).text}"
    return text
