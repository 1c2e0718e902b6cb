"""From `job.chunk` to the item of `handle.stream()`: 20 jobs of 40 chunks a second, the worker in a process of its own.

Beside it, in rounds that alternate, the floor: js.publish of the same bytes to the same stream, and a core subscription
to the republished subjects. Then what a thousand followers of one job cost.
"""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import sys
import time
from itertools import chain
from typing import Any

import cbor2

import aiqueue
from aiqueue import codec, headers, subjects

from .common import raw_client
from .report import Row, table

STREAMS, RATE, SECONDS = 20, 40, 4
COUNT = RATE * SECONDS
DROP = RATE  # of each stream: the first second warms up
TEXT = "a few words of the answer, as they come "
FOLLOWERS = 1_000
ROOT = "ai.agent.results"
RESULTS = "AI_RESULTS"


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


async def _process(client: aiqueue.Client, *words: str) -> asyncio.subprocess.Process:
    settings = client.connection.settings
    password = settings.password.get_secret_value() if settings.password else ""
    told = {
        **os.environ,
        "AIQUEUE_URL": settings.url or "",
        "AIQUEUE_USER": settings.user or "",
        "AIQUEUE_PASSWORD": password,
    }
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "benchmarks.streaming", *words, env=told)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.terminate()
    await process.wait()


async def ours(client: aiqueue.Client) -> list[float]:
    process = await _process(client, "work")
    try:
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
    finally:
        await _end(process)


async def theirs(client: aiqueue.Client) -> list[float]:
    begin = time.monotonic() + 2.0
    raw = await raw_client(client)
    found: dict[str, list[float]] = {}
    every = asyncio.Event()

    async def heard(message: Any) -> None:
        waits = found.setdefault(message.subject, [])
        waits.append((time.monotonic() - cbor2.loads(message.data)[0]["t"]) * 1000)
        if len(found) == STREAMS and all(len(each) == COUNT for each in found.values()):
            every.set()

    await raw.subscribe(f"aiq.live.{ROOT}.raw.*", cb=heard)
    await raw.flush()
    process = await _process(client, "raw", repr(begin))
    try:
        async with asyncio.timeout(60):
            await every.wait()
    finally:
        await _end(process)
        await raw.close()
    return [*chain.from_iterable(waits[DROP:] for waits in found.values())]


async def _followers(client: aiqueue.Client) -> str:
    """What a thousand followers of one job cost, all in this process."""
    process = await _process(client, "work")
    try:
        handle = await client.enqueue(Whisper(chunks=40), tenant="bench")
        async for item in handle.stream(timeout=30):
            if item.event == "chunk":
                break
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        waits: list[float] = []

        async def read() -> int:
            count = 0
            async for item in handle.stream(timeout=60):
                count += 1
                if item.event == "chunk":
                    waits.append(time.monotonic() - item.data["t"])
            return count

        reading = [asyncio.ensure_future(read()) for _ in range(FOLLOWERS)]
        most = 0
        while not all(each.done() for each in reading):
            info = await client.connection.api(f"STREAM.INFO.{RESULTS}")
            most = max(most, info["state"]["consumer_count"])
            await asyncio.wait(reading, timeout=0.5)
        counts = {each.result() for each in reading}
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    finally:
        await _end(process)
    late = statistics.quantiles(waits[-10 * FOLLOWERS :], n=100)
    return (
        f"{FOLLOWERS:,} followers of one job in one process: items each {sorted(counts)}, consumers made {most}, "
        f"{(after - before) / FOLLOWERS:.1f} KiB each at most, chunk latency of all p50 {late[49] * 1000:.0f} ms"
    )


async def run(client: aiqueue.Client, *, rounds: int) -> str:
    rows = [Row(f"chunk to item, {STREAMS} streams of {RATE}/s, p{p}", "ms", "js.publish, subscribe") for p in (50, 95)]
    for _ in range(rounds):
        for side, measure in (("ours", ours), ("raw", theirs)):
            await client.connection.api(f"STREAM.PURGE.{RESULTS}")
            cuts = statistics.quantiles(await measure(client), n=100)
            for row, cut in zip(rows, (cuts[49], cuts[94]), strict=True):
                (row.ours if side == "ours" else row.raw).append(cut)
    return f"{table(rows)}\n\n{await _followers(client)}"


async def _main() -> None:
    async with aiqueue.connect() as client:
        if sys.argv[1] == "raw":
            await _raw_writer(client, float(sys.argv[2]))
        else:
            async with worker.running(client):
                await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
