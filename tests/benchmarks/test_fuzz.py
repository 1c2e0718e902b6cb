"""The fuzzer in short, and the faults that it has found, each with the frame that showed it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pydantic
import pytest

import aiqueue
from aiqueue import attempt, codec, headers
from aiqueue.attempt import DecodedJob, Handler, RawJob, Refused
from aiqueue.connection import frames as seam
from aiqueue.enqueue.deadletter import history_of
from aiqueue.errors import TooLarge
from aiqueue.inspect import lookup
from aiqueue.units import Backoff
from benchmarks.fuzzing import live
from benchmarks.fuzzing.frames import Frame, frames
from benchmarks.fuzzing.readers import Fuzz, NoProgress, family, read_many
from benchmarks.fuzzing.wire import Publisher

from ..support import Account, Eventually, create_streams


def test_a_seed_makes_the_same_frames_wherever_one_begins() -> None:
    made = list(frames(7, 50))
    assert list(frames(7, 20, first=30)) == made[30:]
    assert list(frames(8, 50)) != made
    assert len(set(made)) > 45


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_frames_go_through_every_reader(count: int) -> None:
    outcomes = read_many(20_261_123, count)
    assert outcomes.total() == count
    assert {"ran", "undecodable", "invalid", "unknown_kind"} <= set(outcomes)


@pytest.mark.timeout(120)
async def test_a_thousand_frames_through_a_worker_are_run_or_dead_letters_and_it_goes_on(account: Account) -> None:
    outcome = await live.run(account, seed=3, count=1_000)
    assert outcome.stored > 900
    assert outcome.sound, outcome.plain()


def block(*lines: str, first: str = "NATS/1.0") -> bytes:
    return "\r\n".join([first, *lines, "\r\n"]).encode("latin-1")


@pytest.mark.parametrize("code", ["\xb2", "9" * 5_000, "40", "abc"])
def test_a_status_that_is_none_is_no_status(code: str) -> None:
    assert seam.read_headers(block("a: b", first=f"NATS/1.0 {code}")) == ({"a": "b"}, None)


def test_control_characters_do_not_reach_a_header() -> None:
    line = headers.ascii_line("a\x00b\x1b[31mc\x7f\r\nd\u00fc")
    assert line == "a\\x00b\\x1b[31mc\\x7f d\\xfc"
    seam.block({headers.ERROR: line})


def test_names_that_no_header_may_have_do_not_go_on_with_a_job() -> None:
    told = {"good": "v", "bad name": "v", "": "v", "Nats-TTL": "1s", "Aiq-Kind": "k", "Aiq-\xff": "v"}
    assert headers.carried(told) == {"good": "v"}
    assert headers.carried(told, ours=True) == {"good": "v", "Aiq-Kind": "k"}


@pytest.mark.parametrize("history", ["[" * 200_000, '{"a":' * 3_000, "[" + "9" * 4_300 + "]", "nonsense", "{}", "7"])
def test_a_history_that_is_none_is_empty(history: str) -> None:
    assert history_of({headers.HISTORY: history}) == []


def test_of_a_foreign_history_only_what_a_journal_can_hold_is_kept() -> None:
    good = {"attempt": 1, "at": 2.5, "worker": "w", "error": "e"}
    bad: list[Any] = [{"at": 10**4_250}, {"error": json.loads("[" * 70 + "]" * 70)}, None, 1]
    half = {"error": "\ud800"}  # of a character: replaced where it is encoded
    kept = history_of({headers.HISTORY: json.dumps([*bad, good, half, {"at": float("nan")}])})
    assert kept == [good, half, {"at": None}]
    assert codec.decode(codec.encode(kept), codec.CBOR) == [good, {"error": "\ufffd"}, {"at": None}]


def test_a_kind_in_a_header_is_cut_like_one_in_a_body() -> None:
    told = {headers.KIND: "k" * 100_000, headers.JOB_ID: "j"}
    raw = RawJob(family(), "t0", "normal", 1, 1.7e9, told, b"{}")
    for found in (attempt.decode_body(raw), attempt.decode_headers_only(raw), attempt.decode_headers_or_defaults(raw)):
        assert found is not None
        assert found.kind == "k" * 128


def test_what_a_handler_raises_can_be_written_whatever_its_text_is_made_of() -> None:
    odd = "broken \ud800 text"
    for error in (ValueError(odd), aiqueue.Retry(odd), aiqueue.Reject(odd), KeyboardInterrupt(odd)):
        codec.encode(attempt.outcome_to_plain(attempt.outcome_of_error(error)))


@pytest.mark.parametrize(
    "failure", [ValueError("not \ud800"), KeyError("\ud800"), ZeroDivisionError("none"), ValueError]
)
def test_a_job_that_its_models_own_check_fails_on_is_refused_in_words_that_can_be_written(failure: Any) -> None:
    class Picky(aiqueue.Message, kind="picky"):
        text: str

        @pydantic.field_validator("text")
        @classmethod
        def check(cls, text: str) -> str:
            raise failure

    handler = Handler(Picky, lambda job: None, False, Backoff(), 1.0, True)
    raw = RawJob(family(), "t0", "normal", 1, 1.7e9, {}, b"")
    found = DecodedJob("j", "picky", None, {"text": "\ud800"})
    made = attempt.build_job(raw, found, handler, attempt=1, state=None, progress=NoProgress())
    assert isinstance(made, Refused)
    assert made.reason == "invalid"
    codec.encode(made.error)


def test_headers_that_no_stream_takes_are_refused_before_they_are_sent() -> None:
    with pytest.raises(TooLarge, match=r"headers of 70,\d+ bytes"):
        seam.check_size(seam.block({"a": "v" * 70_000}), b"", 2**20)


async def test_a_stored_job_or_entry_with_a_status_of_its_own_is_not_taken_for_the_servers_word(
    account: Account, eventually: Eventually
) -> None:
    worker = aiqueue.Worker()
    seen = []

    @worker.handle(Fuzz)
    async def fuzz(job: aiqueue.Job[Fuzz]) -> None:
        seen.append(job.message.number)

    async with (
        aiqueue.connect(account.url, user=account.user, password=account.password) as client,
        Publisher(account) as publisher,
    ):
        await create_streams(client)
        for number, first in enumerate(("NATS/1.0 404 No Messages", "NATS/1.0 503", "NATS/1.0 100 Idle Heartbeat")):
            body = json.dumps({"number": number}).encode()
            await publisher.send("ai.agent.tasks.t0", Frame(block("Aiq-Kind: fuzz", first=first), body))
            await publisher.send("ai.agent.results.t0.j", Frame(block("Aiq-Event: progress", first=first), b"\xf6"))
        await publisher.answered()
        assert publisher.said == {"stored": 6}
        async with worker.running(client):
            await eventually(lambda: sorted(seen) == [0, 1, 2], within=40)
        read = [stored.seq async for stored in client.connection.read("AI_RESULTS", "ai.agent.results.t0.j")]
        assert len(read) == 3


async def test_readers_pass_over_dead_letters_and_journals_that_strangers_wrote(account: Account) -> None:
    async with (
        aiqueue.connect(account.url, user=account.user, password=account.password) as client,
        Publisher(account) as publisher,
    ):
        await create_streams(client)
        job = await client.enqueue(Fuzz(number=1), tenant="t0", unique="j")
        for line in ("Aiq-Rest: x", "Aiq-Rest: 9999", "Aiq-Enqueued: nan", "Aiq-History: [[[", "Aiq-Subject: >"):
            await publisher.send("ai.dead.agent.tasks.t0.other", Frame(block(line), b"body"))
        await publisher.answered()
        letters = [letter async for letter in client.dead.find()]
        assert len(letters) == 5
        json.dumps([letter.summary() for letter in letters])
        stored = await client.connection.last("AI_AGENT_TASKS", "ai.agent.tasks.t0.normal")
        assert stored is not None
        begun, enough = asyncio.Event(), asyncio.Event()
        worker = aiqueue.Worker()

        @worker.handle(Fuzz)
        async def fuzz(job: aiqueue.Job[Fuzz]) -> None:
            begun.set()
            await enough.wait()

        async with worker.running(client):
            await asyncio.wait_for(begun.wait(), 20)
            for data in ({"delay_s": "soon"}, {"delay_s": [1]}, {"delay_s": 1e400}, {"history": 7}, "text"):
                lines = ["Aiq-Event: retry", f"Aiq-Run: {stored.seq}", "Content-Type: application/json"]
                await publisher.send("ai.agent.results.t0.j", Frame(block(*lines), json.dumps(data).encode()))
                await publisher.answered()
                found = await lookup.job(client.connection, client.topology, job.id)
                assert found.state in ("in_flight", "retrying")
            enough.set()


@pytest.mark.parametrize("data", [{"history": 7}, {"history": None}, {"history": [1, "x"]}, {}, 7])
async def test_a_job_goes_on_after_an_entry_that_a_stranger_wrote(
    account: Account, eventually: Eventually, data: Any
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Fuzz, retry=Backoff(first=1, jitter=0))
    async def fuzz(job: aiqueue.Job[Fuzz]) -> str:
        if job.attempt > 1:
            return "done"
        raise aiqueue.Retry

    async with (
        aiqueue.connect(account.url, user=account.user, password=account.password) as client,
        Publisher(account) as publisher,
    ):
        await create_streams(client)
        handle = await client.enqueue(Fuzz(number=1), tenant="t0", unique="j")

        async def told() -> bool:
            return await client.journal.head("ai.agent.results.t0.j") is not None

        async with worker.running(client):
            await eventually(told, within=40)
            lines = ["Aiq-Event: retry", "Aiq-Run: 1", "Aiq-Attempt: 1", "Content-Type: application/json"]
            await publisher.send("ai.agent.results.t0.j", Frame(block(*lines), json.dumps(data).encode()))
            assert await handle.result(timeout=30) == "done"


@pytest.mark.parametrize("word", ["\xff", "\x00", "a b", "[" * 5_000, "w" * 200])
async def test_a_job_that_names_no_parking_is_run_all_the_same(account: Account, word: str) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Fuzz)
    async def fuzz(job: aiqueue.Job[Fuzz]) -> int:
        return job.message.number

    async with (
        aiqueue.connect(account.url, user=account.user, password=account.password) as client,
        Publisher(account) as publisher,
    ):
        await create_streams(client)
        frame = Frame(block("Aiq-Kind: fuzz", f"Aiq-Parked: {word}"), b'{"number": 5}')
        await publisher.send("ai.agent.tasks.t0", frame)
        await publisher.send("ai.parked.due.agent.tasks.t0.normal.d.w", frame)
        await publisher.answered()
        async with worker.running(client) as session:
            deadline = asyncio.get_running_loop().time() + 20
            while session.done < 2:
                assert asyncio.get_running_loop().time() < deadline
                await asyncio.sleep(0.02)
        info = await client.connection.api("STREAM.INFO.AI_AGENT_TASKS")
        assert info["state"]["messages"] == 0
