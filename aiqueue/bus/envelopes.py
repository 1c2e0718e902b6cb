"""Bodies: the envelopes of the integration guide's family of messages, nested and flat, in JSON or CBOR."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from .. import codec
from ..errors import BadInput, DecodeError, EncodeError
from ..job import RawMessage
from .message import Msg, to_bytes

SCHEMA_VERSION = "1.0"
_ENVELOPE_KEYS = ("schema_version", "message_type")
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), check_circular=False).encode  # refuses bytes


def create_envelope(
    message_type: str, data: Mapping[str, Any], *, schema_version: str = SCHEMA_VERSION, flat: bool = False
) -> dict[str, Any]:
    """Return ``{"schema_version": …, "message_type": …, "data": {…}}``. `flat`: the fields of `data` beside the others.

    `message_type` is a kind, such as ``summarise``, or an alias of the family, such as ``llm_request``.
    Raises BadInput.
    """
    if not isinstance(message_type, str) or not message_type:
        raise BadInput(f'message_type must be the name of a kind, such as "llm_request", not {message_type!r}')
    if not isinstance(data, Mapping) or not all(isinstance(key, str) for key in data):
        raise BadInput(f"data must be a mapping with text keys, the fields of the message, not {type(data).__name__}")
    head = {"schema_version": schema_version, "message_type": message_type}
    if not flat:
        return head | {"data": dict(data)}
    if taken := sorted({*_ENVELOPE_KEYS, "data"} & set(data)):
        raise BadInput(f"a flat envelope cannot have a field {taken[0]!r} in its data: leave out flat=True")
    return head | dict(data)


def encode(value: Any, content_type: str = codec.JSON) -> bytes:
    """Return a payload: `value` in JSON, or in CBOR if `content_type` is ``application/cbor``. Raises EncodeError."""
    if content_type == codec.CBOR:
        return codec.encode(value)
    if content_type != codec.JSON:
        raise BadInput(f"content_type must be {codec.JSON} or {codec.CBOR}, not {content_type!r}")
    plain = codec.to_plain(value)
    try:
        return _to_json(plain).encode()
    except UnicodeEncodeError:
        return codec.join_surrogates(_to_json(plain)).encode()
    except (ValueError, TypeError) as error:
        raise EncodeError(f"cannot be written as JSON: {error}: use content_type={codec.CBOR!r}") from None


def decode(payload: bytes | str | Msg, content_type: str = "") -> Any:
    """Return the plain data of a payload in JSON or CBOR; of an envelope, nested or flat, the fields of its data.

    A message brings its own `content_type`. Without one, what may be JSON is JSON. Raises DecodeError.
    """
    if isinstance(payload, Msg):
        if payload.job is not None and not content_type:
            try:
                return _fields_of(payload.job.message)
            except DecodeError:  # no map
                pass
        content_type = content_type or payload.content_type
        payload = payload.data
    return _without_envelope(codec.decode(to_bytes(payload), content_type))


def _fields_of(message: RawMessage) -> Any:
    """Return the fields of a job's message, which its worker may have decoded. Raises DecodeError for what is no map.

    Where a header states the kind, the worker has not looked for an envelope.
    """
    fields = message.decode()
    return _without_envelope(fields) if message.schema_version is None else fields


def _without_envelope(value: Any) -> Any:
    if not isinstance(value, dict) or "message_type" not in value or "schema_version" not in value:
        return value
    if isinstance(value.get("data"), dict):
        return value["data"]
    return {key: each for key, each in value.items() if key not in _ENVELOPE_KEYS}
