"""Requests of a hostile plain publisher: none calls a host, none sees a key, and the worker goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import JobFailed
from aiqueue.gateway.standin import StandIn

from .running import KEY, KEY_VARIABLE, ask, records, running, write_config

ASKED: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
DEEP = "[" * 100_000 + "]" * 100_000
BODIES: dict[str, dict[str, Any] | str] = {
    "a host": {**ASKED, "api_base": "{url}"},
    "a host in options": {**ASKED, "options": {"base_url": "{url}"}},
    "a host in parameters": {"model": "small", "prompt": "hi", "parameters": {"api_base": "{url}"}},
    "headers": {**ASKED, "extra_headers": {"Host": "{url}"}},
    "a body": {**ASKED, "extra_body": {"model": "large"}},
    "a key": {**ASKED, "api_key": "sk-mine"},
    "another library": {**ASKED, "custom_llm_provider": "openai"},
    "fallbacks": {**ASKED, "fallbacks": [{"model": "x", "api_base": "{url}"}]},
    "a mock": {**ASKED, "mock_response": "paid"},
    "an image to fetch": {
        **ASKED,
        "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "{url}"}}]}],
    },
    "a tool with a server": {**ASKED, "tools": [{"type": "mcp", "server_url": "{url}"}]},
    "another tenant": {**ASKED, "tenant_id": "globex"},
    "a provider's name": {**ASKED, "model": "openai/gpt-4o"},
    "the gateway itself": {**ASKED, "model": "aiqueue/small"},
    "a file": {**ASKED, "model": "../../etc/passwd"},
    "many choices": {**ASKED, "n": 10**9},
    "many tokens": {**ASKED, "max_tokens": 10**12},
    "no number": {**ASKED, "temperature": "NaN"},
    "deep": json.dumps(ASKED)[:-1] + f', "user": {DEEP}}}',
    "deep in a message": '{"model": "small", "messages": [{"role": "user", "content": ' + DEEP + "}]}",
    "no JSON": "{",
    "a list": "[]",
}


async def test_no_hostile_request_is_called_or_sees_a_key_and_the_worker_goes_on(
    client: aiqueue.Client,
    plain: Any,
    tmp_path: Path,
    standin: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    caplog.set_level("DEBUG", "aiqueue")
    async with StandIn() as foreign, running(client, write_config(tmp_path, standin.url)):
        for number, body in enumerate(BODIES.values()):
            text = body if isinstance(body, str) else json.dumps(body)
            headers = {"request_id": f"r{number}", "Nats-Msg-Id": f"acme/gateway.requests/r{number}"}
            payload = text.replace("{url}", foreign.url).encode()
            await plain.jetstream().publish("ai.gateway.requests.acme", payload, headers=headers)
        told = []
        for number in range(len(BODIES)):
            handle = await client.job(f"r{number}", family="gateway.requests", tenant="acme")
            with pytest.raises(JobFailed) as failed:
                await handle.result(timeout=15)
            told.append(str(failed.value))
        await (await client.enqueue(ask(), tenant="acme")).result(timeout=10)
        assert foreign.calls == []
    assert len(standin.calls) == 1
    assert len(await records(client)) == 1
    assert all("\n" not in each and len(each) < 1_000 for each in told)
    stored = b""
    for stream in client.topology.streams:
        async for each in client.connection.read(stream, ">"):
            stored += each.data + repr(each.headers).encode()
    assert KEY.encode() not in stored
    assert KEY not in "".join(told) + caplog.text
