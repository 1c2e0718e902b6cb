"""Functions of the tick that fail in odd ways: each costs its tick, and no later one."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import AccessDenied, Conflict, NotFound, QueueFull, Unavailable
from aiqueue.schedules import Every, Tick
from aiqueue.schedules import jobs as jobs_module

from ..support import Account, eventually
from .chain import Task, jobs, schedules_of, spec, ticking

pytestmark = pytest.mark.families("agent.tasks")


class Odd(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class Shy:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


async def is_cancelled_within() -> None:
    task = asyncio.create_task(asyncio.sleep(9))
    task.cancel()
    await task


async def cancels_itself() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)


async def does_not_end() -> None:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.05)


def raising(error: BaseException) -> Callable[[], Any]:
    def make() -> None:
        raise error

    return make


WAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "not found": (raising(NotFound("no job x")), "NotFound: no job x"),
    "full": (raising(QueueFull("agent.tasks acme/normal", "it is full")), "QueueFull: agent.tasks acme/normal"),
    "unavailable": (raising(Unavailable("no server")), "Unavailable: no server"),
    "denied": (raising(AccessDenied("no right")), "AccessDenied: no right"),
    "conflict": (raising(Conflict("no")), "Conflict: no"),
    "cancelled": (raising(asyncio.CancelledError()), "CancelledError"),
    "cancelled within": (is_cancelled_within, "CancelledError"),
    "cancels itself": (cancels_itself, "CancelledError"),
    "exit": (raising(SystemExit(3)), "SystemExit: 3"),
    "interrupt": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "generator": (raising(GeneratorExit()), "GeneratorExit"),
    "odd": (raising(Odd()), "Odd: (its text cannot be read)"),
    "shy": (Shy, "BadInput: the function must return a message of kind task, not a value of type Shy"),
    "too long": (does_not_end, "TimeoutError: it took longer than 0.3 s"),
}


@pytest.mark.parametrize("way", WAYS)
async def test_what_a_function_of_the_tick_raises_costs_that_tick_only(
    client: aiqueue.Client, account: Account, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the errors of a client that it uses, of which the ticker has its own: it took them for a full lane."""
    monkeypatch.setattr(jobs_module, "MAKE_S", 0.3)
    schedules, (fail, text), fails = schedules_of(client), WAYS[way], True

    def make(tick: Tick) -> Any:
        return fail() if fails else Task()

    await schedules.add(spec("mine", Every("1s"), body=None, owner="billing"))
    async with ticking(account, owner="billing", makers={("acme", "mine"): make}):

        async def noted() -> None:
            document = await schedules.get("acme", "mine")
            assert document.failed
            assert document.error.startswith(text)

        await eventually(noted)
        fails = False

        async def goes_on() -> None:
            assert await jobs(client)

        await eventually(goes_on)
