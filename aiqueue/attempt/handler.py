"""Handlers: how they are declared, what they are called with, and what their errors mean. Children use this too."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import codec
from ..backoff import Backoff
from ..errors import DecodeError, Stale
from ..job import Job, Message, Progress, Reject, Retry, parse_message
from ..units import seconds
from .decoding import DecodedJob, RawJob
from .outcome_types import AlreadyEnded, Outcome, Raised, Refused, TakenOver, Unknown

TRACEBACK_CHARS_MAX = 4_000
ERROR_CHARS_MAX = 500
RETRY_AFTER_MAX_S = 365 * 86_400.0

Policy = Backoff | type[Reject] | Callable[[Any], str | float | None]
Policies = Mapping[type[Exception], Policy]


@dataclass(frozen=True)
class Handler:
    """A function for one kind of message, and how to run it. `process`: in a child process.

    `on` has the policies for classes of errors. An error that meets none is retried by `retry`.
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
        """Return the retry policy for an error that met policy number `rule` of `on` (None: it met none)."""
        policy = list(self.on.values())[rule] if rule is not None and rule < len(self.on) else None
        return policy if isinstance(policy, Backoff) else self.retry


def build_job(
    raw: RawJob, decoded: DecodedJob, handler: Handler | None, *, attempt: int, state: Any, progress: Progress
) -> Job[Any] | Refused | Unknown:
    """Return the job that the handler is called with, or why it cannot be called.

    1. Refused: the body cannot be decoded, or does not fit the message's model. 2. Unknown: no handler here knows the
    kind, or the schema version.
    """
    family = raw.family
    if decoded.data is None:
        return Refused("undecodable", decoded.problem)
    if handler is None:
        return unknown_kind_outcome(raw, decoded)
    if not codec.is_accepted_version(decoded.version, family.schema_versions):
        return Unknown(f"schema version {decoded.version!r} is none of {', '.join(family.schema_versions)}")
    try:
        message = parse_message(handler.model, decoded.data)
    except DecodeError as error:
        return Refused("invalid", _to_utf8(error.reason))
    return Job(
        message,
        job_id=decoded.job_id,
        lane=(family.name, raw.tenant, raw.priority),
        attempt=attempt,
        enqueued_at=raw.enqueued_at,
        deadline=raw.deadline,
        headers=raw.headers,
        state=state,
        progress=progress,
    )


def unknown_kind_outcome(raw: RawJob, decoded: DecodedJob) -> Unknown:
    """Return the outcome of a job whose kind has no handler here."""
    return Unknown(f"no handler for kind {decoded.kind!r} in {raw.family.name}")


def timeout_outcome(timeout_s: float | None) -> Raised:
    """Return the outcome of an attempt that was ended by its handler's timeout."""
    return Raised(f"timed out after {timeout_s:g} s", "")


def outcome_of_error(error: BaseException, on: Policies | None = None) -> Outcome:
    """Return what an exception of a handler means. `on`: the handler's policies for classes of errors."""
    match error:
        case Retry():
            return Raised(_to_utf8(error.reason), "", error.after_s)
        case Reject():
            return Refused("rejected", _to_utf8(error.reason))
        case asyncio.CancelledError():
            return Raised("the handler was cancelled from within", "")
        case Stale():
            return AlreadyEnded() if error.ended else TakenOver()
        case Exception():
            return _apply_policy(error, on or {})
        case _:
            return Raised(f"the handler raised {_error_line(error)}", _format_traceback(error))


def _apply_policy(error: Exception, on: Policies) -> Outcome:
    """Return what the policy of the error's nearest class in `on` makes of it. Without a policy, it is Raised."""
    line, trace = _error_line(error), _format_traceback(error)
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
        after = policy(error)
        after_s = None if after is None else min(seconds(after), RETRY_AFTER_MAX_S)
    except Exception as fault:  # noqa: BLE001  (a fault of the user's policy must not change the job's fate)
        return Raised(f"{line} (its policy in `on` raised {_error_line(fault)})", trace, None, rule)
    return Raised(line, trace, after_s, rule)


def _error_line(error: BaseException) -> str:
    """Return class and text of an error as one line."""
    text = _to_utf8(" ".join(str(error).split())[:ERROR_CHARS_MAX])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _format_traceback(error: BaseException) -> str:
    """Return the end of the traceback, without aiqueue's own frames before the handler's."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith("aiqueue."):
        frames = frames.tb_next
    text = "".join(traceback.format_exception(type(error), error, frames))
    return _to_utf8(text[-TRACEBACK_CHARS_MAX:])


def _to_utf8(text: str) -> str:
    """Return `text` in a form that UTF-8 can hold: a lone surrogate, which JSON can carry, is spelled out."""
    return str(text).encode("utf-8", "backslashreplace").decode()
