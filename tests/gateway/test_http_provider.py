"""OpenAI-compatible providers, over real HTTP: answers, streams, errors, limits."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web

from aiqueue import codec
from aiqueue.errors import BadInput
from aiqueue.gateway import Provider, ProviderConfig, ProviderError, Usage, call_limits, http_provider
from aiqueue.gateway.answers import PlainChunk
from aiqueue.gateway.opening import open_provider
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ..support import Eventually
from .conftest import HELLO, make_call
from .running import KEY

SSE = "text/event-stream"
CHUNK = {"id": "1", "choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": None}]}
LAST = {"id": "1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


def sse(*events: Any) -> bytes:
    return b"".join(
        b"data: " + (each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n\n" for each in events
    )


async def failure(called: Awaitable[Any]) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await called
    assert KEY not in repr(caught.value) + str(caught.value)
    return caught.value


async def keep(_chunk: dict[str, Any]) -> None:
    """Heed no chunk."""


@asynccontextmanager
async def serving(answer: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> AsyncIterator[Provider]:
    """A provider whose endpoint answers whatever `answer` makes."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    provider = open_provider(ProviderConfig("p", "openai", base_url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1"))
    try:
        yield provider
    finally:
        await provider.close()
        await runner.cleanup()


@asynccontextmanager
async def sending(*parts: bytes, content_type: str = SSE, cut: bool = False) -> AsyncIterator[Provider]:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0)
        if cut:
            request.transport.abort()
        return response

    async with serving(answer) as provider:
        yield provider


async def test_an_answer_comes_back_whole_with_its_usage(standin: StandIn, provider: Provider) -> None:
    reply = await provider.chat(make_call({**HELLO, "max_tokens": 5}, id="call-1"))
    assert reply.answer["choices"][0]["message"]["content"] == "one two three one two"
    assert reply.answer["choices"][0]["finish_reason"] == "length"
    assert reply.usage == Usage(8, 5, 0)
    assert reply.first_token_s is None
    [call] = standin.calls
    assert (call.key, call.model, call.idempotency_key, call.outcome) == (KEY, "up", "call-1", "ok")
    assert (call.prompt_tokens, call.completion_tokens) == (8, 5)
    assert "stream" not in call.body


async def test_a_stream_is_passed_on_as_it_comes_and_is_the_same_answer(standin: StandIn, provider: Provider) -> None:
    standin.behaviour = Behaviour(token_s=0.01)
    chunks: list[dict[str, Any]] = []
    made: list[int] = []

    async def on_chunk(chunk: dict[str, Any]) -> None:
        chunks.append(chunk)
        made.append(standin.calls[0].completion_tokens)

    reply = await provider.chat(make_call({**HELLO, "stream": True, "n": 2, "max_tokens": 4}), on_chunk)
    assert [each["message"]["content"] for each in reply.answer["choices"]] == ["one two three one"] * 2
    assert reply.usage == Usage(8, 8, 0)
    assert chunks[-1]["choices"] == []
    assert made[2] < 8, "no chunk came before the answer was whole"
    assert 0 < reply.first_token_s < reply.latency_s
    assert standin.calls[0].body["stream_options"] == {"include_usage": True}
    whole = await provider.chat(make_call({**HELLO, "n": 2, "max_tokens": 4}))
    assert whole.answer["choices"] == reply.answer["choices"]


async def test_embeddings_come_as_numbers_or_base64(provider: Provider) -> None:
    plain = await provider.embed(make_call({"input": ["a", "b"]}))
    coded = await provider.embed(make_call({"input": ["a", "b"], "encoding_format": "base64"}))
    vectors = [each["embedding"] for each in plain.answer["data"]]
    for vector, each in zip(vectors, coded.answer["data"], strict=True):
        assert struct.unpack("<8f", base64.b64decode(each["embedding"])) == pytest.approx(vector)
    assert plain.usage == Usage(2)


async def test_a_connection_is_used_again_after_a_stream_and_an_error(standin: StandIn, provider: Provider) -> None:
    ports = set()

    async def note(request: web.Request, handler: Any) -> Any:
        ports.add(request.transport.get_extra_info("peername"))
        return await handler(request)

    await standin.stop()
    await standin.start(port=standin.port, middlewares=[web.middleware(note)])
    for _ in range(2):
        await provider.chat(make_call())
        await provider.chat(make_call(), keep)
        standin.order(Fault(500))
        await failure(provider.chat(make_call()))
    assert len(ports) == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_429_says_how_long_to_wait(standin: StandIn, provider: Provider, streamed: bool) -> None:
    standin.order(Fault(429, retry_after_s=20.0, message=f"your key {KEY} is too fast"))
    error = await failure(provider.chat(make_call(), keep if streamed else None))
    assert (error.kind, error.status, error.retry_after_s, error.pauses) == ("rate_limited", 429, 20.0, True)
    assert not error.may_be_billed


async def test_the_stand_in_keeps_its_own_limits_by_key_and_model(standin: StandIn, provider: Provider) -> None:
    standin.behaviour = Behaviour(rpm=2, window_s=0.2)
    other = make_call()
    other = replace(other, model=replace(other.model, upstream="other"))
    await provider.chat(make_call())
    await provider.chat(make_call())
    error = await failure(provider.chat(make_call()))
    await provider.chat(other)
    assert error.kind == "rate_limited"
    assert 0 < error.retry_after_s <= 0.2
    await asyncio.sleep(error.retry_after_s)
    await provider.chat(make_call())
    standin.behaviour = Behaviour(tpm=30)
    third = replace(other.model, upstream="third")
    await provider.chat(make_call({**HELLO, "max_tokens": 20}, model=third))
    assert (await failure(provider.chat(make_call({**HELLO, "max_tokens": 5}, model=third)))).status == 429
    assert [each.outcome for each in standin.calls].count("refused") == 2


async def test_nobody_listening_is_a_connection_error_that_cost_nothing(standin: StandIn, provider: Provider) -> None:
    await standin.stop()
    error = await failure(provider.chat(make_call()))
    assert (error.kind, error.status, error.may_be_billed) == ("connection", None, False)
    assert str(error).startswith("connection: p: nothing answers: ClientConnectorError")


async def test_a_connection_cut_before_the_answer_may_be_billed(standin: StandIn, provider: Provider) -> None:
    standin.order(Fault(abort_after=0))
    error = await failure(provider.chat(make_call()))
    assert (error.kind, error.may_be_billed) == ("connection", True)


async def test_a_stream_cut_in_the_middle_is_broken_and_may_be_billed(standin: StandIn, provider: Provider) -> None:
    standin.order(Fault(abort_after=3))
    chunks = []

    async def on_chunk(chunk: dict[str, Any]) -> None:
        chunks.append(chunk)

    error = await failure(provider.chat(make_call(), on_chunk))
    assert (error.kind, error.may_be_billed, error.is_retryable) == ("broken_stream", True, True)
    assert len(chunks) == 3
    assert standin.calls[0].outcome == "aborted"


@pytest.mark.parametrize(
    ("behaviour", "limits", "streamed", "said"),
    [
        (Behaviour(first_token_s=5.0), {"total_s": 0.05}, False, "p: the answer took longer than 0.05 s"),
        (Behaviour(first_token_s=5.0), {"first_token_s": 0.05}, True, "p: the first chunk took longer than 0.05 s"),
        (Behaviour(token_s=0.02), {"first_token_s": 0.2, "total_s": 0.1}, True, "p: the answer took longer than 0.1 s"),
    ],
)
async def test_a_call_that_takes_too_long_is_a_timeout_and_may_be_billed(
    standin: StandIn, provider: Provider, behaviour: Behaviour, limits: dict[str, float], streamed: bool, said: str
) -> None:
    standin.behaviour = behaviour
    error = await failure(provider.chat(make_call(**limits), keep if streamed else None))
    assert (error.kind, error.text, error.may_be_billed) == ("timeout", said, True)


async def test_a_stream_that_has_begun_has_no_limit_of_the_first_token(standin: StandIn, provider: Provider) -> None:
    standin.behaviour = Behaviour(token_s=0.02, completion_tokens=10)
    reply = await provider.chat(make_call(first_token_s=0.1), keep)
    assert reply.latency_s > 0.1


async def test_cancelling_a_call_ends_it_at_the_provider(
    standin: StandIn, provider: Provider, eventually: Eventually
) -> None:
    standin.behaviour = Behaviour(token_s=0.02, completion_tokens=1_000)
    begun = asyncio.Event()

    async def on_chunk(_chunk: dict[str, Any]) -> None:
        begun.set()

    task = asyncio.create_task(provider.chat(make_call(), on_chunk))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: standin.calls[0].outcome == "lost")
    assert standin.calls[0].completion_tokens < 20


@pytest.mark.parametrize("raised", [TimeoutError("mine"), OSError("mine"), ValueError("mine")])
async def test_what_the_reader_of_chunks_raises_is_raised_as_it_is(provider: Provider, raised: Exception) -> None:
    async def on_chunk(_chunk: dict[str, Any]) -> None:
        raise raised

    with pytest.raises(type(raised), match="mine"):
        await provider.chat(make_call(), on_chunk)


async def test_a_stream_is_read_whatever_its_line_ends_and_parts() -> None:
    body = b": comment\r\n\r\nevent: x\r\n" + sse(CHUNK).replace(b"\n", b"\r\n") + sse(LAST, b"[DONE]")
    async with sending(*(body[at : at + 1] for at in range(len(body)))) as provider:
        reply = await provider.chat(make_call(), keep)
    assert reply.answer["choices"][0]["message"] == {"role": "assistant", "content": "hi", "refusal": None}
    assert reply.usage is None


@pytest.mark.parametrize(
    ("odd", "is_plain"),
    [
        (b'"\\ud83d"', True),
        (b"%d" % 10**30, True),
        (b"9" * 3_800, True),
        (b"NaN", True),
        (b"[" * 44 + b"]" * 44, True),
        (b"[" * 60 + b"]" * 60, False),
        (b'"' + b"x" * 5_000 + b'"', False),
    ],
)
async def test_a_chunk_is_plain_only_if_it_can_be_stored_without_a_look_at_it(odd: bytes, is_plain: bool) -> None:
    chunks = []

    async def on_chunk(chunk: dict[str, Any]) -> None:
        chunks.append(chunk)

    event = json.dumps(CHUNK).encode().replace(b'"hi"', b'"hi", "odd": ' + odd)
    async with sending(b"data: " + event + b"\n\n" + sse(LAST, b"[DONE]")) as provider:
        await provider.chat(make_call(), on_chunk)
    assert isinstance(chunks[0], PlainChunk) == is_plain
    assert isinstance(chunks[1], PlainChunk)
    if is_plain:
        stored = codec.decode(codec.dump(dict(chunks[0])), codec.CBOR)
        assert stored["choices"][0]["delta"]["content"] == "hi"


@pytest.mark.parametrize(
    ("parts", "cut", "usage"),
    [
        ((sse(CHUNK, LAST),), False, None),
        ((sse(CHUNK, LAST),), True, None),
        (
            (sse(CHUNK, LAST, {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}),),
            True,
            Usage(3, 1),
        ),
    ],
)
async def test_an_answer_that_is_whole_stands_though_its_stream_did_not_end_well(
    parts: tuple[bytes, ...], cut: bool, usage: Usage | None
) -> None:
    async with sending(*parts, cut=cut) as provider:
        reply = await provider.chat(make_call(), keep)
    assert reply.answer["choices"][0]["finish_reason"] == "stop"
    assert reply.usage == usage


@pytest.mark.parametrize("limit", [{"total_s": 0.3}, {}])
@pytest.mark.parametrize("more", [b": ping\n\n", sse({"choices": []})])
async def test_a_stream_that_does_not_end_after_its_answer_is_left_and_the_answer_stands(
    monkeypatch: pytest.MonkeyPatch, limit: dict[str, float], more: bytes
) -> None:
    monkeypatch.setattr(call_limits, "END_S", 0.2 if not limit else 10.0)

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": SSE})
        await response.prepare(request)
        await response.write(sse(CHUNK, LAST))
        while True:
            await response.write(more)
            await asyncio.sleep(0.01)

    async with serving(answer) as provider:
        reply = await provider.chat(make_call(**limit), keep)
    assert reply.answer["choices"][0]["message"]["content"] == "hi"
    assert reply.latency_s < 1


async def test_a_stream_that_breaks_between_two_choices_is_no_answer() -> None:
    async with sending(sse(CHUNK, LAST), cut=True) as provider:
        error = await failure(provider.chat(make_call({**HELLO, "n": 2}), keep))
    assert error.kind == "broken_stream"


@pytest.mark.parametrize(
    ("parts", "content_type", "kind", "billed", "said"),
    [
        ((b"",), SSE, "server", True, "the stream ended too early"),
        ((sse(CHUNK),), SSE, "broken_stream", True, "the stream ended too early"),
        ((sse(CHUNK, b"[DONE]"),), SSE, "broken_stream", True, "the stream ended too early"),
        ((sse(b"{oops"),), SSE, "server", True, "an answer that is not in OpenAI's shape"),
        ((sse(CHUNK, b"[1]"),), SSE, "broken_stream", True, "an answer that is not in OpenAI's shape"),
        ((sse({"error": {"message": "busy", "code": 429}}),), SSE, "rate_limited", False, "busy"),
        ((sse({"error": {"message": "no"}}),), SSE, "server", False, "no"),
        (
            (sse(CHUNK, {"error": {"message": "died", "code": 500}}),),
            "text/event-stream",
            "broken_stream",
            True,
            "died",
        ),
        ((sse(CHUNK, {"error": "content_filter"}),), SSE, "content_policy", True, "content_filter"),
        (
            (b'{"error": {"message": "maximum context length"}}',),
            "application/json",
            "context_length",
            False,
            "maximum",
        ),
        ((b"<html>",), "text/html", "server", True, "an answer that is not in OpenAI's shape"),
    ],
)
async def test_what_is_no_stream_is_an_error_of_its_kind(
    parts: tuple[bytes, ...], content_type: str, kind: str, billed: bool, said: str
) -> None:
    async with sending(*parts, content_type=content_type) as provider:
        error = await failure(provider.chat(make_call(), keep))
    assert (error.kind, error.may_be_billed) == (kind, billed)
    assert error.text.startswith(f"p: {said}")


@pytest.mark.parametrize("content_type", ["application/json", SSE])
@pytest.mark.parametrize("reason", ["length", None])
async def test_an_answer_that_comes_whole_in_place_of_a_stream_is_the_answer(
    reason: str | None, content_type: str
) -> None:
    tool = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": "x" * 100_000}, {"role": "assistant", "tool_calls": [tool]}]
    choices = [{"index": None, "message": each, "finish_reason": reason} for each in messages]
    usage = {"prompt_tokens": 3, "completion_tokens": 1}
    body = {"id": "1", "model": "up", "service_tier": "default", "choices": choices, "usage": usage}
    data = sse(body, b"[DONE]") if content_type == SSE else json.dumps(body).encode()
    chunks = []

    async def on_chunk(chunk: dict[str, Any]) -> None:
        chunks.append(chunk)

    async with sending(data, content_type=content_type) as provider:
        reply = await provider.chat(make_call({**HELLO, "n": 2}), on_chunk)
    first, second = reply.answer["choices"]
    assert (first["message"]["content"], first["finish_reason"]) == ("x" * 100_000, reason or "stop")
    assert (second["message"]["tool_calls"], reply.answer["service_tier"]) == ([tool], "default")
    assert reply.usage == Usage(3, 1)
    assert [len(each["choices"]) for each in chunks] == [2, 0]


@pytest.mark.parametrize("streamed", [False, True])
async def test_any_status_of_success_brings_the_answer(streamed: bool) -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        if streamed:
            return web.Response(status=201, body=sse(CHUNK, LAST, b"[DONE]"), content_type=SSE)
        return web.json_response({"choices": [{"message": {"content": "hi"}}]}, status=201)

    async with serving(answer) as provider:
        reply = await provider.chat(make_call(), keep if streamed else None)
    assert reply.answer["choices"][0]["message"]["content"] == "hi"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b'{"choices": 5}'])
async def test_what_is_no_completion_is_an_error_and_may_be_billed(body: bytes) -> None:
    async with sending(body, content_type="application/json") as provider:
        error = await failure(provider.chat(make_call()))
    assert (error.kind, error.may_be_billed) == ("server", True)


@pytest.mark.parametrize("content_type", [SSE, "application/json"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_answer_that_is_nested_too_deeply_to_read_is_paid_once(streamed: bool, content_type: str) -> None:
    deep = b"[" * 100_000
    async with sending(sse(deep) if streamed and content_type == SSE else deep, content_type=content_type) as provider:
        error = await failure(provider.chat(make_call(), keep if streamed else None))
    assert (error.kind, error.may_be_billed, error.is_retryable) == ("refused", True, False)


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_endless_answer_is_cut_at_its_limit(streamed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_provider, "ANSWER_BYTES_MAX", 50_000)
    async with sending(*[sse(CHUNK)] * 1_000) as provider:
        error = await failure(provider.chat(make_call(), keep if streamed else None))
    assert (error.kind, error.may_be_billed) == ("refused", True)


async def test_an_endless_line_of_a_stream_is_cut_at_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_provider, "EVENT_BYTES_MAX", 50_000)
    async with sending(*[b"data: " + b"x" * 1_000] * 1_000) as provider:
        error = await failure(provider.chat(make_call(), keep))
    assert error.text == "p: a stream or an event that is too large"


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nsecret-words\r\n",
        b"HTTP/1.1 200 OK\r\nX: secret-words\r\nsecret-words\r\n\r\n",
        b"secret-words\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: secret-words\r\n",
    ],
)
async def test_what_is_no_http_is_not_quoted(sent: bytes) -> None:
    """It may have the key, or what belongs to another call."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        provider = open_provider(ProviderConfig("p", "openai", base_url=f"http://127.0.0.1:{port}/v1"))
        error = await failure(provider.chat(make_call()))
        await provider.close()
    assert (error.kind, error.may_be_billed) == ("connection", True)
    assert "secret" not in str(error)


async def test_a_redirect_is_not_followed_and_the_key_stays(standin: StandIn) -> None:
    async def answer(_request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(f"{standin.url}/chat/completions")

    async with serving(answer) as provider:
        error = await failure(provider.chat(make_call()))
    assert (error.kind, error.status) == ("refused", 307)
    assert "correct base_url" in str(error)
    assert standin.calls == []


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "aiqueue.gateway.http_provider", raising=False)
    with pytest.raises(BadInput, match=r"^aiqueue.gateway needs aiohttp: pip install 'aiqueue\[gateway\]'$"):
        open_provider(ProviderConfig("p", "openai"))


async def test_a_missing_key_is_refused_before_any_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_TEST_KEY", raising=False)
    with pytest.raises(BadInput, match="provider p has no key: environment variable GATEWAY_TEST_KEY"):
        open_provider(ProviderConfig("p", "openai", key_env="GATEWAY_TEST_KEY"))
