"""What a provider is to the gateway: one call of one model, and what comes back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from ..errors import BadInput
from .config import LIMIT_FIELDS, ModelConfig
from .requests import EmbeddingRequest, GatewayRequest

OnChunk = Callable[[dict[str, Any]], Awaitable[None]]


class Usage(NamedTuple):
    """The tokens of a call, as the provider has counted them.

    Of the prompt's tokens, `cached_tokens` were read from the provider's cache, and `cache_write_tokens` put there.
    """

    prompt_tokens: int
    """Tokens of the request."""
    completion_tokens: int = 0
    """Tokens of the answer."""
    cached_tokens: int = 0
    cache_write_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """The tokens of prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class ProviderCall:
    """One call. `body`: the request in OpenAI's terms without `model`, as `upstream_body` makes it.

    `first_token_s`: how long a stream may take until its first chunk. `total_s`: how long the call may take. `id`: sent
    as the header Idempotency-Key, where the provider is called over HTTP directly; "": none. `start_within_s`: how long
    the call may wait for a connection, and where it is called over HTTP directly, also for connecting; None: no limit.
    """

    model: ModelConfig
    """The model that is called, as gateway.toml declares it."""
    body: dict[str, Any]
    first_token_s: float
    total_s: float
    id: str = ""
    start_within_s: float | None = None

    @property
    def choices(self) -> int:
        """How many choices the body asks for."""
        return self.body.get("n") or 1


@dataclass(frozen=True, slots=True)
class Reply:
    """What a provider has answered: the whole answer in OpenAI's shape, also after a stream.

    `usage`: None: the provider has not said, so the reservation is what the call counts. `first_token_s`: from the
    request to the first chunk of a stream; None without a stream. `latency_s`: from the request to the end.
    """

    answer: dict[str, Any] = field(repr=False)
    """The answer, with OpenAI's fields."""
    usage: Usage | None
    latency_s: float
    first_token_s: float | None = None


class Provider(Protocol):
    """Calls the models of one provider. No call is retried.

    All calls raise ProviderError, and what `on_chunk` raises. Cancelling one ends the provider's call too.
    """

    async def chat(self, call: ProviderCall, on_chunk: OnChunk | None = None) -> Reply:
        """Call a chat model. With `on_chunk` the answer is streamed: it is awaited with each chunk, in OpenAI's shape
        (`chat.completion.chunk`), in order; the last one has the usage and no choices.
        """

    async def embed(self, call: ProviderCall) -> Reply:
        """Call an embedding model."""

    async def close(self) -> None:
        """Close all connections. May be called twice."""


def upstream_body(
    request: GatewayRequest | EmbeddingRequest, model: ModelConfig, limit: int | None = None
) -> dict[str, Any]:
    """Return the request as it goes to the model's provider, without `model`: OpenAI's fields, and the options.

    `limit`: the most tokens of a completion; it stands in the field that the provider heeds, and in no other.

    Raises BadInput for an option that is not on the provider's allow list, and for media that are named by a URL or an
    id if the provider may not fetch any.
    """
    for name in request.options:
        if name not in model.options:
            allowed = ", ".join(sorted(model.options)) or "no other"
            provider = model.provider.name
            problem = (
                f"option {name[:80]!r} is not allowed for provider {provider}; allowed: OpenAI's common fields, and "
            )
            raise BadInput(problem + allowed)
    if isinstance(request, GatewayRequest) and not model.provider.media_urls and request.media_urls():
        raise BadInput(
            "an image, file or spoken answer is named by a URL or id, which provider "
            f'{model.provider.name} may not fetch: send its content as a "data:" URL'
        )
    body = {**request.upstream_fields(), **request.options}
    if limit is not None and model.provider.limit_field != "none":
        for name in LIMIT_FIELDS:
            body.pop(name, None)
        body[model.provider.limit_field] = limit
    return body
