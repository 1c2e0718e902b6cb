"""What `inspect JOB` tells of a job, in one order."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest
from typer.testing import CliRunner

import aiqueue
from aiqueue import codec, headers, subjects
from aiqueue.cli.app import app
from aiqueue.cli.timeline import describe_event
from aiqueue.connection import Stored, timestamp
from aiqueue.inspect import lookup, stats
from aiqueue.inspect.timeline import TimelineEvent, build_timeline
from aiqueue.journal import EMPTY_RECORD, Entry, Writer
from aiqueue.worker import settlement

from ..support import Account, Eventually, create_streams
from .explaining import make_consumer, take


class Work(aiqueue.Message, kind="work"):
    text: str = ""


def workers(after: float = 0.01) -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Work, retry=aiqueue.Backoff(attempts=2, first=after, jitter=0))
    async def work(job: aiqueue.Job[Work]) -> str:
        for step in range(5):
            await job.progress(step / 4, f"step {step}")
        if job.message.text == "bad" or (job.message.text == "late" and job.attempt == 1):
            raise ValueError("broken")
        return job.message.text

    return worker


@pytest.fixture
async def client(account: Account, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[aiqueue.Client]:
    for name, value in {"URL": account.url, "USER": account.user, "PASSWORD": account.password}.items():
        monkeypatch.setenv(f"AIQUEUE_{name}", value)
    monkeypatch.setenv("TZ", "UTC")
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


async def read_timeline(client: aiqueue.Client, job_id: str) -> tuple[TimelineEvent, ...]:
    timeline = (await stats.job(client.connection, client.topology, job_id)).timeline
    times = [each.at for each in timeline if each.at is not None]
    assert times == sorted(times)
    return timeline


async def shown(columns: int, *words: str) -> str:
    """What the command line says, in a thread: it has a loop of its own."""
    environment = {"COLUMNS": str(columns)} if columns else {}
    done = await asyncio.to_thread(CliRunner().invoke, app, ["inspect", *words], env=environment)
    assert done.exit_code == 0, done.output
    return str(done.stdout)


def events(timeline: tuple[TimelineEvent, ...]) -> list[str]:
    return [each.event for each in timeline]


async def test_progress_stands_together_and_the_result_is_last(client: aiqueue.Client) -> None:
    before = time.time()
    async with workers().running(client):
        handle = await client.enqueue(Work(text="good"), tenant="acme")
        await handle.result(25)
    timeline = await read_timeline(client, handle.id)
    assert events(timeline) == ["enqueued", "started", "progress", "result"]
    enqueued, started, progress, result = timeline
    assert enqueued.at == pytest.approx(before, abs=10), "its result tells, although the job is stored no more"
    assert enqueued.at <= (started.at or 0) <= (result.at or 0)
    assert (progress.count, progress.text) == (5, "100% step 4")
    assert result.data == "good"
    assert result.after_s is not None


async def test_a_time_that_nobody_noted_is_none(client: aiqueue.Client) -> None:
    """Of a run that has written, but nothing that ended an attempt."""
    pen = Writer(client.journal, "ai.agent.results.acme.doc-1", run=1, enqueued_at=1.0, attempt=1, record=EMPTY_RECORD)
    await pen.write("progress", {"fraction": 1, "note": ""})
    assert (await read_timeline(client, "doc-1"))[0] == TimelineEvent("enqueued", None, run=1)
    assert "?                    enqueued" in await shown(80, "doc-1")


async def test_retries_failure_and_replay_are_one_list(client: aiqueue.Client, eventually: Eventually) -> None:
    async with workers().running(client):
        for _ in range(2):
            handle = await client.enqueue(Work(text="bad"), tenant="acme", unique="doc-1")
            with pytest.raises(aiqueue.JobFailed):
                await handle.result(25)
    attempts = ["started", "progress", "retried", "started", "progress", "failed"]
    timeline = await read_timeline(client, "doc-1")
    assert events(timeline) == ["enqueued", *attempts], "the second one was a duplicate"
    retried, failed = timeline[3], timeline[-1]
    assert (retried.text, retried.attempt) == ("ValueError: broken", 1)
    assert retried.until is not None
    assert retried.worker
    assert (failed.reason, failed.text, failed.dead_seq, failed.attempt) == ("attempts", "ValueError: broken", 1, 2)
    await client.dead.replay(await client.dead.get(1))
    timeline = await read_timeline(client, "doc-1")
    assert events(timeline) == ["enqueued", *attempts, "replayed"]
    assert timeline[-2].dead_seq is None
    async with workers().running(client):

        async def failed_again() -> None:
            assert events(await read_timeline(client, "doc-1")) == ["enqueued", *attempts, "replayed", *attempts]

        await eventually(failed_again)


async def test_a_long_retry_is_parked_and_comes_back(
    client: aiqueue.Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settlement, "PARK_AFTER_S", 0.1)
    handle = await client.enqueue(Work(text="late"), tenant="acme", unique="doc-1")
    async with workers(after=0.2).running(client):
        assert await handle.result(20) == "late"
    timeline = await read_timeline(client, "doc-1")
    assert events(timeline) == ["enqueued", "started", "progress", "retried", "parked", "started", "progress", "result"]
    assert timeline[0].at is not None

    handle = await client.enqueue(Work(text="late"), tenant="acme", unique="doc-2")
    async with workers(after=200).running(client):

        async def parked() -> bool:
            return (await stats.job(client.connection, client.topology, "doc-2")).state == "retrying"

        await eventually(parked)
    timeline = await read_timeline(client, "doc-2")
    assert events(timeline) == ["enqueued", "started", "progress", "retried", "parked"]
    assert timeline[-1].until == pytest.approx(time.time() + 200, abs=30)


async def test_a_delay_is_shown_while_it_waits_and_when_it_was_cancelled(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Work(), tenant="acme", unique="doc-1", delay="1h")
    timeline = await read_timeline(client, "doc-1")
    assert events(timeline) == ["enqueued", "parked"]
    assert timeline[1].until == handle.due
    table = await shown(80, "doc-1")
    assert "parked             until 20" in table
    assert table.splitlines()[-1].split() == ["now", "parked"]
    await handle.cancel()
    timeline = await read_timeline(client, "doc-1")
    assert events(timeline) == ["enqueued", "parked", "cancelled"]
    assert timeline[-1].text == "cancelled before it started"
    assert "cancelled           cancelled before" in await shown(80, "doc-1")


async def test_a_queued_job_that_was_cancelled_has_no_false_time(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Work(), tenant="acme", unique="doc-1")
    assert events(await read_timeline(client, "doc-1")) == ["enqueued"]
    assert await handle.cancel()
    timeline = await read_timeline(client, "doc-1")
    assert events(timeline) == ["enqueued", "cancelled"]
    assert timeline[0].at is None


async def test_a_job_that_runs_and_has_said_nothing_was_delivered(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    worker, running = aiqueue.Worker(concurrency=2, drain_timeout=0), asyncio.Event()

    @worker.handle(Work)
    async def work(job: aiqueue.Job[Work]) -> None:
        running.set()
        await asyncio.sleep(60)

    async with asyncio.timeout(20):
        async with worker.running(client):
            first = await client.enqueue(Work(), tenant="acme")
            await running.wait()
            (enqueued, delivered) = await read_timeline(client, first.id)
            assert (enqueued.event, delivered.event) == ("enqueued", "delivered")
            assert delivered.at == pytest.approx(time.time(), abs=20)
            running.clear()
            second = await client.enqueue(Work(), tenant="acme")
            await running.wait()
            timeline = await read_timeline(client, first.id)
            assert (events(timeline), timeline[1].at) == (["enqueued", "delivered"], None), (
                "the server knows the newest only"
            )
            assert (await read_timeline(client, second.id))[1].at is not None


async def test_the_extension_of_a_lease_is_no_delivery(
    client: aiqueue.Client, eventually: Eventually, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup, "LEASE_PARTS", 30)  # the first extension is due after a second
    handle = await client.enqueue(Work(), tenant="acme")
    consumer = await make_consumer(client)
    delivered = await take(client, consumer)
    first_s: list[float] = []

    async def is_extended() -> bool:
        await client.connection.publish(delivered.reply, b"+WPI")
        info = await client.connection.api(f"CONSUMER.INFO.{consumer}")
        first_s.append(timestamp(info["delivered"]["last_active"]))
        return first_s[-1] - first_s[0] > 1

    await eventually(is_extended)
    assert (await read_timeline(client, handle.id))[1].at is None


async def test_attempts_outlive_the_journal_with_the_dead_letter(client: aiqueue.Client) -> None:
    async with workers().running(client):
        handle = await client.enqueue(Work(text="bad"), tenant="acme", unique="doc-1")
        with pytest.raises(aiqueue.JobFailed):
            await handle.result(25)
    await client.connection.api("STREAM.PURGE.AI_RESULTS")
    timeline = await read_timeline(client, "doc-1")
    assert events(timeline) == ["enqueued", "attempt failed", "dead letter"]
    assert timeline[1].text == "ValueError: broken"
    assert (timeline[-1].reason, timeline[-1].dead_seq) == ("attempts", 1)


async def test_the_table_keeps_within_80_columns_and_json_has_the_same_list(client: aiqueue.Client) -> None:
    async with workers().running(client):
        handle = await client.enqueue(Work(text="bad"), tenant="acme")
        with pytest.raises(aiqueue.JobFailed):
            await handle.result(25)
    timeline = await read_timeline(client, handle.id)
    narrow, wide = await shown(80, handle.id), await shown(0, handle.id)
    rows = narrow.split("timeline")[1].splitlines()
    assert all(len(row) <= 80 for row in rows)
    assert len(rows) == 2 + len(timeline)
    assert "ValueError: broken" in wide.split("timeline")[1]
    found = json.loads(await shown(0, handle.id, "--json"))["timeline"]
    assert [(each["event"], each["at"], each["text"]) for each in found] == [
        (each.event, each.at, each.text) for each in timeline
    ]


@pytest.mark.parametrize(("limit", "value"), [("ENTRIES_MAX", 2), ("ENTRIES_BYTES_MAX", 50)])
async def test_a_very_long_journal_says_that_it_is_cut(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(lookup, limit, value)
    async with workers().running(client):
        handle = await client.enqueue(Work(text="good"), tenant="acme")
        await handle.result(25)
    assert events(await read_timeline(client, handle.id)) == ["enqueued", "started", "progress", "result"]
    assert "in the middle of the journal" in await shown(80, handle.id)


def entry(
    event: str, data: Any = None, *, at: float = 0.0, run: int = 1, attempt: int = 1, parking_id: str = ""
) -> Entry:
    return Entry(event, 1, run, 1, attempt, 1_800_000_000.0 + at, "", data, parking_id)


def timeline_of(*entries: Entry, stored: Stored | None = None, job_id: str = "doc-1") -> tuple[TimelineEvent, ...]:
    return build_timeline(job_id, entries, stored=stored, parked=(), letter=None)


def test_chunks_are_counted_and_stand_together_by_attempt() -> None:
    timeline = timeline_of(
        entry("chunk", ["a", "b"]), entry("chunk", ["c"], at=1), entry("chunk", ["x"], at=2, attempt=2),
        entry("result", 7, at=3, attempt=2),
    )  # fmt: skip
    assert [(each.event, each.count) for each in timeline[1:]] == [("chunks", 3), ("chunks", 1), ("result", 1)]
    assert [describe_event(each) for each in timeline[1:]] == ["3 chunks in 1.0s", "1 chunk", "7"]
    lost = timeline_of(
        replace(entry("chunk", ["c"]), lost_chunks=2), replace(entry("chunk", ["f"], at=1), lost_chunks=1)
    )
    assert describe_event(lost[-1]) == "2 chunks in 1.0s: 3 chunks lost: the server had no storage for them"


def test_an_id_that_was_used_again_is_shown_so() -> None:
    timeline = timeline_of(entry("result", 1), entry("result", 2, at=5, run=9))
    assert [(each.event, each.run, each.at is None) for each in timeline] == [
        ("enqueued", 1, True), ("result", 1, False), ("enqueued", 9, True), ("result", 9, False),
    ]  # fmt: skip
    assert "again" in timeline[2].text


@pytest.mark.parametrize(
    "data",
    [None, 5, "x", [1], {"delay_s": "soon", "history": 3}, {"delay_s": float("inf")}, {"fraction": [], "note": {}},
     {"delivery": [1, "x", None], "worker": 4}, {"history": [7], "error": b"\x00", "reason": 1}],
)  # fmt: skip
@pytest.mark.parametrize("event", ["started", "progress", "chunk", "retry", "failed", "cancelled", "trial", "", "odd"])
def test_what_a_stranger_wrote_is_shown_all_the_same(event: str, data: Any) -> None:
    timeline = timeline_of(entry(event, data, parking_id="r1-99999999999-a1"))
    assert len(timeline) == (3 if event == "retry" and isinstance(data, dict) and data.get("parked") else 2)
    assert timeline[0].at is None


def test_no_id_gives_a_time_that_cannot_be() -> None:
    made: Callable[[str], float | None] = lambda job_id: timeline_of(entry("result"), job_id=job_id)[0].at  # noqa: E731
    assert made("0" * 26) is None, "1970"
    assert made("7" + "v" * 25) is None, "in thousands of years"
    assert made("s12-" + f"{1_799_999_990_000_000:x}") == 1_799_999_990.0, "the id of a plain publisher's job"


def test_the_time_in_an_id_is_the_one_it_was_made_at() -> None:
    assert subjects.made_at(subjects.new_id()) == pytest.approx(time.time(), abs=5)
    assert subjects.made_at("doc-1") is None


def test_a_stored_job_that_was_parked_says_when_it_came_back() -> None:
    parking_id = "r1-1799999990-a2"
    job_headers = {
        headers.PARKED: parking_id,
        headers.RUN: "1",
        headers.ENQUEUED: "1799999990.5",
        headers.CONTENT_TYPE: codec.CBOR,
    }
    back = Stored("ai.agent.tasks.acme.normal", 8, b"", job_headers, 1_800_000_060.0)
    retry = entry("retry", {"error": "e", "delay_s": 60, "parked": True})
    shown = timeline_of(retry, stored=back)
    assert [(each.event, each.at) for each in shown] == [
        ("enqueued", 1_799_999_990.5), ("retried", 1_800_000_000.0), ("parked", 1_800_000_000.0),
        ("due", 1_800_000_060.0),
    ]  # fmt: skip
