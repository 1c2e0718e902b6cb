"""Envelopes, made and opened."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import cbor2
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiqueue import codec
from aiqueue.bus import Msg, create_envelope, decode, encode
from aiqueue.bus.message import data_of_answer, to_result
from aiqueue.errors import BadInput, DecodeError, EncodeError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers() | st.floats(allow_nan=False)
IN_JSON = st.none() | st.booleans() | NUMBERS | TEXT
JSON = st.recursive(IN_JSON, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
IN_CBOR = IN_JSON | st.binary(max_size=20)
CBOR = st.recursive(IN_CBOR, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))


def is_envelope(value: Any) -> bool:
    return isinstance(value, dict) and {"message_type", "schema_version"} <= value.keys()


@given(JSON)
@example(4)
@example(12)
@example(-3)
@example(True)
@example(None)
@example("failure")
@example('"quoted"')
@example(1e16)
@example(float("inf"))
def test_what_is_encoded_in_json_comes_back_also_as_a_result(value: Any) -> None:
    body, meant = encode(value), codec.to_plain(value)
    assert is_envelope(value) or decode(body) == meant
    assert data_of_answer(body) == to_result(bytearray(body)) == meant


@given(CBOR)
@example(-1)
@example(-3)
@example("failure")
@example(b"")
def test_what_is_encoded_in_cbor_comes_back_as_a_result_if_it_is_a_map_or_array(value: Any) -> None:
    body, meant = encode(value, codec.CBOR), codec.to_plain(value)
    assert is_envelope(value) or decode(body, codec.CBOR) == meant
    assert is_envelope(value) or codec.JSON_SCALAR.fullmatch(body) or decode(body) == meant
    if isinstance(value, list | dict):
        assert data_of_answer(body) == to_result(body) == meant


@given(st.text(max_size=20))
@example("failure")
@example("4")
@example("true")
@example('"quoted"')
@example("")
@example("1e400")
def test_a_text_is_a_result_as_it_is_unless_it_is_a_map_or_array_in_json(text: str) -> None:
    assert to_result(text) == text
    if not text.strip().startswith(("{", "[")):
        assert data_of_answer(text) == text


@given(TEXT)
@example("failure")
@example("1.10")
@example("1e3")
@example("007")
@example("4\n")
@example("1e400")
@example("NaN")
@example("-0")
@example("\ufefftext")
def test_a_text_in_bytes_is_a_result_as_that_text_unless_json_says_otherwise(text: str) -> None:
    if text and not text.strip().startswith(("{", "[", '"')) and text not in ("null", "true", "false"):
        result = to_result(text.encode())
        assert result == text or (isinstance(result, int | float) and encode(result) == text.encode())


@given(st.binary(min_size=1, max_size=20))
@example(b"\xff\x00")
@example(b"\xf5")  # true in CBOR
@example(b"\xfb?\xf8\x00\x00\x00\x00\x00\x00")
@example(b"\xd9\xd9\xf7\x04")
def test_bytes_that_are_neither_text_nor_a_map_or_array_are_a_result_as_they_are(raw: bytes) -> None:
    result = to_result(raw)
    if isinstance(result, bytes):
        assert result == raw
    else:
        assert isinstance(result, list | dict) or raw.decode() is not None


@pytest.mark.parametrize("value", [b"abc", b"\xff", {"a": [b""]}])
def test_bytes_in_json_are_refused_whatever_they_hold(value: Any) -> None:
    with pytest.raises(EncodeError, match="use content_type='application/cbor'"):
        encode(value)


def test_half_a_character_is_written_as_a_replacement_character_in_both_formats() -> None:
    assert decode(encode({"a": "\ud83d"})) == decode(encode({"a": "\ud83d"}, codec.CBOR)) == {"a": "\ufffd"}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("content_type", ["application/json", "application/cbor"])
def test_the_data_of_an_envelope_come_back(flat: bool, content_type: str) -> None:
    data = {"text": "hello", "n": 7}
    body = encode(create_envelope("llm_request", data, flat=flat), content_type)
    assert decode(body) == data
    assert decode(Msg("s", body, {"content-type": content_type})) == data


def test_an_envelope_has_the_guides_form() -> None:
    head = {"schema_version": "1.0", "message_type": "llm_request"}
    assert create_envelope("llm_request", {"text": "x"}) == {**head, "data": {"text": "x"}}
    assert create_envelope("llm_request", {"text": "x"}, flat=True) == {**head, "text": "x"}


def test_what_is_no_envelope_comes_back_as_it_is() -> None:
    assert decode(b'{"message_type": "x"}') == {"message_type": "x"}
    assert decode("[1, 2]") == [1, 2]
    assert decode(cbor2.dumps("text")) == "text"


def test_times_travel_as_text() -> None:
    assert decode(encode({"at": datetime(2026, 1, 2, tzinfo=UTC)})) == {"at": "2026-01-02T00:00:00Z"}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: create_envelope("", {}), "message_type must be the name of a kind"),
        (lambda: create_envelope("x", [1]), "data must be a mapping"),
        (lambda: create_envelope("x", {"data": 1}, flat=True), "leave out flat=True"),
        (lambda: encode({}, "text/plain"), "content_type must be application/json or application/cbor"),
        (lambda: decode({"a": 1}), "payload must be bytes or text, not dict"),
    ],
)
def test_a_wrong_argument_says_what_to_pass(call: Any, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        call()


def test_a_body_that_is_neither_json_nor_cbor_is_a_decode_error() -> None:
    with pytest.raises(DecodeError):
        decode(b"hello")


def test_what_json_cannot_hold_says_so() -> None:
    with pytest.raises(EncodeError):
        encode({"a": object()})
