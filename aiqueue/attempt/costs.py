"""What a call will use at most, such as tokens, told by a function that its handler is declared with."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import BadInput
from ..units import COST_MAX
from .handler import Handler, is_async_handler
from .handler_errors import error_line, format_traceback
from .outcome_types import Refused

REMEDY = "correct the function, and replay the dead letter"


def check_cost_function(function: Any) -> None:
    """Raise BadInput for what cannot be the `cost` of a handler. None: the handler has none."""
    if function is None:
        return
    is_async = is_async_handler(
        function,
        rule="cost must be a function of the message, such as lambda message: message.max_tokens",
        argument="the message",
        instead_of_yield="return the number",
    )
    if is_async:
        name = getattr(function, "__qualname__", None) or repr(function)
        raise BadInput(f"cost must be a plain function, which the worker calls before the handler: {name} is async")


def cost_of(handler: Handler, message: Any) -> float | Refused:
    """Return what a call with `message` uses at most, by the handler's function; 0 without a function.

    Refused: the function raised, or returned what is no number from 0 to 1e15, such as NaN.
    """
    function = handler.cost
    if function is None:
        return 0.0
    try:
        value: Any = function(message)
        if type(value) is float and 0 <= value <= COST_MAX:  # most
            return value
        if inspect.iscoroutine(value):
            value.close()
        if type(value) is not bool and isinstance(value, int | float):
            if 0 <= value <= COST_MAX:  # not NaN
                return float(value)
            shown = f"{value!r:.40}"
        else:
            shown = type(value).__name__  # its text may be a secret of the message
    except BaseException as error:  # noqa: BLE001  (the function is the user's, and may raise anything, SystemExit too)
        problem = f"the cost function of {handler.what} raised {error_line(error)}: {REMEDY}"
        return Refused("cost", problem, format_traceback(error))
    wanted = f"a number from 0 to {COST_MAX:g}"
    return Refused("cost", f"the cost function of {handler.what} returned {shown}, which is not {wanted}: {REMEDY}")
