"""What lanes cost: a backlog spread over 1 to 1,000 tenants, lanes in files or in memory, beside one shared lane; and
what is left in a worker of tenants that came and went.

For the second, a worker process sees 10,000 tenants with 10 jobs each, 1,000 at a time. It lets idle lanes go after
IDLE_S, not a minute, and the server their consumers after INACTIVE_S, so that this takes four minutes and not an hour:
an idle lane's open pull must still run out.
"""

from __future__ import annotations

import asyncio
import signal
import time
from pathlib import Path

import aiqueue
from aiqueue.lanes import discovery
from aiqueue.server.embedded import EmbeddedServer

from .common import STREAM, Noop, empty, raw_client, raw_job
from .drain import fill
from .fairness import declared, forget_lanes
from .raw import loop_factory
from .report import OURS, Row
from .stamped import Stamped, running, skipped

TENANTS = (1, 10, 100, 1_000)
SHARED, FILE, MEMORY = "shared lane", "lane each, file", "lane each, memory"
KINDS = {SHARED: ("shared", "file"), FILE: ("tenant", "file"), MEMORY: ("tenant", "memory")}
HOW = {
    SHARED: "one consumer for all tenants",
    FILE: "a consumer for each tenant, its state in a file (default)",
    MEMORY: "a consumer for each tenant, its state in memory",
}
WITHIN_S = 300.0

SEEN = (1_000, 10_000)
TURN = 1_000  # tenants that are active at a time
JOBS_EACH = 10
IDLE_S, INACTIVE_S = 2.0, 5.0
LIVE_MAX = 2_000
PASSING = {OURS: f"{JOBS_EACH} jobs each, {TURN:,} tenants at a time; at most {LIVE_MAX:,} lanes live"}


def server_cpu_s(client: aiqueue.Client) -> float:
    """CPU seconds that the embedded server has used, from /proc (Linux)."""
    embedded = client._embedded
    assert isinstance(embedded, EmbeddedServer)
    fields = Path(f"/proc/{embedded.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


async def drain(client: aiqueue.Client, jobs: int) -> tuple[float, float]:
    """Jobs a second from the first handler to the last, and the server's CPU seconds meanwhile. In this process: the
    lanes' kind is declared here only. Raises RuntimeError where a job ran twice.
    """
    worker = aiqueue.Worker(concurrency=100)
    seen: list[float] = []
    numbers: set[int] = set()
    finished = asyncio.Event()

    @worker.handle(Noop, result=False)
    async def noop(job: aiqueue.Job[Noop]) -> None:
        seen.append(time.perf_counter())
        numbers.add(job.message.i)
        if len(seen) >= jobs:
            finished.set()

    before = server_cpu_s(client)
    async with worker.running(client), asyncio.timeout(WITHIN_S):
        await finished.wait()
    if len(numbers) != len(seen):
        raise RuntimeError(f"{len(seen):,} handlers ran {len(numbers):,} jobs")
    return (jobs - 1) / (seen[-1] - seen[0]), server_cpu_s(client) - before


async def side_by_side(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """Rates and the server's CPU seconds, for each number of tenants up to `jobs`."""
    plain = client.topology
    counts = [each for each in TENANTS if each <= jobs]
    rates = {n: Row("tenants", f"drain, {n:,} tenants active", "/s", x=n, how=HOW) for n in counts}
    costs = {n: Row("tenants", f"the server's CPU, {n:,} tenants active", "CPU s", x=n, how=HOW) for n in counts}
    try:
        for _ in range(rounds):
            for tenants in counts:
                for side, (mode, storage) in KINDS.items():
                    client.topology = plain
                    await forget_lanes(client)
                    declared(client, lanes=mode, lane_storage=storage)
                    await fill(client, jobs, tenants=tenants)
                    rate, cpu_s = await drain(client, jobs)
                    rates[tenants].add(side, rate)
                    costs[tenants].add(side, cpu_s)
    finally:
        client.topology = plain
        await empty(client)
        await forget_lanes(client)
    return [row for n in counts for row in (rates[n], costs[n])]


async def arrive(client: aiqueue.Client, first: int, turn: int) -> None:
    """The jobs of so many tenants that were not there before, numbered from `first`."""
    raw = await raw_client(client)
    try:
        js = raw.jetstream(publish_async_max_pending=1_000)
        for i in range(turn * JOBS_EACH):
            subject, body, told = raw_job(first * JOBS_EACH + i, tenant=f"p{first + i % turn}")
            await js.publish_async(subject, body, headers=told)
        await js.publish_async_completed()
    finally:
        await raw.close()


async def live(client: aiqueue.Client) -> int:
    info = await client.connection.api(f"STREAM.INFO.{STREAM}")
    return int(info["state"]["consumer_count"])


async def leave(client: aiqueue.Client, *, down_to: int) -> None:
    """Wait until no more lanes than these live. Raises RuntimeError where they stay for a minute."""
    deadline = time.monotonic() + 60
    while (count := await live(client)) > down_to:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{count:,} lanes still live a minute after their last job")
        await asyncio.sleep(0.1)


async def one_tenant(client: aiqueue.Client, worker: Stamped, jobs: int) -> float:
    """The worker's rate over the jobs of one tenant, stored while it is stopped."""
    done = worker.done
    worker.stop()
    try:
        await fill(client, jobs, first=False)
    finally:
        worker.resume()
    await worker.wait(done + jobs)
    skip = skipped(jobs)
    return (jobs - skip) / worker.span_s(done + skip - 1, done + jobs)


async def passing(
    client: aiqueue.Client, *, jobs: int, seen: tuple[int, ...], turn: int = TURN
) -> dict[int, tuple[float, float]]:
    """Of one worker process: its memory in MiB, and its rate over `jobs` of one tenant, by how many tenants it has
    seen, `turn` at a time; none at first. Raises RuntimeError where a job was lost or ran twice.
    """
    figures = {}
    await empty(client)
    await forget_lanes(client)
    async with running(client, OURS, 0, program=("-m", "benchmarks.tenants")) as worker:
        await fill(client, jobs, first=False)
        await worker.wait(jobs)
        figures[0] = worker.now_mib(), await one_tenant(client, worker, jobs)
        for first in range(0, max(seen, default=0), turn):
            await leave(client, down_to=LIVE_MAX - turn)
            done = worker.done
            await arrive(client, first, turn)
            await worker.wait(done + turn * JOBS_EACH)
            worker.span_s(done, done + turn * JOBS_EACH)
            if first + turn in seen:
                await leave(client, down_to=1)
                figures[first + turn] = worker.now_mib(), await one_tenant(client, worker, jobs)
    await forget_lanes(client)
    return figures


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    """Twice `jobs` over all tenants, for with fewer a thousand lanes would be little more than made; and `jobs` of one
    tenant beside those that pass, of whom there are at most `jobs`: they take minutes, and so one round of two only.
    """
    rows = await side_by_side(client, rounds=rounds, jobs=2 * jobs)
    memory: dict[int, Row] = {}
    rate: dict[int, Row] = {}
    passed = tuple(each for each in SEEN if each <= jobs)
    for _ in range((rounds + 1) // 2):
        for seen, (mib, figure) in (await passing(client, jobs=jobs, seen=passed)).items():
            told = f"{seen:,} tenants seen"
            memory.setdefault(seen, Row("tenants", f"worker's memory, {told}", "MiB", x=seen, how=PASSING))
            rate.setdefault(seen, Row("tenants", f"drain of one tenant, {told}", "/s", x=seen, how=PASSING))
            memory[seen].add(OURS, mib)
            rate[seen].add(OURS, figure)
    return rows + [row for seen in memory for row in (memory[seen], rate[seen])]


async def _work() -> None:
    """The worker process of `passing`: that of `stamping`, with lanes that are let go sooner."""
    from .stamping import worker  # noqa: PLC0415  (it opens the file of stamps)

    discovery.IDLE_S = IDLE_S
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with aiqueue.connect() as client:
        declared(client, inactive_threshold_s=INACTIVE_S)
        async with worker.running(client):
            await ended.wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_work())
