"""Of two attempts at one job only the newer one counts: in the journal, in acks, in the number of attempts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import textwrap
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import headers
from aiqueue.connection import Connection
from aiqueue.enqueue.deadletter import DeadLetter
from aiqueue.errors import Stale
from aiqueue.journal import (
    EMPTY_RECORD,
    PROGRESS,
    RESULT,
    RETRY,
    STARTED,
    TRIAL,
    Entry,
    Journal,
    RunRecord,
    Writer,
    entry_from_stored,
)
from aiqueue.topology import provision
from aiqueue.worker import settlement, takeover
from aiqueue.worker.replies import Replies
from aiqueue.worker.settlement import Settlement

from .. import forks
from ..support import Cluster, NatsProcess, create_streams, eventually

SUBJECT = "ai.agent.results.acme.j1"
FILE = """
    [family]
    name = "test.fences"
    default_kind = "fence"
    [stream]
    name = "TEST_FENCES"
    [consumer]
    ack_wait = "1s"
    """


class Fence(aiqueue.Message, kind="fence", family="test.fences"):
    n: int = 0


@pytest.fixture
async def client(account: Any, tmp_path: Path) -> AsyncIterator[aiqueue.Client]:
    (tmp_path / "streams").mkdir()
    (tmp_path / "streams" / "test_fences.toml").write_text(textwrap.dedent(FILE))
    async with aiqueue.connect(
        account.url, user=account.user, password=account.password, streams=tmp_path / "streams"
    ) as client:
        await create_streams(client)
        yield client


def new_writer(
    journal: Journal,
    subject: str = SUBJECT,
    *,
    attempt: int = 1,
    record: RunRecord = EMPTY_RECORD,
    ignore_before: float = 0.0,
) -> Writer:
    return Writer(journal, subject, run=1, enqueued_at=0.0, attempt=attempt, record=record, ignore_before=ignore_before)


async def entries(journal: Journal, subject: str) -> list[Entry]:
    return [entry_from_stored(each) async for each in journal.connection.read(journal.stream, subject)]


async def claim(journal: Journal, subject: str, attempt: int) -> Writer:
    """What the runner does with a redelivery, its deliveries being numbered by attempt."""
    record = await journal.read_run(subject, 1, 0.0)
    writer = new_writer(journal, subject, attempt=attempt, record=record)
    while True:
        if record.ended or (record.recap is not None and record.recap.attempt > attempt):
            raise Stale("overtaken", ended=record.ended)
        if await writer.write_started({"attempt": attempt}):
            return writer
        record = await journal.read_run(subject, 1, 0.0)
        writer.start_after(record, attempt)


# the journal


@pytest.mark.parametrize("event", [PROGRESS, RETRY, RESULT])
async def test_an_attempt_that_has_written_nothing_is_stale_once_a_newer_one_has_started(
    client: aiqueue.Client, event: str
) -> None:
    old = new_writer(client.journal)
    new = await claim(client.journal, SUBJECT, 2)
    with pytest.raises(Stale) as caught:
        await old.write(event, "old")
    assert not caught.value.ended
    await new.write(RESULT, "new")
    assert [each.event for each in await entries(client.journal, SUBJECT)] == [STARTED, RESULT]


async def test_what_was_written_before_the_lanes_consumer_was_made_is_no_newer_attempts(client: aiqueue.Client) -> None:
    await new_writer(client.journal).write(RETRY, "before")
    with pytest.raises(Stale):
        await new_writer(client.journal, ignore_before=time.time() - 60).write(RESULT, "of the same consumer")
    await new_writer(client.journal, ignore_before=time.time() + 60).write(RESULT, "of a later one")


async def test_of_two_that_begin_at_once_the_earlier_delivery_gives_way(client: aiqueue.Client) -> None:
    journal = client.journal
    earlier, later = new_writer(journal, attempt=2), new_writer(journal, attempt=3)
    assert await later.write_started({})
    assert not await earlier.write_started({})
    with pytest.raises(Stale):
        await claim(journal, SUBJECT, 2)


async def rivals(journal: Journal, subject: str, rng: random.Random) -> None:
    async def attempt(number: int) -> None:
        await asyncio.sleep(rng.random() * 0.05)
        with contextlib.suppress(Stale):
            writer = new_writer(journal, subject) if number == 1 else await claim(journal, subject, number)
            for n in range(rng.randrange(4)):
                await writer.write(PROGRESS, [number, n])
            await writer.write(RESULT, number)

    await asyncio.gather(*(attempt(n) for n in (1, 2, 3)))


@asynccontextmanager
async def answers_lost(connection: Connection, rng: random.Random) -> AsyncIterator[None]:
    """15 % of writes are sent a second time, as after an answer that did not arrive."""
    store = connection.store

    async def twice(*args: Any, **options: Any) -> Any:
        ack = await store(*args, **options)
        return await store(*args, **options) if rng.random() < 0.15 else ack

    connection.store = twice  # type: ignore[method-assign]
    try:
        yield
    finally:
        del connection.store  # type: ignore[method-assign]


async def contend(client: aiqueue.Client, journals: int) -> None:
    rng, journal = random.Random(7), client.journal
    where = [f"ai.agent.results.acme.c{n}" for n in range(journals)]
    async with answers_lost(client.connection, rng):
        await asyncio.gather(*(rivals(journal, subject, rng) for subject in where))
    for subject in where:
        written = await entries(journal, subject)
        assert [each.final for each in written].count(True) == 1
        assert written[-1].final
        assert [each.epoch for each in written] == sorted(each.epoch for each in written)
        described = [(each.event, str(each.data)) for each in written]
        assert len(described) == len(set(described))
        started = 0
        for each in written:
            started = each.attempt if each.event == STARTED else started
            assert each.attempt >= started, f"attempt {each.attempt} wrote after {started} had started: {described}"


async def test_contending_attempts_whose_answers_get_lost_leave_one_final_entry_and_none_after_a_newer_began(
    client: aiqueue.Client,
) -> None:
    await contend(client, 60)


async def test_the_same_on_a_cluster(own_cluster: Cluster) -> None:
    account = own_cluster.account
    async with aiqueue.connect(account.url, user=account.user, password=account.password, profile="cluster") as client:
        await provision.apply(client.connection, client.topology)
        own_cluster.wait_ready([client.topology.journal_stream.name])
        await contend(client, 60)


# workers

APP = """
    import asyncio, os, sys, time
    import aiqueue

    class Fence(aiqueue.Message, kind="fence", family="test.fences"):
        n: int = 0

    worker = aiqueue.Worker()

    @worker.handle(Fence)
    async def run(job: aiqueue.Job[Fence]) -> str:
        print("started", flush=True)
        await asyncio.sleep(0.2)
        if job.message.n:
            raise ValueError("too late")
        return "stale"
    """


@asynccontextmanager
async def stopped_worker(directory: Path, account: Any) -> AsyncIterator[forks.Program]:
    """A worker that was stopped (SIGSTOP) as soon as its handler had started."""
    (directory / "app.py").write_text(textwrap.dedent(APP))
    environment = {
        **os.environ, "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "AIQUEUE_STREAMS": str(directory / "streams"),
    }  # fmt: skip
    process = forks.start(
        *("aiqueue", "work", "app:worker"),
        cwd=directory, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        while (await asyncio.to_thread(process.stdout.readline)).strip() != "started":
            assert process.poll() is None
        process.send_signal(signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        await asyncio.to_thread(process.communicate)


@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
async def test_a_worker_that_was_stopped_over_its_lease_says_nothing_of_the_job_any_more(
    client: aiqueue.Client, account: Any, tmp_path: Path, fails: bool
) -> None:
    handle = await client.enqueue(Fence(n=int(fails)), tenant="acme")
    ran, go, worker = [], asyncio.Event(), aiqueue.Worker()

    @worker.handle(Fence)
    async def run(job: aiqueue.Job[Fence]) -> str:
        ran.append(job.attempt)
        await go.wait()
        return "newer"

    async with stopped_worker(tmp_path, account) as stale, worker.running(client):
        await eventually(lambda: ran)
        stale.send_signal(signal.SIGCONT)
        log: list[str] = []
        assert stale.stderr is not None
        while "taken over" not in "".join(log[-1:]):
            log.append(await asyncio.wait_for(asyncio.to_thread(stale.stderr.readline), 20))
        go.set()
        assert await handle.result(timeout=25) == "newer"
    assert ran == [1], "it was delivered once more: the stale attempt's word was taken for the newer one's"
    written = [each.event for each in await entries(client.journal, f"ai.test.fences-results.acme.{handle.id}")]
    assert [event for event in written if event != TRIAL] == [STARTED, RESULT], "a trial: it was lost twice"


async def test_attempts_are_counted_over_parking_naks_and_a_recreated_consumer(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.15)
    ran, worker = [], aiqueue.Worker()

    @worker.handle(Fence, retry=aiqueue.Backoff(attempts=6, first="100ms", factor=2, cap="300ms", jitter=0))
    async def run(job: aiqueue.Job[Fence]) -> None:
        ran.append((job.attempt, headers.PARKED in job.headers))
        if job.attempt == 3:
            await client.connection.api("CONSUMER.DELETE.TEST_FENCES.acme-normal")
        raise ValueError(f"attempt {job.attempt}")

    handle = await client.enqueue(Fence(), tenant="acme")
    async with worker.running(client):
        with pytest.raises(aiqueue.JobFailed, match=r"attempt 6 \(attempts\)"):
            await handle.result(timeout=40)
    assert [number for number, _ in ran if number != 3] == [1, 2, 4, 5, 6]
    assert {parked for number, parked in ran if number > 3} == {True}
    (letter,) = await letters(client)
    assert [each["error"] for each in letter.history][-3:] == [f"ValueError: attempt {n}" for n in (4, 5, 6)]
    assert len(letter.history) >= 6
    assert all(each["traceback"] and each["worker"] and each["at"] for each in letter.history)


async def letters(client: aiqueue.Client) -> list[DeadLetter]:
    return [each async for each in client.dead.find()]


async def test_a_journal_that_has_expired_does_not_forget_the_attempts_of_a_parked_job(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.0)
    ran, worker = [], aiqueue.Worker()

    @worker.handle(Fence)
    async def run(job: aiqueue.Job[Fence]) -> None:
        ran.append(job.attempt)
        await client.connection.api("STREAM.PURGE.AI_RESULTS")
        raise aiqueue.Retry("not yet", after=0.1) if job.attempt < 5 else aiqueue.Reject("never")

    await client.enqueue(Fence(), tenant="acme")
    async with worker.running(client):
        await eventually(lambda: letters(client), within=30)
    assert ran == [1, 2, 3, 4, 5]
    (letter,) = await letters(client)
    assert [each["error"] for each in letter.history] == ["not yet"] * 4 + ["never"]


async def test_without_a_stream_to_park_in_a_job_waits_in_its_lane(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.1)
    await client.connection.api("STREAM.DELETE.AI_PARKED")
    worker = aiqueue.Worker()

    @worker.handle(Fence)
    async def run(job: aiqueue.Job[Fence]) -> int:
        if job.attempt < 3:
            raise aiqueue.Retry("not yet", after=0.2)
        return job.attempt

    handle = await client.enqueue(Fence(), tenant="acme")
    async with worker.running(client):
        assert await handle.result(timeout=20) == 3
    assert "cannot be parked, and waits in its lane" in caplog.text


async def test_a_redelivery_that_was_overtaken_leaves_no_dead_letter(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Fence(), tenant="acme")
    started: list[str] = []
    reject, go = asyncio.Event(), asyncio.Event()
    earlier, later = aiqueue.Worker(name="earlier", concurrency=4), aiqueue.Worker(name="later", concurrency=4)

    @earlier.handle(Fence)
    async def run_earlier(job: aiqueue.Job[Fence]) -> str:
        started.append("earlier")
        if len(started) == 1:
            raise aiqueue.Retry(after=0.05)
        await reject.wait()
        raise aiqueue.Reject("too late")

    @later.handle(Fence)
    async def run_later(job: aiqueue.Job[Fence]) -> str:
        started.append("later")
        await go.wait()
        return "newer"

    async with earlier.running(client) as session:
        await eventually(lambda: len(started) == 2)
        await session.leases.stop()  # as of a machine that was paused
        session.puller.stop()
        async with later.running(client):
            await eventually(lambda: started[2:] == ["later"])
            reject.set()
            await eventually(lambda: not session.running)
            assert await letters(client) == []
            go.set()
            assert await handle.result(timeout=25) == "newer"
    assert await letters(client) == []


async def leave_unfinished(client: aiqueue.Client) -> None:
    """A worker that begins the next attempt and leaves."""
    worker, started = aiqueue.Worker(drain_timeout=0.1), []

    @worker.handle(Fence)
    async def hang(job: aiqueue.Job[Fence]) -> None:
        started.append(job.attempt)
        if job.attempt == 1:
            raise aiqueue.Retry(after=0.05)
        await asyncio.Event().wait()

    async with worker.running(client):
        await eventually(lambda: started[-1:] == [2])


async def finish(client: aiqueue.Client, handle: aiqueue.Handle) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Fence)
    async def run(job: aiqueue.Job[Fence]) -> int:
        return job.attempt

    async with worker.running(client):
        assert await handle.result(timeout=25) == 2


async def test_a_lane_of_another_declaration_does_not_make_its_attempts_look_old(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "CLAIM_LEASES", 1_000)
    handle = await client.enqueue(Fence(), tenant="acme")
    await leave_unfinished(client)
    family = replace(client.topology.families["test.fences"], max_ack_pending=7)
    client.topology = replace(client.topology, families={**client.topology.families, "test.fences": family})
    await finish(client, handle)


async def test_the_first_attempt_after_a_servers_restart_does_not_make_the_next_look_old(
    own_server: Callable[[], NatsProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(takeover, "CLAIM_LEASES", 1_000)
    server = own_server()
    (tmp_path / "test_fences.toml").write_text(textwrap.dedent(FILE))
    async with aiqueue.connect(server.url, user=server.user, password=server.password, streams=tmp_path) as client:
        await create_streams(client)
        handle = await client.enqueue(Fence(), tenant="acme")
        await leave_unfinished(client)
        server.kill()
        await eventually(lambda: not client.connection.connected)
        server.start()
        await eventually(lambda: client.connection.connected)
        await leave_unfinished(client)  # its lane's consumer is the former one, whatever the server says at first
        await finish(client, handle)


async def write_started_by(client: aiqueue.Client, handle: aiqueue.Handle, delivery: list[float]) -> None:
    subject = f"ai.test.fences-results.acme.{handle.id}"
    enqueued_at = (await entries(client.journal, subject))[0].time - 5
    record = await client.journal.read_run(subject, 1, enqueued_at)
    writer = Writer(client.journal, subject, run=1, enqueued_at=enqueued_at, attempt=2, record=record)
    assert await writer.write_started({"delivery": delivery})


async def test_a_message_is_acknowledged_when_one_that_was_parked_from_it_has_started(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ack was lost. The later message is the job now, also once it is done and has kept no result."""
    monkeypatch.setattr(takeover, "CLAIM_LEASES", 0)
    handle = await client.enqueue(Fence(), tenant="acme")
    await leave_unfinished(client)
    await write_started_by(client, handle, [2, 0, 1])
    ran, worker = [], aiqueue.Worker()
    worker.handle(Fence)(ran.append)

    async def is_empty() -> bool:
        state = (await client.connection.api("STREAM.INFO.TEST_FENCES"))["state"]
        return bool(state["messages"] == 0)

    async with worker.running(client):
        await eventually(is_empty)
    assert ran == []


async def test_a_restarted_delivery_count_keeps_no_job_from_its_end(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Fence(), tenant="acme")
    await leave_unfinished(client)
    await write_started_by(
        client, handle, [1, time.time() + 3_600, 99]
    )  # as before a cluster with lanes in memory restarted
    await finish(client, handle)


# a worker that dies between the journal and the ack of a failed attempt


async def stored(client: aiqueue.Client, stream: str) -> int:
    return int((await client.connection.api(f"STREAM.INFO.{stream}"))["state"]["messages"])


@pytest.mark.parametrize(
    ("part", "cut_off"),
    [(Replies, "ack"), (Settlement, "_park_or_nak")],
    ids=["before the ack", "before it is parked"],
)
async def test_a_long_retry_is_kept_when_its_worker_dies_before_it_has_said_all(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, part: type[Any], cut_off: str
) -> None:
    ran, died, worker = [], [], aiqueue.Worker()
    whole = getattr(part, cut_off)

    @worker.handle(Fence)
    async def run(job: aiqueue.Job[Fence]) -> None:
        ran.append(job.attempt)
        raise aiqueue.Retry("not yet", after="10m")

    async def dies(self: Any, *args: Any) -> None:
        if died:
            await whole(self, *args)
        died.append(args)

    monkeypatch.setattr(part, cut_off, dies)
    await client.enqueue(Fence(), tenant="acme")
    async with worker.running(client):
        await eventually(lambda: len(died) > 1)
        await eventually(lambda: none_stored(client))
    assert ran == [1], "it was tried again long before its time"
    assert await stored(client, "AI_PARKED") == 1
    (parked,) = [each async for each in client.connection.read("AI_PARKED", "ai.parked.at.>")]
    assert parked.headers[headers.ATTEMPT] == "2"
    assert headers.number(parked.headers[headers.DUE]) / 1000 == pytest.approx(time.time() + 600, abs=60)


async def none_stored(client: aiqueue.Client) -> bool:
    return await stored(client, "TEST_FENCES") == 0


async def test_what_is_left_of_a_job_that_went_on_from_parking_is_taken_away(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.0)
    ran, acks, worker = [], [], aiqueue.Worker()
    whole = Replies.ack

    @worker.handle(Fence)
    async def run(job: aiqueue.Job[Fence]) -> None:
        ran.append(job.attempt)
        raise aiqueue.Retry("not yet", after=0.1 if job.attempt < 3 else "10m")

    async def lost(self: Replies, *args: Any) -> None:
        acks.append(args)
        if len(acks) > 1:
            await whole(self, *args)

    monkeypatch.setattr(Replies, "ack", lost)
    await client.enqueue(Fence(), tenant="acme")
    async with worker.running(client):
        await eventually(lambda: len(ran) == 3)
        await eventually(lambda: none_stored(client))
    assert ran == [1, 2, 3]
    assert await stored(client, "AI_PARKED") == 1


async def test_a_job_that_is_redelivered_while_it_runs_here_goes_on_with_the_new_lease(client: aiqueue.Client) -> None:
    entered, release, calls = asyncio.Event(), asyncio.Event(), 0
    worker = aiqueue.Worker()

    @worker.handle(Fence)
    async def fence(job: aiqueue.Job[Fence]) -> str:
        nonlocal calls
        calls += 1
        entered.set()
        await release.wait()
        return "once"

    async with worker.running(client) as session:
        handle = await client.enqueue(Fence(), tenant="acme")
        await entered.wait()
        (reply,) = session.leases._held
        session.leases.drop_lease(reply)  # as if its heartbeats were lost: after 1 s the server redelivers the job
        await eventually(lambda: session.leases.held == 1 and reply not in session.leases._held)
        release.set()
        assert await handle.result(25) == "once"
    assert calls == 1


async def test_epochs_grow_also_beyond_those_of_another_run_of_the_id(client: aiqueue.Client) -> None:
    journal = client.journal
    ours = new_writer(journal)
    other = Writer(
        journal, SUBJECT, run=2, enqueued_at=0.0, attempt=1, record=EMPTY_RECORD._replace(epoch=6)
    )  # of a later run of the id, which has seen more attempts
    await other.write(PROGRESS, {"fraction": 0.5})
    await ours.write(PROGRESS, {"fraction": 0.1})
    assert [(each.run, each.epoch) for each in await entries(journal, SUBJECT)] == [(2, 7), (1, 8)]


async def test_a_started_that_was_refused_leaves_no_gap_in_the_numbers(client: aiqueue.Client) -> None:
    journal = client.journal
    late = new_writer(journal, attempt=2)
    await new_writer(journal).write(RETRY, {"error": "no"})
    assert not await late.write_started({})
    late.start_after(await journal.read_run(SUBJECT, 1, 0.0), 2)
    assert await late.write_started({})
    numbers = [each.msg_id.split("/")[3] for each in await entries(journal, SUBJECT)]
    assert numbers == ["1", "1"]  # readers take a skipped number for lost entries


async def test_an_earlier_attempts_history_is_found_behind_what_a_lost_attempt_reported(client: aiqueue.Client) -> None:
    journal, history = client.journal, [{"attempt": 1, "error": "no"}]
    writer = new_writer(journal, attempt=2)
    assert await writer.write_started({"history": history})
    await writer.write(PROGRESS, {"fraction": 0.5})
    record = await journal.read_run(SUBJECT, 1, 0.0)
    assert record.newest is not None
    assert record.newest.event == PROGRESS
    assert record.recap is not None
    assert (record.recap.attempt, record.recap.data["history"]) == (2, history)
