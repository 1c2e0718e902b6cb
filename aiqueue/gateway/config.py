"""What gateway.toml says: providers and models, what a model costs and how long a call may take, and the budgets.

Limits are no part of it: they stand in limits.toml. A key never does either: the file names an environment variable or
a file that has it.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from ..errors import BadInput
from .budgets import Budget
from .prices import Price

KEY_CHARS_MAX: Final = 8_192
ATTEMPTS: Final = 5  # failed calls of a request, unless its model says otherwise

ProviderKind = Literal["openai", "litellm"]
LimitField = Literal["max_tokens", "max_completion_tokens", "none"]
LIMIT_FIELDS: Final = ("max_tokens", "max_completion_tokens")

# Options of chats and embeddings beside OpenAI's fields, which change neither the price nor who is called.
_OPTIONS: Mapping[str, frozenset[str]] = {
    "openai": frozenset({"metadata", "prompt_cache_key", "reasoning_effort", "safety_identifier", "verbosity"}),
    "litellm": frozenset({"reasoning_effort"}),
    "litellm/anthropic": frozenset({"thinking", "top_k"}),
    "litellm/bedrock": frozenset({"thinking", "top_k"}),
    "litellm/gemini": frozenset({"safety_settings", "thinking", "top_k"}),
    "litellm/vertex_ai": frozenset({"safety_settings", "thinking", "top_k"}),
    "litellm/cohere": frozenset({"input_type", "truncate"}),
    "litellm/ollama": frozenset({"keep_alive", "num_ctx", "repeat_penalty", "top_k"}),
}


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """A provider: its endpoint, and where its key is. The key itself is not in here, see `read_key`.

    - `kind`: "openai" is an OpenAI-compatible endpoint, called directly. "litellm" is every other one.
    - `base_url`: None: litellm knows the endpoint.
    - `key_env`, `key_file`: both None: the provider needs no key, or litellm finds it in its own variables.
    - `media_urls`: whether a request may name images and files by URL or id, for the provider to fetch.
    - `options`: which options are allowed beside the default ones.
    - `connections`: how many connections a worker has to it at most.
    - `limit_field`: the field that it heeds as the limit of a completion. "none": the limit is sent only as a request
      gives it.
    """

    name: str
    """Name by which models refer to the provider."""
    kind: ProviderKind
    base_url: str | None = None
    key_env: str | None = None
    key_file: Path | None = None
    media_urls: bool = False
    options: frozenset[str] = frozenset()
    connections: int = 100
    limit_field: LimitField = "max_tokens"

    def read_key(self) -> str | None:
        """Return the key; None if the provider needs none. Raises BadInput, without the key, if it is missing."""
        if self.key_env is not None:
            where, text = f"environment variable {self.key_env}", os.environ.get(self.key_env, "")
            remedy = "set it where the gateway's workers run"
        elif self.key_file is not None:
            where, remedy = f"file {self.key_file}", "write the key into it"
            try:
                with self.key_file.open(encoding="utf-8") as file:
                    text = file.read(KEY_CHARS_MAX + 2)
            except (OSError, UnicodeDecodeError) as error:
                why = (getattr(error, "strerror", "") or "is not text").lower()
                raise BadInput(f"provider {self.name}: the key cannot be read from the {where}: {why}") from None
        else:
            return None
        key = text.strip()
        if not key:
            raise BadInput(f"provider {self.name} has no key: {where} is empty or not set; {remedy}")
        if len(key) > KEY_CHARS_MAX or not (key.isascii() and key.isprintable()):
            raise BadInput(f"provider {self.name}: what the {where} has is no key: a key is one line of ASCII")
        return key


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A model as clients name it, and how it is called.

    - `upstream`: its name at the provider.
    - `context`: how many tokens prompt and completion may have together. `max_output_tokens`: how many a completion may
      have, which the provider is told if the request does not say. Both are None for embeddings only.
    - `tokens_per_byte`: how many tokens a byte of a prompt is reckoned as. 1 is an upper bound of any text; less is one
      only for texts like those that it was measured with.
    - `price`: None: that of litellm's price map, if the model is in there.
    - `fallbacks`: other models of the file, to be tried in this order when this one has failed for good.
    - `attempts`: how many calls of a request may end in timeouts, 5xx and the like; then the model has failed for good.
    - `first_token_s`: how long a stream may take until its first chunk. `total_s`: how long a call may take.
    """

    name: str
    """Name by which requests ask for the model."""
    provider: ProviderConfig
    """Provider that serves the model."""
    upstream: str
    kind: Literal["chat", "embedding"] = "chat"
    """"chat" for completions, "embedding" for embeddings."""
    context: int | None = None
    max_output_tokens: int | None = None
    tokens_per_byte: float = 1.0
    price: Price | None = None
    fallbacks: tuple[str, ...] = ()
    attempts: int = ATTEMPTS
    first_token_s: float = 60.0
    total_s: float = 600.0

    @property
    def options(self) -> frozenset[str]:
        """The options that a request for this model may have, see `GatewayRequest.options`."""
        kind = self.provider.kind
        return self.provider.options | _OPTIONS[kind] | _OPTIONS.get(f"{kind}/{self.upstream.partition('/')[0]}", _NONE)


_NONE: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """What gateway.toml says. `file`: its path, for messages."""

    file: str
    providers: Mapping[str, ProviderConfig] = field(default_factory=dict)
    """Providers of the file, by name."""
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Models of the file, by name."""
    budgets: Mapping[str, Budget] = field(default_factory=dict)
    """Budgets of the file, by tenant; "*" for each tenant without one."""

    def find_model(self, name: str, kind: Literal["chat", "embedding"] | None = None) -> ModelConfig:
        """Return the model of this name. Raises BadInput if there is none, or if it is of another `kind`."""
        model = self.models.get(name)
        if model is None:
            close = difflib.get_close_matches(name, self.models, n=1)
            known = ", ".join(sorted(self.models)[:20]) or "none"
            hint = f"did you mean {close[0]}?" if close else f"models of the gateway: {known}"
            raise BadInput(f"unknown model {name[:80]!r}; {hint}")
        if kind is not None and model.kind != kind:
            what = {"chat": "chat completions", "embedding": "embeddings"}
            raise BadInput(f"model {name} is for {what[model.kind]}, not for {what[kind]}")
        return model

    def budget_of(self, tenant: str) -> Budget | None:
        """Return the budget that holds for a tenant. None: it may spend without a limit."""
        return self.budgets.get(tenant) or self.budgets.get("*")
