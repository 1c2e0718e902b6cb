"""Bodies: CBOR and JSON, encoded and decoded, and which fields of a body are secret."""

from __future__ import annotations

from . import secret_paths
from .codec import (
    CBOR,
    JSON,
    JSON_SCALAR,
    MAX_BYTES,
    MAX_DEPTH,
    Encoded,
    MessageBody,
    TextJoiner,
    decode,
    decode_map,
    decode_message,
    dump,
    encode,
    encode_marked,
    is_accepted_version,
    join_encoded,
    join_surrogates,
    to_plain,
)

__all__ = [
    "CBOR",
    "JSON",
    "JSON_SCALAR",
    "MAX_BYTES",
    "MAX_DEPTH",
    "Encoded",
    "MessageBody",
    "TextJoiner",
    "decode",
    "decode_map",
    "decode_message",
    "dump",
    "encode",
    "encode_marked",
    "is_accepted_version",
    "join_encoded",
    "join_surrogates",
    "secret_paths",
    "to_plain",
]  # fmt: skip
