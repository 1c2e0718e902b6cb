"""Bodies on their way: marks and texts in pieces, results without tags, and messages that cannot be carried."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address
from typing import Any
from uuid import UUID

import cbor2
import pytest

import aiqueue
from aiqueue import codec, subjects
from aiqueue.errors import BadInput

from ..support import Eventually
from .plain_jobs import ONCE, Named, letters, recording

# bodies


async def test_json_with_a_byte_order_mark_is_run(client: aiqueue.Client, plain: Any) -> None:
    seen = asyncio.Queue[aiqueue.Job[Any]]()
    async with recording(seen).running(client):
        await plain.jetstream().publish("ai.agent.tasks.acme", '{"goal": "é"}'.encode("utf-8-sig"))
        job = await asyncio.wait_for(seen.get(), 25)
    assert job.message.goal == "é"


# texts in pieces


async def test_a_character_cut_in_two_is_whole_in_chunks_and_replaced_elsewhere(
    client: aiqueue.Client, eventually: Eventually
) -> None:
    worker = aiqueue.Worker()

    @worker.handle(Named, retry=ONCE)
    async def answer(job: aiqueue.Job[Named]) -> Any:
        for part in ("a\ud83d", "\ude00b", "c\ud83d"):
            await job.chunk(part)
            await job.progress(Fraction(1, 2), "half \ud83d")  # type: ignore[arg-type]  # and it does not part the halves
        await job.chunk({"delta": "\ude00"})
        await job.chunk("end\ud83d")
        if job.message.goal:
            raise ValueError("bad \ud83d")
        return {"text": "\ud83d\ude00 \ud83d"}

    async with worker.running(client):
        handle = await client.enqueue(Named(), tenant="acme")
        assert await handle.result(25) == {"text": "\U0001f600 \ufffd"}
        items = [item async for item in handle.stream(timeout=25)]
        texts = [item.data for item in items if item.event == "chunk"]
        assert texts == ["a", "\U0001f600b", "c", "\ufffd", {"delta": "\ufffd"}, "end", "\ufffd"]
        assert {json.dumps(item.data) for item in items if item.event == "progress"} == {
            json.dumps({"fraction": 0.5, "note": "half \ufffd"})
        }
        await client.enqueue(Named(goal="fail"), tenant="acme")
        await eventually(lambda: letters(client))
    assert (await letters(client))[0].history[-1]["error"] == "ValueError: bad \ufffd"


async def test_a_json_job_with_half_a_character_runs(client: aiqueue.Client, plain: Any) -> None:
    seen = asyncio.Queue[aiqueue.Job[Any]]()
    async with recording(seen).running(client):
        await plain.jetstream().publish("ai.agent.tasks.acme", b'{"goal": "\\ud83d", "task_id": "t-1"}')
        job = await asyncio.wait_for(seen.get(), 25)
    assert job.message.goal == "\ufffd"


# results


def refuse(*given: Any) -> Any:
    raise AssertionError(f"a tag, which cborg refuses: {given}")


async def test_results_and_chunks_are_read_without_tags(client: aiqueue.Client) -> None:
    worker = aiqueue.Worker()
    value = {
        "at": datetime(2026, 1, 2, 3, 4, tzinfo=UTC), "day": date(2026, 1, 2), "id": UUID(int=1),
        "price": Decimal("1.50"),
        "ip": ip_address("::1"), "big": 2**80, "naive": datetime(2026, 1, 2),  # noqa: DTZ001
    }  # fmt: skip
    meant = {
        "at": "2026-01-02T03:04:00Z", "day": "2026-01-02", "id": "00000000-0000-0000-0000-000000000001",
        "price": "1.50",
        "ip": "::1", "big": "1208925819614629174706176", "naive": "2026-01-02T00:00:00",
    }  # fmt: skip

    @worker.handle(Named)
    async def answer(job: aiqueue.Job[Named]) -> Any:
        await job.chunk(value)
        return value

    async with worker.running(client):
        handle = await client.enqueue(Named(), tenant="acme")
        assert await handle.result(25) == meant
        assert [i.data async for i in handle.stream(timeout=25) if i.event == "chunk"] == [meant]
    subject = subjects.journal("ai.agent.results", "acme", handle.id)
    async for stored in client.connection.read("AI_RESULTS", subject):
        cbor2.loads(stored.data, tag_hook=refuse, semantic_decoders=dict.fromkeys(range(300), refuse))


async def test_a_result_that_an_older_worker_has_tagged_is_read(client: aiqueue.Client) -> None:
    handle = await client.enqueue(Named(), tenant="acme")
    value = {"at": datetime(2026, 1, 2, tzinfo=UTC), "price": Decimal("1.5"), "big": 2**80}
    given = {"Aiq-Event": "result", "Aiq-Run": "1", "Aiq-Epoch": "1", "Aiq-Attempt": "1", "Content-Type": codec.CBOR}
    subject = subjects.journal("ai.agent.results", "acme", handle.id)
    await client.connection.store(subject, cbor2.dumps(value), given)
    assert await handle.result(25) == value


# what cannot be carried


@pytest.mark.parametrize("way", ["one", "delayed", "many", "mail", "request"])
async def test_a_message_that_would_change_is_refused_on_every_way_to_a_handler(
    client: aiqueue.Client, way: str
) -> None:
    class Changing(aiqueue.Message, kind="changing", family="agent.message" if way == "mail" else "gateway.requests"):
        meta: dict[str, Any]

    with pytest.raises(BadInput, match=r"meta\.pair"):
        await hand_over(client, Changing(meta={"pair": {1, 2}}), way)


async def hand_over(client: aiqueue.Client, message: aiqueue.Message, way: str) -> None:
    match way:
        case "one":
            await client.enqueue(message, tenant="acme")
        case "delayed":
            await client.enqueue(message, tenant="acme", delay=5)
        case "many":
            (outcome,) = [each async for each in client.enqueue_many([message], tenant="acme")]
            assert isinstance(outcome, BadInput)
            raise outcome
        case "mail":
            await client.inboxes.send(message, tenant="acme", to="ada")
        case "request":
            await client.request(message, tenant="acme", timeout=5)
