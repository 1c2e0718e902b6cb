"""Cancelling jobs that run."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.attempt import cancellation
from aiqueue.client.cancel import ALREADY_CANCELLED, ALREADY_ENDED, STOPPING
from aiqueue.errors import JobFailed
from aiqueue.journal import CANCELLED, EMPTY_RECORD, WHILE_RUNNING, Entry, entry_from_stored
from aiqueue.processes import quarantine
from aiqueue.worker import session, settlement

from .. import suspects
from ..client.test_cancel import cancelled, empty, stored
from ..support import Relay, create_streams, eventually
from ..suspects import Act
from ..worker.test_kill import STREAM as SLEEPS
from ..worker.test_kill import Sleep, WorkerPool

pytestmark = pytest.mark.families("agent.tasks")


class Task(aiqueue.Message, kind="task"):
    n: int = 0


@pytest.fixture(autouse=True)
def only_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt looks by itself, as it would after 5 s: what stops here was told, unless a test has it look."""
    monkeypatch.setattr(cancellation, "LONG_S", 600)


class Seen:
    """What a handler has gone through."""

    def __init__(self) -> None:
        self.entered: list[str] = []
        self.stopped: list[str] = []
        self.done: list[str] = []


def working(seen: Seen, *, takes_s: float = 60.0, cleans_s: float = 0.0, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(**options)

    @worker.handle(Task, timeout=None)
    async def task(job: aiqueue.Job[Task]) -> int:
        seen.entered.append(job.id)
        try:
            await asyncio.sleep(takes_s)
        except asyncio.CancelledError:
            seen.stopped.append(job.id)
            await asyncio.sleep(cleans_s)
            raise
        seen.done.append(job.id)
        return job.message.n

    return worker


async def journal_of(client: aiqueue.Client, job_id: str) -> list[Entry]:
    read = client.connection.read("AI_RESULTS", subjects.journal("ai.agent.results", "acme", job_id))
    return [entry_from_stored(each) async for each in read]


async def test_a_running_jobs_coroutine_is_cancelled_and_its_result_says_so(client: aiqueue.Client) -> None:
    seen = Seen()
    async with working(seen).running(client) as session:
        handles = [await client.enqueue(Task(), tenant="acme", delay=delay) for delay in (None, 0.1)]
        await eventually(lambda: len(seen.entered) == 2)
        for handle in handles:
            assert await handle.verdict() == STOPPING
            assert await cancelled(handle)
            assert await handle.verdict() == ALREADY_CANCELLED
        await eventually(lambda: len(seen.stopped) == 2)
        await eventually(lambda: session.running == 0)
        assert await empty(client)
        assert await stored(client, "AI_DEAD") == 0
        entries = [entry for handle in handles for entry in await journal_of(client, handle.id)]
        assert [each.event for each in entries if each.final] == [CANCELLED, CANCELLED]
    assert seen.done == []


async def test_by_its_id_a_running_job_is_cancelled_too(client: aiqueue.Client) -> None:
    seen = Seen()
    async with working(seen).running(client):
        await client.enqueue(Task(), tenant="acme", unique="a")
        await eventually(lambda: seen.entered)
        assert await client.cancel("a")
        await eventually(lambda: seen.stopped)


async def test_a_notice_without_a_cancellation_in_the_journal_stops_nothing(
    account: Any, client: aiqueue.Client
) -> None:
    seen = Seen()
    async with (
        working(seen).running(client),
        aiqueue.connect(account.url, user=account.user, password=account.password) as other,
    ):
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: seen.entered)
        notice = f"acme {handle.id} {handle._enqueued.seq}".encode()
        for _ in range(1_000):
            await other.connection.publish("aiq.cancel.agent.tasks", notice)
        reads = client.connection
        await other.connection.flush()
        await reads.flush()
        for _ in range(3):  # the reads that the notices have caused are answered before these
            assert not await client.journal.final_entry(subjects.journal("ai.agent.results", "acme", handle.id), 1, 0)
        assert not seen.stopped
        assert await handle.verdict() == STOPPING  # behind all the others
        await eventually(lambda: seen.stopped)
        assert await cancelled(handle)


async def test_what_a_handler_does_in_its_finally_is_let_end(client: aiqueue.Client) -> None:
    seen = Seen()
    cleaned: list[bool] = []
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        try:
            seen.entered.append(job.id)
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(1.5)
            cleaned.append(job.cancelled)

    async with worker.running(client) as session:
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: seen.entered)
        assert await handle.cancel()
        await eventually(lambda: session.running == 0)
    assert cleaned == [True]
    assert await empty(client)


async def test_a_handler_that_swallows_its_cancellation_has_its_result_refused(client: aiqueue.Client) -> None:
    seen = Seen()
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> str:
        seen.entered.append(job.id)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(60)
        return "all the same"

    async with worker.running(client) as session:
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: seen.entered)
        assert await handle.cancel()
        await eventually(lambda: session.running == 0)
        assert await cancelled(handle)
    assert await empty(client)


async def test_a_plain_function_is_told_and_its_slot_is_free_at_once(client: aiqueue.Client) -> None:
    seen = Seen()
    worker = aiqueue.Worker(concurrency=1)
    ends_seen: list[str] = []

    @worker.handle(Task)
    def task(job: aiqueue.Job[Task]) -> None:
        seen.entered.append(job.id)
        while job.message.n and not job.cancelled:
            time.sleep(0.01)
        ends_seen.append("stopped" if job.cancelled else "done")

    async with worker.running(client):
        handle = await client.enqueue(Task(n=1), tenant="acme")
        await eventually(lambda: seen.entered)
        assert await handle.cancel()
        await eventually(lambda: ends_seen == ["stopped"])
        await (await client.enqueue(Task(), tenant="acme")).result(25)
        assert await cancelled(handle)
    assert ends_seen == ["stopped", "done"]


async def test_a_thread_that_was_abandoned_at_its_timeout_is_told_as_well(client: aiqueue.Client) -> None:
    flags: list[bool] = []
    worker = aiqueue.Worker()

    @worker.handle(Task, timeout=0.2, retry=aiqueue.Backoff(attempts=1))
    def task(job: aiqueue.Job[Task]) -> None:
        end = time.monotonic() + 10
        while not job.cancelled and time.monotonic() < end:
            time.sleep(0.01)
        flags.append(job.cancelled)

    async with worker.running(client):
        with pytest.raises(JobFailed, match="timed out"):
            await (await client.enqueue(Task(), tenant="acme")).result(25)
        await eventually(lambda: flags == [True])


@pytest.mark.parametrize("kept", ["async", "plain", "stuck"])
async def test_a_child_process_ends_its_handler_or_is_killed(
    client: aiqueue.Client, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A child whose handler ends is used again; a child that goes on is killed and replaced."""
    monkeypatch.setenv("SUSPECTS_LOG", str(log := tmp_path / "log"))
    monkeypatch.setattr(cancellation, "GRACE_S", 0.3 if kept == "stuck" else 5.0)
    worker = aiqueue.Worker(processes=1)
    worker.handle(Act, process=True)(suspects.act if kept == "async" else suspects.act_sync)
    async with worker.running(client) as session:
        before = await (await client.enqueue(Act(do=""), tenant="acme")).result(20)
        does = {"async": "wait", "plain": "heed", "stuck": "block"}[kept]
        handle = await client.enqueue(Act(do=does, value=60), tenant="acme")
        await eventually(lambda: log.exists() and f"{does} " in log.read_text())
        assert await handle.cancel()
        await eventually(lambda: session.running == 0)
        after = await (await client.enqueue(Act(do=""), tenant="acme")).result(20)
        assert await cancelled(handle)
    assert (after["pid"] == before["pid"]) == (kept != "stuck")
    assert await empty(client)


async def test_a_job_that_waits_for_a_child_process_is_not_run(
    client: aiqueue.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SUSPECTS_LOG", str(log := tmp_path / "log"))
    worker = working(Seen(), processes=1, concurrency=2)
    worker.handle(Act, process=True)(suspects.act_sync)
    async with worker.running(client) as session:
        handles = [await client.enqueue(Act(do="heed"), tenant="acme") for _ in range(2)]
        await eventually(lambda: session.running == 2 and log.exists() and "heed " in log.read_text())
        waiting = next(each for each in handles if each.id not in log.read_text())
        for each in (waiting, *handles):
            assert await each.cancel()
        await eventually(lambda: session.running == 0)
    assert log.read_text().count("heed") == 1


async def test_without_its_notice_a_cancellation_is_found_in_the_journal(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cancellation, "LONG_S", 0.3)
    seen = Seen()
    async with working(seen).running(client) as session:
        await drop_notices(session)
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: seen.entered)
        assert await handle.cancel()
        await eventually(lambda: seen.stopped)
        await eventually(lambda: session.running == 0)
    assert await empty(client)


async def test_of_more_attempts_than_a_round_can_check_the_last_one_is_checked_too(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("LONG_S", 0.01), ("ROUND_S", 0.02), ("CHECKS_MAX", 1)):  # the first is due in every round
        monkeypatch.setattr(cancellation, name, value)
    seen = Seen()
    async with working(seen, drain_timeout=0).running(client) as session:
        await drop_notices(session)
        for n in range(3):
            handle = await client.enqueue(Task(), tenant="acme")
            await eventually(lambda started=n + 1: len(seen.entered) == started)
        assert await handle.cancel()
        await eventually(lambda: seen.stopped)
        assert seen.stopped == [handle.id]


async def drop_notices(session: Any) -> None:
    await session.runner.cancellations.unsubscribe()


async def test_a_write_of_the_attempt_meets_the_cancellation(client: aiqueue.Client) -> None:
    """Without the notice too: `progress` raises in the handler."""
    go, entered = asyncio.Event(), asyncio.Event()
    worker = aiqueue.Worker()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        entered.set()
        await go.wait()
        await job.progress(0.5)

    async with worker.running(client) as session:
        await drop_notices(session)
        handle = await client.enqueue(Task(), tenant="acme")
        await entered.wait()
        assert await handle.cancel()
        go.set()
        await eventually(lambda: session.running == 0)
        assert await cancelled(handle)
    assert [each.event for each in await journal_of(client, handle.id)] == [CANCELLED]
    assert await empty(client)


async def test_a_worker_that_was_cut_off_learns_of_it_when_it_is_back(account: Any, client: aiqueue.Client) -> None:
    """Long before it would have looked."""
    seen = Seen()
    async with (
        Relay(account.address) as relay,
        aiqueue.connect(relay.url, user=account.user, password=account.password) as cut_off,
        working(seen).running(cut_off) as session,
    ):
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: seen.entered)
        await relay.cut()
        await eventually(lambda: not cut_off.connection.connected)
        assert await handle.cancel()
        assert seen.stopped == []
        await relay.mend()
        await eventually(lambda: seen.stopped)
        await eventually(lambda: session.running == 0)
    assert await empty(client)


async def test_an_attempt_that_streams_faster_than_one_can_cancel_is_cancelled(client: aiqueue.Client) -> None:
    """Each entry of its own refuses the canceller's, which knew of an older one."""
    worker = aiqueue.Worker()
    entered = asyncio.Event()

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        async def tell() -> None:
            while True:
                await job.progress(0.5)
                entered.set()

        await asyncio.gather(*(tell() for _ in range(5)))

    async with worker.running(client) as session:
        handle = await client.enqueue(Task(), tenant="acme")
        await entered.wait()
        assert await handle.verdict() == STOPPING
        await eventually(lambda: session.running == 0)
        entries = await journal_of(client, handle.id)
    assert [each.event for each in entries if each.final] == [CANCELLED]
    assert entries[-1].event == CANCELLED


async def test_a_job_that_waits_in_a_worker_for_a_slot_is_not_run(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker holds one beyond its slot, as one does whose jobs are short."""
    monkeypatch.setattr(session, "prefetch", lambda slots, handler_s: 1)
    monkeypatch.setattr(session, "WAIT_HERE_MAX_S", 60.0)
    entered: list[str] = []
    go = asyncio.Event()
    worker = aiqueue.Worker(concurrency=1)

    @worker.handle(Task)
    async def task(job: aiqueue.Job[Task]) -> None:
        entered.append(job.id)
        await go.wait()

    handles = [await client.enqueue(Task(), tenant="acme") for _ in range(2)]
    async with worker.running(client) as running:
        await eventually(lambda: entered and running.vitals()["waiting"] == 1)
        first, second = sorted(handles, key=lambda each: each.id not in entered)
        assert await second.verdict() == STOPPING
        go.set()
        await first.result(25)
        assert await cancelled(second)
        await eventually(lambda: running.vitals()["waiting"] == running.running == 0)
        assert await empty(client)
    assert entered == [first.id]


async def test_a_stopped_job_holds_its_documents_no_longer(client: aiqueue.Client) -> None:
    class Big(aiqueue.Message, kind="big"):
        blob: bytes

    entered = asyncio.Event()
    worker = aiqueue.Worker()

    @worker.handle(Big)
    async def big(job: aiqueue.Job[Big]) -> None:
        entered.set()
        await asyncio.sleep(60)

    async with worker.running(client):
        handle = await client.enqueue(Big(blob=bytes(400_000)), tenant="acme")
        await asyncio.wait_for(entered.wait(), 25)
        assert await handle.cancel()
        assert [each.jobs async for each in client.documents.find()] == []


async def test_drained_while_it_is_stopped_a_job_does_not_come_back(client: aiqueue.Client) -> None:
    seen = Seen()
    async with working(seen, cleans_s=60, drain_timeout=0.2).running(client):
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: seen.entered)
        assert await handle.cancel()
        await eventually(lambda: seen.stopped)
    assert await empty(client)
    assert await cancelled(handle)


Handlers = Callable[[aiqueue.Job[Task]], Awaitable[object]]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("way", ["async", "thread", "child", "fails"])
async def test_around_its_end_a_job_is_cancelled_or_done_and_never_both(client: aiqueue.Client, way: str) -> None:
    """At 200 random moments around the end of the handler (50 for children); a few surely before it, a few after."""
    entered: list[str] = []
    worker = aiqueue.Worker(concurrency=50, processes=2)

    @worker.handle(Task, retry=aiqueue.Backoff(attempts=1))
    async def task(job: aiqueue.Job[Task]) -> int:
        entered.append(job.id)
        await asyncio.sleep(0.05)
        if way == "fails":
            raise ValueError
        return job.message.n

    class Plain(aiqueue.Message, kind="plain"):
        n: int

    @worker.handle(Plain)
    def plain(job: aiqueue.Job[Plain]) -> int:
        entered.append(job.id)
        time.sleep(0.05)
        return job.message.n

    worker.handle(Act, process=True)(suspects.act)
    count = 50 if way == "child" else 200
    verdicts: dict[str, bool] = {}
    ends: dict[str, str] = {}

    def message(n: int) -> aiqueue.Message:
        return {"thread": Plain(n=n), "child": Act(do="sleep", value=0.05)}.get(way) or Task(n=n)

    async def one(n: int) -> None:
        await asyncio.sleep(random.uniform(0, 1.0 if way == "child" else 0.5))
        delay = "30s" if 5 <= n < 10 else None  # cancelled before it can begin, also on a busy machine
        handle = await client.enqueue(message(n), tenant="acme", unique=f"j{n}", delay=delay)
        if n < 5:
            with contextlib.suppress(JobFailed):
                await handle.result(25)
        elif n >= 10:
            await asyncio.sleep(random.uniform(0.02, 0.12))
        verdicts[handle.id] = await handle.cancel()
        try:
            await handle.result(25)
        except JobFailed as failed:
            ends[handle.id] = failed.reason
        else:
            ends[handle.id] = "done"

    async with worker.running(client):
        await asyncio.gather(*(one(n) for n in range(count)))
        await eventually(lambda: empty(client), within=40)
    for name, verdict in verdicts.items():
        assert ends[name] == (CANCELLED if verdict else "attempts" if way == "fails" else "done")
        assert sum(each.final for each in await journal_of(client, name)) == 1
    assert len(set(entered)) == len(entered)
    letters = {each.job_id async for each in client.dead.find()}
    assert letters == {name for name, end in ends.items() if end == "attempts"}
    assert 0 < sum(verdicts.values()) < count


@pytest.mark.parametrize("does", ["wait", "block"])
async def test_a_suspect_is_stopped_and_not_convicted(
    client: aiqueue.Client, does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the child that tries it has to be killed."""
    monkeypatch.setattr(quarantine, "LOST_MIN", 0)
    monkeypatch.setattr(cancellation, "GRACE_S", 0.3)
    monkeypatch.setenv("SUSPECTS_LOG", str(log := tmp_path / "log"))
    worker = aiqueue.Worker(concurrency=8)
    worker.handle(Act)(suspects.act)
    async with worker.running(client) as session:
        handle = await client.enqueue(Act(do=does, value=60), tenant="acme")
        await eventually(lambda: log.exists() and f"{does} " in log.read_text(), within=40)
        behind = await client.enqueue(Act(do="sleep"), tenant="acme")  # waits for the trial to end
        assert await handle.cancel()
        assert (await behind.result(20))["attempt"] == 1
        assert await cancelled(handle)
        await eventually(lambda: session.running == 0)
    assert await stored(client, "AI_DEAD") == 0
    assert await empty(client)


async def test_a_suspect_that_is_tried_in_the_worker_is_stopped(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its handler is found by no child."""
    monkeypatch.setattr(quarantine, "LOST_MIN", 0)
    seen = Seen()
    async with working(seen).running(client) as session:
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: seen.entered, within=40)
        assert await handle.cancel()
        await eventually(lambda: seen.stopped)
        await eventually(lambda: session.running == 0)
        assert await cancelled(handle)
    assert await empty(client)


async def test_a_job_that_was_parked_is_cancelled_by_its_handle(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its message has another sequence than the one that the handle knows."""
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.1)
    attempts: list[int] = []
    worker = aiqueue.Worker()

    @worker.handle(Task, timeout=None)
    async def task(job: aiqueue.Job[Task]) -> None:
        attempts.append(job.attempt)
        if job.attempt == 1:
            raise aiqueue.Retry(after=0.2)
        await asyncio.sleep(60)

    async with worker.running(client) as session:
        handle = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: attempts == [1, 2])
        assert await handle.verdict() == STOPPING
        await eventually(lambda: session.running == 0)
        assert await cancelled(handle)
        assert await handle.verdict() == ALREADY_CANCELLED
    assert await empty(client)
    assert await stored(client, "AI_PARKED") == 0


async def test_without_a_result_to_keep_a_job_is_cancelled_too(client: aiqueue.Client) -> None:
    entered = asyncio.Event()
    stopped = asyncio.Event()
    worker = aiqueue.Worker()

    @worker.handle(Task, result=False)
    async def task(job: aiqueue.Job[Task]) -> None:
        entered.set()
        try:
            await asyncio.sleep(60 if job.message.n else 0)
        except asyncio.CancelledError:
            stopped.set()
            raise

    async with worker.running(client) as session:
        handle = await client.enqueue(Task(n=1), tenant="acme")
        await asyncio.wait_for(entered.wait(), 25)
        assert await handle.verdict() == STOPPING
        await asyncio.wait_for(stopped.wait(), 25)
        assert await cancelled(handle)
        short = await client.enqueue(Task(), tenant="acme")
        await eventually(lambda: empty(client))
        assert await short.verdict() == ALREADY_ENDED
        await eventually(lambda: session.running == 0)


APP = """
    import asyncio, os
    import aiqueue

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
        n: int

    worker = aiqueue.Worker()

    @worker.handle(Sleep)
    async def sleep(job: aiqueue.Job[Sleep]) -> None:
        os.write(LOG, f"start {job.message.n} {os.getpid()}\\n".encode())
        await asyncio.sleep(60 if job.message.n == 1 else 0)
    """


@pytest.mark.parametrize("undeleted", [False, True], ids=["cancelled", "canceller died"])
async def test_a_killed_workers_job_that_was_cancelled_is_not_run_again(
    account: Any, tmp_path: Path, *, undeleted: bool
) -> None:
    """Also where its canceller died before it could take it out of its lane: its journal is looked at."""
    pool = WorkerPool(tmp_path, account, APP, SLEEPS.replace("5s", "1s"))
    streams = tmp_path / "streams"
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        doomed = pool.start()
        handle = await client.enqueue(Sleep(n=1), tenant="acme")
        await eventually(lambda: pool.lines("start"), within=40)
        doomed.send_signal(signal.SIGSTOP)
        if undeleted:
            subject = subjects.journal(client.topology.family("test.sleeps").journal or "", "acme", handle.id)
            assert await client.journal.append_if_unchanged(
                subject, CANCELLED, WHILE_RUNNING, run=1, attempt=1, parking_id="", record=EMPTY_RECORD
            )
        else:
            assert await handle.cancel()
        pool.kill(doomed)
        pool.start()
        await (await client.enqueue(Sleep(n=2), tenant="acme")).result(20)
        await eventually(lambda: no_job_left(client))
        assert await cancelled(handle)
        pool.stop()
    assert [n for n, _ in pool.lines("start")] == [1, 2]


async def no_job_left(client: aiqueue.Client) -> bool:
    return await stored(client, "TEST_SLEEPS") == 0


BUSY = """
    import asyncio, os, time
    import aiqueue

    LOG = os.open(os.environ["JOB_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    class Sleep(aiqueue.Message, kind="sleep", family="test.sleeps"):
        n: int

    worker = aiqueue.Worker(concurrency=20)

    @worker.handle(Sleep)
    async def sleep(job: aiqueue.Job[Sleep]) -> int:
        os.write(LOG, f"start {job.message.n} {time.time_ns()}\\n".encode())
        await asyncio.sleep(0.2)
        return job.message.n
    """


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_while_workers_are_killed_each_job_is_cancelled_or_done_and_none_is_lost(
    account: Any, tmp_path: Path
) -> None:
    """3,000 jobs, half of them cancelled at random moments; a worker is killed -9 every 4 s."""
    pool = WorkerPool(tmp_path, account, BUSY, SLEEPS.replace("5s", "1s"))
    streams = tmp_path / "streams"
    ends: dict[int, str] = {}
    at: dict[int, int] = {}
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=streams) as client:
        await create_streams(client)
        for _ in range(2):
            pool.start()

        async def one(n: int) -> None:
            await asyncio.sleep(random.uniform(0, 30))
            handle = await client.enqueue(Sleep(n=n), tenant="acme")
            verdict = False
            if n % 2:
                await asyncio.sleep(random.uniform(0, 0.5))
                verdict = await handle.cancel()
                at[n] = time.time_ns()
            try:
                assert await handle.result(120) == n
                ends[n] = "done"
            except JobFailed as failed:
                ends[n] = failed.reason
            assert verdict == (ends[n] == CANCELLED), n
            entries = client.connection.read(
                "AI_RESULTS", subjects.journal(client.topology.family("test.sleeps").journal or "", "acme", handle.id)
            )
            assert sum([entry_from_stored(each).final async for each in entries]) == 1, n

        async def kill() -> None:
            while True:
                await asyncio.sleep(4)
                pool.kill(pool.alive[0])
                pool.start()

        killing = asyncio.create_task(kill())
        await asyncio.gather(*(one(n) for n in range(3_000)))
        killing.cancel()
        await asyncio.wait([killing])
        await eventually(lambda: no_job_left(client), within=30)
        pool.stop()
    starts: dict[int, list[int]] = {}
    for n, when in pool.lines("start"):
        starts.setdefault(n, []).append(when)
    late = {n: (max(starts[n]) - at[n]) / 1e9 for n in at if ends[n] == CANCELLED and n in starts}
    assert max(late.values()) < 1
    assert len(late) > 100
    assert len(ends) == 3_000
    print(len(late), "of", sum(end == CANCELLED for end in ends.values()), "had entered; killed", len(pool.killed))
