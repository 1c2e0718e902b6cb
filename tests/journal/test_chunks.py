"""Chunks on their way into journals: together with those of other jobs, each once, whatever the server answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from aiqueue import codec
from aiqueue.config import Settings
from aiqueue.connection import Connection, PubAck, Publish
from aiqueue.errors import Stale
from aiqueue.journal import EMPTY_RECORD, PROGRESS, RESULT, Entry, Journal, Writer, chunk_pace, entry_from_stored
from aiqueue.journal.entries import CHUNK
from aiqueue.topology import provision
from aiqueue.topology.declared import Topology

from ..support import Account

TOPOLOGY = Topology.load()


@pytest.fixture
async def journal(account: Account) -> AsyncIterator[Journal]:
    connection = Connection(Settings.load(url=account.url, user=account.user, password=account.password))
    await connection.open()
    await provision.apply(connection, TOPOLOGY)
    yield Journal(connection, TOPOLOGY.journal_stream.name)
    await connection.close()


def new_writer(journal: Journal, job: str = "j", *, run: int = 1) -> Writer:
    subject = f"ai.agent.results.acme.{job}"
    return Writer(journal, subject, run=run, enqueued_at=0.0, attempt=1, record=EMPTY_RECORD)


async def entries(journal: Journal, job: str = "j") -> list[Entry]:
    read = journal.connection.read(journal.stream, f"ai.agent.results.acme.{job}")
    return [entry_from_stored(each) async for each in read]


def numbers(found: Sequence[Entry]) -> list[str]:
    """The numbers of a writer's entries, with the number of the try behind a hyphen. Readers take a skipped one for a
    gap.
    """
    return [each.msg_id.rpartition("/")[2] for each in found]


@pytest.fixture
def groups(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries of chunks went in each write."""
    found: list[int] = []
    add_all = journal.connection.add_all

    def note(publishes: Sequence[Publish], timeout_s: float) -> None:
        found.append(len(publishes))
        add_all(publishes, timeout_s)

    monkeypatch.setattr(journal.connection, "add_all", note)
    return found


async def test_chunks_of_many_jobs_that_are_there_together_go_in_one_write(journal: Journal, groups: list[int]) -> None:
    writers = [new_writer(journal, f"j{number}") for number in range(20)]
    for writer in writers:
        await writer.add_chunk("a")
    await asyncio.gather(*(each.flush_chunks() for each in writers))
    assert groups == [20]
    for number in range(20):
        assert [each.data for each in await entries(journal, f"j{number}")] == [["a"]]


async def test_chunks_that_come_while_a_group_is_under_way_go_together_when_it_is_stored(
    journal: Journal, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_pace, "HOLD_S", 60.0)  # so that only the PubAck can have them sent
    first, others = new_writer(journal, "first"), [new_writer(journal, f"j{number}") for number in range(5)]
    await first.add_chunk("a")
    while not groups:
        await asyncio.sleep(0)
    for each in (first, *others):
        await each.add_chunk("b")
    async with asyncio.timeout(10):
        while len(groups) < 2:
            await asyncio.sleep(0.001)
    await asyncio.gather(*(each.flush_chunks() for each in (first, *others)))
    assert groups == [1, 6]
    assert [each.data for each in await entries(journal, "first")] == [["a"], ["b"]]


async def test_a_chunk_that_is_refused_for_another_runs_entry_is_stored_behind_it_once(journal: Journal) -> None:
    writer = new_writer(journal, run=2)
    await writer.add_chunk("a")
    await writer.flush_chunks()
    (head,) = await entries(journal)
    other = new_writer(journal, run=1)
    other._head_seq = head.seq  # it has read the journal
    await other.write(PROGRESS, {"note": "another run"})
    await writer.add_chunk("b")
    await writer.add_chunk("c")
    await writer.write(PROGRESS, {"note": "mine"})
    await writer.write(RESULT, 1)
    found = await entries(journal)
    assert [each.data for each in found if each.run == 2] == [["a"], ["b", "c"], {"note": "mine"}, 1]
    assert numbers([each for each in found if each.run == 2]) == ["1", "2-1", "3", "4"]


@pytest.mark.parametrize("event", [CHUNK, PROGRESS, RESULT])
async def test_an_entry_whose_ack_was_lost_is_stored_once_though_another_run_has_written_behind_it(
    journal: Journal, event: str
) -> None:
    writer = new_writer(journal, run=2)
    await writer.write(PROGRESS, "begun")
    before, tried, encoded = writer._head_seq, set[str](), codec.encode_marked(["a"])
    await writer._write_encoded(event, encoded, tried, 10.0)
    other = new_writer(journal, run=1)
    other._head_seq = writer._head_seq
    await other.write(PROGRESS, "another run")
    writer._head_seq = writer._known_seq = before  # as if the ack had been lost with the connection
    await writer._write_encoded(event, encoded, tried, 10.0)
    if event != RESULT:
        await writer.write(RESULT, "done")
    found = [(each.event, each.data) for each in await entries(journal) if each.run == 2]
    assert found == [(PROGRESS, "begun"), (event, ["a"]), *([(RESULT, "done")] if event != RESULT else [])]


async def test_a_started_whose_ack_was_lost_is_stored_once_though_another_run_has_written_behind_it(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, other = new_writer(journal, run=2), new_writer(journal, run=1)
    store = journal.connection.store

    async def store_and_lose_the_ack(*args: Any, **options: Any) -> PubAck:
        monkeypatch.undo()
        other._head_seq = (await store(*args, **options)).seq
        await other.write(PROGRESS, "another run")
        return await store(*args, **options)

    monkeypatch.setattr(journal.connection, "store", store_and_lose_the_ack)
    assert await writer.write_started({})
    await writer.write(RESULT, "done")
    assert numbers([each for each in await entries(journal) if each.run == 2]) == ["1", "2"]


async def test_another_write_waits_while_a_refused_chunk_is_resolved(journal: Journal) -> None:
    writer = new_writer(journal, run=2)
    other = new_writer(journal, run=1)
    await other.write(PROGRESS, {"note": "another run"})
    await writer.add_chunk("a")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    writing = asyncio.create_task(writer._write_encoded(PROGRESS, codec.encode_marked({"note": "mine"}), set(), 10.0))
    await writer.flush_chunks()
    await writing
    found = [each for each in await entries(journal) if each.run == 2]
    assert [each.event for each in found] == ["chunk", PROGRESS]
    assert numbers(found) == ["1-1", "2"]


async def test_a_chunk_that_was_stored_though_its_answer_was_lost_is_not_stored_twice(journal: Journal) -> None:
    writer = new_writer(journal)
    window = journal.connection.window
    on_reply, lost = window.on_reply, []

    def lose(token: bytes, data: bytes, block: bytes | None) -> bool:
        if not lost and token in window._in_flight:
            lost.append(token)
            publish = window._in_flight[token]
            asyncio.get_running_loop().call_soon(window.on_disconnected)  # it is sent again, as after a reconnect
            asyncio.get_running_loop().call_soon(window.on_reconnected)
            assert publish.body
            return True
        return on_reply(token, data, block)

    window.on_reply = lose  # type: ignore[method-assign]
    await writer.add_chunk("a")
    await writer.add_chunk("b")
    await writer.write(RESULT, 1)
    assert lost
    assert [each.data for each in await entries(journal)] == [["a", "b"], 1]


async def test_a_chunk_of_an_attempt_that_was_taken_over_is_stale(journal: Journal) -> None:
    former = new_writer(journal)
    await former.add_chunk("a")
    await former.flush_chunks()
    (head,) = await entries(journal)
    newer = new_writer(journal)
    newer._head_seq = newer._known_seq = head.seq
    await newer.add_chunk("b")
    await newer.flush_chunks()
    await former.add_chunk("c")
    with pytest.raises(Stale):
        await former.flush_chunks()
    with pytest.raises(Stale):
        await former.add_chunk("d")
    assert [each.data for each in await entries(journal)] == [["a"], ["b"]]


async def test_a_discarded_chunk_that_is_under_way_lets_its_writer_write(journal: Journal) -> None:
    writer = new_writer(journal)
    await writer.add_chunk("a")
    await asyncio.sleep(0)
    writer.discard_chunks()
    writer.discard_chunks()
    with pytest.raises(Stale):
        await writer.add_chunk("b")
    assert not writer._lock.locked()
    assert not journal.chunk_pace._under_way
