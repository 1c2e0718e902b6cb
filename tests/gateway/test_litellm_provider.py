"""Providers that litellm calls, over real HTTP. Skipped where it is not installed: `make test-gateway` installs it."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.util import find_spec
from typing import Any

import pytest
from aiohttp import web

from aiqueue.errors import BadInput
from aiqueue.gateway import ModelConfig, Provider, ProviderConfig, ProviderError, Usage, open_provider
from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from ..support import Eventually
from .conftest import HELLO, make_call
from .running import KEY

HAS_LITELLM = find_spec("litellm") is not None
with_litellm = pytest.mark.skipif(not HAS_LITELLM, reason="litellm is not installed: run `make test-gateway`")
if HAS_LITELLM:
    pytestmark = pytest.mark.filterwarnings("default")  # litellm's own, such as those of its pydantic models


def test_a_missing_litellm_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(BadInput, match=r"^aiqueue.gateway needs litellm: pip install 'aiqueue\[gateway\]'$"):
        open_provider(ProviderConfig("p", "litellm"))


def call_of(upstream: str = "openai/up", body: dict[str, Any] | None = None, **fields: Any) -> Any:
    model = ModelConfig("m", ProviderConfig("p", "litellm"), upstream, context=8_000, max_output_tokens=1_000)
    return make_call(body, **{"model": model, **fields})


@pytest.fixture
async def provider(standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Provider]:
    from aiqueue.gateway.litellm_provider import close_litellm  # noqa: PLC0415

    monkeypatch.setenv("GATEWAY_TEST_KEY", KEY)
    yield open_provider(ProviderConfig("p", "litellm", base_url=standin.url, key_env="GATEWAY_TEST_KEY"))
    await close_litellm()


async def failure(called: Any) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await called
    assert KEY not in repr(caught.value) + str(caught.value)
    return caught.value


async def keep(_chunk: dict[str, Any]) -> None:
    """Heed no chunk."""


@with_litellm
async def test_an_answer_comes_back_whole_with_its_usage(standin: StandIn, provider: Provider) -> None:
    reply = await provider.chat(call_of(body={**HELLO, "max_tokens": 5}))
    assert reply.answer["object"] == "chat.completion"
    assert reply.answer["choices"][0]["message"] == {"role": "assistant", "content": "one two three one two"}
    assert reply.usage == Usage(8, 5, 0)
    assert (standin.calls[0].key, standin.calls[0].model) == (KEY, "up")
    json.dumps(reply.answer)


@with_litellm
async def test_a_stream_is_the_same_answer_and_its_last_chunk_has_the_usage(
    standin: StandIn, provider: Provider
) -> None:
    chunks: list[dict[str, Any]] = []

    async def on_chunk(chunk: dict[str, Any]) -> None:
        chunks.append(chunk)

    reply = await provider.chat(call_of(body={**HELLO, "max_tokens": 4}), on_chunk)
    assert reply.answer["choices"][0]["message"]["content"] == "one two three one"
    assert reply.answer["choices"][0]["finish_reason"] == "length"
    assert reply.usage == Usage(8, 4, 0)
    assert (chunks[-1]["choices"], chunks[-1]["object"]) == ([], "chat.completion.chunk")
    assert reply.first_token_s is not None
    assert standin.calls[0].body["stream_options"] == {"include_usage": True}


@with_litellm
async def test_embeddings_come_as_openais(provider: Provider) -> None:
    reply = await provider.embed(call_of(body={"input": ["a", "b"]}))
    assert [each["index"] for each in reply.answer["data"]] == [0, 1]
    assert reply.usage == Usage(2)


@with_litellm
@pytest.mark.parametrize(
    ("fault", "kind", "status", "wait_s", "billed"),
    [
        (Fault(429, retry_after_s=20.0, message=f"{KEY} is too fast"), "rate_limited", 429, 20.0, False),
        (Fault(429, code="insufficient_quota"), "auth", 429, None, False),
        (Fault(503, retry_after_s=3.0), "overloaded", 503, 3.0, False),
        (Fault(500), "server", 500, None, False),
        (Fault(502), "server", 502, None, True),
        (Fault(408), "timeout", 408, None, True),
        (Fault(400, code="context_length_exceeded"), "context_length", 400, None, False),
        (Fault(400, message="flagged", code="content_filter"), "content_policy", 400, None, False),
        (Fault(400), "refused", 400, None, False),
        (Fault(401, message=f"bad key {KEY}"), "auth", 401, None, False),
        (Fault(403), "auth", 403, None, False),
        (Fault(404), "refused", 404, None, False),
        (Fault(422), "refused", 422, None, False),
        (Fault(abort_after=0), "connection", None, None, True),
    ],
    ids=lambda value: f"{value.status}-{value.code}" if isinstance(value, Fault) else "",
)
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_error_has_its_kind_and_is_not_tried_again(
    standin: StandIn,
    provider: Provider,
    fault: Fault,
    kind: str,
    status: int,
    wait_s: float,
    billed: bool,
    streamed: bool,
) -> None:
    standin.order(fault)
    error = await failure(provider.chat(call_of(), keep if streamed else None))
    assert (error.kind, error.status, error.retry_after_s, error.may_be_billed) == (kind, status, wait_s, billed)
    assert len(standin.calls) == 1
    assert "litellm." not in error.text


@with_litellm
async def test_a_stream_cut_in_the_middle_is_broken_and_may_be_billed(standin: StandIn, provider: Provider) -> None:
    standin.order(Fault(abort_after=3))
    error = await failure(provider.chat(call_of(), keep))
    assert (error.kind, error.may_be_billed, error.status) == ("broken_stream", True, None)
    assert len(standin.calls) == 1


@with_litellm
@pytest.mark.parametrize("upstream", ["openai/up", "anthropic/claude-sonnet-4-5"])
async def test_nobody_listening_is_a_connection_error_that_cost_nothing(
    standin: StandIn, provider: Provider, upstream: str
) -> None:
    await standin.stop()
    error = await failure(provider.chat(call_of(upstream)))
    assert (error.kind, error.status, error.may_be_billed) == ("connection", None, False)


@with_litellm
@pytest.mark.parametrize("upstream", ["openai/up", "anthropic/claude-sonnet-4-5", "gemini/gemini-2.0-flash"])
async def test_a_missing_key_is_no_reason_to_try_again(upstream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    error = await failure(open_provider(ProviderConfig("p", "litellm")).chat(call_of(upstream)))
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("auth", False, False)


@with_litellm
@pytest.mark.parametrize(
    ("upstream", "body"), [("zzz/up", HELLO), ("anthropic/claude-sonnet-4-5", {**HELLO, "logit_bias": {"5": 1.0}})]
)
async def test_what_litellm_itself_refuses_cost_nothing(
    provider: Provider, upstream: str, body: dict[str, Any]
) -> None:
    error = await failure(provider.chat(call_of(upstream, body)))
    assert (error.kind, error.may_be_billed) == ("refused", False)


@with_litellm
@pytest.mark.parametrize(
    ("limits", "streamed", "said"),
    [
        ({"total_s": 0.1}, False, "p: the answer took longer than 0.1 s"),
        ({"first_token_s": 0.1}, True, "p: the first chunk took longer than 0.1 s"),
    ],
)
async def test_a_call_that_takes_too_long_is_a_timeout_and_may_be_billed(
    standin: StandIn, provider: Provider, limits: dict[str, float], streamed: bool, said: str
) -> None:
    await provider.chat(call_of())  # makes litellm's client
    standin.behaviour = Behaviour(first_token_s=5.0)
    error = await failure(provider.chat(call_of(**limits), keep if streamed else None))
    assert (error.kind, error.may_be_billed) == ("timeout", True)
    assert error.text == said or "timed out" in error.text  # litellm may be first


@with_litellm
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_call_that_gets_no_connection_in_time_is_not_made(
    standin: StandIn, monkeypatch: pytest.MonkeyPatch, eventually: Eventually, streamed: bool
) -> None:
    monkeypatch.setenv("GATEWAY_TEST_KEY", KEY)
    config = ProviderConfig("p", "litellm", base_url=standin.url, key_env="GATEWAY_TEST_KEY", connections=1)
    provider, on_chunk = open_provider(config), keep if streamed else None
    await provider.chat(call_of(), on_chunk)
    standin.order(Fault(delay_s=0.4))
    slow = asyncio.create_task(provider.chat(call_of(), on_chunk))
    await eventually(lambda: len(standin.calls) == 2)
    error = await failure(provider.chat(call_of(start_within_s=0.1), on_chunk))
    assert (error.kind, error.text, error.may_be_billed) == ("late", "p: no connection within 0.1 s", False)
    await provider.chat(call_of(start_within_s=5.0), on_chunk)
    await slow
    assert len(standin.calls) == 3


@with_litellm
async def test_cancelling_a_call_ends_it_at_the_provider(
    standin: StandIn, provider: Provider, eventually: Eventually
) -> None:
    standin.behaviour = Behaviour(token_s=0.02, completion_tokens=1_000)
    begun = asyncio.Event()

    async def on_chunk(_chunk: dict[str, Any]) -> None:
        begun.set()

    task = asyncio.create_task(provider.chat(call_of(), on_chunk))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: standin.calls[0].outcome == "lost")
    assert standin.calls[0].completion_tokens < 50


@with_litellm
@pytest.mark.parametrize("raised", [TimeoutError("mine"), OSError("mine"), ValueError("mine")])
async def test_what_the_reader_of_chunks_raises_is_raised_as_it_is(provider: Provider, raised: Exception) -> None:
    async def on_chunk(_chunk: dict[str, Any]) -> None:
        raise raised

    with pytest.raises(type(raised), match="mine"):
        await provider.chat(call_of(), on_chunk)


@with_litellm
async def test_another_provider_answers_in_openais_shape() -> None:
    seen: list[dict[str, Any]] = []

    async def messages(request: web.Request) -> web.Response:
        seen.append(await request.json())
        usage = {"input_tokens": 7, "output_tokens": 3, "cache_read_input_tokens": 2, "cache_creation_input_tokens": 1}
        answer = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude", "usage": usage}
        content = [{"type": "text", "text": "hello"}]
        return web.json_response({**answer, "content": content, "stop_reason": "end_turn", "stop_sequence": None})

    app = web.Application()
    app.router.add_post("/v1/messages", messages)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        body = {**HELLO, "max_tokens": 9, "top_k": 3}
        provider = open_provider(ProviderConfig("p", "litellm", base_url=url))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("ANTHROPIC_API_KEY", KEY)
            reply = await provider.chat(call_of("anthropic/claude-sonnet-4-5", body))
    finally:
        await runner.cleanup()
    assert reply.answer["choices"][0]["message"]["content"] == "hello"
    assert reply.answer["choices"][0]["finish_reason"] == "stop"
    assert reply.usage == Usage(10, 3, 2, 1)
    assert (seen[0]["max_tokens"], seen[0]["top_k"], seen[0]["model"]) == (9, 3, "claude-sonnet-4-5")


@with_litellm
def test_litellm_is_imported_by_its_first_use_and_fetches_nothing() -> None:
    code = """
import socket, sys
def refuse(*a, **k): raise AssertionError(f"asked the network: {a}")
socket.getaddrinfo = socket.socket.connect = refuse
import aiqueue.gateway.litellm_provider as lp
assert "litellm" not in sys.modules
litellm = lp.load_litellm()
assert litellm.model_cost["gpt-4o-mini"]["input_cost_per_token"] > 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
