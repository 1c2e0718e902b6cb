"""From a message to the job's id, kind and data. The body is decoded, but not yet checked by the message's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .. import codec, headers, subjects
from ..errors import DecodeError
from ..topology import Family
from .outcome_types import WrongLane

KIND_CHARS_MAX = 128


class RawJob(NamedTuple):
    """A job before its body is decoded, as plain data. `enqueued_at`, `stored_at`: seconds since the epoch, see
    `Delivery`.
    """

    family: Family
    tenant: str
    priority: str
    seq: int
    enqueued_at: float
    headers: Mapping[str, str]
    body: bytes
    stored_at: float = 0.0

    @property
    def deadline(self) -> float | None:
        """The deadline in seconds since the epoch. None: the job has none, or one that is no number."""
        if headers.DEADLINE not in self.headers:
            return None
        return headers.milliseconds(self.headers[headers.DEADLINE])


@dataclass
class DecodedJob:
    """A job's id, kind and schema version, and the data of its body.

    `data` is None if the body was not decoded, or could not be: then `problem` states why. `contradiction`: what is
    wrong if a header and the body do not agree; such a job must not run.
    """

    job_id: str
    kind: str
    version: str | None = None
    data: dict[str, Any] | None = None
    problem: str = ""
    contradiction: str = ""


def decode_body(raw: RawJob) -> DecodedJob:
    """Decode the body. If that fails, `problem` states why."""
    decoded = DecodedJob("", "")
    decode_into(raw, decoded)
    return decoded


def decode_into(raw: RawJob, decoded: DecodedJob) -> None:
    """Decode the body, and set all fields of `decoded` by it and by the headers."""
    message_headers, family = raw.headers, raw.family
    decoded.kind = _kind_in_header(raw)
    try:
        incoming = codec.decode_message(
            raw.body,
            content_type=message_headers.get(headers.CONTENT_TYPE, ""),
            kind=decoded.kind,
            default_kind=family.default_kind,
            aliases=family.aliases,
        )
    except DecodeError as error:
        decoded.problem = error.reason
        decoded.kind = decoded.kind or family.default_kind
    else:
        decoded.kind, decoded.version, decoded.data = incoming
        if family.header_fields:
            decoded.contradiction = headers.take_fields(message_headers, family.header_fields, decoded.data)
    decoded.job_id = _find_job_id(raw, decoded.data)


def decode_headers_only(raw: RawJob) -> DecodedJob | None:
    """Return id and kind from the headers, without the body. None: the headers lack the kind, or an id that the body
    may have.
    """
    message_headers, key = raw.headers, raw.family.key
    if not message_headers.get(headers.KIND) or not (
        message_headers.get(headers.JOB_ID) or not key or headers.find(message_headers, key)
    ):
        return None
    return DecodedJob(_find_job_id(raw, None), _kind_in_header(raw))


def decode_headers_or_defaults(raw: RawJob) -> DecodedJob:
    """Return id and kind of a job whose body must not be decoded: what the headers lack is made up.

    The id is then made of the message's place in the stream, and the kind is the family's default.
    """
    return DecodedJob(_find_job_id(raw, None), _kind_in_header(raw) or raw.family.default_kind)


def limit_key_of(decoded: DecodedJob, family: Family) -> str:
    """Return the value of the family's limited key in a decoded body. "": it has none, or was not decoded."""
    return subjects.key_in_message((decoded.data or {}).get(family.limit_key or ""))


def is_past_deadline(raw: RawJob, at: float) -> bool:
    """Return whether the job's deadline has passed at this time, in seconds since the epoch, by the server's clock."""
    if headers.DEADLINE not in raw.headers:
        return False
    deadline = raw.deadline
    return deadline is not None and at >= deadline


def find_wrong_lane(raw: RawJob) -> WrongLane | None:
    """Return the priority that a header asks for, if the job must move to it. None: the job is in the right lane."""
    wished = wished_priority(raw)
    return WrongLane(wished) if wished != raw.priority and raw.family.is_demotion(raw.priority, wished) else None


def wished_priority(raw: RawJob) -> str:
    """Return the priority that a plain publisher's header asks for on the bare subject, or that of the job's lane."""
    return raw.family.wished(raw.priority, raw.headers.get(headers.PRIORITY, ""))


def _kind_in_header(raw: RawJob) -> str:
    """Return the kind in the headers, cut to the longest that a kind can be. "": there is none."""
    return raw.headers.get(headers.KIND, "")[:KIND_CHARS_MAX]


def _find_job_id(raw: RawJob, data: Mapping[str, Any] | None) -> str:
    """Return the job id, the same at every delivery.

    1. The header of this library. 2. The family's `key` field, in the headers or in the body. 3. The message's sequence
    and time in the stream.
    """
    key = raw.family.key
    found = subjects.id_in_message(raw.headers.get(headers.JOB_ID))
    if found is None and key:
        found = subjects.id_in_message(headers.find(raw.headers, key)) or subjects.id_in_message((data or {}).get(key))
    return found or f"s{raw.seq}-{int(raw.enqueued_at * 1e6):x}"
