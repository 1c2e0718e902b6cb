"""What a body's size costs, from 200 bytes to a megabyte: enqueues awaited singly and in a window, a worker's drain.

Bodies above the claim check (256 KiB) are stored as documents beside the job, and fetched by the worker. The plain side
has no part where a message does not fit into the server's max_payload.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import aiqueue
from aiqueue import codec, headers, subjects

from . import stamped
from .common import FAMILY, Noop, empty, raw_client
from .report import OURS, RAW, Row

SIZES = (200, 2_000, 20_000, 200_000, 1_000_000)
WINDOW = 1_000
WINDOW_BYTES = 32 * 2**20  # what enqueue_many has under way at most
HEADERS_MAX = 4_096
LEAST = 50
WARM = 20
ENQUEUE = {OURS: "enqueue, each awaited", RAW: "js.publish, same headers, Msg-Id, codec"}
MANY = {OURS: f"enqueue_many, window {WINDOW:,}", RAW: "js.publish_async, the same window, headers, Msg-Id, codec"}


def count(size: int, jobs: int) -> int:
    """How many jobs of a size take about as long as `jobs` small ones."""
    return max(LEAST, jobs * 10_000 // (10_000 + size))


def sized(i: int, size: int) -> Noop:
    return Noop(i=i, t=0.0, text="x" * size)


def plain(i: int, size: int) -> tuple[str, bytes, dict[str, str]]:
    """As `common.raw_job`, of a size."""
    job_id = subjects.new_id()
    told = {
        headers.MSG_ID: subjects.msg_id(FAMILY, "bench", job_id),
        headers.CONTENT_TYPE: codec.CBOR,
        headers.KIND: "noop",
        headers.JOB_ID: job_id,
        headers.PRIORITY: "normal",
        "task_id": job_id,
    }
    return subjects.work(FAMILY, "bench", "normal"), codec.encode(sized(i, size)), told


async def one_by_one(client: aiqueue.Client, side: str, size: int, jobs: int) -> float:
    """Jobs a second."""
    if side == OURS:
        begun = time.perf_counter()
        for i in range(jobs):
            await client.enqueue(sized(i, size), tenant="bench")
        return jobs / (time.perf_counter() - begun)
    raw = await raw_client(client)
    try:
        js = raw.jetstream()
        begun = time.perf_counter()
        for i in range(jobs):
            subject, body, told = plain(i, size)
            await js.publish(subject, body, headers=told)
        return jobs / (time.perf_counter() - begun)
    finally:
        await raw.close()


async def many(client: aiqueue.Client, side: str, size: int, jobs: int) -> float:
    """Jobs a second. Raises the error of a job that was not stored."""
    if side == OURS:
        messages: Iterator[Noop] = (sized(i, size) for i in range(jobs))
        begun = time.perf_counter()
        async for outcome in client.enqueue_many(messages, tenant="bench", window=WINDOW):
            if isinstance(outcome, aiqueue.AIQueueError):
                raise outcome
        return jobs / (time.perf_counter() - begun)
    raw = await raw_client(client)
    try:
        js = raw.jetstream(publish_async_max_pending=min(WINDOW, max(1, WINDOW_BYTES // size)))
        begun = time.perf_counter()
        acks = []
        for i in range(jobs):
            subject, body, told = plain(i, size)
            acks.append(await js.publish_async(subject, body, headers=told))
        await js.publish_async_completed()
        for ack in acks:
            ack.result()
        return jobs / (time.perf_counter() - begun)
    finally:
        await raw.close()


async def _round(client: aiqueue.Client, side: str, size: int, jobs: int, rows: tuple[Row, Row, Row]) -> None:
    singly, together, drain = rows
    await empty(client)
    singly.add(side, await one_by_one(client, side, size, max(LEAST, jobs // 4)))
    await empty(client)
    together.add(side, await many(client, side, size, jobs))
    drain.add(side, await stamped.drained(client, side, jobs))  # of what this side has just stored


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """`jobs` small ones; fewer of the large ones, down to LEAST."""
    fits = client.connection.max_payload - HEADERS_MAX
    found: list[Row] = []
    for size in SIZES:
        told = f"{size:,} bytes"
        rows = (
            Row("payload", f"enqueue, one awaited at a time, {told}", "/s", x=size, how=ENQUEUE),
            Row("payload", f"enqueue, many at a time, {told}", "/s", x=size, how=MANY),
            Row("payload", f"drain of one worker, {told}", "/s", x=size, how=stamped.HOW),
        )
        sides = (OURS, RAW) if size < fits else (OURS,)
        for side in sides:
            await many(client, side, size, WARM)  # whose turn is first must not pay for what both find ready
        for _ in range(rounds):
            for side in sides:
                await _round(client, side, size, count(size, jobs), rows)
        found += rows
    await empty(client)
    return found
