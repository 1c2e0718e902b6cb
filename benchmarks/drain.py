"""A backlog of no-op jobs on one worker in this process, then on one and on two worker processes. Results off.

A worker process is ``aiqueue work benchmarks.drain:worker``; others fetch, or run the bare loop. All processes
wait at a gate until the last of them is ready, so that none has a start. In the processes each handler appends 24 bytes
to one file by one write: when the job was enqueued, when its handler began, and its number. The rate is from the first
handler to the last, over all processes, and each job must be there once. The processes get LONGER times as many jobs,
for in a short run their first moments count.
"""

from __future__ import annotations

import asyncio
import os
import struct
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import cbor2
import nats.errors

import aiqueue

from . import tuned
from .backlog import cap_raised, pour
from .common import FAMILY, STREAM, Noop, beside, empty, lane, raw_client, raw_job, run_loop, until
from .raw import FETCH, body, opened
from .report import OURS, RAW, STOCK, TUNED, Row

RECORD = struct.Struct("<ddq")
FILE, GATE = "BENCH_RECORDS", "BENCH_GATE"
WITHIN_S = 120.0
SLOWEST = 500  # jobs a second, of a long run
DEADLINE_S = 3_600.0
PROCESSES = {1: "one worker process", 2: "two worker processes"}
LONGER = 9  # 90,000 jobs, of 10,000

_file: list[int] = []  # opened by the first handler of this process


def note(enqueued: float, number: int) -> None:
    """What every handler does, and every raw consumer: one append that other processes' appends do not cut."""
    if not _file:
        _file.append(os.open(os.environ[FILE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    os.write(_file[0], RECORD.pack(enqueued, time.monotonic(), number))


async def _gate() -> None:
    """Say that this process is ready, and wait until all are."""
    gate = Path(os.environ[GATE])
    (gate / str(os.getpid())).touch()
    await until((gate / "open").exists, lambda: "the gate was shut")


@asynccontextmanager
async def _gated() -> AsyncIterator[None]:
    await _gate()
    yield


worker = aiqueue.Worker(concurrency=100, lifespan=_gated)


@worker.handle(Noop, result=False)
async def noop(job: aiqueue.Job[Noop]) -> None:
    note(job.message.t, job.message.i)


async def fill(
    client: aiqueue.Client,
    jobs: int,
    *,
    tenant: str = "bench",
    tenants: int = 0,
    priority: str = "normal",
    deadline_s: float | None = None,
    first: bool = True,
) -> None:
    """Store a backlog, of one tenant or in turn of `tenants` many; `first` empties the stream before."""
    if first:
        await empty(client)
    raw = await raw_client(client)
    js = raw.jetstream(publish_async_max_pending=1_000)
    for i in range(jobs):
        whose = f"t{i % tenants}" if tenants else tenant
        subject, data, told = raw_job(i, tenant=whose, priority=priority, deadline_s=deadline_s)
        await js.publish_async(subject, data, headers=told)
    await js.publish_async_completed()
    await raw.close()


async def ours(client: aiqueue.Client, jobs: int, *, result: bool = False) -> float:
    """Jobs a second, from the first handler to the last. `result`: each job's number is kept as its result."""

    def make(handler: Callable[[aiqueue.Job[Noop]], Any]) -> aiqueue.Worker:
        worker = aiqueue.Worker(concurrency=100)
        worker.handle(Noop, result=result)(handler)
        return worker

    return await timed_drain(client, jobs, make)


async def timed_drain(
    client: aiqueue.Client, jobs: int, make: Callable[[Callable[[aiqueue.Job[Noop]], Any]], aiqueue.Worker]
) -> float:
    """Jobs a second, from the first handler to the last, of the worker that `make` returns for a handler."""
    seen: list[float] = []
    finished = asyncio.Event()

    async def noop(job: aiqueue.Job[Noop]) -> int:
        seen.append(time.perf_counter())
        if len(seen) >= jobs:
            finished.set()
        return job.message.i

    here = make(noop)
    async with here.running(client), asyncio.timeout(WITHIN_S):
        await finished.wait()
    return (jobs - 1) / (seen[-1] - seen[0])


async def fill_bare(client: aiqueue.Client, jobs: int) -> None:
    """Store a backlog of bodies without headers in the place of what was there."""
    await empty(client)
    raw = await raw_client(client)
    await tuned.publish_many(raw, raw_job(0)[0], map(body, range(jobs)))
    await raw.close()


async def theirs(client: aiqueue.Client, jobs: int) -> float:
    name = await lane(client)
    raw = await raw_client(client)
    subscription = await raw.jetstream().pull_subscribe_bind(name, STREAM)
    first, done = 0.0, 0
    async with asyncio.timeout(WITHIN_S):
        while done < jobs:
            for each in await subscription.fetch(100, timeout=5):
                first = first or time.perf_counter()
                opened(each)
                await each.ack()
                done += 1
    rate = (jobs - 1) / (time.perf_counter() - first)
    await raw.flush()
    await raw.close()
    return rate


async def bare(client: aiqueue.Client, jobs: int, *, result: bool = False) -> float:
    """Jobs a second of the bare loop. `result`: each job publishes one, and awaits that it is stored."""
    raw = await raw_client(client)
    name = await lane(client)
    results = tuned.Publisher(raw)
    await results.start()
    journal = client.topology.family(FAMILY).journal
    seen: list[float] = []

    async def handle(told: dict[str, object]) -> None:
        seen.append(time.perf_counter())
        if result:
            await results.publish(f"{journal}.bench.{told['i']}", cbor2.dumps(told["i"]))

    async with asyncio.timeout(WITHIN_S):
        await tuned.drain(raw, STREAM, name, jobs, handle)
    await raw.close()
    return (jobs - 1) / (seen[-1] - seen[0])


async def processes(client: aiqueue.Client, side: str, jobs: int, *, count: int) -> float:
    """Jobs a second of so many worker processes, from the first handler of all to the last."""
    if side == OURS:
        program = ["-m", "aiqueue", "work", "benchmarks.drain:worker", "--log-level", "warning"]
    else:
        program = ["-m", "benchmarks.drain", await lane(client), side]
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-") as directory:
        gate, file = Path(directory) / "gate", Path(directory) / "records"
        gate.mkdir()
        file.touch()
        env = {FILE: str(file), GATE: str(gate)}
        async with beside(client, *[program] * count, env=env) as workers:

            def ready() -> int:
                for each in workers:
                    each.check()
                return sum(1 for _ in gate.iterdir())

            def done() -> int:
                for each in workers:
                    each.check()
                return file.stat().st_size // RECORD.size

            await until(lambda: ready() == count, lambda: f"{ready()} of {count} workers were ready")
            (gate / "open").touch()
            within_s = max(WITHIN_S, jobs / SLOWEST)
            await until(lambda: done() >= jobs, lambda: f"{done():,} of {jobs:,} jobs had run", within_s=within_s)
        return rate(file, jobs)


def rate(file: Path, jobs: int) -> float:
    """Jobs a second by the records. Raises RuntimeError where one is missing, or was run twice."""
    records = [*RECORD.iter_unpack(file.read_bytes())]
    numbers = {number for _, _, number in records}
    if len(records) != jobs or numbers != set(range(jobs)):
        raise RuntimeError(f"{len(numbers):,} of {jobs:,} jobs ran, in {len(records):,} runs")
    begun = [start for _, start, _ in records]
    return (jobs - 1) / float(max(begun) - min(begun))


async def _fetch(client: aiqueue.Client, consumer: str) -> None:
    """The raw worker's process, until it is ended."""
    raw = await raw_client(client)
    subscription = await raw.jetstream().pull_subscribe_bind(consumer, STREAM)
    await _gate()
    while True:
        try:
            batch = await subscription.fetch(100, timeout=5)
        except nats.errors.TimeoutError:
            continue
        for each in batch:
            told = opened(each)
            note(told["t"], told["i"])
            await each.ack()


async def _loop(client: aiqueue.Client, consumer: str) -> None:
    """The bare loop's process, until it is ended."""

    async def handle(told: dict[str, object]) -> None:
        note(told["t"], told["i"])  # type: ignore[arg-type]

    raw = await raw_client(client)
    await _gate()
    await tuned.drain(raw, STREAM, consumer, sys.maxsize, handle)


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """`jobs` in this process; LONGER times as many in processes of their own."""
    here = Row("drain", "drain, one worker in this process", "/s",
               how={OURS: "typed handler, 100 slots", RAW: FETCH,
                    STOCK: f"{FETCH} (no headers)",
                    TUNED: "pulls ahead, CBOR decoded, a task a job, ack (no headers)"})  # fmt: skip
    full = Row("drain", "drain of jobs with a deadline, one worker in this process", "/s",
               how={OURS: "the worker's full path, for a deadline", RAW: f"{FETCH} (one header more)"})  # fmt: skip
    kept = Row("drain", "drain with results kept, one worker in this process", "/s",
               how={OURS: "typed handler, 100 slots", TUNED: "the same, each result stored and awaited"})  # fmt: skip
    many = LONGER * jobs
    how = {OURS: "aiqueue work, typed handler, 100 slots each", RAW: FETCH, TUNED: "as in this process, each"}
    apart = {count: Row("drain", f"drain, {words}, {many:,} jobs", "/s", how=how) for count, words in PROCESSES.items()}
    async with cap_raised(client, many):
        for _ in range(rounds):
            await fill(client, jobs)
            here.add(OURS, await ours(client, jobs))
            await fill(client, jobs)
            here.add(RAW, await theirs(client, jobs))
            await fill_bare(client, jobs)
            here.add(STOCK, await theirs(client, jobs))
            await fill_bare(client, jobs)
            here.add(TUNED, await bare(client, jobs))
            await fill(client, jobs, deadline_s=DEADLINE_S)
            full.add(OURS, await ours(client, jobs))
            await fill(client, jobs, deadline_s=DEADLINE_S)
            full.add(RAW, await theirs(client, jobs))
            await fill(client, jobs)
            kept.add(OURS, await ours(client, jobs, result=True))
            await fill_bare(client, jobs)
            kept.add(TUNED, await bare(client, jobs, result=True))
            await empty(client, client.topology.journal_stream.name)
            for count, row in apart.items():
                for side in (OURS, RAW):
                    await empty(client)
                    await pour(client, many)
                    row.add(side, await processes(client, side, many, count=count))
                await fill_bare(client, many)
                row.add(TUNED, await processes(client, TUNED, many, count=count))
    return [here, full, kept, *apart.values()]


async def _main() -> None:
    async with aiqueue.connect() as client:
        await {RAW: _fetch, TUNED: _loop}[sys.argv[2]](client, sys.argv[1])


if __name__ == "__main__":
    run_loop(_main())
