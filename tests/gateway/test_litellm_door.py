"""litellm calls the gateway's models as ``aiqueue/<model>``. Skipped where it is not installed: `make test-gateway`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import subjects
from aiqueue.errors import BadInput
from aiqueue.gateway import ApiKeys, GatewayWorker, load
from aiqueue.gateway.litellm_chunks import ChunkReader, StreamCut
from aiqueue.gateway.litellm_door import register
from aiqueue.gateway.standin import Behaviour, Fault, StandIn
from aiqueue.limits import StoredUse

from ..support import Account, Eventually, create_streams
from .running import ask, child, records, running, shorten_leases, write_config

HAS_LITELLM = find_spec("litellm") is not None
with_litellm = pytest.mark.skipif(not HAS_LITELLM, reason="litellm is not installed: run `make test-gateway`")
if HAS_LITELLM:
    pytestmark = pytest.mark.filterwarnings("default")  # litellm's own, such as those of its pydantic models
HELLO = [{"role": "user", "content": "one two three"}]


def test_a_missing_litellm_is_one_line_that_says_what_to_install_also_for_the_door(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    with pytest.raises(BadInput, match=r"^aiqueue.gateway needs litellm: pip install 'aiqueue\[gateway\]'$"):
        register(tenant="acme")


def test_the_door_imports_litellm_when_it_is_used() -> None:
    code = "import sys, aiqueue.gateway.litellm_door; print('litellm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "False"


async def test_who_joins_a_request_whose_call_was_made_anew_reads_the_chunks_of_the_newest_call_alone(
    client: aiqueue.Client, config: Path, standin: StandIn
) -> None:
    """A Router's retry has the id of the former try: it would end in the same error for ever."""
    standin.order(Fault(abort_after=3))
    async with running(client, config):
        handle = await client.enqueue(ask(stream=True), tenant="acme")
        with pytest.raises(StreamCut, match="begun anew after 3 chunks"):
            _ = [chunk async for chunk in ChunkReader(handle, 10.0).read()]
        chunks = [chunk async for chunk in ChunkReader(handle, 10.0).read()]
    texts = [choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]]
    assert "".join(texts) == "one two three one two"
    assert len(standin.calls) == 2


@pytest.fixture(scope="module")
def litellm() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        module = pytest.importorskip("litellm", reason="litellm is not installed: run `make test-gateway`")
    module.suppress_debug_info = True
    return module


@pytest.fixture
async def client(account: Account) -> AsyncIterator[aiqueue.Client]:
    async with aiqueue.connect(account.url, user=account.user, password=account.password) as client:
        await create_streams(client)
        yield client


@pytest.fixture
async def worker(client: aiqueue.Client, config: Path) -> AsyncIterator[GatewayWorker]:
    async with running(client, config) as worker:
        yield worker


@pytest.fixture
def door(account: Account, litellm: Any, config: Path) -> Iterator[Any]:
    del litellm
    made = register(tenant="acme", config=load(config), url=account.url, user=account.user, password=account.password)
    yield made
    made.close()


@with_litellm
async def test_a_completion_has_the_answer_its_usage_and_its_cost(
    litellm: Any, door: Any, worker: Any, client: aiqueue.Client
) -> None:
    del door, worker
    asked = {"model": "aiqueue/small", "messages": HELLO, "max_tokens": 5}
    for answer in (await litellm.acompletion(**asked), await asyncio.to_thread(litellm.completion, **asked)):
        assert answer.choices[0].message.content == "one two three one two"
        assert answer.choices[0].finish_reason == "length"
        assert answer.model == "small"
        assert answer.usage.completion_tokens == 5
        cost = answer.usage.prompt_tokens + 2 * 5  # micro-dollars
        assert answer._hidden_params["response_cost"] == pytest.approx(cost / 1_000_000)
    assert [each.outcome for each in await records(client)] == ["ok", "ok"]


@with_litellm
async def test_a_stream_has_each_chunk_once_and_then_its_usage(litellm: Any, door: Any, worker: Any) -> None:
    del door, worker
    asked = {"model": "aiqueue/small", "messages": HELLO, "max_tokens": 5, "stream": True}
    with_usage = {**asked, "stream_options": {"include_usage": True}}

    def check(chunks: list[Any], *, has_usage: bool) -> None:
        text = [each.choices[0].delta.content for each in chunks if each.choices]
        assert "".join(each or "" for each in text) == "one two three one two"
        assert len([each for each in text if each]) == 5
        assert [each.choices[0].finish_reason for each in chunks if each.choices].count("length") == 1
        usages = [each.usage for each in chunks if getattr(each, "usage", None) is not None]
        assert [(each.completion_tokens, each.prompt_tokens) for each in usages] == ([(5, 8)] if has_usage else [])
        assert litellm.stream_chunk_builder(chunks).choices[0].message.content == "one two three one two"

    check([each async for each in await litellm.acompletion(**with_usage)], has_usage=True)
    check(await asyncio.to_thread(lambda: list(litellm.completion(**with_usage))), has_usage=True)
    check([each async for each in await litellm.acompletion(**asked)], has_usage=False)


@with_litellm
async def test_embeddings_are_those_of_the_provider(litellm: Any, door: Any, worker: Any) -> None:
    del door, worker
    asked = {"model": "aiqueue/vectors", "input": ["one", "two"], "extra_body": {"dimensions": 4}}
    for answer in (await litellm.aembedding(**asked), await asyncio.to_thread(litellm.embedding, **asked)):
        assert [len(each["embedding"]) for each in answer.data] == [4, 4]
        assert [each["index"] for each in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == 2


@with_litellm
async def test_a_call_of_a_tool_comes_through_and_an_answer_can_be_a_message_again(
    litellm: Any, door: Any, worker: Any, standin: StandIn
) -> None:
    del door, worker
    answer = await litellm.acompletion(model="aiqueue/small", messages=HELLO, max_tokens=5)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    messages = [*HELLO, answer.choices[0].message, {"role": "user", "content": "four"}]
    again = await litellm.acompletion(
        model="aiqueue/small", messages=messages, max_tokens=1, tools=tools, tool_choice="auto", temperature=0.5,
        extra_headers={"priority": "high"},
    )  # fmt: skip
    assert again.choices[0].message.content == "four"
    body = standin.calls[-1].body
    assert [each["role"] for each in body["messages"]] == ["user", "assistant", "user"]
    assert (body["tools"], body["tool_choice"], body["temperature"]) == (tools, "auto", 0.5)


@with_litellm
@pytest.mark.parametrize("stream", [False, True])
async def test_a_routers_retry_after_a_timeout_gets_the_answer_of_the_first_call(
    litellm: Any, door: Any, worker: Any, standin: StandIn, *, stream: bool
) -> None:
    del door, worker
    standin.order(Fault(delay_s=1.0))
    params = {"model": "aiqueue/small", "timeout": 0.4, "max_tokens": 5}
    router = litellm.Router(
        model_list=[{"model_name": "m", "litellm_params": params}],
        num_retries=10,
        retry_after=0,
        disable_cooldowns=True,
    )
    answer = await router.acompletion(model="m", messages=HELLO, stream=stream)
    if stream:
        text = "".join([each.choices[0].delta.content or "" async for each in answer])
    else:
        text = answer.choices[0].message.content
    assert text == "one two three one two"
    assert len(standin.calls) == 1
    await router.acompletion(model="m", messages=HELLO)
    assert len(standin.calls) == 2, "a call that is no retry is another one"


@with_litellm
async def test_errors_are_those_of_litellm_with_the_status_that_fits(
    litellm: Any, door: Any, client: aiqueue.Client, tmp_path: Path, standin: StandIn
) -> None:
    errors, path = litellm.exceptions, write_config(tmp_path, standin.url)

    async def fails(**fields: Any) -> Any:
        asked = {"model": "aiqueue/small", "messages": HELLO, "max_tokens": 5, "timeout": 20, **fields}
        try:
            answer = await litellm.acompletion(**asked)
            if fields.get("stream"):
                answer = [each async for each in answer]
        except Exception as error:  # noqa: BLE001  (which one is what the test is about)
            return error
        return answer

    unknown = await fails(model="aiqueue/smal")
    assert (type(unknown), unknown.status_code) == (errors.NotFoundError, 404)
    assert "unknown model 'smal'; did you mean small?" in str(unknown)
    wrong = await fails(messages=[{"role": "user"}])
    assert (type(wrong), "content is missing" in str(wrong)) == (errors.BadRequestError, True)
    assert type(await fails(api_base="http://x", extra_body={"api_base": "http://evil"})) is errors.BadRequestError
    late = await fails(timeout=0.1)
    assert (type(late), late.status_code) == (errors.Timeout, 408)
    budget = '[[budget]]\ntenant = "acme"\nmonth = 0.00001\n'
    for fault, kind, status in (
        (Fault(400, message="this is wrong", code="x"), errors.BadRequestError, 400),
        (Fault(400, message="maximum context length is 5"), errors.ContextWindowExceededError, 400),
        (Fault(401, message="no key"), errors.APIError, 502),
        (None, errors.RateLimitError, 429),
    ):
        standin.clear_faults()
        if fault is not None:
            standin.order(fault)
        async with running(client, path if fault is not None else write_config(tmp_path, standin.url, more=budget)):
            for stream in (False, True):
                found = await fails(stream=stream)
                found = getattr(found, "original_exception", None) or found  # litellm's MidStreamFallbackError
                if fault is not None:
                    standin.order(fault)
                assert (type(found), found.status_code) == (kind, status), str(found)


@with_litellm
async def test_an_api_key_says_whose_call_it_is_and_what_it_may_ask(
    litellm: Any, account: Account, client: aiqueue.Client, config: Path, worker: Any, eventually: Eventually
) -> None:
    del worker
    errors, keys = litellm.exceptions, ApiKeys(client)
    key, token = await keys.add("globex", models=["small"], priorities=["normal"], requests_per_minute=2)
    broad, broad_token = await keys.add("globex", tokens_per_minute=10_000)
    door = register(config=load(config), url=account.url, user=account.user, password=account.password)
    asked = {"model": "aiqueue/small", "messages": HELLO, "max_tokens": 5}
    try:
        for wrong in ({}, {"api_key": "sk-x"}, {"api_key": "aiq-x"}):
            with pytest.raises(errors.AuthenticationError) as caught:
                await litellm.acompletion(**asked, **wrong)
            assert "aiq-x" not in str(caught.value)
        for narrow in ({"model": "aiqueue/large"}, {"extra_headers": {"priority": "high"}}):
            with pytest.raises(errors.PermissionDeniedError, match=f"API key {key.id} may not use model"):
                await litellm.acompletion(**{**asked, **narrow}, api_key=token)
        await litellm.acompletion(**asked, api_key=token)
        streamed = [each async for each in await litellm.acompletion(**asked, stream=True, api_key=broad_token)]
        assert streamed
        vectors = await litellm.aembedding(model="aiqueue/vectors", input=["one"], api_key=broad_token)
        assert len(vectors.data) == 1
        await litellm.acompletion(**asked, api_key=token)
        with pytest.raises(errors.RateLimitError, match="requests of this minute are used") as limited:
            await litellm.acompletion(**asked, api_key=token)
        assert 50 < int(limited.value.response.headers["retry-after"]) <= 64
        used = await _used_tokens(client, broad.id)
        assert 0 < used < 100, "what a call did not use is given back"
        await keys.revoke(broad.id)

        async def refused() -> bool:
            with contextlib.suppress(errors.AuthenticationError):
                await litellm.acompletion(**asked, api_key=broad_token)
                return False
            return True

        await eventually(refused)
    finally:
        door.close()
    assert {(each.tenant, each.api_key) for each in await records(client)} == {("globex", key.id), ("globex", broad.id)}


async def _used_tokens(client: aiqueue.Client, key_id: str) -> float:
    """What counts against a key's tokens a minute when all that is owed has been written."""
    found: list[float] = []
    for _ in range(100):
        subject = subjects.limit("KV_AI_LIMITS", "use", "gateway.keys", key_id, "all")
        stored = await client.connection.last("KV_AI_LIMITS", subject)
        assert stored is not None
        found.append(sum(each[1] for each in StoredUse.parse(stored.data).slots.values()))
        if found[-1] < 100:
            break
        await asyncio.sleep(0.05)
    return found[-1]


@with_litellm
async def test_who_leaves_a_stream_stops_neither_the_call_nor_the_provider(
    litellm: Any, door: Any, worker: Any, client: aiqueue.Client, standin: StandIn, eventually: Eventually
) -> None:
    standin.behaviour = Behaviour(token_s=0.1)
    stream = await litellm.acompletion(model="aiqueue/small", messages=HELLO, max_tokens=5, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.aclose()
    await eventually(lambda: _is_ok(client))
    assert (await litellm.acompletion(model="aiqueue/small", messages=HELLO, max_tokens=1)).choices
    del door, worker


async def _is_ok(client: aiqueue.Client) -> bool:
    return [each.outcome for each in await records(client)] == ["ok"]


@with_litellm
async def test_a_stream_whose_worker_dies_goes_on_or_ends_in_an_error_and_doubles_nothing(
    litellm: Any, door: Any, client: aiqueue.Client, account: Account, config: Path, tmp_path: Path, standin: StandIn
) -> None:
    del door
    await shorten_leases(client)
    standin.behaviour = Behaviour(token_s=0.1)
    with child(account, config, tmp_path / "log") as process:
        stream = await litellm.acompletion(model="aiqueue/small", messages=HELLO, max_tokens=5, stream=True)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                process.kill()
                break
    async with running(client, config):
        with pytest.raises(
            litellm.exceptions.MidStreamFallbackError, match=r"begun anew after \d chunks: send the request"
        ):
            [each async for each in stream]
    assert len(standin.calls) == 2


@with_litellm
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_each_event_loop_and_a_forked_process_get_answers(litellm: Any, door: Any, worker: Any) -> None:
    """gunicorn forks its workers from a process that may have made calls."""
    del door, worker
    asked = {"model": "aiqueue/small", "messages": HELLO, "max_tokens": 1}
    for _ in range(2):
        answer = await asyncio.to_thread(lambda: asyncio.run(litellm.acompletion(**asked)))
        assert answer.choices[0].message.content == "one"
    pid = os.fork()
    if not pid:
        code = 1
        try:
            signal.alarm(20)
            code = 0 if litellm.completion(**asked).choices[0].message.content == "one" else 1
        finally:
            os._exit(code)
    _, status = await asyncio.to_thread(os.waitpid, pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


@with_litellm
async def test_a_door_that_is_closed_amid_a_call_says_so_and_opens_again(
    litellm: Any, door: Any, client: aiqueue.Client, config: Path, eventually: Eventually
) -> None:
    asked = {"model": "aiqueue/small", "messages": HELLO, "max_tokens": 1}
    waiting = [asyncio.create_task(litellm.acompletion(**asked)), asyncio.create_task(_ask_in_thread(litellm, asked))]

    async def are_stored() -> bool:
        info = await client.connection.api("STREAM.INFO.AI_GATEWAY_REQUESTS")
        return bool(info["state"]["messages"] == 2)

    await eventually(are_stored)
    await asyncio.to_thread(door.close)
    for each in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(each, litellm.exceptions.ServiceUnavailableError), each
        assert "the connection was closed during the call" in str(each)
    async with running(client, config):
        assert (await litellm.acompletion(**asked)).choices[0].message.content == "one"


async def _ask_in_thread(litellm: Any, asked: dict[str, Any]) -> Any:
    return await asyncio.to_thread(lambda: litellm.completion(**asked))
