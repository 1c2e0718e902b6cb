"""How many tokens a call takes at most. The tokenizers are those that litellm brings; without it, their tests skip."""

from __future__ import annotations

import functools
import os
import time
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiqueue.errors import BadInput
from aiqueue.gateway import (
    EmbeddingRequest,
    GatewayRequest,
    ModelConfig,
    ProviderConfig,
    bound_tokens,
    token_bound,
    tokens_at_most,
)
from aiqueue.gateway.token_bound import BASE_TOKENS, MESSAGE_TOKENS, TOOLS_TOKENS, prompt_tokens_at_most

MODEL = ModelConfig("m", ProviderConfig("p", "openai"), "up", context=8_000, max_output_tokens=1_000)
FRAME = BASE_TOKENS + MESSAGE_TOKENS
with_litellm = pytest.mark.skipif(
    find_spec("litellm") is None, reason="litellm is not installed: run `make test-gateway`"
)


def bound(model: ModelConfig = MODEL, **fields: Any) -> int:
    asked = {"model": "m", "messages": [{"role": "user", "content": "0123456789"}], **fields}
    return tokens_at_most(GatewayRequest.model_validate(asked), model)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"max_tokens": 100}, FRAME + 10 + 100),
        ({"max_tokens": 100, "n": 3}, FRAME + 10 + 300),
        ({"max_tokens": 100, "max_completion_tokens": 50}, FRAME + 10 + 100),
        ({}, FRAME + 10 + 1_000),
        ({"n": 2}, FRAME + 10 + 2_000),
        ({"max_tokens": 1, "messages": [{"role": "user", "content": "\u00fc\U0001f600"}]}, FRAME + 6 + 1),
        ({"max_tokens": 1, "messages": [{"role": "user", "content": "\ufdfa"}]}, FRAME + 33 + 1),
        ({"max_tokens": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]}, FRAME + 2 + 1),
        ({"max_tokens": 1, "messages": [{"role": "user", "content": "x" * 9_000}]}, 8_000 + 1),
        ({"max_tokens": 1, "response_format": {"type": "text"}}, FRAME + 10 + len('{"type":"text"}') + 1),
    ],
)
def test_the_bound_is_a_token_a_byte_and_the_longest_completions(fields: dict[str, Any], tokens: int) -> None:
    assert bound(**fields) == tokens


def test_tools_count_with_the_providers_instructions_for_them() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    assert bound(tools=[tool]) - bound() == TOOLS_TOKENS + len('[{"function":{"name":"f"},"type":"function"}]')


def test_a_shape_of_the_answer_counts_as_a_tool_where_litellm_may_make_one_of_it() -> None:
    by_litellm = replace(MODEL, provider=ProviderConfig("p", "litellm"))
    shape = {"type": "json_object"}
    assert bound(by_litellm, response_format=shape) - bound(response_format=shape) == TOOLS_TOKENS
    assert bound(by_litellm) == bound()


def test_an_image_counts_as_the_whole_context() -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]
    assert bound(messages=[{"role": "user", "content": content}], max_tokens=5) == 8_005


def test_calls_of_tools_in_the_conversation_count() -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "x" * 500}}]
    messages = [{"role": "assistant", "content": None, "tool_calls": calls}]
    assert bound(messages=messages, max_tokens=1) > FRAME + 500


def test_a_completion_above_the_models_maximum_is_refused() -> None:
    with pytest.raises(BadInput, match="max_tokens 1,001 is above what model m has: ask for at most 1,000"):
        bound(max_tokens=1_001)


@pytest.mark.parametrize(
    ("maximum", "prompt", "limit", "completion"),
    [
        (4_000, 7_000, 4_000, 4_000),  # of tokens there are fewer than bytes, so the limit is likely to fit
        (7_000, 900, 7_000, 7_000),
        (7_000, 1_000, None, 8_000),  # the limit may not fit, and the provider's own one may be above it
        (8_000, 100, None, 8_000),
    ],
)
def test_a_completion_without_a_limit_gets_the_models_maximum_where_that_fits_and_else_may_fill_the_context(
    maximum: int, prompt: int, limit: int | None, completion: int
) -> None:
    request = GatewayRequest(model="m", messages=[{"role": "user", "content": "x" * prompt}])
    found = bound_tokens(request, replace(MODEL, max_output_tokens=maximum))
    assert (found.limit, found.completion) == (limit, completion)
    assert found.total == (found.prompt + completion if limit else 8_000)


def test_a_lower_share_of_tokens_is_rounded_up() -> None:
    model = ModelConfig("m", MODEL.provider, "up", context=8_000, max_output_tokens=1, tokens_per_byte=0.25)
    assert bound(model) == FRAME + 3 + 1


@pytest.mark.parametrize(
    ("given", "tokens"),
    [("abc", 3 + MESSAGE_TOKENS), (["abc", "d"], 4 + 2 * MESSAGE_TOKENS), ([1, 2], 2 + MESSAGE_TOKENS),
     ([[1, 2], [3]], 3 + 2 * MESSAGE_TOKENS)],
)  # fmt: skip
def test_embeddings_count_all_their_inputs(given: Any, tokens: int) -> None:
    assert tokens_at_most(EmbeddingRequest(model="m", input=given), MODEL) == tokens


@pytest.mark.parametrize("marks", ["\u0300\u0316", "\u0f73\u0316", "\u0315\u0e48"])
def test_the_bound_of_many_marks_in_a_row_is_found_soon(marks: str) -> None:
    """A normaliser sorts them, which takes the square of their number: minutes, for a worker with all its calls."""
    text = "a" + marks[0] * 200_000 + marks[1] * 200_000
    started = time.monotonic()
    assert 800_001 <= bound(replace(MODEL, context=10**8), messages=[{"role": "user", "content": text}]) < 2_000_000
    assert time.monotonic() - started < 20


@given(
    st.text(st.sampled_from("a\u00e9\u1ea1\ud55c\u1100\u1161\u0300\u0316\u0f73\u0958\ufdfa\u09c7\u09be"), max_size=30)
)
def test_the_bound_of_a_text_is_no_smaller_than_its_normalised_form(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for most in (0, 100):  # a bound, and the form itself
            patch.setattr(token_bound, "SORTED_MAX", most)
            counted = token_bound._bytes(text)
            assert counted >= max(len(text.encode()), len(unicodedata.normalize("NFKC", text).encode()))


@functools.cache
def tokenizers() -> dict[str, Callable[[str], int]]:
    from tokenizers import Tokenizer  # noqa: PLC0415

    from aiqueue.gateway.litellm_provider import load_litellm  # noqa: PLC0415

    home = Path(load_litellm().__file__).parent / "litellm_core_utils" / "tokenizers"
    os.environ["TIKTOKEN_CACHE_DIR"] = str(home)
    import tiktoken  # noqa: PLC0415

    counts: dict[str, Callable[[str], int]] = {}
    for name in ("cl100k_base", "o200k_base", "p50k_base"):
        encoding = tiktoken.get_encoding(name)
        counts[name] = lambda text, encoding=encoding: len(encoding.encode(text, disallowed_special=()))
    for name in ("anthropic", "deepseek"):
        tokenizer = Tokenizer.from_str((home / f"{name}_tokenizer.json").read_text())
        counts[name] = lambda text, tokenizer=tokenizer: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return counts


@with_litellm
@pytest.mark.filterwarnings("default")
@given(st.text(max_size=200))
@example("qxjqzkvwqjx" * 5)
@example("\ufdfa" * 5)
@example("\U00010330\u1234\U0001fabc" * 9)
@example(" \n\t" * 30)
@example("0" * 50)
def test_no_tokenizer_makes_more_tokens_of_a_text_than_its_bound(text: str) -> None:
    request = GatewayRequest(model="m", messages=[{"role": "user", "content": text}])
    most = prompt_tokens_at_most(request, MODEL) - FRAME
    assert {name: count(text) for name, count in tokenizers().items() if count(text) > most} == {}
