"""Handlers: how they are declared, and what they are called with. Child processes use this too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .. import codec
from ..errors import BadInput, DecodeError
from ..headers import CONTENT_TYPE
from ..job import ANY_KIND, Job, Progress, RawMessage, Reject
from ..payload import parse_message
from ..topology import Family
from ..units import Backoff, Duration
from .around import Around, InThread, call_in_thread, compose
from .decoding import DecodedJob, RawJob
from .handler_errors import to_utf8
from .outcome_types import Raised, Refused, Unknown

Policy = Backoff | type[Reject] | Callable[[Any], Duration | None]
Policies = Mapping[type[Exception], Policy]


@dataclass(frozen=True)
class Handler:
    """A function for one kind of message, or for every kind, and how to run it. `process`: in a child process.

    `on` has the policies for classes of errors. An error that meets none is retried by `retry`. `model` is the class of
    the messages. `any_of`: the family of a handler of every kind, whose `model` is RawMessage; "" for any other. `cost`
    returns an upper bound of what a call with a message uses; call it by `cost_of`.

    `call` is `function`, the user's, within what is around it in the same task or thread.
    """

    model: type[Any]
    function: Callable[[Any], Any]
    is_async: bool
    retry: Backoff
    timeout_s: float | None
    keeps_result: bool
    process: bool = False
    on: Policies = field(default_factory=dict, hash=False)
    any_of: str = ""
    cost: Callable[[Any], float] | None = None
    arounds: tuple[Around, ...] = ()
    call: Callable[[Any], Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", compose(self.function, self.arounds, is_async=self.is_async))

    @property
    def key(self) -> tuple[str, str]:
        """Family and kind, under which a worker keeps its handler."""
        return (self.any_of, ANY_KIND) if self.any_of else (self.model.aiq_family, self.model.aiq_kind)

    @property
    def what(self) -> str:
        """What the handler is for, in a text."""
        return f"every kind of {self.any_of}" if self.any_of else f"kind {self.model.aiq_kind!r}"

    def call_in_thread(self, job: Any, run_in_thread: InThread) -> Awaitable[Any]:
        """Call a plain function by `run_in_thread`, within all that is around it."""
        if not self.arounds:
            return run_in_thread(functools.partial(self.call, job))
        return call_in_thread(self.call, self.arounds, job, run_in_thread)

    def backoff(self, rule: int | None) -> Backoff:
        """Return the retry policy for an error that met policy number `rule` of `on` (None: it met none)."""
        policy = list(self.on.values())[rule] if rule is not None and rule < len(self.on) else None
        return policy if isinstance(policy, Backoff) else self.retry


def is_async_handler(
    function: Any,
    *,
    rule: str = "a handler must be a function of one argument",
    argument: str = "the job or the mail",
    instead_of_yield: str = "give parts with `await job.chunk(...)`, and return the result",
) -> bool:
    """Return whether a handler runs on the event loop; if not, it runs in a thread.

    Raises BadInput for what cannot be a handler: something that cannot be called with one argument, or a generator
    function, whose body would not run when it is called. The texts are parts of these errors.
    """
    name = getattr(function, "__qualname__", None) or repr(function)
    if not callable(function) or isinstance(function, type):
        raise BadInput(f"{rule}, not {function!r}")
    forms = function, getattr(function, "__call__", None)  # noqa: B004  (an object whose __call__ is async)
    if any(inspect.isgeneratorfunction(each) or inspect.isasyncgenfunction(each) for each in forms):
        raise BadInput(f"{name} is a generator function: {instead_of_yield}")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise BadInput(f"{name} must take one argument, {argument}: {error}") from None
    except ValueError:
        pass  # a builtin without a signature
    return any(inspect.iscoroutinefunction(each) for each in forms)


class Handlers(dict[tuple[str, str], Handler]):
    """Handlers by `Handler.key`. ``handlers[family, kind]`` raises nothing: without a handler of the kind, it is the
    family's handler of every kind, or None. `get` and `in` look for the key alone.
    """

    def __missing__(self, key: tuple[str, str]) -> Handler | None:
        return self.get((key[0], ANY_KIND))


def find_handler(handlers: Handlers, family: Family, decoded: DecodedJob) -> Handler | None:
    """Return the handler of a job: that of its kind, else that of every kind in the family.

    The latter also goes first for a schema version that the family does not accept. None: no handler knows the kind.
    """
    found: Handler | None = handlers[family.name, decoded.kind]
    if codec.is_accepted_version(decoded.version, family.schema_versions):
        return found
    return handlers.get((family.name, ANY_KIND), found)


def build_job(
    raw: RawJob, decoded: DecodedJob, handler: Handler | None, *, attempt: int, state: Any, progress: Progress
) -> Job[Any] | Refused | Unknown:
    """Return the job that the handler is called with, or why it cannot be called.

    1. Refused: the body cannot be decoded, contradicts a header, or does not fit the message's model. 2. Unknown: no
    handler here knows the kind, or the schema version. A handler of every kind can be called with any body.
    """
    family = raw.family
    if decoded.contradiction:
        return Refused("invalid", decoded.contradiction)
    if handler is None or not handler.any_of:
        if decoded.data is None:
            return Refused("undecodable", decoded.problem)
        if handler is None:
            return unknown_kind_outcome(raw, decoded)
        if not codec.is_accepted_version(decoded.version, family.schema_versions):
            return Unknown(f"schema version {decoded.version!r} is none of {', '.join(family.schema_versions)}")
    try:
        message = read_message(handler, raw, decoded)
    except DecodeError as error:
        return _refuse_invalid(error)
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
        stored=(raw.seq, raw.stored_at),
    )


def read_message(handler: Handler, raw: RawJob, decoded: DecodedJob) -> Any:
    """Return the message that a handler is called with: one of its model, or the RawMessage of one of every kind.

    Raises DecodeError if the body was not decoded, or does not fit the model.
    """
    if handler.any_of:
        return make_raw_message(raw, decoded)
    if decoded.data is None:
        raise DecodeError(decoded.problem)
    return parse_message(handler.model, decoded.data)


def make_raw_message(raw: RawJob, decoded: DecodedJob) -> RawMessage:
    """Return the message of a job or mail for a handler of every kind."""
    return RawMessage(decoded.kind, raw.body, raw.headers.get(CONTENT_TYPE, ""), decoded.version)


def build_plain_job(
    handler: Handler,
    decoded: DecodedJob,
    lane: tuple[str, str, str],
    headers: Callable[[], Mapping[str, str]],
    known: Any,
    *,
    enqueued_at: float,
    stored: tuple[int, float],
    state: Any,
    progress: Progress,
) -> Job[Any] | Refused:
    """As `build_job`, for a first attempt without a deadline whose body was decoded, and whose version is accepted.

    `known`: the message, if it was read already, and for a handler of every kind.
    """
    message = known
    try:
        if message is None:
            message = parse_message(handler.model, decoded.data)  # type: ignore[arg-type]
    except DecodeError as error:
        return _refuse_invalid(error)
    return Job(
        message, job_id=decoded.job_id, lane=lane, attempt=1, enqueued_at=enqueued_at, deadline=None, headers=headers,
        state=state, progress=progress, stored=stored,
    )  # fmt: skip


def _refuse_invalid(error: DecodeError) -> Refused:
    return Refused("invalid", to_utf8(error.reason))


def unknown_kind_outcome(raw: RawJob, decoded: DecodedJob) -> Unknown:
    """Return the outcome of a job whose kind has no handler here."""
    return Unknown(f"no handler for kind {decoded.kind!r} in {raw.family.name}")


def timeout_outcome(timeout_s: float | None) -> Raised:
    """Return the outcome of an attempt that was ended by its handler's timeout."""
    return Raised(f"timed out after {timeout_s:g} s", "", error_type="timeout")
