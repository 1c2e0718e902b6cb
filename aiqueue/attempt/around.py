"""What users put around runs of handlers: context managers, composed with the handler when they are declared."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..errors import BadInput, Stale
from .handler_errors import PLAIN_TYPES, error_line

AroundFunction = Callable[[Any], AbstractContextManager[Any] | AbstractAsyncContextManager[Any]]
Call = Callable[[Any], Any]
InThread = Callable[[Callable[[], Any]], Awaitable[Any]]  # runs a function in a thread, and returns what it returns

_RULE = "around needs a function with @contextmanager or @asynccontextmanager above it"
_NOT_ONCE = "generator didn't"  # how each error of contextlib about a missing or a second `yield` begins


@dataclass(frozen=True)
class Around:
    """A function of a job or a mail that returns a context manager, an async one if `is_async`."""

    function: AroundFunction
    is_async: bool

    @property
    def name(self) -> str:
        return _name_of(self.function)


def parse_around(function: Any, argument: str) -> Around:
    """Return what `around` was given, whose one argument is `argument` ("the job"). Raises BadInput.

    It is a function that contextlib has decorated, or a class of context managers.
    """
    forms = [_unwrapped(each) for each in (function, getattr(function, "__call__", None))]  # noqa: B004
    if isinstance(function, type):
        is_plain, is_async = hasattr(function, "__enter__"), hasattr(function, "__aenter__")
        if is_plain == is_async:
            what = "both a plain and an async" if is_plain else "no"
            raise BadInput(f"around: {_name_of(function)} is {what} context manager: {_RULE}")
    elif not callable(function):
        raise BadInput(f"{_RULE}, not {function!r}")
    elif inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        decorator = "@contextmanager" if inspect.isgeneratorfunction(function) else "@asynccontextmanager"
        raise BadInput(f"around: {_name_of(function)} is no context manager yet: put {decorator} above it")
    else:
        is_async = any(inspect.isasyncgenfunction(each) for each in forms)
        if not is_async and not any(inspect.isgeneratorfunction(each) for each in forms):
            raise BadInput(f"{_RULE}, and one `yield` in it, where the handler runs: {_name_of(function)} has none")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise BadInput(f"around: {_name_of(function)} must take one argument, {argument}: {error}") from None
    return Around(function, is_async)


def compose(function: Call, arounds: Sequence[Around], *, is_async: bool) -> Call:
    """Return a handler's function with what is around it, the first one outermost.

    A plain function runs in a thread, so the async ones are left out: see `call_in_thread`.
    """
    call = function
    if is_async:
        for each in reversed(arounds):
            wrap = _async_in_async if each.is_async else _plain_in_async
            call = wrap(each, call, is_innermost=call is function)
        return call
    for each in reversed([each for each in arounds if not each.is_async]):
        call = _plain_in_thread(each, call, is_innermost=call is function)
    return call


async def call_in_thread(call: Call, arounds: Sequence[Around], job: Any, run_in_thread: InThread) -> Any:
    """Run a composed plain function in a thread. The async ones of `arounds` are entered here, around that."""

    async def run(job: Any) -> Any:
        return await run_in_thread(functools.partial(call, job))

    return await compose(run, [each for each in arounds if each.is_async], is_async=True)(job)


# Each of these is a `with` statement, written out: an exception that the context manager has suppressed is known then.


def _async_in_async(around: Around, inner: Call, *, is_innermost: bool) -> Call:
    make = around.function

    async def call(job: Any) -> Any:
        context: Any = make(job)
        try:
            await context.__aenter__()
        except RuntimeError as fault:
            _explain(around, fault)
            raise
        try:
            value = await inner(job)
            if is_innermost and type(value) not in PLAIN_TYPES and inspect.isawaitable(value):
                value = await value
        except BaseException as error:
            try:
                suppressed = await context.__aexit__(type(error), error, error.__traceback__)
            except RuntimeError as fault:
                _explain(around, fault)
                raise
            if suppressed:
                raise _suppressed(around, error) from error
            raise
        try:
            await context.__aexit__(None, None, None)
        except RuntimeError as fault:
            _explain(around, fault)
            raise
        return value

    return call


def _plain_in_async(around: Around, inner: Call, *, is_innermost: bool) -> Call:
    make = around.function

    async def call(job: Any) -> Any:
        context: Any = make(job)
        _enter(around, context)
        try:
            value = await inner(job)
            if is_innermost and type(value) not in PLAIN_TYPES and inspect.isawaitable(value):
                value = await value
        except BaseException as error:
            _leave_by(around, context, error)
            raise
        _leave(around, context)
        return value

    return call


def _plain_in_thread(around: Around, inner: Call, *, is_innermost: bool) -> Call:
    make = around.function

    def call(job: Any) -> Any:
        context: Any = make(job)
        _enter(around, context)
        try:
            value = inner(job)
            if is_innermost:
                _check_end_in_thread(job, value)
        except BaseException as error:
            _leave_by(around, context, error)
            raise
        _leave(around, context)
        return value

    return call


def _check_end_in_thread(job: Any, value: Any) -> None:
    """Raise what the context managers are to see of a function that has returned, and whose value does not count.

    1. Stale: the attempt has timed out, or its worker has left. 2. TypeError: what it has returned would be awaited on
    the event loop, behind the context managers.
    """
    if type(value) not in PLAIN_TYPES and inspect.isawaitable(value):
        if inspect.iscoroutine(value):
            value.close()
        raise TypeError("the handler returned a coroutine, which no plain `around` can be around: make it async")
    if job.is_abandoned:
        raise Stale("this attempt is over, and what its handler returned is dropped", ended=False)


def _enter(around: Around, context: Any) -> None:
    try:
        context.__enter__()
    except RuntimeError as fault:
        _explain(around, fault)
        raise


def _leave(around: Around, context: Any) -> None:
    try:
        context.__exit__(None, None, None)
    except RuntimeError as fault:
        _explain(around, fault)
        raise


def _leave_by(around: Around, context: Any, error: BaseException) -> None:
    """Leave a context manager by an error, which the caller raises again. Raises RuntimeError if it was suppressed."""
    try:
        suppressed = context.__exit__(type(error), error, error.__traceback__)
    except RuntimeError as fault:
        _explain(around, fault)
        raise
    if suppressed:
        raise _suppressed(around, error) from error


def _suppressed(around: Around, error: BaseException) -> RuntimeError:
    return RuntimeError(
        f"around {around.name} suppressed the handler's {error_line(error)} (it must re-raise it, or raise another)"
    )


def _explain(around: Around, fault: RuntimeError) -> None:
    """Raise an error that names the function, in place of one of contextlib about a missing or a second `yield`."""
    text = str(fault)
    if text.startswith(_NOT_ONCE):
        raise RuntimeError(f"around {around.name} must yield once: {text}") from fault


def _unwrapped(function: Any) -> Any:
    """Return the function that decorators and `functools.partial` are around."""
    while isinstance(function, functools.partial):
        function = function.func
    return inspect.unwrap(function) if function is not None else None


def _name_of(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__qualname__", None) or repr(function)
