"""OpenAI's own client uploads a file, has its lines answered, and gets the outputs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest

import aiqueue
from aiqueue.gateway import ApiKeys, BatchQuotas
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ..batches.lines import CHAT, chat_line, jsonl
from .fronts import RunningFront, Tokens, bearer, open_front


async def upload(ai: openai.AsyncOpenAI, lines: int = 3) -> str:
    file = await ai.files.create(file=("in.jsonl", jsonl(map(chat_line, range(lines)))), purpose="batch")
    return file.id


async def ended(ai: openai.AsyncOpenAI, batch_id: str) -> Any:
    async with asyncio.timeout(20):
        while (batch := await ai.batches.retrieve(batch_id)).status in (
            "validating", "in_progress", "finalizing", "cancelling",
        ):  # fmt: skip
            await asyncio.sleep(0.1)
    return batch


async def test_a_batch_runs_as_at_openai_s(served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn) -> None:
    standin.order(Fault(422, message="no", model="large-1", count=9))
    lines = [*map(chat_line, range(7)), chat_line(7, model="large")]
    file = await ai.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    assert (file.object, file.purpose, file.filename, file.bytes) == ("file", "batch", "in.jsonl", len(jsonl(lines)))
    made = await ai.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h", metadata={"run": "7"})
    assert (made.object, made.status, made.metadata) == ("batch", "validating", {"run": "7"})
    batch = await ended(ai, made.id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (8, 7, 1)
    output = await ai.files.content(batch.output_file_id)
    records = [json.loads(each) for each in output.text.splitlines()]
    assert sorted(each["custom_id"] for each in records) == [f"c{number}" for number in range(7)]
    (error,) = [json.loads(each) for each in (await ai.files.content(batch.error_file_id)).text.splitlines()]
    assert (error["custom_id"], error["response"]["status_code"]) == ("c7", 422)
    about = await ai.files.retrieve(batch.output_file_id)
    assert (about.purpose, about.bytes) == ("batch_output", len(output.content))
    assert {each.id async for each in ai.files.list()} == {file.id, batch.output_file_id, batch.error_file_id}
    assert [each.id async for each in ai.files.list(purpose="batch", limit=1)] == [file.id]
    assert [each.id async for each in ai.batches.list(limit=1)] == [batch.id]
    assert (await ai.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await ai.files.retrieve(file.id)


async def test_lists_come_in_pages(front: RunningFront, ai: openai.AsyncOpenAI) -> None:
    ids = [await upload(ai) for _ in range(3)]
    first = await ai.files.list(limit=2)
    assert ([each.id for each in first.data], first.has_more) == ([ids[2], ids[1]], True)
    assert [each.id async for each in ai.files.list(limit=2)] == ids[::-1]
    assert [each.id async for each in ai.files.list(order="asc")] == ids
    with pytest.raises(openai.NotFoundError):
        await ai.files.list(after="file-none")
    with pytest.raises(openai.BadRequestError):
        await ai.files.list(limit=0)


async def test_a_batch_is_cancelled(served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn) -> None:
    standin.behaviour = Behaviour(first_token_s=0.5)
    made = await ai.batches.create(input_file_id=await upload(ai, 300), endpoint=CHAT, completion_window="24h")
    assert (await ai.batches.cancel(made.id)).status == "cancelling"
    batch = await ended(ai, made.id)
    assert batch.status == "cancelled"
    with pytest.raises(openai.ConflictError):
        await ai.batches.cancel((await ended(ai, await completed(ai))).id)


async def completed(ai: openai.AsyncOpenAI) -> str:
    made = await ai.batches.create(input_file_id=await upload(ai), endpoint=CHAT, completion_window="24h")
    return made.id


async def test_a_repeated_creation_is_one_batch(front: RunningFront, ai: openai.AsyncOpenAI) -> None:
    asked: Any = {"input_file_id": await upload(ai), "endpoint": CHAT, "completion_window": "24h"}
    first = await ai.batches.create(**asked)
    assert (await ai.batches.create(**asked)).id != first.id
    again = await ai.batches.create(**asked, extra_headers={"x-stainless-retry-count": "1"})
    assert again.id in {each.id async for each in ai.batches.list()}
    assert len([each async for each in ai.batches.list()]) == 2
    keyed = await ai.batches.create(**asked, extra_headers={"idempotency-key": "k1"})
    assert (await ai.batches.create(**asked, extra_headers={"idempotency-key": "k1"})).id == keyed.id
    with pytest.raises(openai.ConflictError):
        await ai.batches.create(**asked, metadata={"a": "b"}, extra_headers={"idempotency-key": "k1"})
    assert len([each async for each in ai.batches.list()]) == 3


async def test_what_is_another_tenant_s_is_not_found(
    front: RunningFront, ai: openai.AsyncOpenAI, tokens: Tokens
) -> None:
    file = await upload(ai)
    batch = await ai.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")
    async with openai.AsyncOpenAI(api_key=tokens.foreign, base_url=front.url, max_retries=0) as foreign:
        for call in (
            foreign.files.retrieve(file),
            foreign.files.content(file),
            foreign.files.delete(file),
            foreign.batches.retrieve(batch.id),
            foreign.batches.cancel(batch.id),
            foreign.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h"),
            foreign.files.list(after=file),
        ):
            with pytest.raises(openai.NotFoundError):
                await call
        assert [each async for each in foreign.files.list()] == []
        assert [each async for each in foreign.batches.list()] == []


async def test_an_api_key_s_models_and_priorities_hold_for_its_batches(
    served: RunningFront, client: aiqueue.Client, ai: openai.AsyncOpenAI, tokens: Tokens
) -> None:
    _, token = await ApiKeys(client).add("acme", models=["small"], priorities=["batch"])
    lines = [chat_line(1), chat_line(2, model="large")]
    file = await ai.files.create(file=("in.jsonl", jsonl(lines)), purpose="batch")
    asked: Any = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    async with openai.AsyncOpenAI(api_key=tokens.other, base_url=served.url, max_retries=0) as other:
        with pytest.raises(openai.PermissionDeniedError):
            await other.batches.create(**asked)
    async with openai.AsyncOpenAI(api_key=token, base_url=served.url) as narrow:
        async with asyncio.timeout(5):
            while served.front.keys.find(token) is None:
                await asyncio.sleep(0.05)
        batch = await ended(narrow, (await narrow.batches.create(**asked)).id)
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 1)
        (error,) = [json.loads(each) for each in (await narrow.files.content(batch.error_file_id)).text.splitlines()]
    assert "this API key may not call the model 'large'" in error["response"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({}, 400),
        ({"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}, 404),
        ({"input_file_id": "../../x", "endpoint": CHAT, "completion_window": "24h"}, 404),
        ({"input_file_id": 7, "endpoint": CHAT, "completion_window": "24h"}, 400),
        ({"input_file_id": "FILE", "endpoint": "/v1/responses", "completion_window": "24h"}, 400),
        ({"input_file_id": "FILE", "endpoint": CHAT, "completion_window": "7d"}, 400),
        ({"input_file_id": "FILE", "endpoint": CHAT, "completion_window": "24h", "metadata": {"a": 1}}, 400),
        ({"input_file_id": "FILE", "endpoint": CHAT, "completion_window": "24h", "metadata": [1]}, 400),
        ({"input_file_id": "FILE", "endpoint": CHAT, "completion_window": "24h", "models": ["large"]}, 400),
        (
            {
                "input_file_id": "FILE", "endpoint": CHAT, "completion_window": "24h",
                "output_expires_after": {"anchor": "created_at", "seconds": 1},
            },
            400,
        ),
    ],
)  # fmt: skip
async def test_a_wrong_creation_is_refused_with_its_status(
    front: RunningFront, ai: openai.AsyncOpenAI, http: aiohttp.ClientSession, tokens: Tokens, body: Any, status: int
) -> None:
    if body.get("input_file_id") == "FILE":
        body = {**body, "input_file_id": await upload(ai)}
    async with http.post(f"{front.url}/batches", json=body, headers=bearer(tokens.mine)) as answer:
        assert answer.status == status
        assert (await answer.json())["error"]["message"]
        assert answer.headers["x-request-id"]


async def test_wrong_uploads_are_refused_with_their_status(
    client: aiqueue.Client, config: Any, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    async def send(front: RunningFront, data: Any, **headers: str) -> int:
        async with http.post(f"{front.url}/files", data=data, headers=bearer(tokens.mine, **headers)) as answer:
            assert "error" in await answer.json()
            return answer.status

    def form(content: bytes = b"{}", purpose: str = "batch", **fields: str) -> aiohttp.FormData:
        made = aiohttp.FormData({"purpose": purpose, **fields})
        made.add_field("file", content, filename="in.jsonl")
        return made

    quotas = BatchQuotas(file_bytes=100_000)
    async with open_front(client, config, quotas=quotas, uploads_max=1, file_s=0.3) as front:
        assert await send(front, form(purpose="fine-tune")) == 400
        assert await send(front, form(b"")) == 400
        assert await send(front, form(b"x" * 100_001)) == 400
        assert await send(front, form(b"x" * 300_000)) == 413
        assert await send(front, aiohttp.FormData({"purpose": "batch"})) == 415  # no multipart
        assert await send(front, b"{}", content_type="application/json") == 415
        assert await send(front, b"nonsense", content_type="multipart/form-data; boundary=x") == 400
        assert await send(front, b"nonsense", content_type="multipart/form-data") == 400
        extra = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "never"}
        assert await send(front, form(**extra)) == 400

        async def slowly() -> Any:
            yield b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
            await asyncio.sleep(5)
            yield b""

        slow = asyncio.create_task(send(front, slowly(), content_type="multipart/form-data; boundary=x"))
        async with asyncio.timeout(5):
            while not front.front.uploads.total:
                await asyncio.sleep(0.01)
        assert await send(front, form()) == 503
        assert await slow == 408
        assert front.front.uploads.total == 0
