"""Bodies: CBOR by default, JSON accepted, the guide's envelopes opened. Reading never executes anything.

CBOR is RFC 8949. Tags that could build cyclic or huge values or compile patterns are refused.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any, NamedTuple, NoReturn

import cbor2
import pydantic
import pydantic_core

from .errors import DecodeError, EncodeError

CBOR = "application/cbor"
JSON = "application/json"
MAX_DEPTH = 64
MAX_BYTES = 64 * 1024 * 1024  # the server's own ceiling for max_payload

# 5 big float (its exponent is computed), 25/256 string references, 28/29 shared (cyclic) values, 30 rational,
# 35 regular expression, 36 MIME message, 43000 complex number
_REFUSED_TAGS = (5, 25, 256, 28, 29, 30, 35, 36, 43000)
_JSON_STARTS = frozenset(b'{[" \t\r\n')


class Incoming(NamedTuple):
    """A body that was read: what kind of message, which schema version it claims (None: none), and its data."""

    kind: str
    version: str | None
    data: dict[str, Any]


def encode(value: Any) -> bytes:
    """`value` (plain data, pydantic models included) as CBOR. Raises EncodeError."""
    if isinstance(value, pydantic.BaseModel):
        value = value.model_dump()
    _check_depth(value, EncodeError)
    try:
        return cbor2.dumps(value, default=_encode_other)
    except (cbor2.CBOREncodeError, RecursionError, ValueError, TypeError, OverflowError) as error:
        raise EncodeError(f"cannot be written as CBOR: {error}") from None


def decode(body: bytes, content_type: str = "") -> Any:
    """Plain data of a CBOR or JSON body, told apart by `content_type` or, without one, by the first byte.

    Limits: MAX_BYTES, MAX_DEPTH levels. Raises DecodeError.
    """
    if len(body) > MAX_BYTES:
        raise DecodeError(f"body of {len(body):,} bytes is above the limit of {MAX_BYTES:,}")
    media = content_type.partition(";")[0].strip().lower()
    if media == JSON or media.endswith("+json"):
        return _decode_json(body)
    if media == CBOR or media.endswith("+cbor"):
        return _decode_cbor(body)
    if media and media not in {"application/octet-stream", "text/plain"}:
        raise DecodeError(f"content type {media[:80]!r} is neither {CBOR} nor {JSON}")
    if not body:
        raise DecodeError("empty body")
    return _decode_json(body) if body[0] in _JSON_STARTS else _decode_cbor(body)


def read(
    body: bytes, *, content_type: str = "", kind: str = "", default_kind: str, aliases: Mapping[str, str]
) -> Incoming:
    """The message in a job's body. `kind` is the Aiq-Kind header's; without one the body may be an envelope of the
    guide's family (``{schema_version, message_type, data}``, nested or flat), else it is a `default_kind`.
    `aliases` maps foreign message types to kinds. Raises DecodeError.
    """
    data = decode(body, content_type)
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise DecodeError("the body must be a map with text keys")
    if kind:
        return Incoming(kind, None, data)
    message_type = data.get("message_type")
    if not isinstance(message_type, str) or "schema_version" not in data:
        return Incoming(default_kind, None, data)
    version = str(data["schema_version"])[:32]
    nested = data.get("data")
    if isinstance(nested, dict) and all(isinstance(key, str) for key in nested):
        inner = nested
    else:
        inner = {k: v for k, v in data.items() if k not in {"schema_version", "message_type"}}
    return Incoming(aliases.get(message_type, message_type[:128]), version, inner)


def known_version(version: str | None, accepted: Collection[str]) -> bool:
    """Whether a body that claims schema `version` can be read; a body without one always can."""
    return version is None or version in accepted


def _encode_other(encoder: cbor2.CBOREncoder, value: Any) -> None:
    """Paths, enums, URLs and the like, in the form that they take in JSON."""
    try:
        plain = pydantic_core.to_jsonable_python(value)
    except (ValueError, TypeError) as error:
        raise EncodeError(f"a {type(value).__name__} cannot be written as CBOR: {error}") from None
    encoder.encode(plain)


def _refuse_tag(*_: Any) -> NoReturn:
    raise DecodeError("a CBOR tag that is not accepted here")


def _decimal(pair: Any, _immutable: bool = False) -> Decimal:
    """Tag 4 within decimal128's exponents: turning 1E+999999999 into an int would take all memory."""
    exponent, digits = pair
    if not isinstance(exponent, int) or not isinstance(digits, int) or abs(exponent) > 6144:
        raise DecodeError("a CBOR decimal outside 1E-6144 to 1E+6144")
    return Decimal(digits).scaleb(exponent)


_TAGS: dict[int, Any] = {**dict.fromkeys(_REFUSED_TAGS, _refuse_tag), 4: _decimal}


def _decode_cbor(body: bytes) -> Any:
    try:
        return cbor2.loads(
            body,
            tag_hook=_refuse_tag,
            semantic_decoders=_TAGS,
            max_depth=MAX_DEPTH,
            strict_hashable_types=True,
        )
    except DecodeError:
        raise
    except Exception as error:  # noqa: BLE001  (decoders of tags raise whatever the bytes lead them to)
        if isinstance(error.__cause__, DecodeError):
            raise error.__cause__ from None
        raise DecodeError(f"not CBOR: {_one_line(error)}") from None


def _decode_json(body: bytes) -> Any:
    try:
        value = json.loads(body)
    except RecursionError:
        raise DecodeError(f"nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, over-long numbers
        raise DecodeError(f"not JSON: {_one_line(error)}") from None
    _check_depth(value, DecodeError)
    return value


def _check_depth(value: Any, error: type[DecodeError | EncodeError]) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper += [v for v in item.values() if isinstance(v, dict | list | tuple)]
            elif isinstance(item, list | tuple):
                deeper += [v for v in item if isinstance(v, dict | list | tuple)]
        if not deeper:
            return
        level = deeper
    raise error(f"nested deeper than {MAX_DEPTH} levels")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
