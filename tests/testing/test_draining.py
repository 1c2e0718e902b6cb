"""`drain` and `advance`: a worker on the real server, and no wait for any time."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import Backoff, Reject, Retry, testing
from aiqueue.errors import BadInput, JobCancelled, JobFailed, TopologyError, UnknownFamily
from aiqueue.processes.pool import ChildProcess
from aiqueue.worker import late_leases, timed

from .. import keyed
from ..support import Account

HOUR = Backoff(attempts=4, first="1h", cap="5h")


class Ask(aiqueue.Message, kind="drain.ask"):
    act: str = ""


class Unkept(aiqueue.Message, kind="drain.unkept"):
    pass


class Slow(aiqueue.Message, kind="drain.slow"):
    pass


class Report(aiqueue.Message, kind="drain.report"):
    day: int = 0


class Stranger(aiqueue.Message, kind="drain.stranger"):
    pass


class Heavy(aiqueue.Message[int], kind="drain.heavy"):
    pass


def heavy(job: aiqueue.Job[Heavy]) -> int:
    return os.getpid()


@pytest.fixture
def families() -> Collection[str]:
    return ["agent.tasks"]


@pytest.fixture
def ran() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def worker(ran: list[tuple[Any, ...]]) -> aiqueue.Worker:
    worker = aiqueue.Worker(owner="tests")

    @worker.handle(Ask, retry=Backoff(attempts=3, first="3s", factor=1))
    async def ask(job: aiqueue.Job[Ask]) -> Any:
        ran.append((job.message.act, job.attempt))
        match job.message.act:
            case "fail":
                raise ValueError("bad")
            case "fail once":
                if job.attempt == 1:
                    raise Retry("once", after=4)
            case "reject":
                raise Reject("never")
            case "gather":
                return await job.gather([("a", Ask(act="a")), ("b", Ask(act="fail once"))])
            case "gather late":
                return await job.gather([await job.enqueue(Ask(act="late"), "late", delay="1d")])
            case "follow":
                await job.enqueue(Ask(act="later"), "later", delay="1d")
        return job.message.act

    @worker.handle(Slow, retry=HOUR)
    async def slow(job: aiqueue.Job[Slow]) -> int:
        ran.append(("slow", job.attempt))
        if job.attempt < 4:
            raise ValueError("not yet")
        return job.attempt

    @worker.handle(Unkept, result=False)
    def unkept(job: aiqueue.Job[Unkept]) -> None:
        ran.append(("unkept", job.attempt))

    @worker.handle(Report)
    async def report(job: aiqueue.Job[Report]) -> Any:
        ran.append(("report", job.message.day, job.scheduled_for))

    return worker


def outcomes(drained: testing.Drained) -> list[tuple[str, int, str]]:
    return [(each.kind.removeprefix("drain."), each.attempt, each.outcome) for each in drained.attempts]


async def test_every_job_is_run_to_its_end_and_no_retry_waits(
    client: aiqueue.Client, worker: aiqueue.Worker, ran: list[tuple[Any, ...]]
) -> None:
    for act in ("fail", "fail once", "reject", "plain"):
        await client.enqueue(Ask(act=act), tenant="acme")
    await client.enqueue(Unkept(), tenant="other")
    started = time.monotonic()
    drained = await testing.drain(client, worker)
    assert time.monotonic() - started < 2.5  # two of the delays would be longer
    assert (drained.done, drained.failed, drained.retried) == (3, 2, 3), outcomes(drained)
    assert sorted(ran) == [
        ("fail", 1), ("fail", 2), ("fail", 3), ("fail once", 1), ("fail once", 2), ("plain", 1), ("reject", 1),
        ("unkept", 1),
    ]  # fmt: skip
    failed = {each.reason: each for each in drained.attempts if each.outcome == "failed"}
    assert failed["attempts"].error == "ValueError: bad"
    assert failed["rejected"].error == "never"
    retry = next(each for each in drained.attempts if each.error == "once")
    assert retry.delay_s == 4
    assert len([letter async for letter in client.dead.find()]) == 2
    assert repr(await testing.drain(client, worker)) == "<Drained nothing>"


async def test_retries_of_an_hour_and_a_delay_of_a_month_take_a_second(
    client: aiqueue.Client, worker: aiqueue.Worker, ran: list[tuple[Any, ...]]
) -> None:
    handle = await client.enqueue(Slow(), tenant="acme", delay="30d")
    assert not (await testing.drain(client, worker)).attempts
    drained = await testing.drain(client, worker, delayed=True)
    assert ran == [("slow", 1), ("slow", 2), ("slow", 3), ("slow", 4)]
    assert (drained.done, drained.retried) == (1, 3)
    assert all(1_800 <= (each.delay_s or 0) <= 5 * 3_600 for each in drained.attempts[:3])
    assert await handle.result(timeout=5) == 4


async def test_a_parent_waits_for_children_that_the_same_worker_runs(
    client: aiqueue.Client, worker: aiqueue.Worker
) -> None:
    handle = await client.enqueue(Ask(act="gather"), tenant="acme")
    drained = await testing.drain(client, worker)
    assert await handle.result(timeout=5) == ["a", "fail once"]
    assert outcomes(drained).count(("ask", 1, "waiting")) >= 1
    assert (drained.done, drained.retried) == (3, 1)


async def test_a_job_that_waits_for_its_children_stays_at_an_advance_which_makes_the_child_due(
    client: aiqueue.Client, worker: aiqueue.Worker
) -> None:
    handle = await client.enqueue(Ask(act="gather late"), tenant="acme")
    assert outcomes(await testing.drain(client, worker)) == [("ask", 1, "waiting")]
    assert (await testing.advance(client)).jobs == 1
    assert (await testing.drain(client, worker)).done == 2
    assert await handle.result(timeout=5) == ["late"]


async def test_what_handlers_enqueue_with_a_delay_runs_too(
    client: aiqueue.Client, worker: aiqueue.Worker, ran: list[tuple[Any, ...]]
) -> None:
    await client.enqueue(Ask(act="follow"), tenant="acme")
    assert (await testing.drain(client, worker)).done == 1
    (job,) = await testing.assert_enqueued(client, Ask, act="later", delayed=True)
    assert job.due_at is not None
    assert job.due_at - time.time() > 80_000
    assert (await testing.drain(client, worker, delayed=True)).done == 1
    assert [each[0] for each in ran] == ["follow", "later"]


async def test_jobs_of_an_unknown_kind_and_of_other_tenants_are_left(client: aiqueue.Client) -> None:
    narrow = aiqueue.Worker(tenants=["acme"])
    narrow.handle(Ask)(lambda job: None)
    await client.enqueue(Stranger(), tenant="acme")
    await client.enqueue(Ask(), tenant="other")
    await client.enqueue(Ask(), tenant="acme")
    assert (await testing.drain(client, narrow, delayed=True)).done == 1
    await testing.assert_enqueued(client, Stranger, count=1)
    await testing.assert_enqueued(client, Ask, count=1, tenant="other")


async def test_advance_makes_due_what_a_running_worker_then_runs(
    client: aiqueue.Client, worker: aiqueue.Worker, ran: list[tuple[Any, ...]]
) -> None:
    handle = await client.enqueue(Ask(act="x"), tenant="acme", delay="30d")
    cancelled = await client.enqueue(Ask(act="y"), tenant="acme", delay="30d")
    assert await cancelled.cancel()
    async with worker.running(client):
        assert await testing.advance(client) == (1, 0)
        assert await handle.result(timeout=10) == "x"
    assert await testing.advance(client) == (0, 0)
    with pytest.raises(JobCancelled):
        await cancelled.result(timeout=5)
    assert ran == [("x", 1)]


async def test_each_schedule_ticks_once_at_an_advance_for_the_time_of_its_next_tick(
    client: aiqueue.Client, worker: aiqueue.Worker, ran: list[tuple[Any, ...]]
) -> None:
    await client.schedules.add("daily", aiqueue.Cron("0 6 * * *"), Report(), tenant="acme")
    await client.schedules.add("paused", aiqueue.Cron("0 6 * * *"), Report(day=-1), tenant="acme")
    await client.schedules.pause("paused", tenant="acme")
    first = (await client.schedules.get("daily", tenant="acme")).next_at
    assert first is not None
    assert await testing.advance(client) == (0, 1)
    assert await testing.advance(client) == (0, 1)
    await testing.drain(client, worker)
    assert ran == [("report", 0, first), ("report", 0, first + 86_400)]
    after = await client.schedules.get("daily", tenant="acme")
    assert (after.next_at, after.document.fired) == (first + 2 * 86_400, 2)


async def test_a_tick_whose_message_a_function_makes_needs_a_worker_of_its_owner(
    client: aiqueue.Client, worker: aiqueue.Worker, ran: list[tuple[Any, ...]]
) -> None:
    @worker.schedule("0 6 * * *", tenant="acme")
    def weekday(tick: aiqueue.Tick) -> Report:
        return Report(day=tick.time.hour)

    async with worker.running(client):
        assert await testing.advance(client) == (0, 1)
        await testing.drain(client, worker)
    assert [each[:2] for each in ran] == [("report", 6)]


async def test_a_schedule_that_does_not_overlap_skips_its_tick_while_the_former_job_waits(
    client: aiqueue.Client, worker: aiqueue.Worker, ran: list[tuple[Any, ...]]
) -> None:
    await client.schedules.add("daily", aiqueue.Cron("0 6 * * *"), Report(), tenant="acme", overlap="skip")
    assert await testing.advance(client) == (0, 1)
    assert await testing.advance(client) == (0, 0)
    assert (await client.schedules.get("daily", tenant="acme")).document.skipped == 1
    await testing.drain(client, worker)
    assert await testing.advance(client) == (0, 1)
    assert len(ran) == 1


async def test_a_drain_that_does_not_end_says_what_is_left(client: aiqueue.Client) -> None:
    stuck = aiqueue.Worker(drain_timeout=0.01)

    @stuck.handle(Ask)
    async def wait(job: aiqueue.Job[Ask]) -> None:
        await client.enqueue(Ask(act="again"), tenant="acme")  # no child: those are at most 32 deep

    await client.enqueue(Ask(), tenant="acme")
    with pytest.raises(
        AssertionError, match=r"testing\.drain: not done within 0\.2 s, after \d+ attempts \(`within` "
    ) as told:
        await testing.drain(client, stuck, within="200ms")
    assert "\n" not in str(told.value)


async def test_a_drain_that_does_not_end_names_the_kind_and_the_pause_that_holds_it(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Ask)
    async def ask(job: aiqueue.Job[Ask]) -> None: ...

    handle = await client.enqueue(Ask(), tenant="acme")
    await client.pause("agent.tasks", tenant="acme", reason="books are closed")
    with pytest.raises(AssertionError, match="within` sets the time") as told:
        await testing.drain(client, worker, within="200ms")
    assert f": drain.ask {handle.id} of agent.tasks acme/normal: agent.tasks, tenant acme" in str(told.value)
    assert "books are closed" in str(told.value)


async def test_a_drain_that_does_not_end_names_the_limit_that_holds_a_job(
    aiqueue_settings: aiqueue.Settings, tmp_path: Path
) -> None:
    (tmp_path / "test_calls.toml").write_text(keyed.FILE)
    rule = 'family = "test.calls"\nkey = "smtp"\nrequests = 1\nwindow = "1h"\n'
    (tmp_path / "limits.toml").write_text(f"[[limit]]\n{rule}")
    settings = aiqueue_settings.with_arguments(streams=tmp_path)
    worker = aiqueue.Worker()

    @worker.handle(keyed.Call)
    async def call(job: aiqueue.Job[keyed.Call]) -> None: ...

    async with testing.client(settings, families=[keyed.FAMILY]) as client:
        for n in range(2):
            await client.enqueue(keyed.Call(model="smtp", n=n), tenant="acme")
        with pytest.raises(AssertionError, match="after 1 attempts") as told:
            await testing.drain(client, worker, within="1s")
    assert "call " in str(told.value)
    assert "the limit of test.calls for 'smtp' is reached: 1 request in 1h, all tenants together" in str(told.value)


async def test_a_drain_that_does_not_end_waits_for_no_handler(client: aiqueue.Client) -> None:
    stuck, ended = aiqueue.Worker(drain_timeout="20s"), asyncio.Event()

    @stuck.handle(Ask)
    async def hang(job: aiqueue.Job[Ask]) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    await client.enqueue(Ask(), tenant="acme")
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"not done within 0\.2 s, after 0 attempts .*: handlers that still run"):
        await testing.drain(client, stuck, within="200ms")
    assert ended.is_set()
    assert time.monotonic() - began < 10


async def test_a_client_that_is_not_of_a_test_is_refused(account: Account, worker: aiqueue.Worker) -> None:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as plain:
        for call in (testing.advance(plain), testing.drain(plain, worker)):
            with pytest.raises(BadInput, match=r"open the client with `async with aiqueue\.testing\.client\("):
                await call
    with pytest.raises(BadInput, match="pass an open client"):
        await testing.advance(worker)  # type: ignore[arg-type]


async def test_wrong_arguments_say_in_one_line_what_to_do(client: aiqueue.Client, worker: aiqueue.Worker) -> None:
    with pytest.raises(BadInput, match=r"testing\.drain needs a Worker, not Client"):
        await testing.drain(client, client)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="within"):
        await testing.drain(client, worker, within="soon")
    with pytest.raises(BadInput, match="delayed"):
        await testing.drain(client, worker, delayed="yes")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="has no handlers"):
        await testing.drain(client, aiqueue.Worker())
    with pytest.raises(BadInput, match=r"testing\.client needs settings, not str: pass what the fixture"):
        async with testing.client("nats://localhost"):  # type: ignore[arg-type]
            pass
    with pytest.raises(BadInput, match="these settings have none"):
        async with testing.client(aiqueue.Settings()):
            pass
    with pytest.raises(TopologyError, match=r"unknown family 'no\.such'"):
        async with testing.client(client.settings, families=["no.such"]):
            pass
    with pytest.raises(BadInput, match="families"):
        async with testing.client(client.settings, families="agent.tasks"):
            pass


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The pids of the child processes that workers have started."""
    pids: list[int] = []
    start = ChildProcess.start

    async def note(recipe: Any) -> ChildProcess:
        child = await start(recipe)
        pids.append(child.pid)
        return child

    monkeypatch.setattr(ChildProcess, "start", note)
    return pids


async def test_the_state_of_a_drain_takes_the_place_of_the_lifespan_and_of_nothing_else(client: aiqueue.Client) -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[str]:
        entered.append(1)
        yield "real"

    entered: list[int] = []
    worker = aiqueue.Worker(lifespan=lifespan)

    @worker.handle(Ask)
    def ask(job: aiqueue.Job[Ask, str]) -> Any:
        return job.state

    async def state_of(**options: Any) -> Any:
        handle = await client.enqueue(Ask(), tenant="acme")
        await testing.drain(client, worker, **options)
        return await handle.result(10)

    assert await state_of(state="fake") == "fake"
    assert await state_of(state=None) is None
    assert entered == []
    assert await state_of() == "real"
    worker.handle(Heavy, process=True)(heavy)
    with pytest.raises(BadInput, match=r"state: the handler of kind 'drain\.heavy'.* runs in a child process"):
        await testing.drain(client, worker, state="fake")


async def test_a_drain_starts_child_processes_only_for_jobs_that_need_one(
    client: aiqueue.Client, worker: aiqueue.Worker, started: list[int]
) -> None:
    worker.handle(Heavy, process=True)(heavy)
    await client.enqueue(Ask(act="done"), tenant="acme")
    assert (await testing.drain(client, worker)).done == 1
    assert started == []
    handle = await client.enqueue(Heavy(), tenant="acme")
    assert (await testing.drain(client, worker)).done == 1
    assert started == [await handle.result()]


async def test_a_short_drain_without_delayed_jobs_starts_no_forwarder_no_ticker_and_no_second_connection(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_leases, "AFTER_S", 60.0)  # "short" is what is shorter, however slow the machine
    monkeypatch.setattr(timed, "LATE_S", 60.0)
    worker = aiqueue.Worker()

    @worker.handle(Ask)
    async def names(job: aiqueue.Job[Ask]) -> list[str]:
        return [each.name for each in threading.enumerate()]

    handle = await client.enqueue(Ask(), tenant="acme")
    assert (await testing.drain(client, worker)).done == 1
    assert "aiqueue-leases" not in await handle.result()
    for stream in (client.topology.parked_stream.name, client.topology.ticks_stream.name):
        assert (await client.connection.api(f"CONSUMER.LIST.{stream}", {"offset": 0}))["total"] == 0


async def test_in_a_drain_a_handler_gets_the_result_of_a_delayed_job_that_it_waits_for(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Ask)
    async def ask(job: aiqueue.Job[Ask]) -> str:
        if job.message.act == "delayed":
            return "late"
        delayed = await client.enqueue(Ask(act="delayed"), tenant="acme", delay="300ms")
        return str(await delayed.result(timeout=10))

    handle = await client.enqueue(Ask(), tenant="acme")
    assert (await testing.drain(client, worker)).done == 2
    assert await handle.result() == "late"


async def test_a_job_whose_handler_blocks_a_drain_for_longer_than_its_lease_is_delivered_once(account: Account) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Ask)
    async def block(job: aiqueue.Job[Ask]) -> None:
        time.sleep(1.4)

    settings = aiqueue.Settings(url=account.url, user=account.user, password=account.password)
    async with testing.client(settings, families=["agent.tasks"], ack_wait="1s") as client:
        await client.enqueue(Ask(), tenant="acme")
        assert (await testing.drain(client, worker)).done == 1
        (lane,) = (await client.connection.api("CONSUMER.LIST.AI_AGENT_TASKS", {"offset": 0}))["consumers"]
        assert lane["delivered"]["consumer_seq"] == 1


async def test_a_job_fails_whose_handler_the_child_process_of_a_drain_does_not_find(
    client: aiqueue.Client, worker: aiqueue.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only_here(job: aiqueue.Job[Heavy]) -> int:
        return 0

    only_here.__qualname__ = "only_here"
    monkeypatch.setattr(sys.modules[__name__], "only_here", only_here, raising=False)
    worker.handle(Heavy, process=True, retry=Backoff(attempts=1))(only_here)
    handle = await client.enqueue(Heavy(), tenant="acme")
    assert (await testing.drain(client, worker)).failed == 1
    with pytest.raises(
        JobFailed, match=r"'drain\.heavy' cannot run with process=True: a child process reports Attribute"
    ):
        await handle.result()


async def test_a_family_that_a_test_leaves_out_is_told_to_be_missing_there_and_not_in_a_file(
    account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "aiqueue.toml").write_text('families = ["agent.tasks", "rag.ingest", "rag.queries"]\n')
    settings = aiqueue.Settings(url=account.url, user=account.user, password=account.password)
    with pytest.raises(TopologyError, match=r"^argument families: unknown family 'agent.task'"):
        async with testing.client(settings, families=["agent.task"]):
            pass
    async with testing.client(settings, families=["agent.tasks"]) as opened:
        with pytest.raises(UnknownFamily, match=r"does not name rag\.ingest \(argument families\): add it there"):
            opened.topology.family("rag.ingest")
    assert settings.source("families") == str(tmp_path / "aiqueue.toml")
