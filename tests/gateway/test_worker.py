"""A request is answered by one call of its model, which is recorded, charged, and never made twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import JobFailed
from aiqueue.errors import IdReused
from aiqueue.gateway import EmbeddingRequest
from aiqueue.gateway.standin import Fault, StandIn

from .running import KEY, KEY_VARIABLE, ask, billed, records, running


async def test_a_request_is_answered_in_openai_s_shape_by_one_call_that_is_recorded(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    async with running(client, config):
        handle = await client.enqueue(ask(request_id="req-1"), tenant="acme")
        answer: Any = await handle.result(timeout=10)
    (call,) = standin.calls
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "one two three one two"
    assert answer["model"] == "small"
    assert answer["aiqueue"] == {
        "request_id": "req-1",
        "provider": "p",
        "model": "small",
        "cost": billed(standin) / 1e6,
        "possibly_billed": 0,
        "attempts": 1,
    }
    assert call.model == "small-1"
    assert call.key == KEY
    (record,) = await records(client)
    assert (record.outcome, record.cost_micros, record.call_id) == ("ok", billed(standin), call.idempotency_key)
    assert (record.prompt_tokens, record.completion_tokens) == standin.billed()
    assert record.reserved_micros >= billed(standin)
    assert (record.tenant, record.request_id, record.model, record.provider) == ("acme", "req-1", "small", "p")


async def test_a_publisher_s_own_headers_make_no_request_a_fallback(client: aiqueue.Client, config: Path) -> None:
    forged = {"Gateway-Fallback-Of": "large", "Gateway-Request-Id": "another"}
    async with running(client, config):
        handle = await client.enqueue(ask(request_id="req-1"), tenant="acme", headers=forged)
        answer: Any = await handle.result(timeout=10)
    assert (answer["model"], answer["aiqueue"]["request_id"]) == ("small", "req-1")
    assert "fallback_of" not in answer["aiqueue"]
    assert [each.request_id for each in await records(client)] == ["req-1"]


async def test_the_short_form_is_answered_in_its_shape(client: aiqueue.Client, config: Path, standin: StandIn) -> None:
    short = {"request_id": "req-2", "prompt": "a b", "model": "small", "parameters": {"max_tokens": 2}}
    async with running(client, config):
        handle = await client.enqueue(aiqueue.gateway.GatewayRequest(**short), tenant="acme")
        answer: Any = await handle.result(timeout=10)
    assert (answer["request_id"], answer["response"], answer["model"]) == ("req-2", "a b", "small")
    assert answer["tokens"] == sum(standin.billed())
    assert answer["cost"] == billed(standin) / 1e6


async def test_embeddings_are_answered(client: aiqueue.Client, config: Path, standin: StandIn) -> None:
    async with running(client, config):
        handle = await client.enqueue(EmbeddingRequest(model="vectors", input=["a", "b"], dimensions=4), tenant="acme")
        answer: Any = await handle.result(timeout=10)
    assert [len(each["embedding"]) for each in answer["data"]] == [4, 4]
    assert [each.outcome for each in await records(client)] == ["ok"]


async def test_the_same_request_id_never_calls_again(client: aiqueue.Client, config: Path, standin: StandIn) -> None:
    async with running(client, config):
        for _ in range(3):
            handle = await client.enqueue(ask(request_id="req-1"), tenant="acme")
            await handle.result(timeout=10)
        with pytest.raises(IdReused, match="req-1"):
            await client.enqueue(ask("other", request_id="req-1"), tenant="acme")
    assert len(standin.calls) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"model": "smal"}, "unknown model 'smal'; did you mean small?"),
        ({"model": "vectors"}, "model vectors is for embeddings, not for chat completions"),
        ({"tenant_id": "globex"}, "tenant_id 'globex' is not the tenant"),
        ({"options": {"top_k": 3}}, "option 'top_k' is not allowed for provider p"),
        ({"max_tokens": 1000}, "max_tokens 1,000 is above what model small has"),
    ],
)
async def test_what_can_never_be_called_is_a_dead_letter_with_one_line(
    client: aiqueue.Client, config: Path, standin: StandIn, fields: dict[str, Any], reason: str
) -> None:
    async with running(client, config):
        handle = await client.enqueue(ask(**fields), tenant="acme")
        with pytest.raises(JobFailed) as failed:
            await handle.result(timeout=10)
    assert reason in failed.value.error
    assert failed.value.reason == "rejected"
    assert standin.calls == []
    assert await records(client) == []


@pytest.mark.parametrize("status", [400, 401, 404, 422])
async def test_what_the_provider_refuses_is_not_tried_again(
    client: aiqueue.Client, config: Path, standin: StandIn, status: int
) -> None:
    standin.order(Fault(status, message=f"no, {KEY}", count=9))
    async with running(client, config):
        handle = await client.enqueue(ask(), tenant="acme")
        with pytest.raises(JobFailed) as failed:
            await handle.result(timeout=10)
    assert len(standin.calls) == 1
    assert f"(status {status})" in failed.value.error
    assert KEY not in failed.value.error
    (record,) = await records(client)
    assert (record.outcome, record.cost_micros) == ("failed", 0)


async def test_a_missing_key_is_said_in_one_line_and_nothing_is_recorded(
    client: aiqueue.Client, config: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    async with running(client, config):
        handle = await client.enqueue(ask(), tenant="acme")
        with pytest.raises(JobFailed, match=f"provider p has no key: environment variable {KEY_VARIABLE}"):
            await handle.result(timeout=10)
    assert standin.calls == []
