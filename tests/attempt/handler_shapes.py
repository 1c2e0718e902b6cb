"""Ways in which a handler fails that are not a plain exception, for workers, agents and child processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import aiqueue


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class BareRetry(aiqueue.Retry):
    def __init__(self) -> None:  # does not call the __init__ of Retry
        pass


class UnreadableReject(aiqueue.Reject):
    def __init__(self) -> None:
        pass

    @property
    def reason(self) -> str:  # type: ignore[override]
        raise KeyError("reason")


def _own_task() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _fail() -> NoReturn:
    await asyncio.sleep(0)
    raise ValueError("a sub-task failed")


async def task_group_fails() -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_fail())
        await asyncio.sleep(60)


async def cancels_itself() -> None:
    _own_task().cancel()
    await asyncio.sleep(60)


async def cancels_itself_and_raises() -> NoReturn:
    _own_task().cancel()
    raise ValueError("after its own cancellation")


async def raises_cancelled() -> NoReturn:
    raise asyncio.CancelledError


async def is_cancelled_by_a_subtask() -> None:
    task = _own_task()
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.sleep(60)


async def swallows_a_cancellation_and_raises() -> NoReturn:
    _own_task().cancel()
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        raise ValueError("instead") from None
    raise AssertionError


async def raises_unprintable() -> NoReturn:
    raise Unprintable


async def raises_bare_retry() -> NoReturn:
    raise BareRetry


async def raises_system_exit() -> NoReturn:
    raise SystemExit(0)


async def returns_retry() -> Any:
    return aiqueue.Retry("by mistake", after=60)


FAILS: dict[str, Callable[[], Awaitable[Any]]] = {  # each is a failed attempt
    each.__name__: each
    for each in (
        task_group_fails, cancels_itself, cancels_itself_and_raises, raises_cancelled, is_cancelled_by_a_subtask,
        swallows_a_cancellation_and_raises, raises_unprintable, raises_bare_retry, raises_system_exit, returns_retry,
    )
}  # fmt: skip
