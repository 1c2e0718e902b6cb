"""Has this process die at a named point of a job's way, as by kill -9: for `aiqueue.testing.spawn` only."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, Literal, NoReturn, get_args

from ..attempt import Raised, Refused, Returned
from .replies import Replies
from .runner import Runner
from .settlement import Settlement

DeathPoint = Literal["before_handler", "after_handler", "result_before_ack"]
DEATH_POINTS: tuple[DeathPoint, ...] = get_args(DeathPoint)


def die_at(point: DeathPoint) -> None:
    """Have this process kill itself when a job comes to this point, from now on and for ever:

    - ``before_handler``: the job was delivered, and its handler is not called yet
    - ``after_handler``: the handler has ended, and nothing of that is written
    - ``result_before_ack``: the outcome is stored (a result, a dead letter, or a retry that is parked), and the job is
      not acknowledged
    """
    if point == "before_handler":
        setattr(Runner, "run_delivery", _die)  # noqa: B010  (mypy refuses the plain form)
    elif point == "after_handler":
        _die_if(Runner, "_conclude", lambda *arguments: isinstance(arguments[5], Returned | Raised | Refused))
    else:
        for owner, name in ((Replies, "ack"), (Replies, "ack_and_release"), (Settlement, "ack")):
            setattr(owner, name, _die)
        _die_if(
            Settlement, "try_ack_now", lambda *arguments: arguments[3] is not None and not arguments[3].keeps_result
        )


def _die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _die_if(owner: type[Any], name: str, is_there: Callable[..., bool]) -> None:
    """Have a method kill this process where `is_there`, which gets the method's arguments, `self` first."""
    method = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        if is_there(*arguments):
            _die()
        return method(*arguments, **options)

    setattr(owner, name, call)
