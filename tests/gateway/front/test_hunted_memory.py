"""What one client can make the front hold, or wait for."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import aiohttp
import pytest

from aiqueue.gateway.json_bounds import VALUES_MAX, find_excess
from aiqueue.starlette import server_events

from .fronts import RunningFront, Tokens, bearer, chat_body

MANY = VALUES_MAX + 1
TOO_MANY, TOO_LONG = "more than 500,000 values", "a number of more than 310 digits"


@pytest.mark.parametrize(
    ("text", "excess"),
    [
        (json.dumps(["a, [b] {c}" * MANY]).encode(), ""),  # marks in a text are none
        (json.dumps(['\\",' * MANY]).encode(), ""),  # nor behind quotes and backslashes that are escaped
        (json.dumps([",\\"] * 10 + ["," * MANY]).encode(), ""),
        (b"[" + b"{}," * MANY + b"1]", TOO_MANY),
        (b'["\\\\",' + b"[]," * MANY + b'"\\""]', TOO_MANY),
        (json.dumps([1] * MANY).encode("utf-16"), TOO_MANY),
        (json.dumps([1] * (VALUES_MAX - 10)).encode(), ""),
        (b"[" + b'"ab",' * 2_100_000 + b"1]", TOO_MANY),
        (b'["' + b"7" * 5_000 + b'"]', ""),
        (b'["\\"7",' + b"7" * 310 + b"]", ""),
        (b'{"a":-1' + b"0" * 310 + b"}", TOO_LONG),
    ],
)
def test_values_and_digits_are_counted_and_what_stands_in_texts_is_not(text: bytes, excess: str) -> None:
    assert find_excess(text) == excess


async def test_a_body_of_millions_of_values_is_refused_before_it_is_read_as_json(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    body = json.dumps(chat_body(response_format={"a": 0})).encode().replace(b'"a": 0', b'"a": [' + b"0," * MANY + b"0]")

    async def parts() -> AsyncGenerator[bytes, None]:
        yield body

    async with http.post(f"{front.url}/chat/completions", data=parts(), headers=bearer(tokens.mine)) as response:
        error = (await response.json())["error"]
    assert (response.status, error["message"]) == (400, "the body has more than 500,000 values")


async def test_large_events_are_not_made_far_ahead_of_a_slow_client() -> None:
    made = 0

    async def parts() -> AsyncGenerator[bytes, None]:
        nonlocal made
        for _ in range(200):
            made += 1
            yield b"x" * 100_000

    async with server_events.EventFlow(parts()) as flow:
        await flow.begin(1.0)
        for _ in range(50):
            await asyncio.sleep(0)
        assert made == 3
        read = 0
        while (part := await flow.read()) is not None:
            read += len(part)
    assert read == 200 * 100_000


async def test_a_tenant_that_sends_slowly_does_not_keep_others_out(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    go_on = asyncio.Event()
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n{}'
    purpose = b'\r\n--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--b--\r\n'

    async def slow() -> AsyncGenerator[bytes, None]:
        yield form
        await go_on.wait()
        yield purpose

    async def upload(token: str, data: AsyncGenerator[bytes, None] | bytes) -> int:
        headers = bearer(token, content_type="multipart/form-data; boundary=b")
        async with http.post(f"{front.url}/files", data=data, headers=headers) as response:
            return response.status

    tasks = [asyncio.create_task(upload(tokens.mine, slow())) for _ in range(4)]
    async with asyncio.timeout(5):
        while front.front.uploads.total < 4:
            await asyncio.sleep(0.005)
    assert await upload(tokens.mine, form) == 503
    assert await upload(tokens.foreign, form + purpose) == 200
    go_on.set()
    assert await asyncio.gather(*tasks) == [200] * 4
    assert front.front.uploads.total == 0
