"""Whether a deep backlog slows a worker or makes it grow: one worker process over 1,000 to a million waiting jobs.

At each depth it drains as many jobs, `jobs` of them in whole portions: where fewer wait, they are stored anew for the
next portion while the process is stopped. The first hundred jobs of each portion are not counted.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from nats.aio.msg import Msg

import aiqueue
from aiqueue.topology import provision

from .common import FAMILY, STREAM, empty, raw_client, raw_job
from .report import OURS, RAW, Row
from .stamped import HOW, all_ran, running, skipped, stored

WAITING = (1_000, 10_000, 100_000, 1_000_000)
PORTIONS_MAX = 20
UNDER_WAY_MAX = 2_000
ANSWER_S = 30.0


@asynccontextmanager
async def cap_raised(client: aiqueue.Client, jobs: int) -> AsyncIterator[None]:
    """One lane of the family under test may hold so many jobs meanwhile. Its stream is emptied on leaving."""
    topology = client.topology
    jobs = max(jobs, topology.family(FAMILY).max_msgs_per_subject)
    spec = topology.streams[STREAM]
    config = {**spec.config, "max_msgs_per_subject": jobs, "max_bytes": max(2**30, 1024 * jobs)}
    family = dataclasses.replace(topology.families[FAMILY], max_msgs_per_subject=jobs)
    client.topology = dataclasses.replace(
        topology,
        families={**topology.families, FAMILY: family},
        streams={**topology.streams, STREAM: dataclasses.replace(spec, config=config)},
    )
    await provision.apply(client.connection, client.topology)
    try:
        yield
    finally:
        await empty(client)
        client.topology = topology
        await provision.apply(client.connection, topology)


async def pour(
    client: aiqueue.Client, jobs: int, more_headers: Callable[[int], Mapping[str, str]] | None = None
) -> None:
    """Store so many jobs more, as fast as a plain client can: one future for many acknowledgements.

    `more_headers`: what else a job has, by its number. Raises RuntimeError where one was refused.
    """
    raw = await raw_client(client)
    sent = acked = 0
    refused: list[bytes] = []
    room = asyncio.Event()

    async def on_ack(answer: Msg) -> None:
        nonlocal acked
        acked += 1
        if answer.data.startswith(b'{"error'):
            refused.append(answer.data)
        if sent - acked < UNDER_WAY_MAX // 2:
            room.set()

    inbox = raw.new_inbox()
    await raw.subscribe(inbox, cb=on_ack)
    try:
        for i in range(jobs):
            subject, body, told = raw_job(i)
            if more_headers is not None:
                told |= more_headers(i)
            await raw.publish(subject, body, inbox, told)
            sent += 1
            if sent - acked >= UNDER_WAY_MAX:
                room.clear()
                await asyncio.wait_for(room.wait(), ANSWER_S)
        while acked < sent and not refused:
            room.clear()
            await asyncio.wait_for(room.wait(), ANSWER_S)
            await asyncio.sleep(0.01)
    finally:
        await raw.close()
    if refused:
        raise RuntimeError(f"{len(refused):,} jobs were refused: {refused[0].decode()}")


async def measure(client: aiqueue.Client, side: str, waiting: int, jobs: int) -> tuple[float, float]:
    """Jobs a second over the counted jobs, and the process's peak memory in MiB. So many jobs wait, and at most so
    many are left. Raises RuntimeError where a job ran twice or is gone without having run.
    """
    portion = min(waiting, jobs)
    portions = min(PORTIONS_MAX, -(-jobs // portion))
    skip = skipped(portion)
    counted, took_s = 0, 0.0
    async with running(client, side, portions * portion) as worker:
        for number in range(portions):
            if number:
                worker.stop()
                try:
                    await pour(client, portion)
                finally:
                    worker.resume()
            await worker.wait((number + 1) * portion)
            took_s += worker.span_s(number * portion + skip - 1, (number + 1) * portion)
            counted += portion - skip
        peak = worker.peak_mib()
        await worker.end()
        await all_ran(client, worker, waiting + (portions - 1) * portion)
    return counted / took_s, peak


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """Depths up to 100 times `jobs`, each drained of twice `jobs`. The family's cap is raised meanwhile."""
    deepest = 100 * jobs
    rows: list[Row] = []
    await empty(client)
    async with cap_raised(client, deepest):
        for waiting in (each for each in WAITING if each <= deepest):
            rate = Row("backlog", f"drain with {waiting:,} jobs waiting", "/s", x=waiting, how=HOW)
            memory = Row("backlog", f"worker's memory, {waiting:,} jobs waiting", "MiB", x=waiting, how=HOW)
            for _ in range(rounds):
                for side in (OURS, RAW):
                    await pour(client, waiting - await stored(client))
                    figure, peak = await measure(client, side, waiting, 2 * jobs)
                    rate.add(side, figure)
                    memory.add(side, peak)
            rows += [rate, memory]
    return rows
