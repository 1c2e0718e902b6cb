"""From `job.chunk` to the item of `handle.stream()`: 20 jobs of 40 chunks a second, the worker in a process of its own.

Beside it, in rounds that alternate, the floor: js.publish of the same bytes to the same stream, and a core subscription
to the republished subjects. Then what a thousand followers of one job cost.
"""

from __future__ import annotations

import asyncio
import resource
import sys
import time
from itertools import chain
from typing import Any

import aiqueue
from aiqueue import codec, headers, subjects

from .common import add_percentiles, beside, percentile_rows, raw_client, run_loop
from .raw import opened
from .report import OURS, RAW, Row

STREAMS, RATE, SECONDS = 20, 40, 4
COUNT = RATE * SECONDS
DROP = RATE  # of each stream: the first second warms up
TEXT = "a few words of the answer, as they come "
FOLLOWERS_MAX = 1_000
ROOT = "ai.agent.results"
RESULTS = "AI_RESULTS"
HOW = {
    OURS: "job.chunk, handle.stream",
    RAW: "js.publish of the same bytes and headers, a core subscription, CBOR decoded",
}


class Talk(aiqueue.Message, kind="bench.talk"):
    begin: float


class Whisper(aiqueue.Message, kind="bench.whisper"):
    chunks: int


worker = aiqueue.Worker(concurrency=STREAMS)


async def paced(begin: float, say: Any) -> None:
    """An open loop; a late call counts from its schedule."""
    for number in range(COUNT):
        due = begin + number / RATE
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        at = time.monotonic() if time.monotonic() - due < 0.005 else due
        await say({"t": at, "text": TEXT})


@worker.handle(Talk, timeout="1m")
async def talk(job: aiqueue.Job[Talk]) -> None:
    await paced(job.message.begin, job.chunk)


@worker.handle(Whisper, timeout="1m")
async def whisper(job: aiqueue.Job[Whisper]) -> None:
    for number in range(job.message.chunks):
        await job.chunk({"t": time.monotonic(), "text": number})
        await asyncio.sleep(0.2)


async def _raw_writer(client: aiqueue.Client, begin: float) -> None:
    js = (await raw_client(client)).jetstream()

    async def one(number: int) -> None:
        subject = subjects.journal(ROOT, "raw", f"{begin * 1e6:.0f}-{number}")
        told = {
            headers.CONTENT_TYPE: codec.CBOR, headers.EVENT: "chunk", headers.RUN: str(number + 1), headers.EPOCH: "1",
            headers.ATTEMPT: "1",
        }  # fmt: skip
        count = 0

        async def say(data: Any) -> None:
            nonlocal count
            count += 1
            msg_id = f"{subject}/0a1b2c3d/1/{count}"
            await js.publish(subject, codec.encode([data]), headers=told | {headers.MSG_ID: msg_id})

        await paced(begin + number / RATE / STREAMS, say)

    await asyncio.gather(*(one(number) for number in range(STREAMS)))


def _program(*words: str) -> list[str]:
    return ["-m", "benchmarks.streaming", *words]


async def ours(client: aiqueue.Client) -> list[float]:
    async with beside(client, _program("work")):
        warm = await client.enqueue(Whisper(chunks=1), tenant="bench")
        await warm.result(30)
        begin = time.monotonic() + 0.5
        jobs = [
            await client.enqueue(Talk(begin=begin + number / RATE / STREAMS), tenant="bench")
            for number in range(STREAMS)
        ]

        async def read(handle: aiqueue.Handle) -> list[float]:
            waits = []
            async for item in handle.stream(timeout=60):
                assert item.event in ("chunk", "result"), item
                if item.event == "chunk":
                    waits.append((time.monotonic() - item.data["t"]) * 1000)
            assert len(waits) == COUNT
            return waits[DROP:]

        return [*chain.from_iterable(await asyncio.gather(*map(read, jobs)))]


async def theirs(client: aiqueue.Client) -> list[float]:
    begin = time.monotonic() + 2.0
    raw = await raw_client(client)
    found: dict[str, list[float]] = {}
    every = asyncio.Event()

    async def heard(message: Any) -> None:
        waits = found.setdefault(message.subject, [])
        waits.append((time.monotonic() - opened(message)[0]["t"]) * 1000)
        if len(found) == STREAMS and all(len(each) == COUNT for each in found.values()):
            every.set()

    try:
        await raw.subscribe(f"aiq.live.{ROOT}.raw.*", cb=heard)
        await raw.flush()
        async with beside(client, _program("raw", repr(begin))), asyncio.timeout(60):
            await every.wait()
    finally:
        await raw.close()
    return [*chain.from_iterable(waits[DROP:] for waits in found.values())]


async def followers(client: aiqueue.Client, count: int) -> list[Row]:
    """What many followers of one job cost, all in this process."""
    async with beside(client, _program("work")):
        handle = await client.enqueue(Whisper(chunks=40), tenant="bench")
        async for item in handle.stream(timeout=30):
            if item.event == "chunk":
                break
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        waits: list[float] = []

        async def read() -> int:
            found = 0
            async for item in handle.stream(timeout=60):
                found += 1
                if item.event == "chunk":
                    waits.append((time.monotonic() - item.data["t"]) * 1000)
            return found

        reading = [asyncio.ensure_future(read()) for _ in range(count)]
        most = 0
        while not all(each.done() for each in reading):
            info = await client.connection.api(f"STREAM.INFO.{RESULTS}")
            most = max(most, info["state"]["consumer_count"])
            await asyncio.wait(reading, timeout=0.5)
        counts = {each.result() for each in reading}
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if len(counts) != 1:
        raise RuntimeError(f"the followers of one job had {sorted(counts)} items")
    what = f"{count:,} followers of one job in one process"
    late = percentile_rows("streaming", f"chunk to item, {what}", {OURS: "handle.stream"})
    add_percentiles(late, OURS, waits[-10 * count :])
    return [
        Row("streaming", f"memory of each, at most, {what}", "KiB", {OURS: [(after - before) / count]}),
        Row("streaming", f"consumers made for {what}", "consumers", {OURS: [float(most)]}),
        *late,
    ]


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    rows = percentile_rows("streaming", f"chunk to item, {STREAMS} streams of {RATE}/s", HOW)
    for _ in range(rounds):
        for side, measure in ((OURS, ours), (RAW, theirs)):
            await client.connection.api(f"STREAM.PURGE.{RESULTS}")
            add_percentiles(rows, side, await measure(client))
    return [*rows, *await followers(client, min(FOLLOWERS_MAX, max(10, jobs // 10)))]


async def _main() -> None:
    async with aiqueue.connect() as client:
        if sys.argv[1] == "raw":
            await _raw_writer(client, float(sys.argv[2]))
        else:
            async with worker.running(client):
                await asyncio.Event().wait()


if __name__ == "__main__":
    run_loop(_main())
