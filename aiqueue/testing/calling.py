"""Calls the function of a handler within its time limit, in a task of its own, as a worker does."""

from __future__ import annotations

import asyncio
import contextvars
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from .. import attempt
from ..attempt import PLAIN_TYPES, Handler, Limits, Outcome, Returned, Threads

THREADS = Threads("aiqueue-testing")  # for handlers and steps that are plain functions

_limits: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Limits] = weakref.WeakKeyDictionary()


class CallEnd(NamedTuple):
    """How a call has ended. `exception`: what the function raised; None: nothing. `is_cancelled`: by `cancel_after`."""

    outcome: Outcome
    exception: BaseException | None
    is_cancelled: bool


async def call_handler(
    handler: Handler,
    argument: Any,
    *,
    timeout_s: float | None,
    cancel_after_s: float | None = None,
    cancel: Callable[[], None] = lambda: None,
) -> CallEnd:
    """Call a handler with a job or a mail. `timeout_s`, `cancel_after_s`: None for no such limit; `cancel` is called
    when the second is over.

    When this is cancelled, so is the handler, and CancelledError is raised once the handler has ended.
    """
    raised: list[BaseException] = []
    outcomes: list[Outcome] = []

    async def run() -> None:
        try:
            if handler.is_async:
                value = await handler.call(argument)
            else:
                value = await handler.call_in_thread(argument, THREADS.run)
            outcomes.append(Returned(value) if type(value) in PLAIN_TYPES else await attempt.outcome_of_value(value))
        except BaseException as error:  # noqa: BLE001  (a handler may raise anything, SystemExit too)
            raised.append(error)
            outcomes.append(attempt.outcome_of_error(error, handler.on))

    loop = asyncio.get_running_loop()
    task = loop.create_task(run(), context=contextvars.copy_context())
    limits = _limits.setdefault(loop, Limits())
    limit = None if timeout_s is None else limits.start_task(task, timeout_s)
    was_cancelled = False

    def cancel_job() -> None:
        nonlocal was_cancelled
        was_cancelled = True
        cancel()
        task.cancel()

    timer = None if cancel_after_s is None else loop.call_later(cancel_after_s, cancel_job)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait((task,))
        raise
    finally:
        if timer is not None:
            timer.cancel()
        if limit is not None:
            limits.stop(limit)
    # a task that was cancelled before its first step has called nothing
    outcome = outcomes[0] if outcomes else attempt.outcome_of_error(asyncio.CancelledError())
    if limit is not None and limit.expired:
        outcome = attempt.timeout_outcome(timeout_s)
    return CallEnd(outcome, raised[0] if raised else None, was_cancelled)
