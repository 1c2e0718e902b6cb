"""Envelopes, made and opened."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import cbor2
import pytest

from aiqueue.bus import Msg, create_envelope, decode, encode
from aiqueue.errors import BadInput, DecodeError, EncodeError


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
