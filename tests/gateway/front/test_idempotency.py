"""Which job a request becomes: one call for an Idempotency-Key, and for a request that a client repeats by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import aiqueue
from aiqueue.connection import Received
from aiqueue.gateway import ApiKeys
from aiqueue.gateway.recent_requests import RecentRequests
from aiqueue.gateway.requests import GatewayRequest
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ...support import Eventually
from .fronts import RunningFront, Tokens, bearer, chat_body, open_front

CHATS = "/chat/completions"


async def post(
    http: aiohttp.ClientSession, front: RunningFront, body: dict[str, Any], headers: dict[str, str]
) -> tuple[int, Any, str]:
    async with http.post(front.url + CHATS, json=body, headers=headers) as response:
        return response.status, await response.json(), response.headers["x-request-id"]


async def test_an_idempotency_key_is_one_call_of_each_tenant(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    headers = bearer(tokens.mine, idempotency_key="order 7")
    answers = [await post(http, served, chat_body(), headers) for _ in range(3)]
    at_once = await asyncio.gather(*(post(http, served, chat_body(), headers) for _ in range(3)))
    assert {each[0] for each in (*answers, *at_once)} == {200}
    assert len({each[2] for each in (*answers, *at_once)}) == 1
    assert len(standin.calls) == 1
    status, _, request_id = await post(http, served, chat_body(), bearer(tokens.foreign, idempotency_key="order 7"))
    assert status == 200
    assert (len(standin.calls), request_id == answers[0][2]) == (2, True)  # the same id, in another tenant


async def test_the_same_idempotency_key_with_another_body_is_409(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    headers = bearer(tokens.mine, idempotency_key="order-7")
    await post(http, served, chat_body(), headers)
    for body in (chat_body("other"), chat_body(stream=True)):
        status, answer, _ = await post(http, served, body, headers)
        assert (status, answer["error"]["code"]) == (409, "idempotency_key_reused")
    assert len(standin.calls) == 1


async def test_a_failed_request_is_made_again_under_its_idempotency_key(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    standin.order(Fault(400))
    statuses = [(await post(http, served, chat_body(), bearer(tokens.mine, idempotency_key="k")))[0] for _ in range(2)]
    assert statuses == [400, 200]


@pytest.mark.parametrize("key", ["", " ", "a" * 257, "caf\u00e9"])
async def test_a_wrong_idempotency_key_is_refused(
    front: RunningFront, http: aiohttp.ClientSession, key: str, tokens: Tokens
) -> None:
    status, answer, _ = await post(http, front, chat_body(), bearer(tokens.mine, idempotency_key=key))
    assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_a_client_s_own_repetition_joins_its_request_from_another_front(
    client: aiqueue.Client,
    served: RunningFront,
    config: Path,
    http: aiohttp.ClientSession,
    standin: StandIn,
    tokens: Tokens,
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.4)
    first = asyncio.create_task(post(http, served, chat_body(), bearer(tokens.mine, x_stainless_retry_count="0")))
    recent = RecentRequests(client.connection, client.topology)
    fingerprint, key = GatewayRequest(**chat_body()).fingerprint(), served.front.keys.find(tokens.mine)
    key_id = key.id if key else ""
    async with asyncio.timeout(5):
        while await recent.find("acme", key_id, fingerprint) is None:
            await asyncio.sleep(0.01)
    async with open_front(client, config) as another:
        repeated = await post(http, another, chat_body(), bearer(tokens.mine, x_stainless_retry_count="1"))
    assert repeated == await first
    assert len(standin.calls) == 1


async def test_a_server_has_the_note_of_a_request_before_its_job(
    client: aiqueue.Client, front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens, eventually: Eventually
) -> None:
    """So a front that is killed leaves no job that the repetition does not find."""
    heard: list[Received] = []
    async with AsyncExitStack() as stack:
        for pattern in ("ai.gateway.requests.>", "ai.gateway.recent.>"):
            subscription = await client.connection.subscribe(pattern, heard.append)
            stack.push_async_callback(subscription.close)
        await client.connection.flush()
        headers = bearer(tokens.mine, x_stainless_retry_count="0")
        asking = asyncio.create_task(post(http, front, chat_body(), headers))
        await eventually(lambda: len(heard) == 2)
        asking.cancel()
        await asyncio.wait([asking])
    assert [each.subject.split(".")[2] for each in heard] == ["recent", "requests"]
    assert heard[0].data.decode() == heard[1].headers["request_id"]


async def test_a_repetition_finds_the_job_of_a_front_that_died_when_it_was_stored(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    enqueue = served.front.client.enqueue

    async def enqueue_and_die(*arguments: Any, **options: Any) -> Any:
        await enqueue(*arguments, **options)
        raise RuntimeError("as ordered")

    with monkeypatch.context() as patch:
        patch.setattr(served.front.client, "enqueue", enqueue_and_die)
        headers = bearer(tokens.mine, x_stainless_retry_count="0")
        assert (await post(http, served, chat_body(), headers))[0] == 500
    headers = bearer(tokens.mine, x_stainless_retry_count="1")
    assert (await post(http, served, chat_body(), headers))[0] == 200
    assert len(standin.calls) == 1


async def test_no_other_request_joins_it(
    served: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    """Nor is what a client sends anew, another body, or another API key's or tenant's repetition."""
    await post(http, served, chat_body(), bearer(tokens.mine, x_stainless_retry_count="0"))
    others = [
        (chat_body(), bearer(tokens.mine, x_stainless_retry_count="0")),
        (chat_body("other"), bearer(tokens.mine, x_stainless_retry_count="1")),
        (chat_body(), bearer(tokens.other, x_stainless_retry_count="1")),
        (chat_body(), bearer(tokens.foreign, x_stainless_retry_count="1")),
        (chat_body(), bearer(tokens.mine)),
    ]
    for number, (body, headers) in enumerate(others, start=2):
        assert (await post(http, served, body, headers))[0] == 200
        assert len(standin.calls) == number


@pytest.fixture
async def without_notes(client: aiqueue.Client, served: RunningFront) -> AsyncIterator[RunningFront]:
    await client.connection.api(f"STREAM.DELETE.{client.topology.recent_stream.name}")
    return served


async def test_without_its_stream_a_repetition_is_a_new_request(
    without_notes: RunningFront, http: aiohttp.ClientSession, standin: StandIn, tokens: Tokens
) -> None:
    for count in ("0", "1"):
        assert (await post(http, without_notes, chat_body(), bearer(tokens.mine, x_stainless_retry_count=count)))[
            0
        ] == 200
    assert len(standin.calls) == 2


async def test_what_is_joined_counts_once_against_the_limits_of_its_key(
    client: aiqueue.Client, served: RunningFront, http: aiohttp.ClientSession
) -> None:
    _, token = await ApiKeys(client).add("acme", tokens_per_minute=120)
    async with asyncio.timeout(5):
        while served.front.keys.find(token) is None:
            await asyncio.sleep(0.01)

    async def ask(key: str) -> tuple[int, Any]:
        return (await post(http, served, chat_body(), bearer(token, idempotency_key=key)))[:2]

    assert {(await ask("k"))[0] for _ in range(12)} == {200}  # 13 tokens once, and not twelve times
    for number in range(10):
        status, answer = await ask(f"k{number}")
        if status != 200:
            break
    assert number > 0
    assert (status, answer["error"]["code"]) == (429, "rate_limit_exceeded")
