"""What the gateway is asked for: chat completions and embeddings, in OpenAI's terms.

A request names a model of gateway.toml. It never says where the model is called, with which key, or by which library:
such fields are refused by name, wherever they stand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import pydantic

from ..errors import BadInput
from ..job import Message

REQUEST_BYTES_MAX: Final = 16 * 1024 * 1024  # of the whole request as JSON
MESSAGES_MAX: Final = 2_048
TOOLS_MAX: Final = 128
EMBEDDING_INPUTS_MAX: Final = 2_048
OPTIONS_MAX: Final = 32
STREAM_OPTIONS_MAX: Final = 16
STOPS_MAX: Final = 16
BIASES_MAX: Final = 1_024
TOKENS_MAX: Final = 10_000_000
ROLES: Final = ("system", "developer", "user", "assistant", "tool", "function")

# They would choose the host, the key, the library's behaviour or the price, or would retry behind the queue's back.
_REFUSED = frozenset({
    "allowed_openai_params", "base_model", "base_url", "caching", "client", "cooldown_time", "default_headers",
    "default_query", "deployment_id", "drop_params", "endpoint", "fallbacks", "guardrails", "headers",
    "hf_model_name", "host", "hostname", "http_client", "input_cost_per_second", "input_cost_per_token", "litellm",
    "max_fallbacks", "max_retries", "mcp_servers", "mock_delay", "mock_response", "mock_timeout", "mock_tool_calls",
    "model_config", "model_id", "model_info", "model_list", "num_retries", "organization", "output_cost_per_second",
    "output_cost_per_token", "preset_cache_key", "project", "prompt_id", "prompt_variables", "proxy",
    "retry_policy", "retry_strategy", "router", "rpm", "shared_session", "ssl_verify", "request_timeout",
    "stream_timeout", "timeout", "token", "tpm", "url", "use_in_pass_through", "use_litellm_proxy", "verbose",
})  # fmt: skip
_REFUSED_STARTS = (
    "api_", "aws_", "azure_", "cache_", "client_", "context_window_", "custom_", "extra_", "gcs_", "langfuse_",
    "litellm_", "mock_", "no-", "oci_", "prompt_management_", "s3_", "sagemaker_", "tenant_", "use_", "vertex_",
    "watsonx_",
)  # fmt: skip
_NESTED = ("parameters", "options")  # where a request has further fields
_OWN = frozenset({"request_id", "tenant_id", "timestamp", "reply_form", "options"})  # the gateway's, not OpenAI's


def is_refused_option(name: str) -> bool:
    """Return whether an option of this name is refused for every provider: no allow list may hold such a name."""
    plain = name.lower().replace("-", "_")
    return plain in _REFUSED or name.lower().startswith(_REFUSED_STARTS) or plain.startswith(_REFUSED_STARTS)


def _check_option(name: str) -> None:
    if is_refused_option(name):
        raise ValueError(
            f"option {name[:80]!r} is refused: endpoints, keys, retries and fallbacks are set in gateway.toml"
        )


def _check_number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


def _at_most(most: int) -> pydantic.BeforeValidator:
    """A limit of length that is looked at before the items: each wrong one makes an error, and millions take a GB."""

    def check(value: Any) -> Any:
        if isinstance(value, list | dict) and len(value) > most:
            raise ValueError(f"at most {most:,} items, not {len(value):,}")
        return value

    return pydantic.BeforeValidator(check)


_NOT_BOOL = pydantic.BeforeValidator(_check_number)
Temperature = Annotated[float, _NOT_BOOL, pydantic.Field(ge=0, le=2)]
Share = Annotated[float, _NOT_BOOL, pydantic.Field(ge=0, le=1)]
Penalty = Annotated[float, _NOT_BOOL, pydantic.Field(ge=-2, le=2)]
Bias = Annotated[float, _NOT_BOOL, pydantic.Field(ge=-100, le=100)]
Tokens = Annotated[int, _NOT_BOOL, pydantic.Field(ge=1, le=TOKENS_MAX)]
Choices = Annotated[int, _NOT_BOOL, pydantic.Field(ge=1, le=128)]
Seed = Annotated[int, _NOT_BOOL, pydantic.Field(ge=-(2**63), lt=2**63)]
TopLogprobs = Annotated[int, _NOT_BOOL, pydantic.Field(ge=0, le=20)]
Dimensions = Annotated[int, _NOT_BOOL, pydantic.Field(ge=1, le=65_536)]
Id = Annotated[str, pydantic.Field(min_length=1, max_length=1_024)]
ModelName = Annotated[str, pydantic.Field(min_length=1, max_length=256)]


class _ModelRequest(Message[dict[str, Any]], kind="gateway", family="gateway.requests"):
    """What all requests have. `request_id`: the job's id, see the wire contract. `tenant_id`: must be the job's tenant.

    `options`: options of the model's provider. Each must be on the provider's allow list, see `upstream_body`. Fields
    that OpenAI has beside those below, and unknown ones, are options.
    """

    model: ModelName
    """Name of the model in gateway.toml."""
    request_id: Id | None = None
    tenant_id: Id | None = None
    timestamp: str | float | None = None
    """When the request was made, as the guide's envelope says it. It is not used."""
    user: Annotated[str, pydantic.Field(max_length=512)] | None = None
    """OpenAI's name of an end user, for the provider."""
    options: dict[str, Any] = pydantic.Field(default_factory=dict, max_length=OPTIONS_MAX)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        return _sort_fields(cls, data) if isinstance(data, Mapping) else data

    @pydantic.model_validator(mode="after")
    def _check_size(self) -> _ModelRequest:
        size = len(canonical_json([self.upstream_fields(), self.options]))
        if size > REQUEST_BYTES_MAX:
            raise ValueError(f"the request has {size:,} bytes, above the limit of {REQUEST_BYTES_MAX:,}")
        return self

    @pydantic.model_serializer(mode="wrap")
    def _write(self, handler: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None and value != {}}

    def upstream_fields(self) -> dict[str, Any]:
        """Return the fields that a provider understands, without `model` and `options`, and none that is not given."""
        skipped = _OWN | {"model"}
        return {name: value for name, value in self.__dict__.items() if name not in skipped and value is not None}

    def fingerprint(self) -> str:
        """Return a hash of what is asked, in 64 hexadecimal digits. Equal requests have equal ones, in either form.

        `request_id`, `tenant_id`, `timestamp` and the form of the answer do not count.
        """
        asked = {**self.upstream_fields(), "model": self.model, "options": self.options, "kind": self.aiq_kind}
        return hashlib.sha256(canonical_json(asked)).hexdigest()


def _sort_fields(cls: type[_ModelRequest], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of either form as those of the class: what the class does not have becomes an option."""
    fields: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for place in ("", *_NESTED):
        given = data if not place else data.get(place)
        if given is None:
            continue
        if not isinstance(given, Mapping):
            raise ValueError(f"{place} must be a map")
        for name, value in given.items():
            if not place and name in _NESTED:
                continue
            if place == "options" and name in cls.model_fields:
                raise ValueError(f"options.{name}: {name} is a field of the request itself, not an option")
            if place == "parameters" and name in _OWN | {"model", "messages", "input", "prompt"}:
                raise ValueError(
                    f"parameters.{str(name)[:80]} is no parameter: give {str(name)[:80]} beside parameters"
                )
            target = fields if name in cls.model_fields or (not place and name == "prompt") else options
            if target is options:
                _check_option(str(name))
                if value is None and place != "options":
                    continue  # OpenAI's null is "not given"
            if name in target and target[name] is not None:
                raise ValueError(f"{str(name)[:80]} is given twice")
            target[str(name)] = value
            if len(options) > OPTIONS_MAX:
                raise ValueError(f"more than {OPTIONS_MAX} options: all unknown fields are options")
    return {**fields, "options": options}


class GatewayRequest(_ModelRequest, kind="gateway.request"):
    """A chat completion, in the terms of OpenAI's chat completions. The result is a `chat.completion` object.

    The short form ``{request_id, prompt, model, parameters: {temperature, max_tokens, …}}`` is read too: its prompt
    becomes a message of the user, and `reply_form` "short", so that the result is ``{request_id, response, tokens,
    cost}``. Limits: 16 MiB of JSON, 2,048 messages, 128 tools.
    """

    messages: list[dict[str, Any]] = pydantic.Field(min_length=1, max_length=MESSAGES_MAX)
    """The conversation, as OpenAI's messages."""
    tools: list[dict[str, Any]] | None = pydantic.Field(default=None, max_length=TOOLS_MAX)
    """Functions that the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """Which tool the model must call, or "auto", "none" or "required"."""
    parallel_tool_calls: bool | None = None
    """Whether the model may call several tools at once."""
    response_format: dict[str, Any] | None = None
    """Form of the answer, such as a JSON Schema."""
    stream: bool = False
    """Whether the answer is also streamed in chunks."""
    stream_options: Annotated[dict[str, bool] | None, _at_most(STREAM_OPTIONS_MAX)] = None
    """OpenAI's options of a stream."""
    temperature: Temperature | None = None
    """How random the answer is, from 0 to 2."""
    top_p: Share | None = None
    """Share of the most probable tokens that the model chooses from."""
    frequency_penalty: Penalty | None = None
    """Penalty for tokens that are frequent in the answer so far."""
    presence_penalty: Penalty | None = None
    """Penalty for tokens that are in the answer so far."""
    max_tokens: Tokens | None = None
    """Maximum of tokens in a choice of the answer."""
    max_completion_tokens: Tokens | None = None
    """OpenAI's newer name of `max_tokens`."""
    n: Choices | None = None
    """How many choices the answer has."""
    stop: Annotated[str | list[str] | None, _at_most(STOPS_MAX)] = None
    """Texts at which the answer ends."""
    seed: Seed | None = None
    """Number with which equal requests have equal answers, if the provider can do that."""
    logprobs: bool | None = None
    """Whether the answer has the log probability of each token."""
    top_logprobs: TopLogprobs | None = None
    """For how many tokens at each place the answer has log probabilities."""
    logit_bias: Annotated[dict[str, Bias] | None, _at_most(BIASES_MAX)] = None
    """By token, by how much its probability is changed, from -100 to 100."""
    reply_form: Literal["openai", "short"] = "openai"

    @pydantic.model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        fields = _sort_fields(cls, data)
        prompt = fields.pop("prompt", None)
        if prompt is None:
            return fields
        if fields.get("messages") is not None:
            raise ValueError("prompt and messages are both given: give one of them")
        if not isinstance(prompt, str):
            raise ValueError("prompt must be a text")
        return {**fields, "messages": [{"role": "user", "content": prompt}], "reply_form": "short"}

    @pydantic.field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, message in enumerate(messages):
            _check_message(f"messages.{number}", message)
        return messages

    @pydantic.field_validator("tools")
    @classmethod
    def _check_tools(cls, tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        for number, tool in enumerate(tools or ()):
            kind = tool.get("type")
            if kind not in ("function", "custom"):  # others have a server's URL in them, or are billed by the call
                raise ValueError(f"tools.{number}: type must be function or custom, not {_shown(kind)}")
            name = tool[kind].get("name") if isinstance(tool.get(kind), dict) else None
            if not isinstance(name, str) or not name:
                raise ValueError(f"tools.{number}: {kind}.name is missing")
            _check_keys(f"tools.{number}", tool, ("type", kind))
        return tools

    @property
    def completion_tokens_max(self) -> int | None:
        """The most tokens of one choice that the request allows: the larger one of its two limits, because providers
        differ in which one they heed. None: no limit.
        """
        return max((each for each in (self.max_tokens, self.max_completion_tokens) if each is not None), default=None)

    def media_urls(self) -> list[str]:
        """Return what the messages name by a URL or by a provider's id, and do not hold themselves."""
        named = [
            url
            for message in self.messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
            for url in _urls_of(part)
            if not url.startswith("data:")
        ]
        spoken = [
            each["audio"] for each in self.messages if each.get("audio")
        ]  # an earlier answer, by the provider's id
        return named + [str(each.get("id") if isinstance(each, dict) else each) for each in spoken]

    @property
    def has_media(self) -> bool:
        """Whether anything in a message is not text, so that its tokens do not follow from its bytes."""
        contents = [each["content"] for each in self.messages if isinstance(each.get("content"), list)]
        return any(each.get("audio") for each in self.messages) or any(
            part.get("type") not in ("text", "refusal") for content in contents for part in content
        )


class EmbeddingRequest(_ModelRequest, kind="gateway.embedding"):
    """Embeddings of one text or several, in OpenAI's terms. The result is OpenAI's list of embeddings.

    `input`: a text, a list of at most 2,048 texts, or the same as tokens. Limit: 16 MiB of JSON.
    """

    input: str | list[str] | list[int] | list[list[int]]
    dimensions: Dimensions | None = None
    """How many numbers each embedding has."""
    encoding_format: Literal["float", "base64"] | None = None
    """"float" for lists of numbers, "base64" for texts."""

    @pydantic.field_validator("input", mode="before")
    @classmethod
    def _check_input(cls, given: Any) -> Any:
        """Here and not by the type, which makes an error of each wrong item: millions take a GB."""
        if not given:
            raise ValueError("must not be empty")
        if isinstance(given, list) and not _is_all(given, int):
            if len(given) > EMBEDDING_INPUTS_MAX:
                raise ValueError(f"at most {EMBEDDING_INPUTS_MAX:,} inputs, not {len(given):,}")
            if not all(given):
                raise ValueError("must not hold an empty text")
            if not _is_all(given, str) and not all(isinstance(each, list) and _is_all(each, int) for each in given):
                raise ValueError("must be a text, a list of texts, a list of tokens, or a list of lists of tokens")
        return given


def _is_all(items: list[Any], kind: type) -> bool:
    return all(type(each) is kind for each in items)


# -- the content of messages

_MESSAGE_KEYS = (
    "role", "content", "name", "tool_calls", "tool_call_id", "refusal", "audio", "function_call", "annotations",
    "reasoning", "reasoning_content", "thinking_blocks", "cache_control",
)  # fmt: skip
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {  # by type: the field that holds it, and that field's own fields
    "text": ("text", ()),
    "refusal": ("refusal", ()),
    "image_url": ("image_url", ("url", "detail", "format")),
    "input_audio": ("input_audio", ("data", "format")),
    "file": ("file", ("file_data", "file_id", "filename", "format")),
}


def _check_message(where: str, message: dict[str, Any]) -> None:
    _check_keys(where, message, _MESSAGE_KEYS)
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}.role must be one of {', '.join(ROLES)}, not {_shown(message.get('role'))}")
    content = message.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            _check_part(f"{where}.content.{number}", part)
    elif content is None:
        if message["role"] != "assistant":
            raise ValueError(f"{where}.content is missing")
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content must be a text or a list of parts, not {_shown(content)}")


def _check_part(where: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str) or kind not in _PARTS:
        raise ValueError(f"{where}.type must be one of {', '.join(_PARTS)}, not {_shown(kind)}")
    field, keys = _PARTS[kind]
    _check_keys(where, part, ("type", field, "cache_control"))
    held = part.get(field)
    if isinstance(held, str) and (not keys or kind == "image_url"):
        return
    if not isinstance(held, dict) or not keys:
        raise ValueError(f"{where}.{field} must be a {'map' if keys else 'text'}, not {_shown(held)}")
    _check_keys(f"{where}.{field}", held, keys)
    if not all(value is None or isinstance(value, str) for value in held.values()):
        raise ValueError(f"{where}.{field}: all its fields must be texts")


def _urls_of(part: dict[str, Any]) -> list[str]:
    """Return the URLs and file ids of a part of a message; empty if the part holds its content itself."""
    held = part.get("image_url")
    if held is not None:
        return [held if isinstance(held, str) else held.get("url") or ""]
    if part.get("type") != "file":
        return []
    data, by_id = part["file"].get("file_data"), part["file"].get("file_id")
    return [*([by_id] if by_id is not None else []), *([data] if isinstance(data, str) and "://" in data[:64] else [])]


def _check_keys(where: str, given: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{where}: unknown field {_shown(key)}; known: {', '.join(known)}")


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "…"


def canonical_json(data: Any) -> bytes:
    """Return data as JSON whose bytes are the same for equal data. Raises ValueError for what JSON does not have."""
    try:
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"the request cannot be written as JSON: {error}") from None
    return text.encode("utf-8", "surrogatepass")


def check_tenant(request: _ModelRequest, tenant: str) -> None:
    """Raise BadInput if the request names another tenant than the job's."""
    if request.tenant_id is not None and request.tenant_id != tenant:
        raise BadInput(f"tenant_id {_shown(request.tenant_id)} is not the tenant of this request, {tenant}")
