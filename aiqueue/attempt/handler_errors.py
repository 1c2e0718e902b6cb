"""What the end of a handler means: its error, or the value it returned. The user's code may raise anything here."""

from __future__ import annotations

import asyncio
import inspect
import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pydantic

from .. import codec
from ..errors import Stale
from ..job import Reject, Retry, WaitsForChildren
from ..payload import error_text
from ..units import Backoff, seconds
from .outcome_types import AlreadyEnded, Outcome, Raised, Refused, Returned, TakenOver, Waiting

log = logging.getLogger(__name__)

TRACEBACK_CHARS_MAX = 4_000
ERROR_CHARS_MAX = 500
RETRY_AFTER_MAX_S = 365 * 86_400.0
CAUSES_MAX = 3  # errors of an exception group that are named
PLAIN_TYPES = frozenset({type(None), str, int, float, bool, bytes, dict, list, tuple})  # values that need no look

_Policies = Mapping[type[Exception], Any]


async def outcome_of_value(value: Any) -> Outcome:
    """Return what a handler's value means. Only for values outside of PLAIN_TYPES; anything they hold is a result.

    1. An awaitable, as from a plain decorator around an async function: it is awaited. Raises what it raises.
    2. A generator: Refused, because its body has not run, and nobody would run it.
    3. A `Retry` or `Reject` that should have been raised: Raised, with an error that says so.
    4. Anything else: Returned.
    """
    if inspect.isawaitable(value):
        value = await value
    if inspect.isgenerator(value) or inspect.isasyncgen(value) or inspect.isawaitable(value):
        name = type(value).__name__
        return Refused(
            "result", f"the handler returned {_with_article(name)}, whose code has not run: run it in the handler"
        )
    named = value if isinstance(value, type) else type(value)
    if issubclass(named, Retry | Reject):
        return Raised(f"the handler returned {named.__name__}: it must raise it", "")
    return Returned(value)


def outcome_of_error(error: BaseException, on: _Policies | None = None) -> Outcome:
    """Return what an exception of a handler means. `on`: the handler's policies for classes of errors.

    Raises nothing: where the error's own code fails, such as its `__str__`, the attempt has failed.
    """
    try:
        outcome = _judge(error, on or {})
    except Exception as fault:  # noqa: BLE001  (the error's class is the user's)
        outcome = Raised(f"{_name(error)}: (the error cannot be read: {_name(fault)})", "")
    return replace(outcome, error_type=_name(error)) if isinstance(outcome, Raised | Refused) else outcome


def _judge(error: BaseException, on: _Policies) -> Outcome:
    match error:
        case Retry():
            pauses = bool(error.pause == "key" and error.after_s)  # a subclass may have a `pause` of its own
            return Raised(_reason(error), _trace_of_cause(error), _delay_s(error.after_s), pauses_key=pauses)
        case Reject():
            return Refused("rejected", _reason(error), _trace_of_cause(error))
        case asyncio.CancelledError():
            return Raised("the handler was cancelled from within", "")
        case Stale():
            return AlreadyEnded() if error.ended else TakenOver()
        case WaitsForChildren():
            return Waiting(*error.wait)
        case BaseExceptionGroup():
            return _judge_group(error, on)
        case Exception():
            return _apply_policy(error, on)
        case _:
            return Raised(f"the handler raised {error_line(error)}", format_traceback(error))


def _judge_group(group: BaseExceptionGroup[BaseException], on: _Policies) -> Outcome:
    """Return what an exception group means, such as that of a failed TaskGroup: the strictest of what its errors mean.

    1. A policy for a class of groups decides alone. 2. An error that ends the attempt (a lost job, `Reject`) decides.
    3. If all of them wait for children, the job waits. 4. Otherwise the longest delay that an error asks for, or the
    `Backoff` with the fewest attempts. If errors pause the key, the longest delay of these: the key is paused as long.
    """
    if isinstance(group, Exception) and _find_rule(type(group), on, below=BaseExceptionGroup) is not None:
        return _apply_policy(group, on)
    errors = list(_leaves(group))
    outcomes = [outcome_of_error(each, on) for each in errors]
    line, trace = _group_line(group, errors), format_traceback(group)
    for outcome in outcomes:
        if isinstance(outcome, AlreadyEnded | TakenOver):
            return outcome
    for outcome in outcomes:
        if isinstance(outcome, Refused):
            return Refused(outcome.reason, f"{outcome.error} (in {line})", trace)
    if all(isinstance(each, Waiting) for each in outcomes):
        return outcomes[-1]
    raised = [each for each in outcomes if isinstance(each, Raised)]
    pausing = [each for each in raised if each.pauses_key]
    delays = [each.after_s for each in pausing or raised if each.after_s is not None]
    if delays:
        return Raised(line, trace, max(delays), pauses_key=bool(pausing))
    policies = list(on.values())
    rules = [
        (policies[each.rule].attempts, each.rule)
        for each in raised
        if each.rule is not None and isinstance(policies[each.rule], Backoff)
    ]
    return Raised(line, trace, None, min(rules)[1] if rules else None)


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Yield the errors of a group and of the groups within."""
    for each in group.exceptions:
        if isinstance(each, BaseExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


def _group_line(group: BaseExceptionGroup[BaseException], errors: list[BaseException]) -> str:
    """Return class and first errors of a group as one line."""
    causes = "; ".join(error_line(each) for each in errors[:CAUSES_MAX])
    more = f" (and {len(errors) - CAUSES_MAX} more)" if len(errors) > CAUSES_MAX else ""
    return f"{_name(group)}: {causes}{more}"[:ERROR_CHARS_MAX]


def _apply_policy(error: Exception, on: _Policies) -> Outcome:
    """Return what the policy of the error's nearest class in `on` makes of it. Without a policy, it is Raised."""
    line, trace = error_line(error), format_traceback(error)
    rule = _find_rule(type(error), on)
    if rule is None:
        return Raised(line, trace)
    policy = list(on.values())[rule]
    if isinstance(policy, type):
        return Refused("rejected", line, trace)
    if isinstance(policy, Backoff):
        return Raised(line, trace, None, rule)
    try:
        after = policy(error)
        after_s = None if after is None else _delay_s(seconds(after))
    except Exception as fault:  # noqa: BLE001  (a fault of the user's policy must not change the job's fate)
        return Raised(f"{line} (its policy in `on` raised {error_line(fault)})", trace, None, rule)
    return Raised(line, trace, after_s, rule)


def _find_rule(error: type[BaseException], on: _Policies, *, below: type[BaseException] = BaseException) -> int | None:
    """Return the number of the policy for the nearest class of an error's class that is a `below`; None: no policy."""
    rules = {each: number for number, each in enumerate(on)}
    return next((rules[each] for each in error.__mro__ if each in rules and issubclass(each, below)), None)


def _delay_s(after_s: float | None) -> float | None:
    return None if after_s is None else min(after_s, RETRY_AFTER_MAX_S)


def _reason(error: Retry | Reject) -> str:
    """Return the reason, and the error that it was raised from."""
    reason = to_utf8(error.reason)
    return f"{reason} ({error_line(error.__cause__)})" if error.__cause__ is not None else reason


def _trace_of_cause(error: Retry | Reject) -> str:
    """Return the traceback where the reason has a cause. Without one, the reason says all."""
    return format_traceback(error) if error.__cause__ is not None else ""


def warn_of_no_key(what: str, why: str) -> None:
    """Log that a `Retry` of the handler of `what` pauses no key, and `why` there is none."""
    log.warning('%s: the handler raised Retry(pause="key"), which pauses nothing: %s', what, why)


def error_line(error: BaseException) -> str:
    """Return class and text of an error as one line. Where its text cannot be read, a placeholder."""
    try:
        text = to_utf8(" ".join(error_text(error).split())[:ERROR_CHARS_MAX])
    except Exception as fault:  # noqa: BLE001  (an error's __str__ may raise anything)
        text = f"(its text cannot be read: {_name(fault)})"
    return f"{_name(error)}: {text}" if text else _name(error)


def _name(error: BaseException) -> str:
    return type(error).__name__


def _with_article(name: str) -> str:
    return f"{'an' if name[:1] in 'aeio' else 'a'} {name}"


def format_traceback(error: BaseException) -> str:
    """Return the end of the traceback, without aiqueue's own frames before the handler's."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_globals.get("__name__", "").startswith("aiqueue."):
        frames = frames.tb_next
    try:
        text = "".join(_lines(traceback.TracebackException(type(error), error, frames), error))
    except Exception as fault:  # noqa: BLE001  (notes and causes are the user's objects)
        text = f"the traceback cannot be read: {_name(fault)}\n"
    return to_utf8(text[-TRACEBACK_CHARS_MAX:])


def _lines(trace: traceback.TracebackException, error: BaseException) -> Iterator[str]:
    """Return the lines of a traceback. The texts of pydantic's errors do not contain the input, causes included."""
    todo: list[tuple[traceback.TracebackException | None, BaseException | None]] = [(trace, error)]
    while todo:
        each, of = todo.pop()
        if each is None or of is None:
            continue
        if isinstance(of, pydantic.ValidationError):
            vars(each)["_str"] = error_text(of)  # there is no other way to give a text
        todo += [(each.__cause__, of.__cause__), (each.__context__, of.__context__)]
        if isinstance(of, BaseExceptionGroup):
            todo += zip(each.exceptions or (), of.exceptions, strict=False)
    return trace.format()


def to_utf8(text: str) -> str:
    """Return `text` in a form that UTF-8 can hold; see `codec.join_surrogates`."""
    return codec.join_surrogates(str(text))
