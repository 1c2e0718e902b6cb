"""What may come of an attempt. The runner makes one outcome for each delivery; `settlement` acts on it."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any

from .. import codec

CHECKED_MAX = 256 * 1024  # bytes of a child's result that are decoded to check them


@dataclass(slots=True)  # not frozen, which would cost more than the rest of it: there is one for every job
class Returned:
    """The handler returned `value`."""

    value: Any


RETURNED_NONE = Returned(None)  # what most handlers without a result return


@dataclass(frozen=True)
class Raised:
    """The attempt failed, and another one may succeed.

    `after_s`: how long the handler asked to wait before the next attempt. `rule`: the number of the policy in the
    handler's `on` that the error met. None: neither; the handler's `retry` decides. `pauses_key`: the handler asked
    that no job of its key starts for `after_s` seconds, which are above 0 then. `error_type`: the class of the
    exception, or `timeout`; "" for what is neither.
    """

    error: str
    trace: str
    after_s: float | None = None
    rule: int | None = None
    pauses_key: bool = False
    error_type: str = field(default="", compare=False)


@dataclass(frozen=True)
class Refused:
    """No attempt can succeed: the job becomes a dead letter. `reason` is one word for programs, `error` one line.

    `holds_id`: False if another run holds the job id, in a family with `claim`: the journal is that run's, and says
    nothing about this one. `error_type`: as in `Raised`.
    """

    reason: str
    error: str
    trace: str = ""
    holds_id: bool = True
    error_type: str = field(default="", compare=False)


@dataclass(frozen=True)
class Unknown:
    """This worker has no handler for the kind or schema version. A newer worker may have one."""

    error: str


@dataclass(frozen=True)
class KindPaused:
    """The job's kind is paused, perhaps `until` a time, in seconds since the epoch: it is parked aside."""

    error: str
    until: float | None


@dataclass(frozen=True)
class WrongLane:
    """The job moves to another lane of its tenant. A plain publisher used the bare subject and asked by header for the
    lower `priority`, or the job is of a limited key that has a lane of its own: `token`, for the value `key`.
    """

    priority: str
    token: str = ""
    key: str = ""


@dataclass(frozen=True)
class Waiting:
    """The handler waits for its job's children, see `job.Wait`. The job is parked, and the attempt goes on after it."""

    number: int
    children: int
    fallback_s: float


@dataclass(frozen=True)
class AlreadyEnded:
    """The run has its final entry: another attempt ended it, or it was cancelled."""


@dataclass(frozen=True)
class Cancelled:
    """The job was cancelled while this attempt ran, and the attempt stopped."""


@dataclass(frozen=True)
class Duplicate:
    """Another message with this job id runs or has run, in a family that claims ids."""


@dataclass(frozen=True)
class TakenOver:
    """A later delivery holds this run. This one must not even reply to the server: its ack would end the later one."""


@dataclass(frozen=True)
class Interrupted:
    """The worker stopped the attempt because the worker leaves. The job returns to the queue."""


@dataclass(frozen=True)
class Postponed:
    """The job could not be run yet: it returns to the queue for `after_s` seconds."""

    after_s: float


@dataclass(frozen=True)
class RetryPending:
    """An earlier attempt failed, and its message was not acknowledged. The next attempt is due `after_s` seconds from
    now. None: another message of the job carries the next attempt.
    """

    after_s: float | None


Outcome = (
    Returned
    | Raised
    | Refused
    | Unknown
    | KindPaused
    | WrongLane
    | Waiting
    | AlreadyEnded
    | Cancelled
    | Duplicate
    | TakenOver
    | Interrupted
    | Postponed
    | RetryPending
)

_BY_NAME: dict[str, type[Any]] = {
    "raised": Raised, "refused": Refused, "unknown": Unknown, "kind paused": KindPaused, "wrong lane": WrongLane,
    "waiting": Waiting, "already ended": AlreadyEnded, "cancelled": Cancelled, "duplicate": Duplicate,
    "taken over": TakenOver, "interrupted": Interrupted, "postponed": Postponed, "retry pending": RetryPending,
}  # fmt: skip
_NAMES = {outcome: name for name, outcome in _BY_NAME.items()}


def outcome_to_plain(outcome: Outcome) -> list[Any]:
    """Return an outcome as plain data, for the pipe of a child process. A result is CBOR in it. Raises EncodeError."""
    if isinstance(outcome, Returned):
        encoded = codec.encode_marked(outcome.value)
        return ["returned", encoded.secrets, encoded.body]  # the body last: large bytes cross the pipe as they are
    return [_NAMES[type(outcome)], *astuple(outcome)]


def outcome_from_plain(plain: list[Any]) -> Outcome:
    """Return the outcome that `outcome_to_plain` wrote. The value of a result stays encoded: a small one is checked, a
    large one would cost its size in memory once more.

    Raises ValueError, TypeError or DecodeError for other data.
    """
    name, *fields = plain
    if name == "returned":
        secrets, body = fields
        if len(body) <= CHECKED_MAX:
            codec.decode(body, codec.CBOR)  # a broken body must not get into the journal
        return Returned(codec.Encoded(body, secrets))
    if name not in _BY_NAME:
        raise ValueError(f"a child process sent an unknown outcome: {name!r}")
    outcome: Outcome = _BY_NAME[name](*fields)
    return outcome
