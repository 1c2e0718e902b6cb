"""The spans of a gateway request, from the job that asks for it, or from a request, to the calls of providers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

import aiqueue
from aiqueue import Backoff
from aiqueue.gateway import handler
from aiqueue.gateway.standin import Fault, StandIn

from ..gateway.front.fronts import add_keys, bearer, chat_body, open_front
from ..gateway.running import KEY, KEY_VARIABLE, ask, running, write_config
from ..support import Account
from .recording import PARENT_ID, SAMPLED, TRACE_ID, Recorder, trace_ids

SHOWN = ("aiqueue.attempt", "aiqueue.outcome", "aiqueue.step", "aiqueue.child", "gen_ai.request.model", "error.type")


class Research(aiqueue.Message, kind="research"):
    question: str


@pytest.fixture
async def standin() -> AsyncIterator[StandIn]:
    async with StandIn() as standin:
        yield standin


@pytest.fixture
def config(tmp_path: Path, standin: StandIn, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gateway.toml in which "small" falls back to "large"."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(handler, "BACKOFF", Backoff(first="10ms", cap="50ms"))
    return write_config(tmp_path, standin.url, small='fallbacks = ["large"]')


async def test_a_request_with_a_retry_and_a_fallback_is_one_tree_below_the_step_s_job(
    client: aiqueue.Client, account: Account, config: Path, standin: StandIn
) -> None:
    recorder, worker = Recorder(), aiqueue.Worker()

    async def plan() -> str:
        return "one two three"

    @worker.handle(Research)
    async def research(job: aiqueue.Job[Research]) -> str:
        text = await job.step("plan", plan)
        (answer,) = await job.gather([("ask", ask(text))])
        return str(answer["model"])

    standin.order(Fault(503, model="small-1"))
    standin.order(Fault(400, model="small-1"))
    async with recorder.connect(account) as traced, worker.running(traced), running(traced, config):
        handle = await traced.enqueue(Research(question="?"), tenant="acme")
        assert await handle.result(timeout=30) == "small"
        await recorder.ended(19)
    assert len(trace_ids(recorder)) == 1
    assert recorder.tree(SHOWN) == [
        "send ai.agent.tasks PRODUCER",
        "  process ai.agent.tasks CONSUMER aiqueue.attempt=1 aiqueue.outcome=waiting",
        "    agent.task.execute INTERNAL",
        "      step plan INTERNAL aiqueue.step=plan",
        "      send ai.gateway.requests PRODUCER aiqueue.child=ask",
        "        process ai.gateway.requests CONSUMER aiqueue.attempt=1 aiqueue.outcome=retry error.type=Retry ERROR",
        "          gateway.generate INTERNAL error.type=Retry ERROR",
        "            gateway.provider.call CLIENT gen_ai.request.model=small-1 error.type=overloaded ERROR",
        "        process ai.gateway.requests CONSUMER aiqueue.attempt=2 aiqueue.outcome=waiting",
        "          gateway.generate INTERNAL",
        "            gateway.provider.call CLIENT gen_ai.request.model=small-1 error.type=refused ERROR",
        "            send ai.gateway.requests PRODUCER aiqueue.child=fallback large",
        "              process ai.gateway.requests CONSUMER aiqueue.attempt=1 aiqueue.outcome=done",
        "                gateway.generate INTERNAL",
        "                  gateway.provider.call CLIENT gen_ai.request.model=large-1",
        "        process ai.gateway.requests CONSUMER aiqueue.attempt=2 aiqueue.outcome=done",
        "          gateway.generate INTERNAL",
        "  process ai.agent.tasks CONSUMER aiqueue.attempt=1 aiqueue.outcome=done",
        "    agent.task.execute INTERNAL",
    ]


async def test_a_request_and_the_wait_for_its_result_are_one_span_above_the_job(
    client: aiqueue.Client, account: Account
) -> None:
    class Ask(aiqueue.Message, kind="ask", family="gateway.requests"):
        prompt: str = ""

    recorder, worker = Recorder(), aiqueue.Worker()

    @worker.handle(Ask)
    async def answer(job: aiqueue.Job[Ask]) -> str:
        return job.message.prompt

    async with recorder.connect(account) as traced, aiqueue.Responder().running(client), worker.running(traced):
        assert await traced.request(Ask(prompt="?"), tenant="acme", unique="req-1", timeout=20) == "?"
        await recorder.ended(3)
    assert recorder.tree() == [
        "request ai.gateway.responses CLIENT",
        "  process ai.gateway.requests CONSUMER",
        "    gateway.generate INTERNAL",
    ]
    asked, called = recorder.one("request ai.gateway.responses"), recorder.one("gateway.generate")
    assert asked.end_time is not None
    assert called.end_time is not None
    assert asked.end_time > called.end_time
    assert recorder.attributes("request ai.gateway.responses")["messaging.message.id"] == "req-1"


async def test_a_plain_client_s_request_is_traced_to_the_call_of_the_provider(
    client: aiqueue.Client, account: Account, plain: Any, config: Path, standin: StandIn
) -> None:
    recorder = Recorder()
    body = json.dumps({"request_id": "req-1", "prompt": "a b", "model": "small", "parameters": {"max_tokens": 1}})
    async with recorder.connect(account) as traced, aiqueue.Responder().running(client), running(traced, config):
        await plain.request("ai.gateway.responses.acme", body.encode(), timeout=20, headers={"traceparent": SAMPLED})
        await recorder.ended(3)
    first = recorder.spans[0]
    assert first.parent is not None
    assert (first.parent.trace_id, first.parent.span_id) == (TRACE_ID, PARENT_ID)
    assert recorder.tree() == [
        "process ai.gateway.requests CONSUMER",
        "  gateway.generate INTERNAL",
        "    gateway.provider.call CLIENT",
    ]
    attributes: dict[str, Any] = recorder.attributes("gateway.provider.call")
    (call,) = standin.calls
    prompt, completion = standin.billed()
    assert attributes.pop("gen_ai.response.id")
    assert attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "p", "gen_ai.request.model": "small-1",
        "gen_ai.request.stream": False, "gen_ai.response.model": "small-1",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": prompt, "gen_ai.usage.output_tokens": completion,
        "aiqueue.gateway.call_id": call.idempotency_key,
    }  # fmt: skip


async def test_the_trace_of_an_http_client_of_the_front_continues(
    client: aiqueue.Client, account: Account, config: Path
) -> None:
    recorder, tokens = Recorder(), await add_keys(client)
    async with (
        recorder.connect(account, trace_ratio=0) as traced,
        running(traced, config),
        open_front(traced, config) as front,
        aiohttp.ClientSession() as http,
    ):
        for headers in (bearer(tokens.mine, traceparent=SAMPLED), bearer(tokens.mine)):
            async with http.post(f"{front.url}/chat/completions", json=chat_body(), headers=headers) as answer:
                assert answer.status == 200
        await recorder.ended(3)
    assert trace_ids(recorder) == {TRACE_ID}
    assert recorder.names == ["process ai.gateway.requests", "gateway.generate", "gateway.provider.call"]
