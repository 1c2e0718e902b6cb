"""One run of a handler on a job: what it needs, and what may come of it. The same in a worker and in its children."""

from __future__ import annotations

import asyncio
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any, NamedTuple

from .. import codec, headers, subjects
from ..backoff import Backoff
from ..errors import DecodeError, Stale
from ..job import Job, Message, Progress, Reject, Retry, parse_message
from ..topology import Family
from ..units import seconds

TRACEBACK_CHARS_MAX = 4_000
RETRY_AFTER_MAX_S = 365 * 86_400.0

Policy = Backoff | type[Reject] | Callable[[Any], str | float | None]
Policies = Mapping[type[Exception], Policy]


@dataclass(frozen=True)
class Handler:
    """A function for a kind of message, and how it is to be run. `process`: in a child process. `on`: what an error of
    a class means, where it is not tried again by `retry`.
    """

    model: type[Message]
    call: Callable[[Job[Any]], Any]
    is_async: bool
    retry: Backoff
    timeout_s: float | None
    keeps_result: bool
    process: bool = False
    on: Policies = field(default_factory=dict, hash=False)

    def backoff(self, rule: int | None) -> Backoff:
        """The retry policy for an error that was met by rule number `rule` of `on`, None: by none."""
        policy = list(self.on.values())[rule] if rule is not None and rule < len(self.on) else None
        return policy if isinstance(policy, Backoff) else self.retry


# What came of running a delivery


@dataclass(slots=True)  # not frozen, which would cost more than the rest of it: there is one for every job
class Returned:
    """The handler's own result."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """It failed, and another attempt may succeed, `after_s` seconds later if the handler said so. `rule`: which of the
    handler's `on` has met the error.
    """

    error: str
    trace: str
    after_s: float | None = None
    rule: int | None = None


@dataclass(frozen=True)
class Refused:
    """It can never succeed: `reason` is one word for machines, `error` a line for people."""

    reason: str
    error: str
    trace: str = ""


@dataclass(frozen=True)
class Unknown:
    """Nobody here knows this kind or version; a newer worker may."""

    error: str


@dataclass(frozen=True)
class WrongLane:
    """A plain publisher asked by header for a lower priority than the bare subject has."""

    priority: str


@dataclass(frozen=True)
class AlreadyEnded:
    """Another attempt has ended this job already."""


@dataclass(frozen=True)
class Cancelled:
    """Its job was cancelled while it ran."""


@dataclass(frozen=True)
class Duplicate:
    """Another message of this id has been run, or is being run: see `claims`."""


@dataclass(frozen=True)
class TakenOver:
    """A newer attempt holds this job: whatever this delivery said of it would be taken for that one's word."""


@dataclass(frozen=True)
class Interrupted:
    """The worker is leaving; the job is to go to another one."""


@dataclass(frozen=True)
class Postponed:
    """There was no room to try this suspect: it is to come back `after_s` seconds later."""

    after_s: float


@dataclass(frozen=True)
class RetryPending:
    """An attempt has failed and its message was not acknowledged: the next one is due `after_s` seconds later; None: by
    another message.
    """

    after_s: float | None


Outcome = (
    Returned
    | Raised
    | Refused
    | Unknown
    | WrongLane
    | AlreadyEnded
    | Cancelled
    | Duplicate
    | TakenOver
    | Interrupted
    | Postponed
    | RetryPending
)


class RawJob(NamedTuple):
    """What an attempt needs of a delivery, in plain data. `enqueued_at`: seconds since the epoch."""

    family: Family
    tenant: str
    priority: str
    seq: int
    enqueued_at: float
    headers: Mapping[str, str]
    body: bytes

    @property
    def deadline(self) -> float | None:
        """Seconds since the epoch; None: none."""
        if headers.DEADLINE not in self.headers:
            return None
        value = headers.number(self.headers[headers.DEADLINE])
        return value / 1000 if value else None


@dataclass
class DecodedJob:
    """What a parcel holds: the job's id, and its data unless `problem` says why that cannot be read."""

    job_id: str
    kind: str
    version: str | None = None
    data: dict[str, Any] | None = None
    problem: str = ""


def read(raw: RawJob) -> DecodedJob:
    """Read the body. One that cannot be read is told in `problem`."""
    found = DecodedJob("", "")
    fill(raw, found)
    return found


def fill(raw: RawJob, found: DecodedJob) -> None:
    """Read the body into `found`."""
    told, family = raw.headers, raw.family
    found.kind = _told_kind(raw)
    try:
        incoming = codec.read(
            raw.body,
            content_type=told.get(headers.CONTENT_TYPE, ""),
            kind=found.kind,
            default_kind=family.default_kind,
            aliases=family.aliases,
        )
    except DecodeError as error:
        found.problem = error.reason
        found.kind = found.kind or family.default_kind
    else:
        found.kind, found.version, found.data = incoming
    found.job_id = _job_id(raw, found.data)


def unread(raw: RawJob) -> DecodedJob | None:
    """Id and kind without a look at the body; None where the headers do not tell both."""
    told, key = raw.headers, raw.family.key
    if not told.get(headers.KIND) or not (told.get(headers.JOB_ID) or not key or told.get(key)):
        return None
    return DecodedJob(_job_id(raw, None), _told_kind(raw))


def nameless(raw: RawJob) -> DecodedJob:
    """The contents of a parcel whose body must not be looked at and whose headers do not tell them."""
    return DecodedJob(_job_id(raw, None), _told_kind(raw) or raw.family.default_kind)


def _told_kind(raw: RawJob) -> str:
    """What the header says; no kind is longer."""
    return raw.headers.get(headers.KIND, "")[:128]


def prepare(
    raw: RawJob, found: DecodedJob, handler: Handler | None, *, attempt: int, state: Any, progress: Progress
) -> Job[Any] | Refused | Unknown:
    """The job for its handler, or why there is none."""
    family = raw.family
    if found.data is None:
        return Refused("undecodable", found.problem)
    if handler is None:
        return unknown_kind(raw, found)
    if not codec.known_version(found.version, family.schema_versions):
        return Unknown(f"schema version {found.version!r} is none of {', '.join(family.schema_versions)}")
    try:
        message = parse_message(handler.model, found.data)
    except DecodeError as error:
        return Refused("invalid", _writable(error.reason))
    return Job(
        message,
        job_id=found.job_id,
        lane=(family.name, raw.tenant, raw.priority),
        attempt=attempt,
        enqueued_at=raw.enqueued_at,
        deadline=raw.deadline,
        headers=raw.headers,
        state=state,
        progress=progress,
    )


def unknown_kind(raw: RawJob, found: DecodedJob) -> Unknown:
    """The outcome of a job whose kind has no handler here."""
    return Unknown(f"no handler for kind {found.kind!r} in {raw.family.name}")


def overdue(raw: RawJob, *, in_s: float = 0.0) -> bool:
    """Whether the job's deadline has passed, or will have, so many seconds later."""
    if headers.DEADLINE not in raw.headers:
        return False
    deadline = raw.deadline
    return deadline is not None and time.time() + in_s >= deadline


def misplaced(raw: RawJob) -> WrongLane | None:
    """The priority that a header asks for, where the job belongs there."""
    wished = raw.headers.get(headers.PRIORITY)
    if not wished or wished == raw.priority or not raw.family.demoted(raw.priority, wished):
        return None
    return WrongLane(wished)


def timed_out(timeout_s: float | None) -> Raised:
    """The outcome of an attempt that its handler's `timeout_s` has ended."""
    return Raised(f"timed out after {timeout_s:g} s", "")


def raised(error: BaseException, on: Policies | None = None) -> Outcome:
    """What an exception of a handler means, by its class where `on` has a policy for that."""
    match error:
        case Retry():
            return Raised(_writable(error.reason), "", error.after_s)
        case Reject():
            return Refused("rejected", _writable(error.reason))
        case asyncio.CancelledError():
            return Raised("the handler was cancelled from within", "")
        case Stale():
            return AlreadyEnded() if error.ended else TakenOver()
        case Exception():
            return _by_class(error, on or {})
        case _:
            return Raised(f"the handler raised {_error_line(error)}", _trace(error))


def _by_class(error: Exception, on: Policies) -> Outcome:
    """The policy of the nearest class in the error's line of descent, as an `except` clause of each would have it."""
    line, trace = _error_line(error), _trace(error)
    rules = {each: number for number, each in enumerate(on)}
    rule = next((rules[each] for each in type(error).__mro__ if each in rules), None)
    if rule is None:
        return Raised(line, trace)
    policy = list(on.values())[rule]
    if isinstance(policy, type):
        return Refused("rejected", line, trace)
    if isinstance(policy, Backoff):
        return Raised(line, trace, None, rule)
    try:
        said = policy(error)
        after_s = None if said is None else min(seconds(said), RETRY_AFTER_MAX_S)
    except Exception as fault:  # noqa: BLE001  (the user's own; the job is not to suffer for it)
        return Raised(f"{line} (its policy in `on` raised {_error_line(fault)})", trace, None, rule)
    return Raised(line, trace, after_s, rule)


_BY_WORD: dict[str, type[Any]] = {
    "raised": Raised, "refused": Refused, "unknown": Unknown, "misplaced": WrongLane, "ended": AlreadyEnded,
    "stopped": Cancelled, "duplicate": Duplicate, "taken over": TakenOver, "cancelled": Interrupted,
    "postponed": Postponed, "waits": RetryPending,
}  # fmt: skip
_WORDS = {made: word for word, made in _BY_WORD.items()}


def to_plain(outcome: Outcome) -> list[Any]:
    """An outcome as plain data, for a pipe; `outcome_of` reads it. A result is CBOR in it."""
    if isinstance(outcome, Returned):
        return ["returned", codec.encode(outcome.value)]
    return [_WORDS[type(outcome)], *astuple(outcome)]


def outcome_of(plain: list[Any]) -> Outcome:
    """The outcome that `to_plain` wrote. Raises ValueError or TypeError for anything else."""
    word, *rest = plain
    if word == "returned":
        return Returned(codec.decode(rest[0], codec.CBOR))
    if word not in _BY_WORD:
        raise ValueError(f"{word!r} is no outcome")
    made: Outcome = _BY_WORD[word](*rest)
    return made


def here(handler: Handler) -> Handler:
    """The same handler, run in this very process."""
    return replace(handler, process=False)


def _job_id(raw: RawJob, data: Mapping[str, Any] | None) -> str:
    """The library's header, else the caller's own key in header or body, else what the stream knows: the same at
    every delivery.
    """
    key = raw.family.key
    found: Any = raw.headers.get(headers.JOB_ID)
    if not found and key:
        found = raw.headers.get(key) or (data or {}).get(key)
    if type(found) is str and found:
        return subjects.foreign_id(found)
    if isinstance(found, int):
        return subjects.foreign_id(str(found))
    return f"s{raw.seq}-{int(raw.enqueued_at * 1e6):x}"


def _error_line(error: BaseException) -> str:
    text = _writable(" ".join(str(error).split())[:500])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _trace(error: BaseException) -> str:
    """The traceback from the handler on, aiqueue's own frames before it left out."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith("aiqueue."):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return _writable(text[-TRACEBACK_CHARS_MAX:])


def _writable(text: str) -> str:
    """`text` as UTF-8 can hold it: a lone surrogate, which JSON can bring, is spelled out."""
    return str(text).encode("utf-8", "backslashreplace").decode()
