"""The output of a job while it runs, and its readers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

import aiqueue
from aiqueue import codec, subjects
from aiqueue.connection import Received
from aiqueue.errors import BadInput, DiskFull, EncodeError, JobGone, NotFound, ResultTimeout, Stale, TooLarge
from aiqueue.journal import (
    EMPTY_RECORD,
    PROGRESS,
    RESULT,
    RETRY,
    STARTED,
    Entry,
    Journal,
    Retention,
    RunRecord,
    Writer,
    chunks,
)
from aiqueue.journal.entries import CHUNK, LIVE, _chunks_from_live, entry_from_live, is_live_chunk
from aiqueue.journal.follower import LIVE_MAX, StreamItem, _Follower, follow
from aiqueue.worker import overflow

from ..enqueue.test_full import BODY, DISK, Parcel
from ..enqueue.test_full import opened as full
from ..support import Account, Eventually, create_streams
from .test_journal import SUBJECT, OwnServer, entries, new_writer, opened


@pytest.fixture
async def journal(account: Account) -> AsyncIterator[Journal]:
    async with opened(account) as found:
        yield found


def flat(found: list[Any]) -> list[Any]:
    return [part for each in found if each.event == CHUNK for part in each.data]


# writing


async def test_chunks_given_during_a_write_share_the_next_entry(journal: Journal) -> None:
    writer = new_writer(journal)
    for number in range(50):
        await writer.add_chunk({"n": number})
    await writer.write(RESULT, "done")
    found = await entries(journal)
    assert [each["n"] for each in flat(found)] == list(range(50))
    assert [each.event for each in found][-1] == RESULT
    assert len(found) <= 4, "one write was under way, and all others waited for it"


async def test_other_entries_keep_their_place_among_chunks(journal: Journal) -> None:
    writer = new_writer(journal)
    await writer.add_chunk("a")
    await writer.write(PROGRESS, 1)
    await writer.add_chunk("b")
    await writer.flush_chunks()
    assert [(each.event, each.data) for each in await entries(journal)] == [
        (CHUNK, ["a"]), (PROGRESS, 1), (CHUNK, ["b"]),
    ]  # fmt: skip


async def test_a_job_that_gives_no_chunk_writes_its_result_alone(journal: Journal) -> None:
    writer = new_writer(journal)
    await writer.flush_chunks()
    await writer.write(RESULT, 1)
    writer.discard_chunks()
    assert [each.event for each in await entries(journal)] == [RESULT]


async def test_a_handler_waits_when_so_many_chunks_are_not_stored(own_server: OwnServer) -> None:
    server = own_server()
    async with opened(server) as journal:
        writer = new_writer(journal)
        await writer.add_chunk("first")
        server.pause()
        try:
            given = 0

            async def give() -> None:
                nonlocal given
                while True:
                    await writer.add_chunk(given)
                    given += 1

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(give(), 0.5)
        finally:
            server.resume()
        assert given <= 2 * chunks.BUFFERED_MAX
        await writer.write(RESULT, "done")
        assert flat(await entries(journal)) == ["first", *range(given)]


async def test_a_chunk_above_max_payload_is_refused_at_once_and_no_entry_is_larger(own_server: OwnServer) -> None:
    async with opened(own_server("max_payload: 8000")) as journal:
        writer = new_writer(journal)
        with pytest.raises(TooLarge):
            await writer.add_chunk("x" * 8_000)
        with pytest.raises(EncodeError):
            await writer.add_chunk(object())
        for _ in range(40):
            await writer.add_chunk("y" * 1_000)
        await writer.write(RESULT, "done")
        assert flat(await entries(journal)) == ["y" * 1_000] * 40


async def test_the_chunks_of_an_attempt_that_was_taken_over_are_refused(journal: Journal) -> None:
    old = new_writer(journal)
    await old.add_chunk("old")
    await old.flush_chunks()
    head = await journal.head(old.subject)
    assert head is not None
    newer = Writer(
        journal, old.subject, run=1, enqueued_at=0.0, attempt=1, record=RunRecord(head.seq, head.epoch, head)
    )
    assert await newer.write_started({})
    await old.add_chunk("late")
    with pytest.raises(Stale):
        await old.flush_chunks()
    with pytest.raises(Stale):
        await old.add_chunk("later")
    with pytest.raises(Stale):
        await old.write(RESULT, "never")
    assert [each.event for each in await entries(journal)] == [CHUNK, STARTED]


async def test_chunks_that_find_no_server_are_stored_once_when_it_is_back(own_server: OwnServer) -> None:
    server = own_server()
    async with opened(server) as journal:
        writer = new_writer(journal)
        for number in range(20):
            await writer.add_chunk(number)
        server.kill()
        for number in range(20, 40):
            await writer.add_chunk(number)
        server.start()
        await writer.write(RESULT, "done")
        assert flat(await entries(journal)) == list(range(40))


async def test_chunks_without_room_are_dropped_and_the_next_entry_tells_how_many(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "NO_ROOM_S", 0.2)
    async with full(own_server(DISK), {}) as client:
        handles = []
        with contextlib.suppress(DiskFull):
            while True:
                handles.append(await client.enqueue(Parcel(blob=os.urandom(BODY)), tenant="acme"))
        worker = aiqueue.Worker(concurrency=4)

        @worker.handle(Parcel)
        async def handle(job: aiqueue.Job[Parcel]) -> str:
            for _ in range(3):
                await job.chunk(os.urandom(BODY))
            return "kept"

        results = [asyncio.ensure_future(each.result(30)) for each in handles]
        async with worker.running(client):
            assert await asyncio.gather(*results) == ["kept"] * len(handles)
        kept = [
            await entries(client.journal, subjects.journal("ai.agent.results", "acme", each.id)) for each in handles
        ]
        assert sum(entry.lost_chunks for journal in kept for entry in journal) > 0


# following


WORK = "AI_AGENT_TASKS"
Items = list[StreamItem]


def events_of(items: Items) -> list[tuple[str, Any]]:
    return [(each.event, each.data) for each in items]


async def followed(journal: Journal, *, run: int = 1, after: str | None = None) -> Items:
    return [each async for each in follow(journal, SUBJECT, run=run, after=after, timeout_s=20)]


async def some(journal: Journal, count: int, *, after: str | None = None) -> Items:
    """The first so many items; then the reader is gone."""
    found: Items = []
    async with contextlib.aclosing(follow(journal, SUBJECT, run=1, after=after, timeout_s=20)) as items:
        while len(found) < count:
            found.append(await anext(items))
    return found


def another(journal: Journal, head: Entry, *, run: int = 1, attempt: int = 1) -> Writer:
    return Writer(
        journal, SUBJECT, run=run, enqueued_at=0.0, attempt=attempt, record=RunRecord(head.seq, head.epoch, head)
    )


async def newest(journal: Journal) -> Entry:
    head = await journal.head(SUBJECT)
    assert head is not None
    return head


async def test_a_stream_has_each_chunk_once_and_ends_with_the_result(journal: Journal) -> None:
    reading = asyncio.ensure_future(followed(journal))
    writer = new_writer(journal)
    for number in range(200):
        await writer.add_chunk(number)
        await asyncio.sleep(0)
    await writer.write(RESULT, "done")
    whole = [*((CHUNK, number) for number in range(200)), (RESULT, "done")]
    assert events_of(await reading) == whole
    assert events_of(await followed(journal)) == whole, "from the beginning, when it is over"


async def test_a_live_entry_that_was_lost_is_read_from_the_stream_before_those_behind_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_live = _Follower._on_live
    lost: list[int] = []

    def lose_one(self: _Follower, message: Received) -> None:
        if codec.decode(message.data, codec.CBOR) == 2:
            lost.append(2)
        else:
            on_live(self, message)

    monkeypatch.setattr(_Follower, "_on_live", lose_one)
    writer, found = new_writer(journal), []
    async with contextlib.aclosing(follow(journal, SUBJECT, run=1, timeout_s=20)) as items:
        for number in range(6):
            await writer.write(PROGRESS, number)
            if number != 2:  # one at a time, so that each of the others is taken live
                found.append((await anext(items)).data)
            if number == 3:
                found.append((await anext(items)).data)
    assert found == list(range(6))
    assert lost == [2]


@pytest.mark.parametrize("retention", [Retention(), Retention(chunk_s=900)])
async def test_each_entry_heard_is_the_stored_one_and_those_of_chunks_are_read_by_one_pattern(
    journal: Journal, retention: Retention
) -> None:
    heard: list[Received] = []
    listening = await journal.connection.subscribe(f"{LIVE}.{SUBJECT}", heard.append)
    writer = Writer(
        journal, SUBJECT, run=1, enqueued_at=0.0, attempt=1, record=EMPTY_RECORD, retention=retention
    )  # fmt: skip
    assert await writer.write_started({})
    for number in range(3):
        await writer.add_chunk({"n": number})
        await writer.flush_chunks()
    writer.count_lost_chunks(2)
    await writer.add_chunk("behind a loss")
    await writer.add_chunk({"key": pydantic.SecretStr("k")})
    await writer.write(RESULT, "done")
    await journal.connection.flush()
    await listening.close()
    stored = await entries(journal)
    assert [entry_from_live(each) for each in heard] == stored
    usual = [not (each.lost_chunks or each.secrets) and each.event == CHUNK for each in stored]
    assert [_chunks_from_live(each) is not None for each in heard] == usual
    assert usual.count(True) == 3
    assert [is_live_chunk(each) for each in heard] == [each.event == CHUNK for each in stored]


async def followed_new(journal: Journal) -> Items:
    return [each async for each in follow(journal, SUBJECT, run=1, is_new=True, job=(WORK, 1), timeout_s=20)]


async def test_a_new_job_is_followed_without_a_request(journal: Journal) -> None:
    asked: list[str] = []
    await journal.connection.subscribe("$JS.API.>", lambda message: asked.append(message.subject))
    reading = asyncio.ensure_future(followed_new(journal))
    await asyncio.sleep(0)
    await journal.connection.flush()  # what is written from here on is heard
    writer = new_writer(journal)
    assert await writer.write_started({"seq": 1})
    for number in range(20):
        await writer.add_chunk(number)
        await writer.flush_chunks()
    await writer.write(RESULT, "done")
    found = await reading
    assert [each.data for each in found] == [{"seq": 1}, *range(20), "done"]
    await journal.connection.flush()
    assert [each for each in asked if ".GET." in each] == []


@pytest.mark.parametrize("missed", [1, 2])
async def test_what_a_new_jobs_reader_was_too_late_for_is_read(journal: Journal, missed: int) -> None:
    writer = new_writer(journal)
    for number in range(missed):
        await writer.add_chunk(number)
        await writer.flush_chunks()
    async with contextlib.aclosing(follow(journal, SUBJECT, run=1, is_new=True, timeout_s=20)) as items:
        found = [(await anext(items)).data for _ in range(missed)]  # though nothing is written any more
        await writer.add_chunk("heard")
        await writer.write(RESULT, "done")
        found += [each.data async for each in items]
    assert found == [*range(missed), "heard", "done"]


async def test_lost_chunks_are_told_by_the_next_entry_alone(journal: Journal) -> None:
    writer = new_writer(journal)
    writer.count_lost_chunks(3)
    await writer.write(PROGRESS, 1)
    await writer.write(PROGRESS, 2)
    assert [each.lost_chunks for each in await entries(journal)] == [3, 0]


async def test_every_cursor_resumes_after_its_item(journal: Journal) -> None:
    writer = new_writer(journal)
    for number in range(7):
        await writer.add_chunk(number)
    await writer.write(PROGRESS, 0.5)
    await writer.add_chunk("last")
    await writer.write(RESULT, "done")
    whole = await followed(journal)
    assert len(whole) == 10
    for index, item in enumerate(whole):
        assert events_of(await followed(journal, after=item.cursor)) == events_of(whole[index + 1 :])


@pytest.mark.parametrize("seed", range(3))
async def test_a_reader_that_comes_and_goes_at_random_has_each_item_once(seed: int, own_server: OwnServer) -> None:
    chance, restarts = random.Random(seed), 2
    server = own_server()
    async with opened(server) as journal, opened(server) as other:
        writer = new_writer(journal)

        async def write() -> None:
            for number in range(300):
                await writer.add_chunk(number)
                if chance.random() < 0.2:
                    await writer.write(PROGRESS, number)
                if chance.random() < 0.3:
                    await asyncio.sleep(0.002)
            await writer.write(RESULT, "done")

        writing = asyncio.ensure_future(write())
        found: Items = []
        while not found or not found[-1].final:
            after = found[-1].cursor if found else None
            async with contextlib.aclosing(follow(other, SUBJECT, run=1, after=after, timeout_s=20)) as items:
                for _ in range(chance.randrange(1, 60)):
                    found.append(await anext(items))
                    if found[-1].final:
                        break
                    if chance.random() < 0.02:
                        await asyncio.sleep(0.02)  # slow
            if seed == 2 and restarts and chance.random() < 0.5:
                restarts -= 1
                server.kill()
                server.start()
        await writing
        assert [each.data for each in found if each.event == CHUNK] == list(range(300))
        other_entries = [(each.event, each.data) for each in await entries(journal) if each.event != CHUNK]
        assert [each for each in events_of(found) if each[0] != CHUNK] == other_entries


async def test_a_reader_that_takes_nothing_holds_little_and_misses_nothing(journal: Journal) -> None:
    writer = new_writer(journal)
    await writer.add_chunk("first")
    async with contextlib.aclosing(follow(journal, SUBJECT, run=1, timeout_s=20)) as items:
        assert (await anext(items)).data == "first"
        for number in range(3 * LIVE_MAX):
            await writer.write(PROGRESS, number)
        await writer.write(RESULT, "done")
        assert [each.data async for each in items] == [*range(3 * LIVE_MAX), "done"]


async def test_another_attempt_is_told_before_its_items(journal: Journal) -> None:
    first = new_writer(journal)
    for part in "abc":
        await first.add_chunk(part)
    await first.flush_chunks()
    before = await some(journal, 2)
    second = another(journal, await newest(journal), attempt=2)
    assert await second.write_started({})
    with pytest.raises(Stale):
        await first.write(RESULT, "late")
    await second.add_chunk("A")
    await second.write(RESULT, "done")
    rest = [("restart", 2), (STARTED, 2), (CHUNK, 2), (RESULT, 2)]
    whole = await followed(journal)
    assert [(each.event, each.attempt) for each in whole] == [(CHUNK, 1), (CHUNK, 1), (CHUNK, 1), *rest]
    resumed = await followed(journal, after=before[-1].cursor)
    assert [(each.event, each.attempt) for each in resumed] == [(CHUNK, 1), *rest]
    assert events_of(await followed(journal, after=whole[3].cursor)) == events_of(whole[4:]), "shown once"


async def test_a_retry_gives_the_reason_of_the_restart(journal: Journal) -> None:
    first = new_writer(journal)
    await first.add_chunk("a")
    await first.write(RETRY, {"error": "it rained", "delay_s": 0.1})
    second = another(journal, await newest(journal), attempt=2)
    assert await second.write_started({})
    await second.write(RESULT, "done")
    found = await followed(journal)
    assert [each.event for each in found] == [CHUNK, RETRY, "restart", STARTED, RESULT]
    assert found[2].data == {"attempt": 2, "why": "it rained"}


async def test_an_attempt_that_wrote_only_its_retry_is_followed_by_a_restart(journal: Journal) -> None:
    first = new_writer(journal)
    await first.write(RETRY, {"error": "it rained", "delay_s": 0.1})
    second = another(journal, await newest(journal), attempt=2)
    assert await second.write_started({})
    await second.write(RESULT, "done")
    whole = await followed(journal)
    assert [each.event for each in whole] == [RETRY, "restart", STARTED, RESULT]
    assert whole[1].data == {"attempt": 2, "why": "it rained"}
    for at in range(3):
        resumed = await followed(journal, after=whole[at].cursor)
        assert [each.event for each in resumed] == [each.event for each in whole[at + 1 :]]


async def test_an_attempt_that_wrote_nothing_is_followed_by_no_restart(journal: Journal) -> None:
    second = new_writer(journal, attempt=2)
    assert await second.write_started({})
    await second.write(RESULT, "done")
    assert [each.event for each in await followed(journal)] == [STARTED, RESULT]


async def test_a_run_before_is_not_shown_and_a_later_one_restarts(journal: Journal) -> None:
    old = new_writer(journal, run=1)
    await old.add_chunk("old")
    await old.write(RESULT, "old")
    mine = new_writer(journal, run=5)
    await mine.add_chunk("mine")
    await mine.flush_chunks()
    later = new_writer(journal, run=9)
    await later.add_chunk("later")
    await later.flush_chunks()
    await mine.write(PROGRESS, "of the run that is not followed any more")
    await later.write(RESULT, "done")
    assert events_of(await followed(journal, run=5)) == [
        (CHUNK, "mine"), ("restart", {"attempt": 1, "why": "a later run of this job id"}), (CHUNK, "later"),
        (RESULT, "done"),
    ]  # fmt: skip


async def test_what_is_gone_from_a_journal_is_told_as_a_gap(journal: Journal) -> None:
    writer = new_writer(journal)
    for number in range(6):
        await writer.write(PROGRESS, number)
    first_items = await some(journal, 2)
    stored = await entries(journal)
    for entry in stored[1:4]:
        await journal.connection.delete(journal.stream, entry.seq)
    await writer.write(RESULT, "done")
    rest = [("gap", {"chunks": None}), (PROGRESS, 4), (PROGRESS, 5), (RESULT, "done")]
    assert events_of(await followed(journal, after=first_items[-1].cursor)) == rest
    whole = await followed(journal)
    assert events_of(whole) == [(PROGRESS, 0), *rest]
    assert events_of(await followed(journal, after=whole[1].cursor)) == rest[1:], "shown once"


async def test_a_cursor_within_an_entry_that_is_gone_leads_to_a_gap(journal: Journal) -> None:
    writer = new_writer(journal)
    await writer.write(PROGRESS, 0)
    for part in "abc":
        await writer.add_chunk(part)
    await writer.flush_chunks()
    found = await some(journal, 2)
    *_, entry = await entries(journal)
    assert entry.data == ["a", "b", "c"]
    await journal.connection.delete(journal.stream, entry.seq)
    await writer.write(RESULT, "done")
    assert events_of(await followed(journal, after=found[-1].cursor)) == [("gap", {"chunks": None}), (RESULT, "done")]


async def test_a_wrong_cursor_is_refused_in_one_line(journal: Journal) -> None:
    await new_writer(journal).write(RESULT, 1)
    (item,) = await followed(journal)
    for wrong in ("", "7", item.cursor + "x", "é" * 40, item.cursor.replace("1-", "2-", 1)):
        with pytest.raises(BadInput, match="is no cursor"):
            await followed(journal, after=wrong)
    with pytest.raises(BadInput, match="another job"):
        async for _ in follow(journal, SUBJECT + "x", run=1, after=item.cursor):
            pass
    assert await followed(journal, after=item.cursor) == []


async def test_a_stream_that_does_not_end_in_time_says_so(journal: Journal) -> None:
    await new_writer(journal).write(PROGRESS, 1)
    items = follow(journal, SUBJECT, run=1, timeout_s=0.3)
    assert (await anext(items)).data == 1
    with pytest.raises(ResultTimeout):
        await anext(items)


async def test_entries_expire_by_their_time_and_the_writer_goes_on(journal: Journal, eventually: Eventually) -> None:
    writer = Writer(
        journal, SUBJECT, run=1, enqueued_at=0.0, attempt=1, record=EMPTY_RECORD, retention=Retention(60.0, 1.0)
    )
    other = Writer(
        journal, SUBJECT + "x", run=1, enqueued_at=0.0, attempt=1, record=EMPTY_RECORD, retention=Retention(60.0, 1.0)
    )
    await writer.add_chunk("soon gone")
    await writer.flush_chunks()
    first_items = await some(journal, 1)
    assert await other.write_started({})
    await other.add_chunk("soon gone")
    await other.flush_chunks()

    async def expired() -> bool:
        return await journal.head(SUBJECT) is None and len(await entries(journal, SUBJECT + "x")) == 1

    await eventually(expired)
    for each in (writer, other):
        await each.write(RESULT, "done")
    assert [each.event for each in await entries(journal, SUBJECT + "x")] == [STARTED, RESULT]
    assert events_of(await followed(journal, after=first_items[-1].cursor)) == [(RESULT, "done")], "nothing was missed"
    assert events_of(await followed(journal)) == [("gap", {"chunks": None}), (RESULT, "done")]


# of a job


class Story(aiqueue.Message, kind="story"):
    parts: int = 5
    fail: bool = False


def teller(**options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Story, **options)
    async def tell(job: aiqueue.Job[Story]) -> str:
        for number in range(job.message.parts):
            await job.chunk(f"{job.attempt}.{number}")
            if job.message.fail and job.attempt == 1 and number == 2:
                raise aiqueue.Retry("again", after=0.05)
        return "done"

    return worker


@contextlib.asynccontextmanager
async def queue(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


async def test_a_handlers_chunks_reach_whoever_has_the_handle(account: Account) -> None:
    async with queue(account) as client:
        handle = await client.enqueue(Story(fail=True), tenant="acme")
        async with teller().running(client):
            found = [each async for each in handle.stream(timeout=20)]
        assert [each.event for each in found] == [CHUNK] * 3 + [RETRY, "restart", STARTED] + [CHUNK] * 5 + [RESULT]
        assert [each.data for each in found if each.event == CHUNK and each.attempt == 2] == [
            f"2.{number}" for number in range(5)
        ]
        assert found[-1].data == "done"


@pytest.mark.parametrize("delay", [None, 0.2])
async def test_a_job_can_be_followed_by_its_id_from_elsewhere(account: Account, delay: float | None) -> None:
    async with queue(account) as client, queue(account) as elsewhere:
        mine = await client.enqueue(Story(), tenant="acme", delay=delay)
        theirs = await elsewhere.job(mine.id)
        assert (await theirs.status()).state == ("queued" if delay is None else "parked")
        reading = [asyncio.ensure_future(collect(each)) for each in (mine, theirs)]
        async with teller().running(client):
            one, other = await asyncio.gather(*reading)
        assert [each.data for each in one if each.event == CHUNK] == [f"1.{number}" for number in range(5)]
        assert one == other
        again = await elsewhere.job(mine.id, family="agent.tasks", tenant="acme")
        assert await again.result(25) == "done"
        assert [each.cursor for each in await collect(again)] == [each.cursor for each in one]
        assert (await again.status()).state == "done"
        with pytest.raises(NotFound):
            await elsewhere.job("nobody")


async def test_a_stream_ends_where_a_handler_keeps_no_result(account: Account) -> None:
    async with queue(account) as client:
        handle = await client.enqueue(Story(parts=3), tenant="acme")
        reading = asyncio.ensure_future(collect(handle))
        async with teller(result=False).running(client):
            found = await reading
        assert [each.event for each in found] == [CHUNK] * 3
        assert [each.event for each in await collect(handle)] == [CHUNK] * 3


@pytest.mark.parametrize("result", [True, False])
async def test_a_new_jobs_stream_ends_with_its_job(account: Account, result: bool) -> None:
    async with queue(account) as client, teller(result=result).running(client):
        handle = await client.enqueue(Story(parts=3), tenant="acme")
        found = [each async for batch in handle.stream_batches(timeout=20, is_new=True) for each in batch]
        assert [each.event for each in found] == [CHUNK] * 3 + [RESULT] * result


async def test_a_new_job_that_is_purged_is_gone_for_the_reader_of_its_stream(account: Account) -> None:
    async with queue(account) as client:
        handle = await client.enqueue(Story(), tenant="acme")
        await client.connection.api(f"STREAM.PURGE.{WORK}")
        with pytest.raises(JobGone):
            [each async for each in handle.stream_batches(timeout=20, is_new=True)]


async def test_a_family_says_how_long_its_entries_are_kept(account: Account, tmp_path: Path) -> None:
    class Brief(aiqueue.Message, kind="brief", family="brief.jobs"):
        pass

    (tmp_path / "brief.toml").write_text("""
        family = { name = "brief.jobs", default_kind = "brief", journal_ttl = "1h", chunk_ttl = "10m" }
        stream = { name = "BRIEF", max_bytes = "1MiB" }
    """)
    where = {"user": account.user, "password": account.password, "streams": tmp_path}
    async with aiqueue.connect(account.url, **where) as client:
        await create_streams(client)
        worker = aiqueue.Worker()

        @worker.handle(Brief)
        async def handle(job: aiqueue.Job[Brief]) -> None:
            await job.chunk("a")

        async with worker.running(client):
            handle = await client.enqueue(Brief(), tenant="acme")
            await handle.result(20)
        found = client.connection.read(client.journal.stream, f"ai.brief.jobs-results.acme.{handle.id}")
        stored = [(each.headers["Aiq-Event"], each.headers["Nats-TTL"]) async for each in found]
        assert stored == [(CHUNK, "600s"), (RESULT, "3600s")]


async def test_followers_make_no_consumer(account: Account) -> None:
    async with queue(account) as client:
        handle = await client.enqueue(Story(), tenant="acme")
        reading = [asyncio.ensure_future(collect(handle)) for _ in range(50)]
        worker = teller()

        async def consumers() -> int:
            info = await client.connection.api(f"STREAM.INFO.{client.topology.journal_stream.name}")
            return int(info["state"]["consumer_count"])

        async with worker.running(client):
            await asyncio.wait(reading, return_when=asyncio.FIRST_COMPLETED)
            assert await consumers() == 0
            assert all(len(found) == 6 for found in await asyncio.gather(*reading))


def test_a_sync_client_streams_too(account: Account) -> None:
    async def work(ready: threading.Event, over: threading.Event) -> None:
        async with queue(account) as client, teller().running(client):
            ready.set()
            await asyncio.to_thread(over.wait, 30)

    ready, over = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(work(ready, over)))
    thread.start()
    try:
        assert ready.wait(40)
        with aiqueue.connect_sync(account.url, user=account.user, password=account.password) as client:
            handle = client.enqueue(Story(), tenant="acme")
            found = list(handle.stream(timeout=20))
            assert [each.event for each in found] == [CHUNK] * 5 + [RESULT]
            for item in client.job(handle.id).stream(after=found[2].cursor):
                assert item.data == "1.3"
                break
            assert handle.status().state == "done"
    finally:
        over.set()
        thread.join()


async def collect(handle: aiqueue.Handle) -> Items:
    return [each async for each in handle.stream(timeout=20)]
