"""Headers that a function of the client makes for each job that it enqueues: ``connect(headers=...)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import BadInput
from .message import Message, check_message

MakeHeaders = Callable[[Message[Any]], Mapping[str, str]]
_RULE = "headers= of connect must be a plain function of the message that returns a mapping"


def check_make_headers(function: Any) -> None:
    """Raise BadInput for what cannot make headers. None: nothing makes any."""
    if function is None:
        return
    if not callable(function):
        raise BadInput(f"{_RULE}, not {function!r}")
    name = getattr(function, "__qualname__", None) or repr(function)
    forms = function, getattr(function, "__call__", None)  # noqa: B004
    if any(inspect.iscoroutinefunction(each) or inspect.isgeneratorfunction(each) for each in forms):
        raise BadInput(f"{_RULE}: {name} is {'async' if inspect.iscoroutinefunction(function) else 'no such function'}")
    try:
        inspect.signature(function).bind(None)
    except TypeError as error:
        raise BadInput(f"{_RULE}: {name}: {error}") from None
    except ValueError:
        pass  # a builtin without a signature


def add_made_headers(
    make: MakeHeaders | None, message: Message[Any], given: Mapping[str, str] | None
) -> Mapping[str, str] | None:
    """Return the headers that the caller has given, and those that `make` returns for the message.

    Where both have a name, in whatever case, the caller's counts. Raises BadInput: the function raised, or returned
    no mapping; then nothing may be enqueued.
    """
    if make is None:
        return given
    check_message(message)
    try:
        made = make(message)
    except Exception as error:
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"headers= of connect raised {problem}; nothing was enqueued") from error
    if not isinstance(made, Mapping):
        raise BadInput(f"headers= of connect returned {made!r:.80}, which is no mapping; nothing was enqueued")
    if not given or not isinstance(given, Mapping):  # what is none is refused where it is checked
        return given or made
    names = {str(name).lower() for name in given}
    return {**{name: value for name, value in made.items() if str(name).lower() not in names}, **given}
