"""`Job.first_stored`: when the stream has first stored a job, through all that stores it anew."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

import aiqueue
from aiqueue import headers

pytestmark = pytest.mark.families("agent.tasks")

SEQ, AT = 17, 1_700_000_100.25


class Echo(aiqueue.Message, kind="echo"):
    text: str = ""


def recording(fails: int = 0, reason: type[Exception] = aiqueue.Reject) -> tuple[aiqueue.Worker, list[Any]]:
    worker, seen = aiqueue.Worker(concurrency=1), []

    @worker.handle(Echo)
    async def echo(job: aiqueue.Job[Echo]) -> None:
        seen.append((job.priority, job.first_stored, job.headers.get(headers.FIRST_STORED)))
        if len(seen) <= fails:
            raise reason("no")

    return worker, seen


async def wait_for(seen: list[Any], count: int) -> None:
    async with asyncio.timeout(25):
        while len(seen) < count:
            await asyncio.sleep(0.01)


async def dead_letter(client: aiqueue.Client) -> Any:
    async with asyncio.timeout(25):
        while not (found := [each async for each in client.dead.find()]):
            await asyncio.sleep(0.01)
    return found[0]


async def test_a_replay_keeps_when_the_job_was_first_stored_also_a_second_one(client: aiqueue.Client) -> None:
    worker, seen = recording(fails=2)
    async with worker.running(client):
        await client.enqueue(Echo(), tenant="acme")
        await client.dead.replay(await dead_letter(client))
        await wait_for(seen, 2)
        await client.dead.replay(await dead_letter(client))
        await wait_for(seen, 3)
    assert len({each[1] for each in seen}) == 1
    assert (seen[0][1][1], seen[0][1][0]) == (1, pytest.approx(time.time(), abs=30))
    assert [each[2] is None for each in seen] == [True, False, False]


async def test_a_move_to_another_lane_keeps_it(client: aiqueue.Client, plain: Any) -> None:
    worker, seen = recording()
    ack = await plain.jetstream().publish("ai.agent.tasks.acme", b'{"message_type": "echo", "schema_version": "1.0"}',
                                          headers={"priority": "low"})  # fmt: skip
    async with worker.running(client):
        await wait_for(seen, 1)
    assert (seen[0][0], seen[0][1][1]) == ("low", ack.seq)


async def test_no_header_of_a_plain_publisher_makes_a_job_younger_than_it_is(
    client: aiqueue.Client, plain: Any
) -> None:
    worker, seen = recording()
    body = b'{"message_type": "echo", "schema_version": "1.0"}'
    forged = [
        {headers.FIRST_STORED: "99999999999999999-1"},
        {headers.FIRST_STORED: "soon"},
        {headers.PARKED: "p-1", headers.ENQUEUED: "99999999999.0", headers.RUN: "1"},
        {headers.REPLAY: "1", headers.RESUMES: "1-999999999999"},
    ]
    acks = [await plain.jetstream().publish("ai.agent.tasks.acme", body, headers=each) for each in forged]
    stored = [await client.connection.get("AI_AGENT_TASKS", each.seq) for each in acks]
    async with worker.running(client):
        await wait_for(seen, len(forged))
    assert [each[1][1] for each in seen] == [each.seq for each in acks]
    assert [each[1][0] for each in seen] == pytest.approx([each.time for each in stored if each], abs=1e-5)


@pytest.mark.parametrize(
    ("job_headers", "first"),
    [
        ({}, (AT, SEQ)),
        ({headers.FIRST_STORED: "1700000000123456-9"}, (1_700_000_000.123456, 9)),
        ({headers.PARKED: "r9-a2", headers.RUN: "9", headers.ENQUEUED: "1700000000.5"}, (1_700_000_000.5, 9)),
        ({headers.REPLAY: "1", headers.RESUMES: "9-1700000000"}, (1_700_000_000.0, 9)),  # a former version's replay
        ({headers.RESUMES: "9-1700000000"}, (AT, SEQ)),
        ({headers.FIRST_STORED: ""}, (AT, SEQ)),
    ],
)  # fmt: skip
def test_it_is_read_from_the_headers_of_every_form_in_which_a_job_is_stored(
    job_headers: dict[str, str], first: tuple[float, int]
) -> None:
    assert headers.first_stored(job_headers, SEQ, AT) == first


def test_its_header_comes_back_to_the_microsecond() -> None:
    text = headers.first_stored_text(1_796_000_000.999999, 12)
    assert headers.first_stored({headers.FIRST_STORED: text}, 99, 2e9) == (1_796_000_000.999999, 12)
