"""Jobs that exceeded max deliveries, found by the server's advisories and without them."""

from __future__ import annotations

import asyncio
import json
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import attempt
from aiqueue.attempt import DecodedJob, RawJob
from aiqueue.enqueue import Parents
from aiqueue.enqueue.deadletter import DeadLetter
from aiqueue.worker import stranded
from aiqueue.worker.counting import Notes
from aiqueue.worker.stranded import StrandedSweeper

from .. import keyed
from ..support import create_streams, eventually

FILE = """
    [family]
    name = "test.strands"
    default_kind = "strand"
    [stream]
    name = "TEST_STRANDS"
    [consumer]
    ack_wait = "1s"
    max_deliver = 2
    """
STREAM, LANE = "TEST_STRANDS", "acme-normal"


class Strand(aiqueue.Message, kind="strand", family="test.strands"):
    n: int


@pytest.fixture
async def client(account: Any, tmp_path: Path) -> AsyncIterator[aiqueue.Client]:
    (tmp_path / "test_strands.toml").write_text(textwrap.dedent(FILE))
    async with aiqueue.connect(account.url, user=account.user, password=account.password, streams=tmp_path) as client:
        await create_streams(client)
        yield client


async def identify(raw: RawJob) -> DecodedJob:
    return attempt.decode_body(raw)


def sweeper(client: aiqueue.Client, name: str = "w") -> StrandedSweeper:
    parents = Parents(client.connection, client.topology)
    return StrandedSweeper(
        client.connection,
        client.topology,
        client.journal,
        client.dead,
        parents,
        worker=name,
        identify=identify,
        notes=Notes(None),
    )


async def make_lane(client: aiqueue.Client) -> None:
    config = client.topology.family("test.strands").lane_config("acme", "normal")
    subject = f"CONSUMER.CREATE.{STREAM}.{LANE}.{config['filter_subject']}"
    await client.connection.api(subject, {"stream_name": STREAM, "config": config})


async def pull(client: aiqueue.Client, reply: bytes = b"", *, consumer: str = f"{STREAM}.{LANE}") -> list[int]:
    """What the lane gives now; `reply` is sent for each. The sequences."""
    inbox, seqs = client.connection.new_inbox(), []
    answers: asyncio.Queue[Any] = asyncio.Queue()
    subscription = await client.connection.subscribe(inbox, answers.put_nowait)
    await client.connection.publish(
        f"$JS.API.CONSUMER.MSG.NEXT.{consumer}", json.dumps({"batch": 100, "no_wait": True}).encode(), reply=inbox
    )
    while (answer := await asyncio.wait_for(answers.get(), 25)).status is None:
        seqs.append(int(answer.reply.split(".")[5]))
        if reply:
            await client.connection.publish(answer.reply, reply)
    await subscription.close()
    await client.connection.flush()
    return seqs


async def in_flight(client: aiqueue.Client) -> int:
    return int((await client.connection.api(f"CONSUMER.INFO.{STREAM}.{LANE}"))["num_ack_pending"])


async def count(client: aiqueue.Client, stream: str) -> int:
    return int((await client.connection.api(f"STREAM.INFO.{stream}"))["state"]["messages"])


async def letters(client: aiqueue.Client) -> list[DeadLetter]:
    return [each async for each in client.dead.find()]


async def strand(client: aiqueue.Client, jobs: int) -> None:
    """Have `jobs` jobs exceed max deliveries: delivered twice, and no more."""
    for n in range(jobs):
        await client.enqueue(Strand(n=n), tenant="acme", unique=f"job-{n}")
    await make_lane(client)
    assert len(await pull(client)) == jobs
    redeliveries: list[int] = []

    async def redelivered() -> bool:
        redeliveries.extend(await pull(client))
        return len(redeliveries) == jobs

    await eventually(redelivered)

    async def exceeded() -> bool:
        return await pull(client) == [] and await in_flight(client) == 0

    await eventually(exceeded)
    assert await count(client, STREAM) == jobs


async def test_a_stranded_job_becomes_a_dead_letter_with_its_payload_when_a_worker_starts(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stranded, "FIRST_S", 0.1)
    await strand(client, 1)
    worker = aiqueue.Worker()

    @worker.handle(Strand)
    async def run(job: aiqueue.Job[Strand]) -> None: ...

    async with worker.running(client):
        await eventually(lambda: letters(client))
        await eventually(lambda: _empty(client))
    (letter,) = await letters(client)
    assert (letter.job_id, letter.reason, letter.kind) == ("job-0", "stranded", "strand")
    assert letter.error == "it was delivered 2 times without an outcome (max_deliver is 2)"
    assert letter.body
    with pytest.raises(aiqueue.JobFailed, match="stranded"):
        await (await client.enqueue(Strand(n=0), tenant="acme", unique="job-0")).result(timeout=25)
    await client.dead.replay(letter)
    async with worker.running(client):
        await eventually(lambda: _empty(client))


async def _empty(client: aiqueue.Client) -> bool:
    return await count(client, STREAM) == 0


async def test_without_advisories_the_lane_shows_which_jobs_exceeded_max_deliveries(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stranded, "CONFIRM_S", 0.1)
    await strand(client, 3)
    await eventually(lambda: count(client, "AI_STRANDED"))
    await client.connection.api("STREAM.PURGE.AI_STRANDED")
    for n in (3, 4):
        await client.enqueue(Strand(n=n), tenant="acme", unique=f"job-{n}")
    assert await sweeper(client).sweep() == 3
    assert {each.job_id for each in await letters(client)} == {"job-0", "job-1", "job-2"}
    assert await count(client, STREAM) == 2, "those that were never delivered wait on"


async def test_jobs_in_flight_or_between_two_attempts_are_left_alone(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stranded, "CONFIRM_S", 0.1)
    await client.enqueue(Strand(n=0), tenant="acme")
    await make_lane(client)
    await pull(client, b'-NAK {"delay": 60000000000}')
    assert await sweeper(client).sweep() == 0
    await client.enqueue(Strand(n=1), tenant="acme")
    await pull(client, b"+WPI")
    assert await sweeper(client).sweep() == 0
    assert await count(client, STREAM) == 2


async def test_an_advisory_of_an_ended_job_or_a_recreated_consumer_dead_letters_nothing(
    client: aiqueue.Client,
) -> None:
    await strand(client, 2)
    await eventually(lambda: _has_advisories(client, 2))
    await client.connection.api(f"STREAM.MSG.DELETE.{STREAM}", {"seq": 1})
    await client.connection.api(f"CONSUMER.DELETE.{STREAM}.{LANE}")

    async def remade() -> None:
        try:
            await make_lane(client)
        except aiqueue.AIQueueError as error:
            raise AssertionError from error

    await eventually(remade)
    assert await sweeper(client).sweep() == 0
    assert await letters(client) == []
    assert await pull(client) == [2]
    assert await count(client, "AI_STRANDED") == 0


async def _has_advisories(client: aiqueue.Client, advisories: int) -> bool:
    return await count(client, "AI_STRANDED") == advisories


async def test_two_sweepers_at_once_keep_one_dead_letter_of_each_job(client: aiqueue.Client) -> None:
    await strand(client, 5)
    await eventually(lambda: _has_advisories(client, 5))
    await asyncio.gather(*(sweeper(client, f"w{n}").sweep() for n in range(3)))
    assert sorted(each.job_id for each in await letters(client)) == [f"job-{n}" for n in range(5)]
    assert await count(client, STREAM) == 0


async def test_a_sweeper_that_dies_between_dead_letter_and_deletion_leaves_the_rest_to_the_next(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stranded, "CONFIRM_S", 0.1)
    await strand(client, 1)
    await eventually(lambda: _has_advisories(client, 1))
    api = client.connection.api

    async def dying(subject: str, *args: Any, **options: Any) -> Any:
        if subject.startswith("STREAM.MSG.DELETE"):
            raise asyncio.CancelledError
        return await api(subject, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(client.connection, "api", dying)
        with pytest.raises(asyncio.CancelledError):
            await sweeper(client).sweep()
    assert len(await letters(client)) == 1
    assert await count(client, STREAM) == 1
    assert await sweeper(client).sweep() == 1, "the advisory is redelivered, or the lane shows the job"
    assert len(await letters(client)) == 1
    assert await count(client, STREAM) == 0


async def test_a_message_that_is_no_advisory_is_dropped(client: aiqueue.Client) -> None:
    for body in (b"", b"[]", b"{", b'{"stream": "X"}', b"\xff"):
        await client.connection.publish(f"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.{STREAM}.x", body)
    await eventually(lambda: _has_advisories(client, 5))
    assert await sweeper(client).sweep() == 0
    await eventually(lambda: _has_advisories(client, 0))


async def test_where_the_server_allows_small_batches_only_all_advisories_are_read(own_server: Any) -> None:
    server = own_server(storage="limits { max_request_batch: 50 }")
    async with aiqueue.connect(server.url, user=server.user, password=server.password) as client:
        await create_streams(client)
        for _ in range(120):
            await client.connection.publish("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.AI_AGENT_TASKS.x", b"{")
        await eventually(lambda: _has_advisories(client, 120))
        assert await sweeper(client).sweep() == 0
        await eventually(lambda: _has_advisories(client, 0))


async def test_without_the_stream_of_advisories_the_lanes_are_checked(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stranded, "CONFIRM_S", 0.1)
    await strand(client, 2)
    await client.connection.api("STREAM.DELETE.AI_STRANDED")
    one = sweeper(client)
    assert await one.sweep() == 2
    assert await one.sweep() == 0
    assert caplog.text.count("by a slower search") == 1, "it is logged once"


async def test_a_stranded_job_of_a_key_lane_becomes_a_dead_letter_that_names_its_ordinary_lane(
    account: Any, tmp_path: Path
) -> None:
    file = keyed.FILE + '[consumer]\nack_wait = "1s"\nmax_deliver = 1\n'
    async with keyed.connect(account, tmp_path, file) as client:
        lane = keyed.key_lane("gpt-4o")
        job_id, _ = await keyed.store(client, lane, "gpt-4o")
        consumer = await keyed.make_consumer(client, lane)
        assert len(await pull(client, consumer=f"{keyed.STREAM}.{consumer}")) == 1

        async def swept() -> None:
            assert await sweeper(client).sweep() == 1

        await eventually(swept)
        (letter,) = await letters(client)
        assert (letter.job_id, letter.lane, letter.key) == (job_id, lane.without_key, "gpt-4o")
        assert await count(client, keyed.STREAM) == 0


def watch_reads(client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, *, races: int) -> list[int]:
    """Have a job of the lane end between the two requests of the first `races` looks. Returns how many jobs each read
    of the lane asks for at a time.
    """
    api, read, batches, looks = client.connection.api, client.connection.read, [], 0

    async def racing(subject: str, *args: Any, **options: Any) -> Any:
        nonlocal looks
        answer = await api(subject, *args, **options)
        if subject == f"STREAM.INFO.{STREAM}":
            looks += 1
            if looks <= races:
                await end_one(client)
        return answer

    def counting(stream: str, subject: str, **options: Any) -> Any:
        if stream == STREAM:
            batches.append(options.get("batch", 256))
        return read(stream, subject, **options)

    monkeypatch.setattr(stranded, "CONFIRM_S", 0.0)
    monkeypatch.setattr(client.connection, "api", racing)
    monkeypatch.setattr(client.connection, "read", counting)
    return batches


async def end_one(client: aiqueue.Client) -> None:
    """Have the next job of the lane end, and wait until the server has counted it."""
    inbox, answers = client.connection.new_inbox(), asyncio.Queue[Any]()
    subscription = await client.connection.subscribe(inbox, answers.put_nowait)
    subject = f"$JS.API.CONSUMER.MSG.NEXT.{STREAM}.{LANE}"
    await client.connection.publish(subject, b'{"batch": 1, "no_wait": true}', reply=inbox)
    await client.connection.request((await asyncio.wait_for(answers.get(), 25)).reply, b"+ACK")
    await subscription.close()


@pytest.mark.parametrize(("races", "batches"), [(1, []), (2, [1])])
async def test_of_a_lane_whose_jobs_end_between_the_two_requests_none_or_one_is_read(
    client: aiqueue.Client, monkeypatch: pytest.MonkeyPatch, races: int, batches: list[int]
) -> None:
    for n in range(5):
        await client.enqueue(Strand(n=n), tenant="acme")
    await make_lane(client)
    read = watch_reads(client, monkeypatch, races=races)
    assert await sweeper(client).sweep() == 0
    assert read == batches
    assert await count(client, STREAM) == 5 - races
