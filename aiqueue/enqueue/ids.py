"""The id of a new job: the caller's key, the family's key in the message, or a new one."""

from __future__ import annotations

from typing import NamedTuple, Protocol, Self, get_args
from uuid import UUID

from .. import headers, subjects
from ..errors import BadInput
from ..job import Message
from ..subjects import OnDuplicate
from ..topology import Family

ON_DUPLICATE: tuple[OnDuplicate, ...] = get_args(OnDuplicate)

_MSG_ID_STARTS = f"NATS/1.0\r\n{headers.MSG_ID}: ".encode()


class HasOffset(Protocol):
    """A clock: `offset_ms` is the server's clock less the local one."""

    offset_ms: int


class JobId(NamedTuple):
    """The id of a job. `by_caller`: the caller chose it. `shown`: the value of Aiq-Unique; "": the id is the key."""

    id: str
    by_caller: bool
    shown: str = ""


class FreshId(str):
    """A new id, given as `unique` by who has to know it before its job is stored: nobody else can have it."""

    __slots__ = ()

    @classmethod
    def make(cls, clock: HasOffset) -> Self:
        return cls(subjects.new_id(clock.offset_ms))


def resolve_job_id(family: Family, message: Message, unique: str | None, clock: HasOffset) -> JobId:
    """Return the job's id: by `unique`, or by the family's key in the message. Raises BadInput (InvalidToken).

    Otherwise the id is new, and holds the time by the server's clock.
    """
    if isinstance(unique, FreshId):
        return JobId(str(unique), False)
    if unique is not None:
        return id_of_key(unique)
    key = _key_in_message(family, message)
    return JobId(subjects.new_id(clock.offset_ms), False) if key is None else JobId(key, True)


def id_of_key(unique: str) -> JobId:
    """Return the id for a caller's key, which may be any text but an empty one. Raises BadInput."""
    if not isinstance(unique, str) or not unique:
        raise BadInput(f"unique key {unique!r} must be a text that is not empty, or None for a new id")
    job_id = subjects.foreign_id(unique)
    return JobId(job_id, True, "" if job_id == unique else headers.encode_unique(unique))


def check_on_duplicate(value: OnDuplicate) -> OnDuplicate:
    """Return `value` if it says what a known id leads to. Raises BadInput."""
    if value not in ON_DUPLICATE:
        raise BadInput(f"on_duplicate must be one of {', '.join(map(repr, ON_DUPLICATE))}, not {value!r}")
    return value


def with_header(block: bytes, name: str, value: str) -> bytes:
    """Return an encoded header block with one more header at its end."""
    return block[:-2] + f"{name}: {value}\r\n\r\n".encode()


def with_step(block: bytes, step: str) -> bytes:
    """Return a job's encoded header block, which begins with the Msg-Id, with `step` at the end of that.

    As of `subjects.msg_id`. An empty step changes nothing.
    """
    if not step:
        return block
    assert block.startswith(_MSG_ID_STARTS)
    end = block.index(b"\r\n", len(_MSG_ID_STARTS))
    return block[:end] + f"/{step}".encode() + block[end:]


def _key_in_message(family: Family, message: Message) -> str | None:
    """Return the value of the family's key field (such as request_id) in a message; None if it has none.

    Raises InvalidToken.
    """
    if family.key is None:
        return None
    value = message.__dict__.get(family.key)
    if value is None:
        value = (message.model_extra or {}).get(family.key)
    if value is None or value == "":
        return None
    if isinstance(value, UUID) or type(value) is int:
        return str(value)
    return subjects.token(family.key, value)
