"""OpenAI's own client, unchanged but for its base_url."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pydantic
import pytest

from aiqueue.gateway.standin import Behaviour, Fault, StandIn

from .fronts import RunningFront, Tokens

MESSAGES: Any = [{"role": "user", "content": "one two three"}]


async def test_a_chat_is_answered(served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn) -> None:
    answer = await ai.chat.completions.create(model="small", messages=MESSAGES, max_tokens=5)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "one two three one two"
    assert (answer.model, answer.choices[0].finish_reason) == ("small", "length")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 5
    assert answer._request_id
    assert answer.aiqueue["request_id"] == answer._request_id  # type: ignore[attr-defined]
    assert len(standin.calls) == 1


async def test_a_stream_has_each_token_once_and_its_usage_where_it_is_asked_for(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn
) -> None:
    for options in ({}, {"stream_options": {"include_usage": True}}):
        stream: Any = await ai.chat.completions.create(
            model="small", messages=MESSAGES, max_tokens=5, stream=True, **options
        )
        chunks = [chunk async for chunk in stream]
        texts = [each.choices[0].delta.content or "" for each in chunks if each.choices]
        assert "".join(texts) == "one two three one two"
        assert {each.model for each in chunks} == {"small"}
        assert not hasattr(chunks[0], "aiqueue")
        usages = [each.usage for each in chunks if each.usage]
        assert len(usages) == (1 if options else 0)
        assert [each.choices for each in chunks[-1:]] == ([[]] if options else [chunks[-1].choices])


async def test_the_stream_helper_collects_the_answer(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn
) -> None:
    standin.behaviour = Behaviour(completion_tokens=4)
    async with ai.chat.completions.stream(model="small", messages=MESSAGES) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_completion()
    assert kinds.count("content.delta") == 5  # the first one is empty
    assert final.choices[0].message.content == "one two three one"


async def test_tools_reach_the_provider(served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn) -> None:
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    tools: Any = [{"type": "function", "function": function}]
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    messages: Any = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    answer = await ai.chat.completions.create(model="small", messages=messages, tools=tools, tool_choice="auto")
    assert answer.choices[0].message.content is not None
    assert standin.calls[0].body["tools"] == tools
    assert standin.calls[0].body["messages"] == messages


async def test_structured_output_is_parsed(served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn) -> None:
    class Point(pydantic.BaseModel):
        x: int

    messages: Any = [{"role": "user", "content": json.dumps({"x": 7}, separators=(",", ":"))}]
    standin.behaviour = Behaviour(completion_tokens=1)  # the stand-in answers with the words that it was asked
    answer = await ai.chat.completions.parse(model="small", messages=messages, response_format=Point)
    assert answer.choices[0].message.parsed == Point(x=7)
    assert standin.calls[0].body["response_format"]["type"] == "json_schema"


async def test_embeddings_come_as_the_client_asks_for_them(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn
) -> None:
    plain = await ai.embeddings.create(model="vectors", input=["a", "b"], dimensions=4, encoding_format="float")
    packed = await ai.embeddings.create(model="vectors", input=["a", "b"], dimensions=4)
    assert standin.calls[1].body["encoding_format"] == "base64"  # the client's default
    for one, other in zip(plain.data, packed.data, strict=True):
        assert other.embedding == pytest.approx(one.embedding, abs=1e-6)
    assert plain.usage.total_tokens == packed.usage.total_tokens


async def test_models_are_those_that_the_key_may_call(
    front: RunningFront, ai: openai.AsyncOpenAI, tokens: Tokens
) -> None:
    assert [each.id async for each in ai.models.list()] == ["large", "small", "vectors"]
    assert (await ai.models.retrieve("small")).owned_by == "p"
    with pytest.raises(openai.NotFoundError):
        await ai.models.retrieve("none")
    other = ai.with_options(api_key=tokens.other)
    assert [each.id async for each in other.models.list()] == ["small"]


async def test_raw_responses_have_the_headers(served: RunningFront, ai: openai.AsyncOpenAI) -> None:
    raw = await ai.chat.completions.with_raw_response.create(model="small", messages=MESSAGES)
    assert raw.status_code == 200
    assert raw.headers["x-request-id"] == raw.request_id
    assert raw.parse().choices[0].message.content
    async with ai.chat.completions.with_streaming_response.create(model="small", messages=MESSAGES) as response:
        assert (await response.json())["object"] == "chat.completion"


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_timeout_that_the_client_repeats_by_itself_is_one_call(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn, streamed: bool
) -> None:
    standin.behaviour = Behaviour(first_token_s=1.2)
    impatient = ai.with_options(timeout=0.7, max_retries=3)
    if streamed:
        async with impatient.chat.completions.stream(model="small", messages=MESSAGES) as stream:
            answer: Any = await stream.get_final_completion()
    else:
        answer = await impatient.chat.completions.create(model="small", messages=MESSAGES)
    assert answer.choices[0].message.content.startswith("one two three one")
    assert len(standin.calls) == 1


async def test_a_request_that_was_cancelled_for_its_client_is_made_anew_when_that_repeats_it(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn
) -> None:
    standin.order(Fault(delay_s=1.5))
    answer = await ai.with_options(timeout=0.7, max_retries=3).chat.completions.create(
        model="small", messages=MESSAGES, extra_headers={"x-aiqueue-on-disconnect": "cancel"}
    )
    assert answer.choices[0].message.content
    assert len(standin.calls) == 2


async def test_a_stream_that_is_left_goes_on_unless_its_request_says_otherwise(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn
) -> None:
    standin.behaviour = Behaviour(token_s=0.02, completion_tokens=20)
    ends = []
    for headers in ({}, {"x-aiqueue-on-disconnect": "cancel"}):
        stream = await ai.chat.completions.create(model="small", messages=MESSAGES, stream=True, extra_headers=headers)
        async for chunk in stream:
            if chunk.choices[0].delta.content:
                break
        await stream.close()
        call = standin.calls[-1]
        async with asyncio.timeout(5):
            while call.ended_at is None:
                await asyncio.sleep(0.01)
        ends.append(call.outcome)
    assert ends == ["ok", "lost"]


async def test_a_request_that_the_client_gives_up_is_cancelled_if_it_says_so(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn
) -> None:
    standin.behaviour = Behaviour(first_token_s=0.8)
    with pytest.raises(openai.APITimeoutError):
        await ai.with_options(timeout=0.4, max_retries=0).chat.completions.create(
            model="small", messages=MESSAGES, extra_headers={"x-aiqueue-on-disconnect": "cancel"}
        )
    async with asyncio.timeout(2):
        while standin.calls[0].ended_at is None:
            await asyncio.sleep(0.01)
    assert standin.calls[0].outcome == "lost"


async def test_a_wrong_key_and_a_wrong_model_are_the_client_s_own_errors(
    front: RunningFront, ai: openai.AsyncOpenAI, tokens: Tokens
) -> None:
    with pytest.raises(openai.AuthenticationError) as unknown:
        await ai.with_options(api_key="aiq-none").models.list()
    assert (unknown.value.code, unknown.value.response.headers["x-should-retry"]) == ("invalid_api_key", "false")
    assert unknown.value.request_id
    with pytest.raises(openai.NotFoundError) as missing:
        await ai.chat.completions.create(model="none", messages=MESSAGES)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        await ai.with_options(api_key=tokens.other).chat.completions.create(model="large", messages=MESSAGES)
    assert forbidden.value.code == "model_not_allowed"
    with pytest.raises(openai.BadRequestError) as wrong:
        await ai.chat.completions.create(model="small", messages=[{"role": "ghost", "content": "a"}])  # type: ignore[typeddict-item]
    assert wrong.value.param == "messages.0.role"
    assert "ghost" in wrong.value.message


@pytest.mark.parametrize("streamed", [False, True])
async def test_early_errors_keep_their_status_and_are_not_repeated(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn, streamed: bool
) -> None:
    cases: list[tuple[Fault, type[openai.APIStatusError], str]] = [
        (Fault(400, code="context_length_exceeded"), openai.BadRequestError, "context_length_exceeded"),
        (Fault(401, message="the key"), openai.InternalServerError, "provider_auth"),
        (Fault(422, message="no"), openai.UnprocessableEntityError, "refused"),
    ]
    for fault, kind, code in cases:
        standin.order(fault)
        with pytest.raises(kind) as caught:
            await ai.chat.completions.create(model="small", messages=MESSAGES, stream=streamed)
        assert caught.value.code == code
        assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(standin.calls) == len(cases)


async def test_an_error_amid_a_stream_is_the_client_s_error(
    served: RunningFront, ai: openai.AsyncOpenAI, standin: StandIn
) -> None:
    standin.order(Fault(abort_after=3, count=1))
    stream = aiter(await ai.chat.completions.create(model="small", messages=MESSAGES, stream=True))
    got = [await anext(stream) for _ in range(3)]
    with pytest.raises(openai.APIError, match="begun anew after 3 chunks") as caught:
        await anext(stream)
    assert [each.choices[0].delta.content for each in got] == ["", "one", " two"]
    assert caught.value.code == "stream_restarted"
