"""Requests that mean harm, or are wrong: an error in OpenAI's shape, nothing of another tenant, and no process dies."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from yarl import URL

import aiqueue
from aiqueue.errors import QueueFull, Unavailable
from aiqueue.gateway.front import bodies, http_protocol

from .fronts import RunningFront, Tokens, bearer, chat_body, open_front

CHATS = "/v1/chat/completions"
MIB = 1024 * 1024
DEEP: Any = []
for _ in range(100):
    DEEP = [DEEP]


async def check(response: aiohttp.ClientResponse, status: int) -> dict[str, Any]:
    """The response is an error of this status, in OpenAI's shape, and says what a client needs."""
    text = await response.text()
    assert response.status == status, text
    assert response.headers["x-request-id"]
    assert response.headers["x-should-retry"] in ("true", "false")
    error = json.loads(text)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert "\n" not in error["message"]
    return dict(error)


@pytest.fixture
async def small(client: aiqueue.Client, config: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningFront]:
    """A front with small bounds."""
    monkeypatch.setattr(bodies, "STALLED_S", 0.1)
    async with open_front(client, config, body_bytes_max=MIB, body_s=0.3, bodies_bytes_max=2 * MIB) as front:
        yield front
        assert front.front.bodies.total == 0


async def test_without_a_valid_key_nothing_is_reached(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    wrong = (
        None, "", "Bearer", "Bearer ", "Basic YTpi", "Bearer aiq-none", f"Bearer {'x' * 4_000}", "Bearer caf\u00e9",
        f"Bearer {tokens.mine} x", f"Bearer {tokens.mine}\u00a0",
    )  # fmt: skip
    for authorization in wrong:
        headers = {} if authorization is None else {"authorization": authorization}
        for method, path in (("GET", "/v1/models"), ("POST", CHATS), ("GET", "/none"), ("GET", "/v1/../healthz")):
            async with http.request(method, URL(front.root + path, encoded=True), headers=headers) as response:
                error = await check(response, 401)
            assert error["type"] == "authentication_error"
            assert tokens.mine not in error["message"]


async def test_two_authorizations_are_none(front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens) -> None:
    headers = [("authorization", f"Bearer {tokens.mine}"), ("authorization", f"Bearer {tokens.foreign}")]
    async with http.get(f"{front.url}/models", headers=headers) as response:
        await check(response, 401)


TRICKS = (
    ("GET", "/v1/none", 404), ("GET", "//v1/models", 404), ("GET", "/v1/models/../models/none", 404),
    ("GET", "/v1/models/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404), ("GET", "/V1/models", 404),
    ("POST", f"{CHATS}/", 404), ("GET", CHATS, 405), ("DELETE", "/v1/models/small", 405), ("PUT", CHATS, 405),
    ("GET", "/v1/models/%00", 404), ("GET", "/v1/models/" + "a" * 5_000, 404), ("GET", "/docs", 404),
)  # fmt: skip


async def test_tricks_with_paths_and_methods_find_nothing(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    for method, path, status in TRICKS:
        async with http.request(method, URL(front.root + path, encoded=True), headers=bearer(tokens.mine)) as response:
            await check(response, status)


@pytest.mark.parametrize(
    ("method", "path", "problem"),
    [
        ("POST", "/chat/completions", "POST /chat/completions; base_url must end with /v1, once"),
        ("GET", "/v1/v1/models/small", "GET /v1/v1/models/small; base_url must end with /v1, once"),
        ("POST", "/v1/responses", "there are /v1/batches, /v1/chat/completions, /v1/embeddings, /v1/files, /v1/models"),
        ("PUT", "/v1/batches", "PUT /v1/batches is not allowed; allowed: GET, HEAD, POST"),
    ],
)
async def test_a_wrong_url_or_method_is_told_the_right_ones(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens, method: str, path: str, problem: str
) -> None:
    async with http.request(method, front.root + path, headers=bearer(tokens.mine)) as response:
        error = await check(response, 405 if method == "PUT" else 404)
        assert error["message"].endswith(problem)
        assert error["code"] == ("method_not_allowed" if method == "PUT" else "unknown_url")
        assert response.headers.get("allow") == ("GET, HEAD, POST" if method == "PUT" else None)


WRONG_BODIES: tuple[tuple[Any, str | None], ...] = (
    (b"", None), (b"{", None), (b"[]", None), (b"null", None), (b'"a"', None), (b"\xff\xfe{}", None),
    (b'{"model": NaN}', "model"), (b'{"model": "small"}', "messages"), (chat_body(model=7), "model"),
    (chat_body(messages=[]), "messages"), (chat_body(messages=DEEP), None), (b"[" * 900_000, None),
    (chat_body(messages=[{"role": "user", "content": "a"}] * 2_049), "messages"),
    (chat_body(n=129), "n"), (chat_body(temperature=1e400), "temperature"), (chat_body(stream="perhaps"), "stream"),
    (chat_body(request_id="theirs"), "request_id"), (chat_body(tenant_id="globex"), "tenant_id"),
    (chat_body(api_base="http://169.254.169.254"), None), (chat_body(extra_headers={"a": "b"}), None),
    (chat_body(prompt="a"), "prompt"), (chat_body(reply_form="short"), "reply_form"),
    (chat_body(max_tokens=101), None), (chat_body(tools=[{"type": "mcp", "server_url": "http://a"}]), "tools.0"),
    (chat_body(messages=[{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}]), None),
)  # fmt: skip


async def test_a_wrong_body_is_refused_with_what_is_wrong(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    for body, param in WRONG_BODIES:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with http.post(front.root + CHATS, data=data, headers=bearer(tokens.mine)) as response:
            error = await check(response, 400)
        assert error["param"] == param, error


async def test_a_body_that_is_too_large_is_refused_also_where_its_length_is_not_declared(
    small: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 100_000

    for data in (io.BytesIO(b" " * (2 * MIB)), pieces()):
        async with http.post(small.root + CHATS, data=data, headers=bearer(tokens.mine)) as response:
            assert (await check(response, 413))["code"] == "request_too_large"


async def test_twenty_mebibytes_are_read_and_refused_by_what_a_job_may_have(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    data = io.BytesIO(json.dumps(chat_body("x" * (20 * MIB - 200))).encode())
    async with http.post(front.root + CHATS, data=data, headers=bearer(tokens.mine)) as response:
        await check(response, 400)  # a prompt of more tokens than the model has room for
    async with http.get(f"{front.url}/models", headers=bearer(tokens.mine)) as response:
        assert response.status == 200


async def test_a_large_body_that_nobody_reads_leaves_the_answer_readable_and_the_connection_open(
    front: RunningFront, tokens: Tokens
) -> None:
    data = b" " * (3 * MIB)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as http:
        for path, headers, status in ((CHATS, {}, 401), ("/v1/none", bearer(tokens.mine), 404)):
            async with http.post(front.root + path, data=io.BytesIO(data), headers=headers) as response:
                await check(response, status)
            async with http.get(f"{front.url}/models", headers=bearer(tokens.mine)) as response:
                assert response.status == 200


async def test_a_body_that_does_not_come_is_408_and_holds_nothing_up(
    small: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    async def drip() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await asyncio.sleep(5)

    async def send() -> None:
        async with http.post(small.root + CHATS, data=drip(), headers=bearer(tokens.mine)) as response:
            await check(response, 408)

    async with asyncio.timeout(3):
        await asyncio.gather(*(send() for _ in range(5)))


async def test_more_bodies_at_once_than_the_process_may_hold_are_503_to_be_sent_again(
    small: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    begun, go_on = asyncio.Semaphore(0), asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b" " * 900_000
        begun.release()
        await go_on.wait()

    async def send() -> tuple[int, str]:
        async with http.post(small.root + CHATS, data=body(), headers=bearer(tokens.mine)) as response:
            return response.status, response.headers["x-should-retry"]

    tasks = [asyncio.create_task(send()) for _ in range(3)]
    for _ in tasks:
        await begun.acquire()
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert done.pop().result() == (503, "true")
    go_on.set()
    await asyncio.gather(*tasks)


async def test_a_packed_body_is_not_unpacked(front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens) -> None:
    async with http.post(
        front.root + CHATS, data=b"\x1f\x8b", headers=bearer(tokens.mine, content_encoding="gzip")
    ) as response:
        await check(response, 415)


async def test_a_priority_that_the_key_may_not_use_is_refused(
    front: RunningFront, http: aiohttp.ClientSession, tokens: Tokens
) -> None:
    for token, priority, status in ((tokens.mine, "urgent", 400), (tokens.other, "high", 403)):
        headers = bearer(token, x_aiqueue_priority=priority)
        async with http.post(front.root + CHATS, json=chat_body(), headers=headers) as response:
            await check(response, status)


def refusing(error: Exception) -> Any:
    async def admit(*_: Any, **__: Any) -> None:
        raise error

    return admit


@pytest.mark.parametrize(
    ("error", "status", "wait"),
    [(QueueFull("the key", "all is used", retry_after_s=2.5), 429, "3"), (Unavailable("gone"), 503, "1")],
)
async def test_what_may_be_sent_again_says_when(
    front: RunningFront,
    http: aiohttp.ClientSession,
    error: Exception,
    status: int,
    wait: str,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(front.front.keys, "admit", refusing(error))
    async with http.post(front.root + CHATS, json=chat_body(), headers=bearer(tokens.mine)) as response:
        await check(response, status)
    assert (response.headers["retry-after"], response.headers["x-should-retry"]) == (wait, "true")


async def test_an_unexpected_error_is_a_500_without_its_text(
    front: RunningFront,
    http: aiohttp.ClientSession,
    caplog: pytest.LogCaptureFixture,
    tokens: Tokens,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(front.front.keys, "admit", refusing(RuntimeError("the secret of globex")))
    async with http.post(front.root + CHATS, json=chat_body(), headers=bearer(tokens.mine)) as response:
        error = await check(response, 500)
    assert "globex" not in json.dumps(error)
    assert "the secret of globex" in caplog.text


async def talk(front: RunningFront, *parts: bytes) -> bytes:
    """Send bytes, and return all that comes until the front closes the connection."""
    host, port = front.root.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        for part in parts:
            writer.write(part)
        async with asyncio.timeout(5):
            return await reader.read()
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


async def test_what_is_no_http_is_400_in_the_same_shape(front: RunningFront) -> None:
    for sent in (
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / FTP/9\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    ):
        head, _, body = (await talk(front, sent)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 "), sent
        assert json.loads(body)["error"]["code"] == "invalid_http"


async def test_a_head_without_an_end_is_closed(front: RunningFront, monkeypatch: pytest.MonkeyPatch) -> None:
    answered = await talk(front, b"GET /v1/models HTTP/1.1\r\n", *[b"x-a: " + b"b" * 8_000 + b"\r\n"] * 20)
    assert answered.startswith(b"HTTP/1.1 431 ") or not answered  # closed; unread bytes may reset it
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.1)
    for sent in (b"", b"GET /v1/models HT"):
        assert (await talk(front, sent)).startswith(b"HTTP/1.1 408 ")


async def test_health_needs_no_key_and_says_whether_the_server_answers(
    front: RunningFront, http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def get(path: str) -> tuple[int, Any]:
        async with http.get(front.root + path) as response:
            return response.status, (await response.json())["status"]

    assert (await get("/healthz"), await get("/readyz")) == ((200, "ok"), (200, "ok"))
    front.front.is_draining = True
    assert (await get("/healthz"), await get("/readyz")) == ((200, "ok"), (503, "draining"))
