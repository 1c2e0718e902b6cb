"""How many tokens a call takes at most: what is reserved of limits and budgets before the request is sent."""

from __future__ import annotations

from typing import Any, Final

from ..errors import BadInput
from .config import ModelConfig
from .requests import EmbeddingRequest, GatewayRequest, canonical_json

BASE_TOKENS: Final = 16  # of the frame around a conversation
MESSAGE_TOKENS: Final = 8  # of the frame around a message, beside what its JSON has
TOOLS_TOKENS: Final = 1_000  # of a provider's own instructions that go with tools: up to some 800 are documented
_SCHEMA_FIELDS = ("tools", "tool_choice", "response_format")


def tokens_at_most(request: GatewayRequest | EmbeddingRequest, model: ModelConfig) -> int:
    """Return an upper bound of the tokens that a call of this model uses: prompt and all completions.

    Raises BadInput if the request cannot fit in: a completion above what the model has.
    """
    return prompt_tokens_at_most(request, model) + completion_tokens_at_most(request, model)


def completion_tokens_at_most(request: GatewayRequest | EmbeddingRequest, model: ModelConfig) -> int:
    """Return an upper bound of the tokens of all completions: the request's, else the model's maximum, times `n`."""
    if isinstance(request, EmbeddingRequest):
        return 0
    most, asked = model.max_output_tokens, request.completion_tokens_max
    if most is not None and asked is not None and asked > most:
        raise BadInput(f"max_tokens {asked:,} is above what model {model.name} has: ask for at most {most:,}")
    return (asked or most or 0) * (request.n or 1)


def prompt_tokens_at_most(request: GatewayRequest | EmbeddingRequest, model: ModelConfig) -> int:
    """Return an upper bound of the prompt's tokens. It is never above the model's context, which media count as."""
    if isinstance(request, EmbeddingRequest):
        return _of_input(request.input)
    context = model.context
    if request.has_media and context is not None:
        return context
    bound = BASE_TOKENS + sum(MESSAGE_TOKENS + text_tokens_at_most(each) for each in request.messages)
    bound += sum(text_tokens_at_most(value) for name in _SCHEMA_FIELDS if (value := getattr(request, name)) is not None)
    if request.tools:
        bound += TOOLS_TOKENS
    return bound if context is None else min(bound, context)


def _of_input(given: str | list[Any]) -> int:
    if isinstance(given, str):
        return text_tokens_at_most(given) + MESSAGE_TOKENS
    if isinstance(given[0], int):
        return len(given) + MESSAGE_TOKENS
    return sum((len(each) if isinstance(each, list) else text_tokens_at_most(each)) + MESSAGE_TOKENS for each in given)


def text_tokens_at_most(data: Any) -> int:
    """Return an upper bound of the tokens of a text, or of data as JSON: a token has at least one byte."""
    return len(data.encode("utf-8", "surrogatepass") if isinstance(data, str) else canonical_json(data))
