"""Answers: OpenAI's shape and the short form, usage, and completions made of chunks. No server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aiqueue import codec
from aiqueue.gateway import Bill, Usage, answer_of, from_chunks
from aiqueue.gateway.answers import usage_of

ANSWER: dict[str, Any] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "gpt-4o-mini-2024",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "42"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
}


def chunk(
    delta: dict[str, Any] | None = None, *, index: int = 0, finish: str | None = None, **more: Any
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta or {}, "finish_reason": finish}
    return {"id": "c1", "object": "chat.completion.chunk", "created": 5, "model": "up", "choices": [choice], **more}


def test_an_answer_is_the_providers_with_what_the_gateway_knows_beside_it() -> None:
    bill = Bill("openai", "gpt-4o-mini", cost=0.01, possibly_billed=1, attempts=2, fallback_of="big")
    answer = answer_of(ANSWER, bill, request_id="r1", model="small")
    assert {**answer, "model": ANSWER["model"]} == {**ANSWER, "aiqueue": answer["aiqueue"]}
    assert answer["model"] == "small"
    assert answer["aiqueue"] == {
        "request_id": "r1", "provider": "openai", "model": "gpt-4o-mini", "cost": 0.01, "possibly_billed": 1,
        "attempts": 2, "fallback_of": "big",
    }  # fmt: skip


def test_the_short_form_has_the_text_the_tokens_and_the_cost() -> None:
    answer = answer_of(ANSWER, Bill("p", "up", cost=0.5), request_id="r1", model="m", reply_form="short")
    about = answer.pop("aiqueue")
    assert answer == {"request_id": "r1", "response": "42", "tokens": 7, "cost": 0.5, "model": "m"}
    assert about["provider"] == "p"
    bare = answer_of({"choices": []}, Bill("p", "up"), request_id="r1", model="m", reply_form="short")
    assert (bare["response"], bare["tokens"], bare["cost"]) == ("", None, None)


def nested(levels: int) -> Any:
    return [nested(levels - 1)] if levels else {"a": 1}


@pytest.mark.parametrize("levels", [1, 46, 47, 48, 800])
def test_what_is_nested_too_deeply_to_be_stored_is_json_in_a_text(levels: int) -> None:
    kept = answer_of({**ANSWER, "x": nested(levels)}, Bill("p", "up"), request_id="r1", model="m")
    assert codec.decode(codec.encode([[[[kept]]]])) == [[[[kept]]]]
    value = kept["x"]
    for _ in range(min(levels, 47)):
        (value,) = value
    assert value == ({"a": 1} if levels < 47 else json.dumps(nested(levels - 47)))
    assert kept["choices"] == ANSWER["choices"]


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 3}}, Usage(5, 2, 3)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": None}, Usage(5, 2)),
        ({"prompt_tokens": 5, "prompt_cache_hit_tokens": 9}, Usage(5, 0, 5)),
        ({"prompt_tokens": 5, "completion_tokens": None}, Usage(5)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 47}, Usage(5, 42)),
        ({"prompt_tokens": 9, "cache_creation_input_tokens": 4}, Usage(9, 0, 0, 4)),
        (
            {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 6, "cache_creation_tokens": 9}},
            Usage(9, 0, 6, 3),
        ),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cache_write_tokens": 4}}, Usage(9, 0, 0, 4)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cache_creation_input_tokens": 4}}, Usage(9, 0, 0, 4)),
        ({"prompt_tokens": -5, "completion_tokens": 2}, None),
        ({"prompt_tokens": True, "completion_tokens": 2}, None),
        ({"prompt_tokens": 10**9, "completion_tokens": 2}, Usage(10**9, 2)),
        ({"prompt_tokens": 10**9 + 1, "completion_tokens": 2}, None),
        ({"prompt_tokens": 1, "completion_tokens": 2**52}, None),
        ({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 2**52}, Usage(1, 2)),
        ({"completion_tokens": 2}, None),
        ("many", None),
        (None, None),
    ],
)
def test_usage_that_cannot_be_believed_is_none(usage: Any, expected: Usage | None) -> None:
    assert usage_of({"usage": usage}) == expected


def test_chunks_make_the_completion_that_was_streamed() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    made = from_chunks([
        chunk({"role": "assistant", "content": ""}, system_fingerprint="fp"),
        chunk({"content": "4"}),
        chunk({"content": "x"}, index=1),
        chunk({"content": "2", "reasoning_content": "hm"}),
        chunk(finish="stop"),
        chunk(index=1, finish="length"),
        {**chunk(), "choices": [], "usage": usage},
    ])  # fmt: skip
    first = {"role": "assistant", "content": "42", "reasoning_content": "hm", "refusal": None}
    second = {"role": "assistant", "content": "x", "refusal": None}
    assert made == {
        "id": "c1", "object": "chat.completion", "created": 5, "model": "up", "usage": usage,
        "system_fingerprint": "fp",
        "choices": [
            {"index": 0, "message": first, "finish_reason": "stop", "logprobs": None},
            {"index": 1, "message": second, "finish_reason": "length", "logprobs": None},
        ],
    }  # fmt: skip


def test_calls_of_tools_that_come_in_parts_are_put_together() -> None:
    def part(index: int, **fields: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": index, **fields}]})

    made = from_chunks([
        chunk({"role": "assistant", "content": None}),
        part(0, id="a", type="function", function={"name": "f", "arguments": ""}),
        part(0, function={"arguments": '{"x"'}),
        part(1, id="b", type="function", function={"name": "g", "arguments": "{}"}),
        part(0, function={"arguments": ": 1}"}),
        chunk(finish="tool_calls"),
    ])  # fmt: skip
    assert made is not None
    message = made["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_probabilities_of_tokens_are_put_together() -> None:
    logprobs = [{"token": "4", "logprob": -0.1}, {"token": "2", "logprob": -0.2}]
    chunks = [chunk({"content": each["token"]}) for each in logprobs]
    for each, logprob in zip(chunks, logprobs, strict=True):
        each["choices"][0]["logprobs"] = {"content": [logprob], "refusal": None}
    made = from_chunks([*chunks, chunk(finish="stop")])
    assert made is not None
    assert made["choices"][0]["logprobs"] == {"content": logprobs}


@pytest.mark.parametrize(
    "chunks",
    [
        [],
        [chunk({"content": "4"})],
        [{**chunk(), "choices": []}],
        [chunk({"content": "4"}, finish="stop"), chunk({"content": "x"}, index=1)],
    ],
)
def test_chunks_that_are_not_all_there_make_no_completion(chunks: list[dict[str, Any]]) -> None:
    assert from_chunks(chunks) is None


def test_of_two_choices_that_come_one_after_the_other_the_first_is_not_all() -> None:
    first, second = chunk({"content": "4"}, finish="stop"), chunk({"content": "2"}, index=1, finish="stop")
    assert from_chunks([first], choices=2) is None
    both = from_chunks([first, second], choices=2)
    assert both is not None
    assert [each["message"]["content"] for each in both["choices"]] == ["4", "2"]
    usage = {"choices": [], "usage": {"prompt_tokens": 1}}  # the end, also where the provider heeds no `n`
    assert from_chunks([first, usage], choices=2) is not None


@pytest.mark.parametrize(
    "odd",
    [
        {"choices": None}, {"choices": [None]}, {"choices": [{"index": -1}]}, {"choices": [{"index": 10**9}]},
        {"choices": [{"index": 0, "delta": "x"}]}, chunk({"tool_calls": [5, {"index": 10**9}, {"index": 0.5}]}),
        chunk({"tool_calls": [{"index": 0, "function": "f"}, {"index": 0, "function": {"name": "f"}}]}),
        chunk({"tool_calls": [{"index": 0, "function": {"name": "f"}}, {"index": 0, "function": "f"}]}),
        chunk({"content": 5}), {},
    ],
)  # fmt: skip
def test_an_odd_chunk_does_no_harm(odd: dict[str, Any]) -> None:
    made = from_chunks([chunk({"content": "4"}), odd, chunk({"content": "2"}, finish="stop")])
    assert made is not None
    assert made["choices"][0]["message"]["content"] == "42"
