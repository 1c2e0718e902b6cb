"""Journals: one truth per job, whoever writes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from aiqueue import codec, headers
from aiqueue.client.cancel import Canceller
from aiqueue.client.handle import Handle
from aiqueue.config import Settings
from aiqueue.connection import Connection, Received, Stored
from aiqueue.enqueue.producer import Enqueued
from aiqueue.errors import EncodeError, JobFailed, JobGone, NotFound, ResultDisabled, ResultTimeout, Stale, Unavailable
from aiqueue.journal import (
    EMPTY_RECORD,
    FAILED,
    PROGRESS,
    RESULT,
    RETRY,
    STARTED,
    Entry,
    Journal,
    RunRecord,
    Writer,
    entry_from_stored,
    wait_for_outcome,
)
from aiqueue.subjects import Lane
from aiqueue.topology import provision
from aiqueue.topology.declared import Topology

from ..support import Account, Eventually, NatsProcess

OwnServer = Callable[..., NatsProcess]
SUBJECT = "ai.agent.results.acme.j1"
TOPOLOGY = Topology.load()


@contextlib.asynccontextmanager
async def opened(where: Account | NatsProcess) -> AsyncIterator[Journal]:
    account = where.account if isinstance(where, NatsProcess) else where
    connection = Connection(Settings.load(url=account.url, user=account.user, password=account.password))
    await connection.open()
    try:
        await provision.apply(connection, TOPOLOGY)
        yield Journal(connection, TOPOLOGY.journal_stream.name)
    finally:
        await connection.close()


@pytest.fixture
async def journal(account: Account) -> AsyncIterator[Journal]:
    async with opened(account) as found:
        yield found


def new_writer(
    journal: Journal, *, run: int = 1, attempt: int = 1, enqueued_at: float = 0.0, head: Entry | None = None
) -> Writer:
    record = EMPTY_RECORD if head is None else RunRecord(head.seq, head.epoch, head if head.run == run else None)
    return Writer(journal, SUBJECT, run=run, enqueued_at=enqueued_at, attempt=attempt, record=record)


async def entries(journal: Journal, subject: str = SUBJECT) -> list[Entry]:
    return [entry_from_stored(each) async for each in journal.connection.read(journal.stream, subject)]


async def events(journal: Journal) -> list[tuple[str, int, Any]]:
    return [(each.event, each.attempt, each.data) for each in await entries(journal)]


# writing


async def test_an_entry_is_read_as_it_was_written(journal: Journal) -> None:
    assert await journal.head(SUBJECT) is None
    await new_writer(journal, run=7, attempt=2).write(RESULT, {"answer": [1, None, "é"]})
    head = await journal.head(SUBJECT)
    assert head is not None
    assert (head.event, head.run, head.epoch, head.attempt, head.final) == (RESULT, 7, 1, 2, True)
    assert head.data == {"answer": [1, None, "é"]}
    assert abs(head.time - time.time()) < 30


async def test_one_writers_entries_stay_in_order(journal: Journal) -> None:
    writer = new_writer(journal)
    await asyncio.gather(*(writer.write(PROGRESS, n) for n in range(20)))
    await writer.write(RESULT, "done")
    assert [data for _, _, data in await events(journal)] == [*range(20), "done"]


@pytest.mark.parametrize("round_", range(5))
async def test_of_attempts_that_write_a_final_entry_at_once_exactly_one_succeeds(journal: Journal, round_: int) -> None:
    writers = [new_writer(journal, attempt=n) for n in range(1, 9)]
    found = await asyncio.gather(*(each.write(RESULT, n) for n, each in enumerate(writers)), return_exceptions=True)
    assert sorted(map(str, map(type, found))) == sorted(map(str, [type(None), *[Stale] * 7]))
    written = await events(journal)
    assert len(written) == 1
    assert written[0][2] == found.index(None)


async def test_after_the_final_entry_of_a_run_its_other_attempts_are_stale(journal: Journal) -> None:
    late = new_writer(journal, attempt=1)
    await new_writer(journal, attempt=2).write(RESULT, "first")
    for event in (PROGRESS, RETRY, RESULT, FAILED):
        with pytest.raises(Stale):
            await late.write(event, "late")
    assert [data for _, _, data in await events(journal)] == ["first"]


async def test_an_attempt_that_was_taken_over_is_stale_and_the_newer_one_goes_on(journal: Journal) -> None:
    old = new_writer(journal, attempt=1)
    await old.write(PROGRESS, "old")
    new = new_writer(journal, attempt=2, head=await journal.head(SUBJECT))
    await new.write(PROGRESS, "new")
    with pytest.raises(Stale):
        await old.write(RESULT, "old")
    await new.write(RESULT, "new")
    assert [data for _, _, data in await events(journal)] == ["old", "new", "new"]


async def test_epochs_never_fall_when_attempts_follow_each_other(journal: Journal) -> None:
    for n in range(1, 6):
        await new_writer(journal, attempt=n, head=await journal.head(SUBJECT)).write(RETRY, n)
    epochs = [each.epoch for each in await entries(journal)]
    assert epochs == sorted(set(epochs))


async def test_a_later_run_overwrites_an_earlier_runs_final_entry(journal: Journal) -> None:
    await new_writer(journal, run=1).write(RESULT, "first")
    await new_writer(journal, run=2).write(RESULT, "replayed")
    head = await journal.head(SUBJECT)
    assert head is not None
    assert (head.run, head.data) == (2, "replayed")
    with pytest.raises(Stale):
        await new_writer(journal, run=1, attempt=9).write(RESULT, "zombie")


async def test_an_entry_older_than_the_job_is_of_a_stream_before_this_one(journal: Journal) -> None:
    await new_writer(journal, run=500).write(RESULT, "of a deleted stream")
    await new_writer(journal, run=3, enqueued_at=time.time() + 60).write(RESULT, "new")
    assert [data for _, _, data in await events(journal)] == ["of a deleted stream", "new"]


async def test_a_replica_that_lags_does_not_hide_the_newest_entry(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head is read from the stream's leader, the rest from any replica."""
    writer = new_writer(journal, run=3)
    for n in range(3):
        await writer.write(PROGRESS, n)
    read = journal.connection.read

    async def read_from_a_replica_that_lags(stream: str, subject: str) -> AsyncIterator[Stored]:
        found = [each async for each in read(stream, subject)]
        for each in found[:-1]:
            yield each

    monkeypatch.setattr(journal.connection, "read", read_from_a_replica_that_lags)
    record = await journal.read_run(SUBJECT, 3, 0.0)
    assert record.newest is not None
    assert (record.newest.data, record.newest.seq) == (2, record.head_seq)
    monkeypatch.setattr(journal.connection, "read", None)  # the head says it all
    newest = await journal.newest_of_run(SUBJECT, 3, 0.0)
    assert newest is not None
    assert newest.data == 2


async def test_a_write_whose_answer_was_lost_is_found_and_not_doubled(own_server: OwnServer) -> None:
    server = own_server()
    async with opened(server) as journal:
        writer = new_writer(journal)
        await writer.write(PROGRESS, "begun")
        server.pause()
        work = asyncio.create_task(writer.write(RESULT, "done"))
        await asyncio.sleep(0.05)  # let it be sent: with what is not sent this test would prove less, not fail
        journal.connection.window.on_disconnected()  # its answer will be to a try that nobody waits for any more
        journal.connection.window.on_reconnected()
        server.resume()
        await work
        assert [data for _, _, data in await events(journal)] == ["begun", "done"]


async def test_a_write_that_was_given_up_but_stored_does_not_make_its_own_writer_stale(own_server: OwnServer) -> None:
    server = own_server()
    async with opened(server) as journal:
        writer = new_writer(journal)
        await writer.write(PROGRESS, 1)
        for event, data in ((PROGRESS, 2), (RESULT, "done")):
            server.pause()
            with pytest.raises(Unavailable) as caught:
                await writer.write(event, data, timeout_s=0.3)
            assert caught.value.maybe_stored
            server.resume()
        await writer.write(RESULT, "done")  # once more: there can be one final entry only
        assert [data for _, _, data in await events(journal)] == [1, 2, "done"]


async def test_writes_go_on_over_a_server_restart_and_none_is_lost_or_doubled(
    own_server: OwnServer, eventually: Eventually
) -> None:
    server = own_server()
    async with opened(server) as journal:
        writer, written = new_writer(journal), 0

        async def write() -> None:
            nonlocal written
            for n in range(300):
                await writer.write(PROGRESS, n)
                written += 1

        work = asyncio.create_task(write())
        await eventually(lambda: written > 50)
        server.kill()
        await eventually(lambda: not journal.connection.connected)
        server.start()
        await work
        assert [data for _, _, data in await events(journal)] == list(range(300))


async def test_a_chaos_of_writers_leaves_one_final_entry_and_no_doubles(journal: Journal) -> None:
    async def attempt(number: int) -> None:
        writer = new_writer(journal, attempt=number)
        with contextlib.suppress(Stale):
            for n in range(10):
                await writer.write(PROGRESS, (number, n))
            await writer.write(RESULT, number)

    await asyncio.gather(*(attempt(n) for n in range(1, 6)))
    written = await entries(journal)
    assert [each.final for each in written].count(True) == 1
    assert written[-1].final
    described = [str(each.data) for each in written]
    assert len(described) == len(set(described))
    assert [each.epoch for each in written] == sorted(each.epoch for each in written)


async def test_what_cannot_be_written_is_refused_and_the_writer_still_works(journal: Journal) -> None:
    writer = new_writer(journal)
    with pytest.raises(EncodeError):
        await writer.write(RESULT, object())
    await writer.write(RESULT, "fine")
    assert [data for _, _, data in await events(journal)] == ["fine"]


async def test_a_foreign_entry_that_cannot_be_read_is_told_and_not_raised(journal: Journal) -> None:
    entry_headers = {headers.MSG_ID: "x", headers.EVENT: RESULT, headers.RUN: "many", headers.CONTENT_TYPE: codec.CBOR}
    await journal.connection.store(SUBJECT, b"\xff\xff", entry_headers)
    head = await journal.head(SUBJECT)
    assert head is not None
    assert head.run == 0
    assert "undecodable" in head.data


# awaiting the final entry


async def test_a_final_entry_that_is_there_is_returned_at_once(journal: Journal) -> None:
    await new_writer(journal).write(RESULT, 1)
    entry = await wait_for_outcome(journal, SUBJECT, run=1, timeout_s=5)
    assert entry is not None
    assert entry.data == 1


async def test_waiting_ends_with_the_message_of_the_final_entry(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.journal.outcome_watch.POLL_S", 600.0)  # nothing is found by looking
    writer = new_writer(journal)
    await writer.write(PROGRESS, 0)
    waiting = asyncio.create_task(wait_for_outcome(journal, SUBJECT, run=1, timeout_s=20))
    for n in range(5):
        await writer.write(PROGRESS, n)
    for _ in range(5):
        await journal.head(SUBJECT)  # whatever these woke has read by now
    assert not waiting.done()
    await writer.write(FAILED, {"reason": "rejected"})
    entry = await waiting
    assert entry is not None
    assert (entry.event, entry.data) == (FAILED, {"reason": "rejected"})


async def test_nothing_is_read_when_a_stored_job_has_started_nor_once_the_message_of_its_final_entry_was_heard(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.journal.outcome_watch.POLL_S", 600.0)
    writer = new_writer(journal)
    await writer.write(PROGRESS, 0)
    get, reads = journal.connection.get, []

    async def counted(stream: str, seq: int) -> Any:
        reads.append(seq)
        return await get(stream, seq)

    monkeypatch.setattr(journal.connection, "get", counted)
    waiting = asyncio.create_task(
        wait_for_outcome(journal, SUBJECT, run=1, timeout_s=20, job=(journal.stream, 1))  # any message that is stored
    )
    while not reads:
        await asyncio.sleep(0)
    await journal.head(SUBJECT)
    await journal.head(SUBJECT)  # it has read the journal by now, and waits
    await writer.write(STARTED, {})
    await journal.head(SUBJECT)
    await writer.write(RESULT, 7)
    entry = await waiting
    assert entry is not None
    assert (entry.data, reads) == (7, [1])


async def test_a_start_of_a_job_that_was_stored_again_elsewhere_is_followed_at_once(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiqueue.journal.outcome_watch.POLL_S", 600.0)
    writer = new_writer(journal)
    await writer.write(PROGRESS, 0)
    waiting = asyncio.create_task(wait_for_outcome(journal, SUBJECT, run=1, timeout_s=20, job=(journal.stream, 1)))
    await journal.head(SUBJECT)
    await journal.head(SUBJECT)
    get, reads = journal.connection.get, []

    async def counted(stream: str, seq: int) -> Any:
        reads.append(seq)
        return await get(stream, seq)

    monkeypatch.setattr(journal.connection, "get", counted)
    await writer.write(STARTED, {"seq": 2})
    while not reads:
        await asyncio.sleep(0.01)
    await writer.write(RESULT, 7)
    entry = await waiting
    assert entry is not None
    assert entry.data == 7


async def test_a_hundred_may_wait_for_the_same_job(journal: Journal) -> None:
    waiting = [asyncio.create_task(wait_for_outcome(journal, SUBJECT, run=1, timeout_s=20)) for _ in range(100)]
    await asyncio.sleep(0)
    await new_writer(journal).write(RESULT, "all")
    assert {entry.data for entry in await asyncio.gather(*waiting) if entry} == {"all"}


async def test_an_earlier_runs_final_entry_is_not_taken_and_a_later_ones_is(journal: Journal) -> None:
    await new_writer(journal, run=1).write(RESULT, "earlier")
    with pytest.raises(ResultTimeout):
        await wait_for_outcome(journal, SUBJECT, run=2, timeout_s=0.2)
    await new_writer(journal, run=3).write(RESULT, "later")
    entry = await wait_for_outcome(journal, SUBJECT, run=2, timeout_s=5)
    assert entry is not None
    assert entry.data == "later"


async def test_no_final_entry_in_time_is_a_result_timeout_and_leaves_nothing_behind(journal: Journal) -> None:
    await new_writer(journal).write(PROGRESS, 0)
    for _ in range(3):
        with pytest.raises(ResultTimeout, match=r"0\.1 s"):
            await wait_for_outcome(journal, SUBJECT, run=1, timeout_s=0.1)
    assert journal.connection._subscriptions == set()
    assert journal.connection._regained.all() == []


async def test_a_final_entry_said_while_the_waiter_was_cut_off_is_found_after_the_reconnect(
    own_server: OwnServer, eventually: Eventually
) -> None:
    server = own_server()
    async with opened(server) as waiter:
        await new_writer(waiter).write(PROGRESS, 0)
        waiting = asyncio.create_task(wait_for_outcome(waiter, SUBJECT, run=1, timeout_s=30))
        await eventually(waiter.connection._regained.all)
        await waiter.connection.flush()
        server.kill()
        await eventually(lambda: not waiter.connection.connected)
        waiter.connection._up.clear()
        server.start()
        async with opened(server) as other:
            await new_writer(other, head=await other.head(SUBJECT)).write(RESULT, "meanwhile")
        entry = await waiting
        assert entry is not None
        assert entry.data == "meanwhile"


# through the handle


async def handle(journal: Journal) -> Handle:
    family = TOPOLOGY.family("agent.tasks")
    ack = await journal.connection.store("ai.agent.tasks.acme", codec.encode({}), {headers.MSG_ID: "acme/j1"})
    enqueued = Enqueued("j1", Lane("agent.tasks", "acme", "normal"), ack.stream, ack.seq, duplicate=False)
    return Handle(enqueued, family, journal, Canceller(journal.connection, TOPOLOGY))


async def remove(journal: Journal, job: Handle) -> None:
    found = job._enqueued
    await journal.connection.api(f"STREAM.MSG.DELETE.{found.stream}", {"seq": found.seq, "no_erase": True})


async def test_a_handle_gives_the_result_and_raises_the_failure(journal: Journal) -> None:
    job = await handle(journal)
    await new_writer(journal, run=job._enqueued.seq).write(RESULT, {"n": 1})
    assert await job.result("5s") == {"n": 1}
    failure = {"reason": "rejected", "error": "ValueError: no"}
    await new_writer(journal, run=job._enqueued.seq + 1, attempt=3).write(FAILED, failure)
    assert await job.result("5s") == {"n": 1}  # a later run's end is none of its own
    job._enqueued = job._enqueued._replace(duplicate=True)
    with pytest.raises(JobFailed) as caught:
        await job.result(25)
    assert (caught.value.reason, caught.value.error, caught.value.attempt) == ("rejected", "ValueError: no", 3)


async def test_who_awaits_a_job_that_was_deleted_unrun_learns_that_it_is_gone(journal: Journal) -> None:
    job = await handle(journal)
    waiting = asyncio.create_task(job.result(25))
    with pytest.raises(ResultTimeout):
        await job.result(0.2)
    await remove(journal, job)
    for late in (waiting, job.result(25)):
        with pytest.raises(JobGone, match="gone without an outcome"):
            await late
    with pytest.raises(JobGone):
        [item async for item in job.stream(timeout=25)]


async def test_a_job_that_is_gone_from_its_lane_and_parked_is_waited_for(journal: Journal) -> None:
    """Without an entry that tells so, as a delayed job that was cancelled and enqueued again, or one parked aside."""
    job = await handle(journal)
    await remove(journal, job)
    is_parked = [True]

    async def parked() -> bool:
        return is_parked[0]

    where = (job._enqueued.stream, job._enqueued.seq)
    with pytest.raises(ResultTimeout):
        await wait_for_outcome(
            journal, job._journal_subject(), run=job._enqueued.seq, timeout_s=0.5, job=where, parked=parked
        )
    is_parked[0] = False
    with pytest.raises(JobGone):
        await wait_for_outcome(
            journal, job._journal_subject(), run=job._enqueued.seq, timeout_s=25, job=where, parked=parked
        )


async def test_progress_alone_does_not_make_a_gone_job_wait_for_ever(journal: Journal) -> None:
    job = await handle(journal)
    await new_writer(journal, run=job._enqueued.seq).write(PROGRESS, 0.5)
    await remove(journal, job)
    with pytest.raises(ResultDisabled):
        await job.result(25)


async def test_a_waiter_is_woken_by_the_ack_of_a_job_that_keeps_no_result(journal: Journal) -> None:
    job = await handle(journal)
    connection, lane = journal.connection, TOPOLOGY.family("agent.tasks").lane_config("acme", "normal")
    name = f"{job._enqueued.stream}.{lane['durable_name']}"
    await connection.api(
        f"CONSUMER.CREATE.{name}.{lane['filter_subject']}", {"stream_name": job._enqueued.stream, "config": lane}
    )
    waiting = asyncio.create_task(job.result(20))
    inbox, delivered = connection.new_inbox(), asyncio.Queue[Received]()
    await connection.subscribe(inbox, delivered.put_nowait)
    await connection.publish(f"$JS.API.CONSUMER.MSG.NEXT.{name}", b'{"batch":1}', reply=inbox)
    await connection.publish((await delivered.get()).reply, b"+ACK")
    started = time.monotonic()
    with pytest.raises(ResultDisabled):
        await waiting
    assert time.monotonic() - started < 15


async def test_a_family_without_a_journal_says_so(journal: Journal) -> None:
    job = await handle(journal)
    with pytest.raises(NotFound, match="keeps no journal"):
        await Handle(job._enqueued, replace(job._family, journal=None), journal, job._cancels).result()
