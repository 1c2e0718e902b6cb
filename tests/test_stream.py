"""What comes out of a job while it runs, and whoever follows it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.errors import DiskFull, EncodeError, Stale, TooLarge
from aiqueue.journal import (
    CHUNK,
    CHUNKS_HELD_MAX,
    PROGRESS,
    RESULT,
    STARTED,
    Journal,
    Past,
)

from .support import Account
from .test_full import BODY, DISK, Parcel
from .test_full import opened as full
from .test_journal import OwnServer, entries, opened, pen


@pytest.fixture
async def journal(account: Account) -> AsyncIterator[Journal]:
    async with opened(account) as found:
        yield found


def flat(found: list[Any]) -> list[Any]:
    return [part for each in found if each.event == CHUNK for part in each.data]


# writing


async def test_chunks_given_during_a_write_share_the_next_entry(journal: Journal) -> None:
    writer = pen(journal)
    for number in range(50):
        await writer.chunk({"n": number})
    await writer.write(RESULT, "done")
    found = await entries(journal)
    assert [each["n"] for each in flat(found)] == list(range(50))
    assert [each.event for each in found][-1] == RESULT
    assert len(found) <= 4, "one write was under way, and all others waited for it"


async def test_other_entries_keep_their_place_among_chunks(journal: Journal) -> None:
    writer = pen(journal)
    await writer.chunk("a")
    await writer.write(PROGRESS, 1)
    await writer.chunk("b")
    await writer.flush()
    assert [(each.event, each.data) for each in await entries(journal)] == [
        (CHUNK, ["a"]), (PROGRESS, 1), (CHUNK, ["b"]),
    ]  # fmt: skip


async def test_a_job_that_gives_no_chunk_writes_its_result_alone(journal: Journal) -> None:
    writer = pen(journal)
    await writer.flush()
    await writer.write(RESULT, 1)
    writer.close()
    assert [each.event for each in await entries(journal)] == [RESULT]


async def test_a_handler_waits_when_so_many_chunks_are_not_stored(own_server: OwnServer) -> None:
    server = own_server()
    async with opened(server) as journal:
        writer = pen(journal)
        await writer.chunk("first")
        server.pause()
        try:
            given = 0

            async def give() -> None:
                nonlocal given
                while True:
                    await writer.chunk(given)
                    given += 1

            with pytest.raises(TimeoutError):
                await asyncio.wait_for(give(), 0.5)
        finally:
            server.resume()
        assert given <= 2 * CHUNKS_HELD_MAX
        await writer.write(RESULT, "done")
        assert flat(await entries(journal)) == ["first", *range(given)]


async def test_a_chunk_above_max_payload_is_refused_at_once_and_no_entry_is_larger(own_server: OwnServer) -> None:
    async with opened(own_server("max_payload: 8000")) as journal:
        writer = pen(journal)
        with pytest.raises(TooLarge):
            await writer.chunk("x" * 8_000)
        with pytest.raises(EncodeError):
            await writer.chunk(object())
        for _ in range(40):
            await writer.chunk("y" * 1_000)
        await writer.write(RESULT, "done")
        assert flat(await entries(journal)) == ["y" * 1_000] * 40


async def test_the_chunks_of_an_attempt_that_was_taken_over_are_refused(journal: Journal) -> None:
    old = pen(journal)
    await old.chunk("old")
    await old.flush()
    head = await journal.head(old.subject)
    assert head is not None
    newer = journal.writer(old.subject, run=1, born=0.0, attempt=1, past=Past(head.seq, head.epoch, head))
    assert await newer.begin({})
    await old.chunk("late")
    with pytest.raises(Stale):
        await old.flush()
    with pytest.raises(Stale):
        await old.chunk("later")
    with pytest.raises(Stale):
        await old.write(RESULT, "never")
    assert [each.event for each in await entries(journal)] == [CHUNK, STARTED]


async def test_chunks_that_find_no_server_are_stored_once_when_it_is_back(own_server: OwnServer) -> None:
    server = own_server()
    async with opened(server) as journal:
        writer = pen(journal)
        for number in range(20):
            await writer.chunk(number)
        server.kill()
        for number in range(20, 40):
            await writer.chunk(number)
        server.start()
        await writer.write(RESULT, "done")
        assert flat(await entries(journal)) == list(range(40))


async def test_chunks_without_room_are_dropped_and_the_next_entry_tells_how_many(own_server: OwnServer) -> None:
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
        assert sum(entry.lost for journal in kept for entry in journal) > 0
