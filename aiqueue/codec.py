"""Message bodies: CBOR by default; JSON and envelopes of plain publishers are accepted. Decoding executes nothing.

CBOR is RFC 8949. Tags that could build cyclic or huge values, or compile patterns, are refused.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Collection, Mapping
from datetime import date, datetime
from decimal import Context, Decimal
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any, NamedTuple, NoReturn
from uuid import UUID

import cbor2
import pydantic
import pydantic_core

from .errors import DecodeError, EncodeError

CBOR = "application/cbor"
JSON = "application/json"
MAX_DEPTH = 64
MAX_BYTES = 64 * 1024 * 1024  # the server's own ceiling for max_payload
MAX_INT_BITS = (
    14_000  # about 4,200 digits: Python neither reads nor prints longer numbers, so JSON cannot have them either
)
MAX_EXPONENT = 6144  # that of decimal128
_SMALL_MIN, _SMALL_MAX = -(1 << 63), (1 << 63) - 1  # whole numbers whose length need not be checked

# 5 big float (whose exponent would be computed), 25/256 string references, 28/29 shared (cyclic) values, 30 rational,
# 35 regular expression, 36 MIME message, 43000 complex number
_REFUSED_TAGS = (5, 25, 256, 28, 29, 30, 35, 36, 43000)
_Model = pydantic.BaseModel
_EXACT = Context(prec=20_000, Emax=999_999, Emin=-999_999, traps=[])
_TEXT = frozenset({str})
_JSON_STARTS = frozenset(b'{[" \t\r\n')


class MessageBody(NamedTuple):
    """A decoded body: the kind of its message, the schema version that it states (None: none), and its data."""

    kind: str
    version: str | None
    data: dict[str, Any]


def encode(value: Any) -> bytes:
    """Encode `value` (plain data, also with pydantic models) as CBOR that `decode` can read.

    Types that CBOR does not have are encoded as in JSON: keys become text, sets and tuples arrays, enums their values,
    paths and the like text. Raises EncodeError.
    """
    try:
        return cbor2.dumps(_plain(value, 0))
    except EncodeError:
        raise
    except Exception as error:  # noqa: BLE001  (the value's own code may raise anything)
        raise EncodeError(f"cannot be encoded as CBOR: {_to_line(error)}") from None


def join_encoded(encoded: list[bytes]) -> bytes:
    """Return the encoded list of values that are encoded already: at most 65,535."""
    count = len(encoded)
    head = bytes([0x80 | count]) if count < 24 else b"\x99" + count.to_bytes(2, "big")
    return b"".join([head, *encoded])


def decode(body: bytes, content_type: str = "") -> Any:
    """Decode a CBOR or JSON body into plain data. `content_type`, or without one the first byte, decides which it is.

    Limits: MAX_BYTES, MAX_DEPTH levels. Raises DecodeError.
    """
    if len(body) > MAX_BYTES:
        raise DecodeError(f"body of {len(body):,} bytes is above the limit of {MAX_BYTES:,}")
    if content_type == CBOR:
        return _decode_cbor(body)
    media = content_type.partition(";")[0].strip().lower()
    if media == JSON or media.endswith("+json"):
        return _decode_json(body)
    if media == CBOR or media.endswith("+cbor"):
        return _decode_cbor(body)
    if media and media not in {"application/octet-stream", "text/plain"}:
        raise DecodeError(f"content type {media[:80]!r} is neither {CBOR} nor {JSON}")
    if not body:
        raise DecodeError("the body is empty")
    return _decode_json(body) if body[0] in _JSON_STARTS else _decode_cbor(body)


def decode_message(
    body: bytes, *, content_type: str = "", kind: str = "", default_kind: str, aliases: Mapping[str, str]
) -> MessageBody:
    """Decode the message in a job's body. Raises DecodeError.

    1. `kind`, the Aiq-Kind header, is set: the body is the message's data.
    2. The body is an envelope of a plain publisher (``{schema_version, message_type, data}``, or with the data's fields
       beside the others): the kind is its message_type, translated by `aliases`.
    3. Otherwise: the body is the data of a `default_kind`.
    """
    data = decode(body, content_type)
    if type(data) is not dict or set(map(type, data)) - _TEXT:
        raise DecodeError("the body must be a map with text keys")
    if kind:
        return MessageBody(kind, None, data)
    message_type = data.get("message_type")
    if not isinstance(message_type, str) or "schema_version" not in data:
        return MessageBody(default_kind, None, data)
    version = str(data["schema_version"])[:32]
    nested = data.get("data")
    if isinstance(nested, dict) and all(isinstance(key, str) for key in nested):
        inner = nested
    else:
        inner = {k: v for k, v in data.items() if k not in {"schema_version", "message_type"}}
    return MessageBody(aliases.get(message_type, message_type[:128]), version, inner)


def is_accepted_version(version: str | None, accepted: Collection[str]) -> bool:
    """Whether a body of schema `version` is accepted; a body without a version always is."""
    return version is None or version in accepted


def _plain(value: Any, depth: int) -> Any:
    """Return `value` in types that CBOR and Python share, and check its limits. `depth`: the containers around it."""
    kind = type(value)
    if kind in _AS_THEY_ARE:
        return value
    if kind in (dict, list, tuple, set, frozenset):
        return _plain_container(value, depth)
    if kind in (int, Decimal):
        _check_number(value)
        return value
    if _Model in kind.__mro__:  # like isinstance, which pydantic's metaclass makes slow
        if kind.model_dump is _Model.model_dump:  # not overridden: call directly what it would call
            data = value.__pydantic_serializer__.to_python(value)
            return _plain_map(data, depth) if type(data) is dict and depth < MAX_DEPTH else _plain(data, depth)
        return _plain(value.model_dump(), depth)
    if isinstance(value, dict):
        return _plain(dict(value), depth)
    try:
        return _plain(pydantic_core.to_jsonable_python(value), depth)
    except Exception as error:  # noqa: BLE001  (the value's own code may raise anything)
        raise EncodeError(f"a {kind.__name__} cannot be encoded as CBOR: {_to_line(error)}") from None


_AS_THEY_ARE = frozenset(
    {
        *(str, bytes, bytearray, bool, float, type(None), date, datetime, UUID),
        *(IPv4Address, IPv4Network, IPv4Interface, IPv6Address, IPv6Network, IPv6Interface),
    }
)


def _plain_container(value: Any, depth: int) -> Any:
    if depth >= MAX_DEPTH:
        raise EncodeError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return _plain_map(value, depth)
    if _AS_THEY_ARE.issuperset(map(type, value)):  # the quick way, because it may be an embedding
        return list(value)
    return [_plain(item, depth + 1) for item in value]


def _plain_map(value: dict[Any, Any], depth: int) -> dict[str, Any]:
    made = {}
    for key, inner in value.items():
        kind = type(inner)
        if kind not in _AS_THEY_ARE and not (kind is int and _SMALL_MIN <= inner <= _SMALL_MAX):
            inner = _plain(inner, depth + 1)  # noqa: PLW2901  (a call for each value would cost more than everything else)
        made[key if type(key) is str else _key_as_text(key)] = inner
    if len(made) < len(value):
        raise EncodeError("two keys of a map are equal as text")
    return made


def _key_as_text(key: Any) -> str:
    (text,) = pydantic_core.to_jsonable_python({key: None})
    return str(text)


def _check_number(value: int | Decimal) -> None:
    """Raise EncodeError for a number outside of the limits."""
    if isinstance(value, int):
        if value.bit_length() > MAX_INT_BITS:
            raise EncodeError(f"a whole number above {MAX_INT_BITS:,} bits")
        return
    _, digits, exponent = value.as_tuple()
    if isinstance(exponent, int) and (abs(exponent) > MAX_EXPONENT or len(digits) > MAX_INT_BITS // 4):
        raise EncodeError(f"a decimal outside of 1E-{MAX_EXPONENT} to 1E+{MAX_EXPONENT}, or with too many digits")


def _refuse_tag(*_: Any) -> NoReturn:
    raise DecodeError("a CBOR tag that is not accepted")


def _decimal(pair: Any, _immutable: bool = False) -> Decimal:
    """Decode tag 4, a decimal, within the exponents of decimal128.

    Without the limit, converting 1E+999999999 to an int would use up all memory, and a mantissa of 1 MB take minutes.
    """
    exponent, digits = pair
    if not isinstance(exponent, int) or not isinstance(digits, int) or abs(exponent) > MAX_EXPONENT:
        raise DecodeError(f"a CBOR decimal outside of 1E-{MAX_EXPONENT} to 1E+{MAX_EXPONENT}")
    return Decimal(digits).scaleb(exponent, _EXACT)


def _positive(raw: Any, _immutable: bool = False) -> int:
    """Decode tag 2, a large whole number, if Python can print it."""
    if not isinstance(raw, bytes) or len(raw) * 8 > MAX_INT_BITS:
        raise DecodeError(f"a CBOR whole number above {MAX_INT_BITS:,} bits")
    return int.from_bytes(raw, "big")


def _negative(raw: Any, _immutable: bool = False) -> int:
    """Decode tag 3, a large negative number."""
    return -1 - _positive(raw)


_TAGS: dict[int, Any] = {**dict.fromkeys(_REFUSED_TAGS, _refuse_tag), 2: _positive, 3: _negative, 4: _decimal}


def _make_decoder(source: io.BytesIO) -> cbor2.CBORDecoder:
    return cbor2.CBORDecoder(
        source, tag_hook=_refuse_tag, semantic_decoders=_TAGS, max_depth=MAX_DEPTH, strict_hashable_types=True
    )


class _ThreadDecoder(threading.local):
    """A decoder for each thread: creating one takes as long as decoding a small body."""

    def __init__(self) -> None:
        self.decoder = _make_decoder(io.BytesIO())


_of_thread = _ThreadDecoder()
_OF_THREAD_MAX = 64 * 1024  # bytes; it keeps the last body in memory, so a larger body gets a new decoder


def _decode_cbor(body: bytes) -> Any:
    source = io.BytesIO(body)
    try:
        if len(body) > _OF_THREAD_MAX:
            value = _make_decoder(source).decode()
        else:
            decoder = _of_thread.decoder
            decoder.fp = source
            value = decoder.decode()
    except DecodeError:
        raise
    except Exception as error:  # noqa: BLE001  (decoders of tags may raise anything)
        if isinstance(error.__cause__, DecodeError):
            raise error.__cause__ from None
        raise DecodeError(f"not CBOR: {_to_line(error)}") from None
    if source.tell() != len(body):  # decode() leaves the source at the end of the value
        raise DecodeError("not CBOR: there are bytes behind the value")
    return value


def _decode_json(body: bytes) -> Any:
    try:
        value = json.loads(body)
    except RecursionError:
        raise DecodeError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, over-long numbers
        raise DecodeError(f"not JSON: {_to_line(error)}") from None
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        inside = [each for each in level if isinstance(each, dict | list)]
        if not inside:
            return value
        level = [v for each in inside for v in (each.values() if isinstance(each, dict) else each)]
    raise DecodeError(f"nested deeper than {MAX_DEPTH} levels")


def _to_line(error: Exception) -> str:
    """Return the text of an error as one line, with its class where a model's own code raised the error."""
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:  # noqa: BLE001  (an error's __str__ may raise anything)
        return name
    known = isinstance(error, ValueError | TypeError | RecursionError | OverflowError)
    return (text if known else f"{name}: {text}") or name
