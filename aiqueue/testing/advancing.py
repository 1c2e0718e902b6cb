"""Makes everything that waits for a time due now. No clock is moved."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from .. import subjects
from ..client import Client
from ..enqueue import ASIDE_KEY, ParkedJob, parse_parked_job
from ..errors import Conflict, NotFound, Unavailable
from ..schedules import Schedules
from .clients import check_test_client

AT_ONCE = 64
DUE_S = 10.0  # how long the server may take to make a job due
POLL_S = 0.005


class Advanced(NamedTuple):
    """What `advance` has made due: `jobs` that waited for a time, and `ticks` of schedules."""

    jobs: int
    ticks: int


async def advance(client: Client) -> Advanced:
    """Make everything due that waits for its time on the server of a test: no clock is moved, and nothing sleeps.

    - Jobs with a delay, retries that are 5 seconds or more away, and jobs of a kind that no worker knew or that is
      paused: they become due as if their time had come, and a worker takes them when one runs. What it does then, such
      as a further retry, waits again until the next `advance`.
    - Each schedule that is not paused ticks once: its job is enqueued for the time of its next tick, and the tick after
      it is the next one. Where a function of a worker makes the message, a worker of the same owner must run.
    - Jobs that wait for their children stay: the children's ends wake them. So do pauses, and keys that are limited.

    `client` is one that `aiqueue.testing.client` has opened. Raises BadInput for any other: on a server in production
    this would start everything that waits there. Raises NotFound, Unavailable, AccessDenied.
    """
    check_test_client(client, what="testing.advance makes all that waits on a server due")
    jobs = await advance_jobs(client, lambda job: not waits_for_children(job))
    return Advanced(jobs, await _pass_ticks(client))


async def advance_jobs(client: Client, wanted: Callable[[ParkedJob], bool]) -> int:
    """Make parked jobs due, and wait until they are. Return how many. Raises NotFound, Unavailable."""
    parking, clock = client.parking, client.connection.clock
    await clock.ensure(parking.stream)
    limit = asyncio.Semaphore(AT_ONCE)

    async def move(job: ParkedJob) -> str:
        async with limit:
            try:
                await parking.move(job, clock.now())
            except Conflict:
                return ""  # it became due by itself, or was cancelled
        return job.stored.subject

    found = [job async for job in read_parked(client) if wanted(job)]
    moved = {subject for subject in await asyncio.gather(*map(move, found)) if subject}
    await _wait_until_due(client, moved)
    return len(moved)


async def read_parked(client: Client) -> AsyncIterator[ParkedJob]:
    """Yield the jobs that wait for their time. Raises NotFound, Unavailable."""
    read = client.connection.read(client.parking.stream, subjects.parked(is_due=False))
    async for stored in read:
        if (job := parse_parked_job(stored)) is not None:
            yield job


async def _wait_until_due(client: Client, moved: set[str]) -> None:
    """Wait until the server has moved these messages. Raises Unavailable after DUE_S."""
    deadline = time.monotonic() + DUE_S
    waiting = f"{subjects.PARKED}.at.>"
    while moved & await list_subjects(client, client.parking.stream, waiting):
        if time.monotonic() > deadline:
            raise Unavailable(f"testing.advance: the server has not made {len(moved)} jobs due within {DUE_S:g} s")
        await asyncio.sleep(POLL_S)


async def list_subjects(client: Client, stream: str, pattern: str) -> set[str]:
    """Return the subjects of a stream that have messages. Empty without the stream. Raises Unavailable."""
    found: set[str] = set()
    while True:
        try:
            info = await client.connection.api(
                f"STREAM.INFO.{stream}", {"subjects_filter": pattern, "offset": len(found)}
            )
        except NotFound:
            return found
        page = info["state"].get("subjects") or {}
        found.update(page)
        if not page or len(found) >= info.get("total", 0):
            return found


def waits_for_children(job: ParkedJob) -> bool:
    """Whether a parked job waits for the ends of its children: its run is parked under a key of its own then."""
    return job.subject.dedup_key.startswith("w")


def is_aside(job: ParkedJob) -> bool:
    """Whether a parked job waits for a worker that knows its kind, or for the end of a pause."""
    return job.subject.dedup_key == ASIDE_KEY


async def _pass_ticks(client: Client) -> int:
    """Have each schedule tick once. Return how many did."""
    schedules = Schedules(client.connection, client.topology, client.key_lanes)
    try:
        documents = await schedules.list()
    except NotFound:
        return 0  # a server without the streams of schedules has none
    passed = [await schedules.pass_tick(each.tenant, each.id) for each in documents]
    return sum(each is not None for each in passed)
