"""A task of its own for a handler, for callers that go on after it: what a handler does to its task ends there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import TypeVar

T = TypeVar("T")


async def run_in_task(
    coroutine: Coroutine[None, None, T], context: Context, started: Callable[[asyncio.Task[None]], None]
) -> T:
    """Run `coroutine` in a new task with these context variables, and return what it returns.

    `started` gets the new task, for whoever may cancel it. A cancellation of the caller is passed on to the task once,
    and the coroutine's value is returned all the same. The coroutine must turn every exception into a value. A second
    cancellation of the caller, while the task goes on, raises CancelledError.
    """
    values: list[T] = []

    async def keep_value() -> None:  # the task ends as cancelled where its handler has cancelled it and returned
        values.append(await coroutine)

    task = asyncio.get_running_loop().create_task(keep_value(), context=context)
    started(task)
    try:
        await asyncio.wait((task,))
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait((task,))
    if not values:
        task.result()  # raises what no coroutine of ours should: its error, or CancelledError before its first step
    return values[0]
