"""Requests of the gateway: what is read, in which forms, and what is refused. No server."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pydantic
import pytest

from aiqueue.codec import decode_map
from aiqueue.errors import BadInput
from aiqueue.gateway import EmbeddingRequest, GatewayRequest, check_tenant
from aiqueue.gateway.requests import MESSAGES_MAX
from aiqueue.payload import encode_message, parse_message

HELLO: dict[str, Any] = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


def chat(**fields: Any) -> GatewayRequest:
    return GatewayRequest.model_validate({**HELLO, **fields})


def part(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [fields]}]}


def refusal(**fields: Any) -> str:
    with pytest.raises(pydantic.ValidationError) as caught:
        chat(**fields)
    return str(caught.value.errors()[0]["msg"])


def test_importing_the_gateway_imports_no_library_of_http() -> None:
    heavy = ("aiohttp", "litellm", "httpx", "starlette", "uvicorn")
    code = f"import sys, aiqueue, aiqueue.gateway; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"


WHOLE: dict[str, Any] = {
    "model": "small",
    "messages": [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": "data:"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function", "function": {}}]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "top_p": 1,
    "max_completion_tokens": 100,
    "n": 2,
    "stop": ["\n", "END"],
    "seed": -5,
    "logit_bias": {"50256": -100},
    "user": "u-1",
    "reasoning_effort": "low",
}  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        WHOLE,
        {
            "model": "m",
            "prompt": "hi",
            "request_id": "r1",
            "parameters": {"temperature": 0, "max_tokens": 5, "top_k": 3},
        },
    ],
)
def test_a_request_arrives_as_it_was_enqueued(fields: dict[str, Any]) -> None:
    request = GatewayRequest.model_validate(fields)
    body = decode_map(encode_message(request), "application/cbor")
    assert parse_message(GatewayRequest, body) == request
    assert None not in body.values()


def test_a_whole_chat_completion_goes_upstream_as_it_was_given() -> None:
    request = GatewayRequest.model_validate(WHOLE)
    given = {name: value for name, value in WHOLE.items() if name not in ("model", "reasoning_effort")}
    assert request.upstream_fields() == given
    assert request.options == {"reasoning_effort": "low"}


def test_the_short_form_is_a_message_of_the_user_with_its_parameters() -> None:
    request = GatewayRequest.model_validate({
        "request_id": "r1", "prompt": "hi", "model": "m", "tenant_id": "acme", "timestamp": "2026-01-30T00:00:00Z",
        "parameters": {"temperature": 0.2, "max_tokens": 9},
    })  # fmt: skip
    assert request.messages == [{"role": "user", "content": "hi"}]
    assert (request.temperature, request.max_tokens, request.reply_form) == (0.2, 9, "short")
    assert chat().reply_form == "openai"


def test_a_null_counts_as_not_given() -> None:
    assert chat(temperature=None, tools=None, reasoning_effort=None) == chat()


@pytest.mark.parametrize(
    "name",
    [
        "api_base", "base_url", "api_key", "extra_headers", "extra_body", "headers", "custom_llm_provider", "fallbacks",
        "mock_response", "timeout", "model_list", "num_retries", "litellm_params", "aws_access_key_id",
        "vertex_project", "azure_ad_token", "API_BASE", "Api-Key", "context_window_fallback_dict",
        "allowed_openai_params", "proxy", "mock_tool_calls", "prompt_id", "no-log", "organization",
        "deployment_id", "ssl_verify", "client",
    ],
)  # fmt: skip
@pytest.mark.parametrize("place", ["", "parameters", "options"])
def test_fields_that_choose_who_is_called_are_refused_by_name_wherever_they_stand(name: str, place: str) -> None:
    said = refusal(**({place: {name: "http://evil.example"}} if place else {name: "http://evil.example"}))
    assert f"option '{name}' is refused" in said
    assert "gateway.toml" in said
    assert "evil" not in said


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"messages": []}, "at least 1 item"),
        ({"messages": [{"role": "user", "content": "x"}] * (MESSAGES_MAX + 1)}, "at most 2048 items"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages.0.role must be one of system, developer"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content must be a text or a list of parts, not 5"),
        ({"messages": [{"role": "user", "content": "x", "api_base": "y"}]}, "messages.0: unknown field 'api_base'"),
        (part(type="video"), "messages.0.content.0.type must be one of text,"),
        (part(type=["text"]), "messages.0.content.0.type must be one of text,"),
        (part(type="text", text={"a": 1}), "messages.0.content.0.text must be a text"),
        (part(type="image_url", image_url={"url": "data:", "headers": {}}), "image_url: unknown field 'headers'"),
        (part(type="file", file="x"), "messages.0.content.0.file must be a map"),
        ({"tools": [{"type": "mcp", "server_url": "http://evil"}]}, "tools.0: type must be function or custom"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0: function.name is missing"),
        ({"temperature": 2.1}, "less than or equal to 2"),
        ({"temperature": float("nan")}, "greater than or equal to 0"),
        ({"max_tokens": True}, "must be a number, not true or false"),
        ({"n": 129}, "less than or equal to 128"),
        ({"seed": 2**63}, "less than 922337203685477"),
        ({"stop": ["x"] * 17}, "at most 16 items, not 17"),
        ({"logit_bias": {"5": float("nan")}}, "greater than or equal to -100"),
        ({"response_format": {"x": float("inf")}}, "not JSON compliant"),
        ({"top_k": float("nan")}, "not JSON compliant"),
        ({"top_k": b"x"}, "not JSON serializable"),
        ({"options": {"stream": True}}, "options.stream: stream is a field of the request itself"),
        ({"top_k": 1, "options": {"top_k": 2}}, "top_k is given twice"),
        ({"parameters": {"model": "other"}}, "parameters.model is no parameter: give model beside parameters"),
        ({"parameters": 5}, "parameters must be a map"),
        ({"prompt": "and a prompt"}, "prompt and messages are both given"),
        ({"prompt": 5, "messages": None}, "prompt must be a text"),
        ({"model": ""}, "at least 1 character"),
        ({"options": {f"o{number}": 1 for number in range(33)}}, "more than 32 options"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_its_place(fields: dict[str, Any], problem: str) -> None:
    assert problem in refusal(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [None] * 3_000}, {"input": [[None] * 3_000]}, {"input": [1, *["x"] * 3_000]},
        {"stop": [None] * 3_000}, {"tools": [None] * 3_000}, {"messages": [None] * 3_000},
        {"stream_options": {str(number): "x" for number in range(3_000)}},
        {"logit_bias": {str(number): "x" for number in range(3_000)}},
        {"parameters": {f"x{number}": 1 for number in range(3_000)}},
    ],
)  # fmt: skip
def test_many_wrong_items_are_few_errors(fields: dict[str, Any]) -> None:
    """Millions of them, which are a few MB, would take a worker GBs and half a minute."""
    kind = EmbeddingRequest if "input" in fields else GatewayRequest
    with pytest.raises(pydantic.ValidationError) as refused:
        kind.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    assert refused.value.error_count() < 10


def test_a_request_of_20_mb_is_refused() -> None:
    said = refusal(messages=[{"role": "user", "content": "x" * 20_000_000}])
    assert "above the limit of 16,777,216" in said


def test_equal_questions_have_equal_fingerprints_whatever_their_form_and_id() -> None:
    short = GatewayRequest.model_validate({"request_id": "a", "prompt": "hello", "model": "small", "timestamp": 1.5})
    assert short.fingerprint() == chat(request_id="b", tenant_id="acme").fingerprint()
    others = [chat(temperature=0.1), chat(model="big"), chat(top_k=1), chat(stream=True)]
    assert len({short.fingerprint(), *(each.fingerprint() for each in others)}) == 5


def test_what_media_a_request_names_but_does_not_hold_is_known() -> None:
    def urls(**fields: Any) -> list[str]:
        return chat(**part(**fields)).media_urls()

    assert urls(type="image_url", image_url={"url": "http://evil/x.png"}) == ["http://evil/x.png"]
    assert urls(type="image_url", image_url="gs://bucket/x") == ["gs://bucket/x"]
    assert urls(type="file", file={"file_id": "file-of-another-tenant"}) == ["file-of-another-tenant"]
    assert urls(type="file", file={"file_data": "https://evil/x.pdf"}) == ["https://evil/x.pdf"]
    both = {"file_id": "data:x", "file_data": "http://evil/x.pdf"}
    assert urls(type="file", file=both) == ["http://evil/x.pdf"]
    assert urls(type="image_url", image_url={"url": "data:image/png;base64,AAAA"}) == []
    assert urls(type="file", file={"file_data": "JVBERi0xLjQ="}) == []
    assert urls(type="text", text="see http://example.com") == []
    spoken = chat(messages=[{"role": "assistant", "audio": {"id": "audio-of-another-tenant"}}])
    assert (spoken.media_urls(), spoken.has_media) == (["audio-of-another-tenant"], True)


@pytest.mark.parametrize("given", ["text", ["a", "b"], [1, 2, 3], [[1, 2], [3]]])
def test_embeddings_are_of_texts_or_tokens(given: Any) -> None:
    request = EmbeddingRequest(model="e", input=given, encoding_format="base64")
    assert request.upstream_fields() == {"input": given, "encoding_format": "base64"}
    assert parse_message(EmbeddingRequest, decode_map(encode_message(request), "application/cbor")) == request


@pytest.mark.parametrize("given", ["", [], [""], ["a", ""], [[]], ["x"] * 2_049, [[1], "a"]])
def test_embeddings_of_nothing_or_too_much_are_refused(given: Any) -> None:
    with pytest.raises(pydantic.ValidationError):
        EmbeddingRequest(model="e", input=given)


def test_a_request_that_names_another_tenant_is_refused() -> None:
    check_tenant(chat(tenant_id="acme"), "acme")
    check_tenant(chat(), "acme")
    with pytest.raises(BadInput, match="tenant_id 'other' is not the tenant of this request, acme"):
        check_tenant(chat(tenant_id="other"), "acme")
