"""What plain clients send: headers in any case, numbers in any form, keys that are false."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any
from uuid import UUID

import pytest

import aiqueue
from aiqueue.agent import Mail

from ..support import Eventually
from .plain_jobs import Named, Task, letters, recording


class Note(aiqueue.Message, kind="agent.message", family="agent.message"):
    text: str = ""


# headers


async def test_header_names_in_another_case_are_heeded(client: aiqueue.Client, plain: Any) -> None:
    seen = asyncio.Queue[aiqueue.Job[Any]]()
    deadline = time.time() + 3600
    async with recording(seen).running(client):
        given = {
            "content-type": "application/json; charset=utf-8", "aiq-kind": "named", "Task_id": "t-7",
            "AIQ-DEADLINE": str(round(deadline * 1000)), "Model": "small",
        }  # fmt: skip
        await plain.jetstream().publish("ai.agent.tasks.acme", b'{"goal": "plan"}', headers=given)
        job = await asyncio.wait_for(seen.get(), 25)
    assert (job.kind, job.id, job.message) == ("named", "t-7", Named(goal="plan"))
    assert job.deadline == pytest.approx(deadline, abs=0.01)
    assert job.headers["Model"] == "small"


async def test_a_job_with_an_id_header_in_another_case_is_found_and_dead_lettered_under_its_kind(
    client: aiqueue.Client, plain: Any, eventually: Eventually
) -> None:
    await plain.jetstream().publish("ai.agent.tasks.acme", b"[]", headers={"aiq-job-id": "t-8", "aiq-kind": "named"})
    assert (await client.job("t-8")).id == "t-8"
    async with recording(asyncio.Queue()).running(client):
        await eventually(lambda: letters(client))
    (letter,) = await letters(client)
    assert (letter.job_id, letter.kind, letter.reason) == ("t-8", "named", "undecodable")
    assert letter.headers["Aiq-Kind"] == "named", "it is replayed as such"


@pytest.mark.parametrize("form", ["{:.3f}", "{:.0f}", "{:.6e}", " {:.1f} "])
async def test_a_deadline_may_be_any_number_of_milliseconds(client: aiqueue.Client, plain: Any, form: str) -> None:
    seen = asyncio.Queue[aiqueue.Job[Any]]()
    at_ms = (time.time() + 36_000) * 1000
    async with recording(seen).running(client):
        await plain.jetstream().publish("ai.agent.tasks.acme", b"{}", headers={"Aiq-Deadline": form.format(at_ms)})
        job = await asyncio.wait_for(seen.get(), 25)
    assert job.deadline == pytest.approx(at_ms / 1000, abs=3600)


@pytest.mark.parametrize("value", ["0", "1.5", "-3"])
async def test_a_deadline_that_has_passed_long_ago_counts(
    client: aiqueue.Client, plain: Any, eventually: Eventually, value: str
) -> None:
    async with recording(asyncio.Queue()).running(client):
        await plain.jetstream().publish("ai.agent.tasks.acme", b"{}", headers={"Aiq-Deadline": value})
        await eventually(lambda: letters(client))
    assert [each.reason for each in await letters(client)] == ["deadline"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Aiq-Deadline", "soon"), ("aiq-deadline", "2026-01-01T00:00:00Z"), ("Aiq-Deadline", "nan"), ("Aiq-Deadline",
        "1_000"),
        ("Aiq-Replay", "many"), ("Aiq-Run", "x"), ("Aiq-Document-Size", "1MB"),
    ],
)  # fmt: skip
async def test_a_job_with_a_malformed_number_is_refused_by_the_name_of_its_header(
    client: aiqueue.Client, plain: Any, eventually: Eventually, name: str, value: str
) -> None:
    seen = asyncio.Queue[aiqueue.Job[Any]]()
    async with recording(seen).running(client):
        await plain.jetstream().publish("ai.agent.tasks.acme", b"{}", headers={name: value})
        await eventually(lambda: letters(client))
    (letter,) = await letters(client)
    assert letter.reason == "invalid"
    assert name.title() in letter.error.title()
    assert value in letter.error
    assert seen.empty()


async def test_a_mail_with_a_malformed_deadline_is_refused_and_one_with_a_number_handled(
    client: aiqueue.Client, plain: Any, eventually: Eventually
) -> None:
    agent, seen = aiqueue.Agent("ada", tenant="acme"), asyncio.Queue[Mail[Note]]()

    @agent.handle(Note)
    async def note(mail: Mail[Note]) -> None:
        seen.put_nowait(mail)

    async with agent.running(client):
        subject, at_ms = "ai.agent.message.acme.ada", (time.time() + 3600) * 1000
        await plain.jetstream().publish(subject, b'{"text": "bad"}', headers={"Aiq-Deadline": "soon"})
        await plain.jetstream().publish(subject, b'{"text": "good"}', headers={"aiq-deadline": f"{at_ms:.2f}"})
        mail = await asyncio.wait_for(seen.get(), 25)
        await eventually(lambda: letters(client))
    assert mail.message.text == "good"
    assert mail.deadline == pytest.approx(at_ms / 1000, abs=0.01)
    (letter,) = await letters(client)
    assert "Aiq-Deadline" in letter.error


async def test_a_request_with_a_malformed_deadline_is_answered_with_its_name(
    client: aiqueue.Client, plain: Any
) -> None:
    async with aiqueue.Responder().running(client):
        answer = await plain.request(
            "ai.gateway.responses.acme", b'{"prompt": "x", "request_id": "r1"}', timeout=25,
            headers={"aiq-deadline": "soon"},
        )  # fmt: skip
    assert "Aiq-Deadline" in json.loads(answer.data)["message"]


# own keys


@pytest.mark.parametrize("key", [0, "0", UUID(int=0)])
async def test_a_key_in_the_message_that_is_false_is_a_key(client: aiqueue.Client, key: Any) -> None:
    first = await client.enqueue(Task(task_id=key), tenant="acme")
    second = await client.enqueue(Task(task_id=key), tenant="acme")
    assert (first.id, second.id, second.duplicate) == (str(key), str(key), True)
