"""Message bodies: CBOR by default; JSON and envelopes of plain publishers are accepted. Decoding executes nothing.

CBOR is RFC 8949. Tags that could build cyclic or huge values, or compile patterns, are refused.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import json
import os
import re
from collections import deque
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Context, Decimal
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Any, Literal, NamedTuple, NoReturn
from uuid import UUID

import cbor2
import pydantic
import pydantic_core

from ..errors import DecodeError, EncodeError
from . import secret_paths

CBOR = "application/cbor"
JSON = "application/json"
MAX_DEPTH = 64
MAX_BYTES = 64 * 1024 * 1024  # the server's own ceiling for max_payload
MAX_INT_BITS = 14_000  # about 4,200 digits: Python neither reads nor prints longer numbers, nor does JSON have them
MAX_EXPONENT = 6144  # that of decimal128

# 5 big float (whose exponent would be computed), 25/256 string references, 28/29 shared (cyclic) values, 30 rational,
# 35 regular expression, 36 MIME message, 43000 complex number
_REFUSED_TAGS = (5, 25, 256, 28, 29, 30, 35, 36, 43000)
_Model = pydantic.BaseModel
_EXACT = Context(prec=20_000, Emax=999_999, Emin=-999_999, traps=[])
_TEXT = frozenset({str})
_JSON_STARTS = frozenset(b'{[" \t\r\n')
JSON_SCALAR = re.compile(rb"(?:-?(?:0|[1-9]\d*+)(?:\.\d++)?(?:[eE][+-]?\d++)?|true|false|null|NaN|-?Infinity)\s*+")
_MINUTE = timedelta(minutes=1)
_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # no CBOR map starts so


class MessageBody(NamedTuple):
    """A decoded body: the kind of its message, the schema version that it states (None: none), and its data."""

    kind: str
    version: str | None
    data: dict[str, Any]


class Encoded(NamedTuple):
    """An encoded value, and which of its fields are secret, as the header Aiq-Secret names them (empty: none)."""

    body: bytes
    secrets: str = ""


def encode(value: Any, *, tagged: bool = False, by_alias: bool = True) -> bytes:
    """Encode `value` (plain data, also with pydantic models) as CBOR that `decode` can read.

    Types that JSON does not have are encoded as in JSON: times, UUIDs, decimals, IP addresses and whole numbers above
    64 bits become text, keys too, sets and tuples arrays, enums their values. With `tagged`, those that CBOR has a tag
    for keep their type. Models are written by alias, without computed fields, and with their secrets. A lone surrogate
    becomes U+FFFD. Raises EncodeError.
    """
    return dump(to_plain(value, tagged=tagged, by_alias=by_alias))


def encode_marked(value: Any) -> Encoded:
    """As `encode`, and state which fields are secret. What is Encoded already is returned unchanged."""
    if type(value) is Encoded:
        return value
    try:
        return Encoded(dump(_to_plain(value, _SECRETS_SHOW)))
    except _SecretFound:
        return Encoded(encode(value), secret_paths.header_of_value(value))


def to_plain(value: Any, *, tagged: bool = False, by_alias: bool = True) -> Any:
    """Return `value` as `encode` writes it, in the types that `decode` returns. Raises EncodeError."""
    return _to_plain(value, (_TAGGED if tagged else 0) | (0 if by_alias else _BY_NAME))


def _to_plain(value: Any, form: int) -> Any:
    try:
        return _convert(value, 0, form)
    except (EncodeError, _SecretFound):
        raise
    except Exception as error:  # noqa: BLE001  (the value's own code may raise anything)
        raise EncodeError(f"cannot be encoded as CBOR: {_to_line(error)}") from None


def dump(plain: Any) -> bytes:
    """Encode what `to_plain` returned. Raises EncodeError."""
    try:
        return cbor2.dumps(plain)
    except UnicodeEncodeError:
        return cbor2.dumps(_map_texts(plain, join_surrogates))
    except (cbor2.CBOREncodeError, RecursionError, ValueError, TypeError, OverflowError) as error:
        raise EncodeError(f"cannot be encoded as CBOR: {_to_line(error)}") from None


def join_encoded(encoded: list[bytes]) -> bytes:
    """Return the encoded list of values that are encoded already: at most 65,535."""
    count = len(encoded)
    head = bytes([0x80 | count]) if count < 24 else b"\x99" + count.to_bytes(2, "big")
    return b"".join([head, *encoded])


def decode(body: bytes, content_type: str = "", *, max_bytes: int = MAX_BYTES) -> Any:
    """Decode a CBOR or JSON body into plain data. `content_type`, or without one the body itself, decides which it is.

    What may be JSON is JSON then. Limits: `max_bytes`, MAX_DEPTH levels. Raises DecodeError.
    """
    if len(body) > max_bytes:
        raise DecodeError(f"body of {len(body):,} bytes is above the limit of {max_bytes:,}")
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
    is_json = (body[0] in _JSON_STARTS and len(body) > 1) or body.startswith(_MARKS) or JSON_SCALAR.fullmatch(body)
    return _decode_json(body) if is_json else _decode_cbor(body)


def decode_map(body: bytes, content_type: str = CBOR) -> dict[str, Any]:
    """As `decode`, for a body that must be a map with text keys. Raises DecodeError."""
    data = _decode_cbor(body) if content_type == CBOR and len(body) <= MAX_BYTES else decode(body, content_type)
    if type(data) is not dict or not _TEXT.issuperset(map(type, data)):
        raise DecodeError("the body must be a map with text keys")
    return data


def decode_message(
    body: bytes, *, content_type: str = "", kind: str = "", default_kind: str, aliases: Mapping[str, str]
) -> MessageBody:
    """Decode the message in a job's body. Raises DecodeError.

    1. `kind`, the Aiq-Kind header, is set: the body is the message's data.
    2. The body is an envelope of a plain publisher (``{schema_version, message_type, data}``, or with the data's fields
       beside the others): the kind is its message_type, translated by `aliases`.
    3. Otherwise: the body is the data of a `default_kind`.
    """
    data = decode_map(body, content_type)
    if kind:
        return MessageBody(kind, None, data)
    message_type = data.get("message_type")
    if not isinstance(message_type, str) or "schema_version" not in data:
        return MessageBody(default_kind, None, data)
    version = str(data["schema_version"])[:32]
    nested = data.get("data")
    if isinstance(nested, dict) and _TEXT.issuperset(map(type, nested)):
        inner = nested
    else:
        inner = {k: v for k, v in data.items() if k not in {"schema_version", "message_type"}}
    return MessageBody(aliases.get(message_type, message_type[:128]), version, inner)


def is_accepted_version(version: str | None, accepted: Collection[str]) -> bool:
    """Whether a body of schema `version` is accepted; a body without a version always is."""
    return version is None or version in accepted


_TAGGED, _BY_NAME, _SECRETS_SHOW = 1, 2, 4  # bits of a form: keep CBOR's types, field names as keys, report secrets


class _SecretFound(Exception):
    """The value has a secret in it: raised for _SECRETS_SHOW."""


def _convert(value: Any, depth: int, form: int) -> Any:
    """Return `value` in the types that CBOR, JSON and Python share, and check its limits.

    `depth`: the containers around it. `form`: how, in the bits above.
    """
    kind = type(value)
    if kind in _AS_THEY_ARE or (kind is int and _INT_MIN <= value <= _INT_MAX):
        return value
    if kind in (dict, list, tuple, set, frozenset):
        return _convert_container(value, depth, form)
    if kind in (int, Decimal):
        _check_number(value)
        return value if form & _TAGGED else str(value)
    if kind in _BYTES:
        return bytes(value)
    if kind is datetime:
        value = _to_whole_minutes(value)
    if form & _TAGGED and kind in _TAGS_OF_CBOR and (kind is not datetime or value.tzinfo is not None):
        return value  # CBOR has no tag for a time without a zone
    if _Model in kind.__mro__:  # like isinstance, which pydantic's metaclass makes slow
        if form & _SECRETS_SHOW and secret_paths.header_of_class(kind):
            raise _SecretFound
        if kind.model_dump is not _Model.model_dump:
            return _convert(value.model_dump(), depth, form)
        data = _dump_model(value, form)  # what model_dump calls; saves time
        return (
            _convert_map(data, depth, form) if type(data) is dict and depth < MAX_DEPTH else _convert(data, depth, form)
        )
    return _convert_other(value, kind, depth, form)


def _convert_other(value: Any, kind: type, depth: int, form: int) -> Any:
    """As `_convert`, for types that are neither CBOR's nor a model."""
    if isinstance(value, secret_paths.Secret):
        if form & _SECRETS_SHOW:
            raise _SecretFound
        return _convert(value.get_secret_value(), depth, form)
    if dataclasses.is_dataclass(value):
        if hasattr(kind, "__pydantic_serializer__"):
            return _convert(_dump_model(value, form), depth, form)
        fields = {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
        return _convert_container(fields, depth, form)
    if isinstance(value, dict):
        return _convert_container(dict(value), depth, form)
    if isinstance(value, list | tuple | set | frozenset | deque):
        return _convert_container(list(value), depth, form)
    try:
        return _convert(pydantic_core.to_jsonable_python(value), depth, form)
    except EncodeError:
        raise
    except Exception as error:  # noqa: BLE001  (the value's own code may raise anything)
        raise EncodeError(f"a {kind.__name__} cannot be encoded as CBOR: {_to_line(error)}") from None


def _dump_model(value: Any, form: int) -> Any:
    return value.__pydantic_serializer__.to_python(value, by_alias=not form & _BY_NAME, round_trip=True, warnings=False)


_INT_MIN, _INT_MAX = -(1 << 64), (1 << 64) - 1  # of CBOR without a tag
_AS_THEY_ARE = frozenset({str, bytes, bool, float, type(None)})
_BYTES = frozenset({bytearray, memoryview})
_ADDRESSES = IPv4Address, IPv4Network, IPv4Interface, IPv6Address, IPv6Network, IPv6Interface
_TAGS_OF_CBOR = frozenset({date, datetime, UUID, *_ADDRESSES})


def _to_whole_minutes(value: datetime) -> datetime:
    """Return the same time in UTC if its zone has an offset with seconds, which neither RFC 3339 nor CBOR can write."""
    offset = value.utcoffset()
    return value.astimezone(UTC) if offset is not None and offset % _MINUTE else value


def _convert_container(value: Any, depth: int, form: int) -> Any:
    if depth >= MAX_DEPTH:
        raise EncodeError(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return _convert_map(value, depth, form)
    if _AS_THEY_ARE.issuperset(map(type, value)):  # the quick way, because it may be an embedding
        return list(value)
    return [_convert(item, depth + 1, form) for item in value]


def _convert_map(value: dict[Any, Any], depth: int, form: int) -> dict[str, Any]:
    made = {}
    for key, inner in value.items():
        kind = type(inner)
        if kind not in _AS_THEY_ARE and not (kind is int and _INT_MIN <= inner <= _INT_MAX):
            inner = _convert(inner, depth + 1, form)  # noqa: PLW2901  (a call for each value would cost more than everything else)
        made[key if type(key) is str else _key_as_text(key)] = inner
    if len(made) < len(value):
        raise EncodeError("two keys of a map are equal as text")
    return made


def _key_as_text(key: Any) -> str:
    if isinstance(key, secret_paths.Secret):
        raise EncodeError("a secret cannot be the key of a map: keys are not masked")
    try:
        (text,) = pydantic_core.to_jsonable_python({key: None})
    except (ValueError, TypeError) as error:
        raise EncodeError(f"a {type(key).__name__} cannot be the key of a map: {_to_line(error)}") from None
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


# A body is decoded as a list with this word behind it. Nobody knows the word, so no body ends too early or too late.
_GUARD_WORD = os.urandom(16)
_GUARD = b"\x50" + _GUARD_WORD
_SELF_DESCRIBED = b"\xd9\xf7"  # the end of tag 55799, which would take the guard word as its own value
_GUARDED_MAX = 64 * 1024  # bytes of a body: a larger one costs more to copy than it saves


def _decode_cbor(body: bytes) -> Any:
    if len(body) <= _GUARDED_MAX:
        try:
            value, end = cbor2.loads(
                b"\x82%b%b" % (body, _GUARD), tag_hook=_refuse_tag, semantic_decoders=_TAGS, max_depth=MAX_DEPTH + 1,
                strict_hashable_types=True,
            )  # fmt: skip
            if end == _GUARD_WORD and not body.endswith(_SELF_DESCRIBED):
                return value
        except Exception:  # noqa: BLE001, S110  (decoders of tags may raise anything; what is wrong is found again below)
            pass
    try:
        return _decode_strictly(body, "strict")
    except _NotUtf8:
        return _map_texts(_decode_strictly(body, "surrogateescape"), _from_escaped)


class _NotUtf8(DecodeError):
    """A text is not UTF-8. It may still be one with a lone surrogate."""


def _decode_strictly(body: bytes, str_errors: Literal["strict", "surrogateescape"]) -> Any:
    source = io.BytesIO(body)
    try:
        value = cbor2.CBORDecoder(
            source, tag_hook=_refuse_tag, semantic_decoders=_TAGS, max_depth=MAX_DEPTH, strict_hashable_types=True,
            str_errors=str_errors,
        ).decode()  # fmt: skip
    except DecodeError:
        raise
    except Exception as error:  # noqa: BLE001  (decoders of tags may raise anything)
        if isinstance(error.__cause__, DecodeError):
            raise error.__cause__ from None
        failure = _NotUtf8 if isinstance(error.__cause__, UnicodeDecodeError) else DecodeError
        raise failure(f"not CBOR: {_to_line(error)}") from None
    if source.tell() != len(body):  # decode() leaves the source at the end of the value
        raise DecodeError("not CBOR: there are bytes behind the value")
    return value


_decode_strictly(b"\xa0", "strict")  # an older cbor2 does not know all options: fail here, and not for every body


def _decode_json(body: bytes) -> Any:
    is_utf8_map = body[:1] == b"{" and body[1:2] != b"\0"
    try:
        value = json.loads(body.decode("utf-8", "surrogatepass") if is_utf8_map else body)
    except RecursionError:
        raise DecodeError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, over-long numbers
        raise DecodeError(f"not JSON: {_to_line(error)}") from None
    level = [value] if body.count(b"{") + body.count(b"[") > MAX_DEPTH else []  # otherwise it cannot be too deep
    for _ in range(MAX_DEPTH + 1):
        inside = [each for each in level if isinstance(each, dict | list)]
        if not inside:
            has_escapes = b"\\ud" in body or b"\\uD" in body  # only these can stand for a lone surrogate
            return _map_texts(value, join_surrogates) if has_escapes else value
        level = [v for each in inside for v in (each.values() if isinstance(each, dict) else each)]
    raise DecodeError(f"nested deeper than {MAX_DEPTH} levels")


def join_surrogates(text: str) -> str:
    """Return `text` in a form that UTF-8 can hold: two halves of a character are joined, a lone one becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def split_half(text: str) -> tuple[str, str]:
    """Return `text` without the first half of a character at its end, and that half; empty if it does not end so."""
    return (text[:-1], text[-1]) if text and "\ud800" <= text[-1] <= "\udbff" else (text, "")


class TextJoiner:
    """Joins texts that may be cut within a character, such as the parts of a model's answer."""

    def __init__(self) -> None:
        self._half = ""

    def take(self, value: Any) -> list[Any]:
        """Return what can be written now: a text without the half of a character at its end, any other value whole."""
        if type(value) is not str:
            return [*self.rest(), value]
        text, self._half = split_half(self._half + value)
        return [text] if text or not self._half else []

    def rest(self) -> list[str]:
        """Return the half that has waited in vain, for the end of the output. `encode` makes U+FFFD of it."""
        half, self._half = self._half, ""
        return [half] if half else []


def _from_escaped(text: str) -> str:
    """Return a text that was decoded with surrogateescape. Raises DecodeError for what no writer of UTF-16 sends."""
    try:
        return join_surrogates(text.encode("utf-8", "surrogateescape").decode("utf-8", "surrogatepass"))
    except UnicodeDecodeError:
        raise DecodeError("not CBOR: a text is not UTF-8") from None


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return plain data with all its texts changed, keys too. Of two keys that become equal, the last one counts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_texts(inner, change) for inner in value)
    return value


def _to_line(error: Exception) -> str:
    """Return the text of an error as one line, with its class where a model's own code raised the error."""
    name = type(error).__name__
    try:
        text = " ".join(str(error).split())[:200]
    except Exception:  # noqa: BLE001  (an error's __str__ may raise anything)
        return name
    known = isinstance(error, ValueError | TypeError | RecursionError | OverflowError)
    return (text if known else f"{name}: {text}") or name
