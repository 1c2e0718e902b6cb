"""Acts on jobs of a filter while two workers run and every 2 s one of them is killed -9 and replaced.

The judge is what the handlers wrote down and what the journals say: each job that is not cancelled ends once, and runs
again only where a kill has met its run.
"""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.client import ActOutcome
from aiqueue.journal import entry_from_stored
from aiqueue.topology import provision

from .chaos import app, checker, records
from .chaos.checker import Evidence, Verdict, Word
from .chaos.children import Workers
from .chaos.nemesis import Fault
from .common import until

WORKERS = 2
CONCURRENCY = 20
EVERY_S, KILLS_MIN = 2.0, 3
KILLED_SHARE = 0.9  # of the jobs that are to run; then the rest may end in peace
HANDLER_MS = 50.0
ACK_WAIT_S = 15.0  # with a shorter one a busy machine's acks come too late
PATIENCE_S = 60.0
WITHIN_S = 180.0
TENANT = "acted"
OPTIONS: dict[str, dict[str, Any]] = {"run_now": {"delay": "1h"}, "move": {"priority": "low"}}


class Ground:
    """A client with the streams of `app`, and the workers."""

    def __init__(self, client: aiqueue.Client, directory: Path) -> None:
        self.client = client
        self.faults: list[Fault] = []
        self.log = directory / "runs.log"
        settings = client.connection.settings
        env = {
            "AIQUEUE_URL": settings.url or "", "AIQUEUE_USER": settings.user or "",
            "AIQUEUE_PASSWORD": settings.password.get_secret_value() if settings.password else "",
            "AIQUEUE_STREAMS": str(directory / "streams"), app.LOG: str(self.log), app.HANDLER_MS: str(HANDLER_MS),
        }  # fmt: skip
        program = ["-m", "aiqueue", "work", f"--concurrency={CONCURRENCY}", "--log-level=warning"]
        log = directory / "workers.log"
        self.workers = Workers([*program, "benchmarks.chaos.app:worker"], env, log, count=WORKERS)

    async def stored(self) -> int:
        """Return how many jobs are in their lanes, and parked. The server is all ours."""
        streams = (app.STREAM, self.client.topology.parked_stream.name)
        infos = [await self.client.connection.api(f"STREAM.INFO.{each}") for each in streams]
        return sum(int(info["state"]["messages"]) for info in infos)

    @property
    def ended(self) -> int:
        """How many runs have ended."""
        return sum(run.end is not None for run in records.runs(self.log))

    async def kill_every_2_s(self) -> None:
        while True:
            await asyncio.sleep(EVERY_S)
            victim = self.workers.alive[0]  # the oldest
            fault = Fault("worker-kill", time.monotonic(), victim=victim.pid)
            await asyncio.to_thread(self.workers.kill, victim)
            fault.until = time.monotonic()  # till then it may have begun to run a job
            self.faults.append(fault)
            self.workers.start()

    async def drain(self) -> int:
        """Return how many jobs are stored, once none is, or the number has stayed the same for PATIENCE_S."""
        left, since = -1, time.monotonic()
        while left and time.monotonic() - since < PATIENCE_S:
            await asyncio.sleep(0.2)
            with contextlib.suppress(aiqueue.errors.Unavailable):  # a busy server may be late
                if (now := await self.stored()) != left:
                    left, since = now, time.monotonic()
        return left


@contextlib.asynccontextmanager
async def ground() -> AsyncIterator[Ground]:
    """A server and workers of its own, with nothing left of them afterwards."""
    with tempfile.TemporaryDirectory(prefix="aiqueue-bench-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        (directory / "streams").mkdir()
        (directory / "streams" / "chaos_jobs.toml").write_text(app.declared(ACK_WAIT_S, "1GiB"))
        async with aiqueue.connect(directory=directory / "server", streams=directory / "streams") as client:
            await provision.apply(client.connection, client.topology)
            made = Ground(client, directory)
            try:
                yield made
            finally:
                made.workers.kill_all()


async def prepare(client: aiqueue.Client, name: str, jobs: int) -> None:
    """Store the jobs where the act finds them."""
    specs = (
        aiqueue.JobSpec(app.Task(number=n), tenant=TENANT, unique=str(n), **OPTIONS.get(name, {})) for n in range(jobs)
    )
    async for stored in client.enqueue_many(specs):
        if isinstance(stored, aiqueue.AIQueueError):
            raise stored
    if name != "replay":
        return
    worker = aiqueue.Worker(concurrency=50)

    @worker.handle(app.Task, retry=aiqueue.Backoff(attempts=1))
    async def fail(job: aiqueue.Job[app.Task]) -> None:
        raise aiqueue.Reject("to be replayed")

    async with worker.running(client), asyncio.timeout(WITHIN_S):
        while (await client.jobs.plan("replay", tenant=TENANT)).count < jobs:
            await asyncio.sleep(0.5)


async def read_journals(client: aiqueue.Client) -> dict[int, list[Word]]:
    found: dict[int, list[Word]] = {}
    async for stored in client.connection.read(client.topology.journal_stream.name, f"{app.JOURNAL}.*.*"):
        entry = entry_from_stored(stored)
        mark = entry.data.get("mark", "") if isinstance(entry.data, dict) else ""
        found.setdefault(int(stored.subject.rpartition(".")[2]), []).append(Word(entry.event, entry.run, str(mark)))
    return found


def judge(name: str, jobs: int, outcome: ActOutcome, verdict: Verdict, cancelled: int, faults: int) -> None:
    """Raise RuntimeError where something is lost, left, overwritten, or has run again without a reason."""
    problems = {
        "jobs that the outcome does not name": outcome.matched - outcome.done - len(outcome.ended),
        "failures": len(outcome.failed), "jobs that never ended": len(verdict.lost), "jobs left": verdict.left,
        "journals with two ends": len(verdict.overwritten),
        "runs again that no kill explains": len(verdict.unexplained),
        "runs beyond those in flight at a kill": max(0, verdict.repeats - verdict.in_flight),
        "dead letters": verdict.dead, "kills missing": max(0, KILLS_MIN - faults),
        "cancelled beside the count": cancelled - (outcome.done if name == "cancel" else 0),
        "jobs that are neither": jobs - cancelled - verdict.completed,
    }  # fmt: skip
    if wrong := {what: count for what, count in problems.items() if count}:
        raise RuntimeError(f"{name} under kills: {wrong}; {verdict.plain()}")


def describe(runs: list[records.Run], number: int, faults: list[Fault], journals: dict[int, list[Word]]) -> str:
    """Return the runs of a job in words. Times are from its first run."""
    own = [run for run in runs if run.number == number]
    first = own[0].start
    killed = {fault.victim: f", killed at {fault.at - first:.3f} s" for fault in faults}
    told = [
        f"run of {run.pid} from {run.start - first:.3f} s to "
        f"{'no end' if run.end is None else f'{run.end - first:.3f} s'}{killed.get(run.pid, '')}"
        for run in own
    ]  # fmt: skip
    return f"job {number}: {'; '.join(told)}; journal: {[word.event for word in journals.get(number, ())]}"


async def act(name: Any, jobs: int) -> str:
    """Act on `jobs` jobs under kills, and say what came of it. Raises RuntimeError where a sum is wrong."""
    async with ground() as here:
        client = here.client
        await prepare(client, name, jobs)
        here.workers.start()
        if name in ("cancel", "move"):  # of the others, none waits in a lane
            await until(lambda: here.ended > 0, lambda: "no job has ended")
        killing = asyncio.create_task(here.kill_every_2_s())
        at = time.monotonic()
        plan = await client.jobs.plan(name, tenant=TENANT, to="high" if name == "move" else "")
        outcome = await client.jobs.act(plan)
        took_s = time.monotonic() - at
        to_run = jobs - outcome.done if name == "cancel" else jobs
        async with asyncio.timeout(WITHIN_S):
            while not killing.done() and (len(here.faults) < KILLS_MIN or here.ended < to_run * KILLED_SHARE):
                await asyncio.sleep(0.5)
        killing.cancel()
        await asyncio.gather(killing, return_exceptions=True)
        here.workers.start()
        left = await here.drain()
        here.workers.end()
        journals = await read_journals(client)
        cancelled = {number for number, words in journals.items() if any(word.event == "cancelled" for word in words)}
        dead = [int(letter.job_id) async for letter in client.dead.find()]
        kept = [records.Line(records.ACKED, n, "0", 0.0) for n in range(jobs) if n not in cancelled]
        runs = records.runs(here.log)
        verdict = checker.check(Evidence(kept, runs, here.faults, journals, dead, left))
        try:
            judge(name, jobs, outcome, verdict, len(cancelled), len(here.faults))
        except RuntimeError as error:
            told = [describe(runs, number, here.faults, journals) for number in verdict.unexplained[: checker.SHOWN]]
            raise RuntimeError("\n  ".join([str(error), *told])) from None
    return (
        f"{name} {plan.count:,} jobs under {len(here.faults)} kills: {took_s:.1f} s, {outcome.done:,} done, "
        f"{len(outcome.ended):,} ended meanwhile; of {verdict.in_flight} runs in flight {verdict.repeats} came again"
    )
