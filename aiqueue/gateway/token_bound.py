"""How many tokens a call takes at most: what is reserved of limits and budgets before the request is sent.

The bound of a text is its number of bytes, because a token has at least one. Nothing lower is true for all texts and
tokenizers: random Unicode has 1.03 bytes in a token of p50k, random ASCII 1.16. English has 3.3 to 3.8, code 3.6 to
4.3, JSON 2.5, Chinese 1.5 to 6. A model's `tokens_per_byte` lowers the bound where all its prompts are such texts.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from typing import Any, Final, Literal, NamedTuple

from ..errors import BadInput
from .config import ModelConfig
from .requests import EmbeddingRequest, GatewayRequest, canonical_json

BASE_TOKENS: Final = 32  # of the frame around a conversation, which in some models' templates has a few sentences
MESSAGE_TOKENS: Final = 8  # of the frame around a message
TOOLS_TOKENS: Final = 1_000  # of a provider's own instructions that go with tools: up to some 800 are documented
MARKS_MAX: Final = 64  # combining marks in a row: no language has so many
SORTED_MAX: Final = 100_000  # characters of a text with marks
_SCHEMA_FIELDS = ("tools", "tool_choice", "response_format")
_FREE_FIELDS = ("role", "content", "cache_control")


class TokenBound(NamedTuple):
    """What a call takes at most. `completion`: of all its choices. `limit`: of one choice, as the provider is told it;
    None: it is not told.
    """

    prompt: int
    """Upper bound of the tokens of the prompt."""
    completion: int
    limit: int | None
    total: int
    """Upper bound of all tokens of the call."""


def bound_tokens(request: GatewayRequest | EmbeddingRequest, model: ModelConfig) -> TokenBound:
    """Return upper bounds of the tokens that a call of this model uses.

    Without a limit in the request, the model's maximum is sent: the provider's own one may be above it. A provider may
    refuse a limit that does not fit into the context beside the prompt. So one above half of the context is sent only
    where it is sure to fit. Elsewhere a completion may fill the context.

    Raises BadInput if the request asks for a completion above what the model has.
    """
    prompt = prompt_tokens_at_most(request, model)
    if isinstance(request, EmbeddingRequest):
        return TokenBound(prompt, 0, None, prompt)
    most, asked, context, choices = (
        model.max_output_tokens,
        request.completion_tokens_max,
        model.context,
        request.n or 1,
    )
    if most is not None and asked is not None and asked > most:
        raise BadInput(f"max_tokens {asked:,} is above what model {model.name} has: ask for at most {most:,}")
    if asked is not None:
        own = getattr(request, model.provider.limit_field, None)
        return TokenBound(prompt, asked * choices, own or asked, prompt + asked * choices)
    if most is None or context is None or model.provider.limit_field == "none":
        completion = (most or 0) * choices
        return TokenBound(prompt, completion, most, prompt + completion)
    if 2 * most <= context or prompt + most <= context:
        return TokenBound(prompt, most * choices, most, prompt + most * choices)
    return TokenBound(prompt, context * choices, None, context * choices)


def tokens_at_most(request: GatewayRequest | EmbeddingRequest, model: ModelConfig) -> int:
    """Return an upper bound of the tokens that a call of this model uses: prompt and all completions. See
    `bound_tokens`.
    """
    return bound_tokens(request, model).total


def prompt_tokens_at_most(request: GatewayRequest | EmbeddingRequest, model: ModelConfig) -> int:
    """Return an upper bound of the prompt's tokens, at most the model's context. Media count as all of it."""
    share = model.tokens_per_byte
    if isinstance(request, EmbeddingRequest):
        return _of_input(request.input, share)
    context = model.context
    if request.has_media and context is not None:
        return context
    size = sum(_message_bytes(each) for each in request.messages)
    size += sum(_bytes(value) for name in _SCHEMA_FIELDS if (value := getattr(request, name)) is not None)
    bound = BASE_TOKENS + MESSAGE_TOKENS * len(request.messages) + math.ceil(size * share)
    if request.tools or (request.response_format and model.provider.kind == "litellm"):  # it makes a tool of the format
        bound += TOOLS_TOKENS
    return bound if context is None else min(bound, context)


def _of_input(given: str | list[Any], share: float) -> int:
    """Return an upper bound of the tokens of what is to be embedded."""
    items = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    return sum(
        MESSAGE_TOKENS + (len(each) if isinstance(each, list) else math.ceil(_bytes(each) * share)) for each in items
    )


def _message_bytes(message: dict[str, Any]) -> int:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content or ""}]
    rest = {name: value for name, value in message.items() if name not in _FREE_FIELDS and value is not None}
    return sum(_bytes(each.get("text") or each) for each in parts) + (_bytes(rest) if rest else 0)


def _bytes(data: Any) -> int:
    """Return the bytes of a text, or of data as JSON. A tokenizer may normalise it to more."""
    encoded = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else canonical_json(data)
    if encoded.isascii():
        return len(encoded)
    text = encoded.decode("utf-8", "surrogatepass")
    return max(len(encoded), _normalised_bytes(text))


def _normalised_bytes(text: str) -> int:
    """Return the bytes of a text in the form NFKC, or an upper bound of them where making it would take long: marks are
    sorted, which takes the square of their number.
    """
    count = Counter(text)
    marks = [each for each in count if unicodedata.combining(unicodedata.normalize("NFKD", each)[0])]
    if marks and len(text) <= SORTED_MAX and not re.search(f"[{''.join(map(re.escape, marks))}]{{{MARKS_MAX}}}", text):
        return _size(unicodedata.normalize("NFKC", text))
    form: Literal["NFKD", "NFKC"] = "NFKD" if marks else "NFKC"  # without marks, no character changes another one
    return sum(_size(unicodedata.normalize(form, each)) * number for each, number in count.items())


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))
