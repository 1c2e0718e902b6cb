"""Bodies: what is written can be read, and nothing that comes in does harm."""

from __future__ import annotations

import contextlib
import enum
import json
import math
import subprocess
import sys
import time
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import cbor2
import pydantic
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aiqueue import codec
from aiqueue.errors import DecodeError, EncodeError

ZONES = st.integers(-23 * 60, 23 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes)))
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ELEMENTARY = (
    st.none() | st.booleans() | st.integers(-(2**64), 2**64 - 1) | st.floats(allow_nan=False) | TEXT
    | st.binary(max_size=50)
)  # fmt: skip
SCALARS = (
    ELEMENTARY | st.integers() | st.decimals(allow_nan=False, allow_infinity=False) | st.dates() | st.uuids()
    | st.ip_addresses() | st.datetimes(timezones=ZONES)
)  # fmt: skip
PLAIN = st.recursive(ELEMENTARY, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5))
RICH = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5))
JSON_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXT, inner, max_size=5),
)
WILD = (
    SCALARS | st.fractions() | st.complex_numbers() | st.decimals() | st.times() | st.timedeltas() | st.datetimes()
    | st.sets(st.integers()) | st.frozensets(TEXT) | st.dictionaries(st.integers(), st.none())
    | st.dictionaries(st.tuples(st.integers(), TEXT), st.none()) | st.text() | st.integers(2**13_990, 2**14_010)
    | st.lists(st.integers(2**63, 2**70)) | st.deferred(lambda: st.from_type(object))
)  # fmt: skip


def refuse_tag(*given: Any) -> Any:
    raise AssertionError(f"a tag, which cborg refuses: {given}")


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = [inner]
    return inner


def tagged(number: int, value: Any) -> bytes:
    return cbor2.dumps(cbor2.CBORTag(number, value))


def read(body: bytes, **more: Any) -> codec.MessageBody:
    return codec.decode_message(
        body, default_kind="gateway.request", aliases={"llm_request": "gateway.request"}, **more
    )


# what is written can be read


@given(PLAIN)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    assert codec.decode(codec.encode(value), codec.CBOR) == value


@given(RICH)
@example(Decimal("1.23456789012345678901234567890123456789"))
@example(datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=5))))
def test_tagged_data_comes_back_as_it_was_and_data_of_older_versions_is_tagged(value: Any) -> None:
    assert codec.decode(codec.encode(value, tagged=True), codec.CBOR) == value


@given(WILD | RICH)
def test_what_is_written_without_tags_has_none(value: Any) -> None:
    with contextlib.suppress(EncodeError):
        cbor2.loads(
            codec.encode({"v": value}), tag_hook=refuse_tag, semantic_decoders=dict.fromkeys(range(300), refuse_tag)
        )


@given(PLAIN)
def test_a_map_is_read_without_a_content_type(value: Any) -> None:
    assert codec.decode(codec.encode({"v": value})) == {"v": value}


@given(JSON_PLAIN)
def test_json_is_read_by_content_type_and_by_first_byte(value: Any) -> None:
    assert codec.decode(json.dumps(value).encode(), codec.JSON) == value
    assert codec.decode(json.dumps({"v": value}, indent=1).encode()) == {"v": value}
    assert codec.decode(b"\n \t" + json.dumps([value]).encode()) == [value]


@given(WILD)
def test_whatever_can_be_written_can_be_read(value: Any) -> None:
    try:
        body = codec.encode({"v": [value]})
    except EncodeError:
        return
    codec.decode(body)


class Colour(enum.Enum):
    RED = "red"


class Grade(enum.StrEnum):
    A = "a"


class Inner(pydantic.BaseModel):
    by_number: dict[int, set[int]] = {1: {2}}
    link: pydantic.HttpUrl = pydantic.HttpUrl("http://x/")


class Outer(pydantic.BaseModel):
    inner: Inner = Inner()
    grade: Grade = Grade.A
    when: datetime = datetime(2026, 1, 2, tzinfo=UTC)


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ({2: "a", None: "b", True: "c"}, {"2": "a", "None": "b", "true": "c"}), ((1, 2), [1, 2]), ({3}, [3]),
        (frozenset("x"), ["x"]), (Colour.RED, "red"), ([Grade.A], ["a"]), ({Grade.A: 1}, {"a": 1}),
        (Path("/x"), "/x"), (timedelta(seconds=5), "PT5S"), (Fraction(1, 3), "1/3"), (bytearray(b"x"), b"x"),
        (ip_address("::1"), "::1"), (ip_network("10.0.0.0/8"), "10.0.0.0/8"), (date(2026, 1, 1), "2026-01-01"),
        (uuid.UUID(int=5), "00000000-0000-0000-0000-000000000005"), (datetime(2026, 1, 1), "2026-01-01T00:00:00"),  # noqa: DTZ001
        (2**64, "18446744073709551616"), (-(2**64) - 1, "-18446744073709551617"), (2**64 - 1, 2**64 - 1),
        (Decimal("1.50"), "1.50"), (Decimal("Infinity"), "Infinity"), (deque([1, (2,)]), [1, [2]]),
        (Outer(), {"inner": {"by_number": {"1": [2]}, "link": "http://x/"}, "grade": "a",
                   "when": "2026-01-02T00:00:00Z"}),
    ],
)  # fmt: skip
def test_what_cbor_has_no_common_type_for_takes_the_form_it_has_in_json(value: Any, meant: Any) -> None:
    assert codec.decode(codec.encode({"v": value}), codec.CBOR) == {"v": meant}


def test_a_model_written_is_read_into_an_equal_model() -> None:
    assert Outer.model_validate(codec.decode(codec.encode(Outer()))) == Outer()


@pytest.mark.parametrize(
    "value",
    [object(), {"a": object()}, lambda: None, 2**14_001, Decimal("1E+7000"), {pydantic.SecretStr("x"): 1},
     {1: "a", "1": "b"}, Decimal("1E-7000"), Decimal(2**15_000), Exception("x"), type],
)  # fmt: skip
def test_what_cannot_be_written_is_refused_in_one_line(value: Any) -> None:
    with pytest.raises(EncodeError) as caught:
        codec.encode({"v": value})
    assert len(str(caught.value).splitlines()) == 1


def test_a_cyclic_value_is_refused_and_not_walked_for_ever() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(EncodeError, match="nested deeper"):
        codec.encode(cycle)


def test_numbers_that_are_none_stay_so() -> None:
    assert math.isnan(codec.decode(codec.encode(float("nan")), codec.CBOR))
    assert math.isinf(codec.decode(codec.encode(Decimal("Infinity"), tagged=True), codec.CBOR))


# texts that are cut within a character


@pytest.mark.parametrize(
    ("text", "meant"),
    [("a\ud83d", "a\ufffd"), ("\ude00b", "\ufffdb"), ("\ud83d\ude00", "\U0001f600"), ("\ude00\ud83d", "\ufffd\ufffd"),
     ("é\ud83d\ud83d\ude00", "é\ufffd\U0001f600")],
)  # fmt: skip
def test_halves_of_a_character_are_joined_and_a_lone_half_becomes_a_replacement_character(
    text: str, meant: str
) -> None:
    value = {"t": [text, {text: text}]}
    assert codec.decode(codec.encode(value), codec.CBOR) == {"t": [meant, {meant: meant}]}
    assert codec.decode(json.dumps(value).encode(), codec.JSON) == {"t": [meant, {meant: meant}]}
    raw = cbor2.dumps({"t": "?"}).replace(b"a?", bytes([0x60 + len(b := text.encode("utf-8", "surrogatepass"))]) + b)
    assert codec.decode(raw) == {"t": meant}, "as some writers of CBOR send them"


def test_a_text_that_is_not_utf_8_is_refused_all_the_same() -> None:
    for text in (b"\xff", b"\xe9a", b"\xed\xa0"):
        with pytest.raises(DecodeError):
            codec.decode(b"\xa1\x61t" + bytes([0x60 + len(text)]) + text)


@given(st.lists(st.text(st.characters(categories=["Cs", "Ll", "So"]), max_size=4), max_size=6))
@example(["a\ud83d", "\ude00b", "\ud83d"])
def test_parts_of_a_text_that_are_written_one_by_one_make_the_whole_text(parts: list[str]) -> None:
    joiner = codec.TextJoiner()
    written = [codec.encode(each) for part in parts for each in joiner.take(part)]
    written += [codec.encode(each) for each in joiner.rest()]
    assert "".join(codec.decode(each, codec.CBOR) for each in written) == codec.join_surrogates("".join(parts))


def test_a_half_before_something_that_is_no_text_is_not_lost() -> None:
    joiner = codec.TextJoiner()
    assert [*joiner.take("a\ud83d"), *joiner.take({"n": 1}), *joiner.take("\ude00")] == [
        "a",
        "\ud83d",
        {"n": 1},
        "\ude00",
    ]


@pytest.mark.parametrize("coding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@given(
    body=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=3), end=st.text(max_size=2)
)
@example(body={}, end=" ")
@example(body={"a": "{["}, end="}")
def test_a_map_in_json_is_read_as_json_loads_reads_it(coding: str, body: dict[str, Any], end: str) -> None:
    written = (json.dumps(body) + end).encode(coding)
    if end.strip(" \t\r\n"):
        with pytest.raises(DecodeError, match="not JSON"):
            codec.decode(written, codec.JSON)
    else:
        assert codec.decode(written, codec.JSON) == json.loads(written) == body


# limits


@pytest.mark.parametrize("wrap", [lambda v: [v], lambda v: {"k": v}])
def test_writer_and_both_readers_stop_at_the_same_depth(wrap: Any) -> None:
    deep: Any = 1
    for _ in range(codec.MAX_DEPTH):
        deep = wrap(deep)
    too_deep = wrap(deep)
    assert codec.decode(codec.encode(deep), codec.CBOR) == deep
    assert codec.decode(json.dumps(deep).encode(), codec.JSON) == deep
    with pytest.raises(EncodeError, match="nested deeper"):
        codec.encode(too_deep)
    with pytest.raises(DecodeError, match="depth"):
        codec.decode(cbor2.dumps(too_deep), codec.CBOR)
    with pytest.raises(DecodeError, match="nested deeper"):
        codec.decode(json.dumps(too_deep).encode(), codec.JSON)


@pytest.mark.parametrize(
    ("body", "media"),
    [(b"[" * 1_000_000, codec.JSON), (b"\x81" * 1_000_000, codec.CBOR), (b"\xd8\x40" * 500_000, codec.CBOR),
     (b'{"a":' * 200_000, codec.JSON), (b"\x9f" * 1_000_000, codec.CBOR)],
)  # fmt: skip
def test_a_million_levels_are_refused_at_once(body: bytes, media: str) -> None:
    started_at = time.monotonic()
    with pytest.raises(DecodeError):
        codec.decode(body, media)
    assert time.monotonic() - started_at < 20


@pytest.mark.parametrize("head", ["9b", "bb", "5b", "7b", "d901029b", "c25b", "d9010281bb"])
@pytest.mark.parametrize("length", ["0000000100000000", "7fffffffffffffff", "ffffffffffffffff"])
def test_a_claimed_length_alone_takes_no_memory(head: str, length: str) -> None:
    code = (
        "import resource, sys; from aiqueue import codec; from aiqueue.errors import DecodeError\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        f"body = bytes.fromhex('{head}{length}'); before = used()\n"
        "try: codec.decode(body, codec.CBOR)\nexcept DecodeError: print(used() - before)"
    )
    if (head, length) != ("9b", "ffffffffffffffff"):  # a process each would take half a minute
        with pytest.raises(DecodeError):
            codec.decode(bytes.fromhex(head + length), codec.CBOR)
        return
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert int(done.stdout) < 50_000  # KiB


def test_a_body_above_the_servers_own_ceiling_is_refused() -> None:
    with pytest.raises(DecodeError, match="above the limit"):
        codec.decode(bytes(codec.MAX_BYTES + 1), codec.CBOR)


@pytest.mark.parametrize(
    "body",
    [tagged(4, [0, 2**8_000_000]), tagged(4, [10**9, 1]), tagged(4, [-(10**9), 1]), cbor2.dumps(2**8_000_000),
     cbor2.dumps(-(2**8_000_000)), tagged(5, [10**9, 1]), tagged(30, [1, 0]), b"9" * 100_000, tagged(1, 1e300),
     tagged(0, "9" * 100_000), tagged(4, [1]), tagged(4, "x"), tagged(4, [1.5, 2])],
)  # fmt: skip
def test_a_number_that_would_take_minutes_or_gigabytes_is_refused_at_once(body: bytes) -> None:
    started_at = time.monotonic()
    with pytest.raises(DecodeError):
        codec.decode(body, codec.JSON if body[:1] == b"9" else codec.CBOR)
    assert time.monotonic() - started_at < 20


@pytest.mark.parametrize(
    "body",
    [bytes.fromhex("d81c81d81d00"), bytes.fromhex("d81d00"), bytes.fromhex("d90100824361616141d81900"), tagged(25, 0),
     tagged(35, "(a+)+$"), tagged(36, "x"), tagged(43000, [1, 2]), tagged(5, [1, 2]), tagged(12345, 1),
     tagged(30, [1, 3])],
)  # fmt: skip
def test_tags_that_share_compile_or_compute_are_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        codec.decode(body, codec.CBOR)


# anything may come in


@given(
    st.binary(max_size=300),
    st.sampled_from(["", codec.CBOR, codec.JSON, "text/plain", "x/y", ";", "application/x+cbor"]),
)
def test_arbitrary_bytes_never_raise_anything_but_decode_error(body: bytes, media: str) -> None:
    with contextlib.suppress(DecodeError):
        codec.decode(body, media)


@given(st.binary(max_size=300), st.text(max_size=10))
def test_reading_arbitrary_bytes_as_a_message_never_raises_anything_but_decode_error(body: bytes, media: str) -> None:
    with contextlib.suppress(DecodeError):
        read(body, content_type=media)


@given(PLAIN, st.data())
def test_every_truncation_of_cbor_is_refused(value: Any, data: st.DataObject) -> None:
    body = codec.encode({"v": value})
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(DecodeError):
        codec.decode(body[:cut], codec.CBOR)


@given(PLAIN, st.binary(min_size=1, max_size=10))
def test_what_follows_a_value_is_refused_and_not_lost(value: Any, more: bytes) -> None:
    with pytest.raises(DecodeError):
        codec.decode(codec.encode(value) + more, codec.CBOR)


@pytest.mark.parametrize("tag", ["d9d9f7", "da0000d9f7", "db000000000000d9f7", "c1", "d87b"])
@pytest.mark.parametrize("size", [1, 70_000])
def test_a_tag_without_a_value_behind_the_body_is_refused_whatever_its_size(tag: str, size: int) -> None:
    body = codec.encode({"v": "x" * size})
    for behind in (tag, tag * 2):
        with pytest.raises(DecodeError, match="behind the value"):
            codec.decode(body + bytes.fromhex(behind), codec.CBOR)


@given(PLAIN, st.data())
def test_a_flipped_byte_never_raises_anything_but_decode_error(value: Any, data: st.DataObject) -> None:
    body = bytearray(codec.encode({"v": value}))
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DecodeError):
        codec.decode(bytes(body), codec.CBOR)


# content types


@pytest.mark.parametrize(
    "media", ["application/json", "application/json; charset=utf-8", " Application/JSON ", "application/problem+json"]
)
def test_json_is_known_by_any_spelling_of_its_content_type(media: str) -> None:
    assert codec.decode(b'{"a": 1}', media) == {"a": 1}


@pytest.mark.parametrize("media", ["", "text/plain; charset=utf-8", "application/octet-stream"])
def test_a_content_type_that_says_nothing_leaves_it_to_the_first_byte(media: str) -> None:
    assert codec.decode(b'{"a": 1}', media) == codec.decode(cbor2.dumps({"a": 1}), media) == {"a": 1}


@pytest.mark.parametrize("coding", ["utf-8-sig", "utf-16"])
@pytest.mark.parametrize("media", ["", "text/plain", codec.JSON, "application/octet-stream"])
def test_json_with_a_byte_order_mark_is_read(coding: str, media: str) -> None:
    assert codec.decode('{"a": "é"}'.encode(coding), media) == {"a": "é"}


@pytest.mark.parametrize("media", ["application/pickle", "application/x-python-serialize", "application/xml", "json"])
def test_another_content_type_is_refused_by_name(media: str) -> None:
    with pytest.raises(DecodeError, match="neither application/cbor nor application/json"):
        codec.decode(b'{"a": 1}', media)


@pytest.mark.parametrize(("body", "media"), [(b'{"a": 1}', codec.CBOR), (cbor2.dumps({"a": 1}), codec.JSON)])
def test_a_content_type_that_lies_is_believed_and_the_body_refused(body: bytes, media: str) -> None:
    with pytest.raises(DecodeError):
        codec.decode(body, media)


# messages


@pytest.mark.parametrize(
    ("body", "kind", "version", "data"),
    [
        ({"schema_version": "1", "message_type": "llm_request", "data": {"a": 1}}, "gateway.request", "1", {"a": 1}),
        ({"schema_version": 1, "message_type": "llm_request", "a": 1}, "gateway.request", "1", {"a": 1}),
        ({"schema_version": "2", "message_type": "new", "data": {}}, "new", "2", {}),
        ({"schema_version": "1", "message_type": "x", "data": "text", "b": 2}, "x", "1", {"data": "text", "b": 2}),
        ({"schema_version": "1", "message_type": 5, "a": 1}, "gateway.request", None, None),
        ({"message_type": "llm_request", "a": 1}, "gateway.request", None, None),
        ({"prompt": "hi"}, "gateway.request", None, None),
        ({}, "gateway.request", None, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("write", [cbor2.dumps, lambda v: json.dumps(v).encode()])
def test_the_guides_envelopes_are_opened_and_other_maps_are_the_default_kind(
    body: dict[str, Any], kind: str, version: str | None, data: dict[str, Any] | None, write: Any
) -> None:
    assert read(write(body)) == (kind, version, body if data is None else data)


def test_a_kind_in_the_header_leaves_the_body_as_it_is() -> None:
    body = {"schema_version": "1", "message_type": "llm_request", "data": {}}
    assert read(codec.encode(body), kind="mine") == ("mine", None, body)


def test_a_huge_message_type_and_version_are_cut() -> None:
    body = codec.encode({"schema_version": "9" * 10_000, "message_type": "x" * 10_000})
    found = read(body)
    assert (len(found.kind), len(found.version or "")) == (128, 32)


@pytest.mark.parametrize("value", [[], [1], "text", 5, None, True, b"x", 1.5])
def test_a_body_that_is_no_map_is_refused(value: Any) -> None:
    with pytest.raises(DecodeError, match="must be a map"):
        read(codec.encode(value), content_type=codec.CBOR)


@pytest.mark.parametrize("body", [bytes.fromhex("a10102"), bytes.fromhex("a14161f6"), bytes.fromhex("a1f6f6")])
def test_a_map_whose_keys_are_not_text_is_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        read(body, content_type=codec.CBOR)


def test_an_empty_body_is_refused() -> None:
    for media in ("", codec.CBOR, codec.JSON):
        with pytest.raises(DecodeError):
            read(b"", content_type=media)


def test_a_version_is_known_if_accepted_or_not_claimed() -> None:
    assert codec.is_accepted_version(None, ("1",))
    assert codec.is_accepted_version("1", ("1",))
    assert not codec.is_accepted_version("2", ("1",))


SHARED = b"\xd8\x1c\x82\xd8\x1d\x00\x01"  # a list that refers to itself


@pytest.mark.parametrize(
    "broken", [b"\x82\x01", b"\xa1\x01", b"\xff", b"\xc0\x61x", SHARED, b"\x01\x02", b"\x81" * 500]
)
def test_what_cannot_be_read_leaves_nothing_behind_for_what_is_read_next(broken: bytes) -> None:
    good = {"a": [1, "x", {"b": b"y"}], "c": 2.5}
    with contextlib.suppress(DecodeError):
        codec.decode(broken, codec.CBOR)
    assert codec.decode(codec.encode(good), codec.CBOR) == good
    with pytest.raises(DecodeError):  # a reference to a value of the body before
        codec.decode(b"\xd8\x1d\x00", codec.CBOR)


def test_threads_that_read_at_once_each_get_their_own() -> None:
    bodies = [codec.encode({"n": n, "rest": list(range(n))}) for n in range(200)]

    def read(first: int) -> list[int]:
        return [codec.decode(body, codec.CBOR)["n"] for body in bodies[first:] * 20]

    with ThreadPoolExecutor(4) as pool:
        for first, decoded in enumerate(pool.map(read, range(4))):
            assert decoded == list(range(first, 200)) * 20
