"""Handlers with context managers around them: child processes of the tests import them by name."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiqueue

TRAIL: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("TRAIL", default=())


class Do(aiqueue.Message, kind="do"):
    """`what` the handler does, and what is around it; `log`: a file that they write to."""

    what: str = ""
    log: Path


def note(job: aiqueue.Job[Any], line: str) -> None:
    with job.message.log.open("a") as log:
        log.write(f"{line}\n")


def where() -> list[Any]:
    return [os.getpid(), threading.get_ident()]


@contextmanager
def noted(job: aiqueue.Job[Any], name: str) -> Iterator[None]:
    note(job, f"{name} in")
    token = TRAIL.set((*TRAIL.get(), name))
    try:
        yield
    except BaseException as error:
        note(job, f"{name} saw {type(error).__name__}")
        raise
    finally:
        TRAIL.reset(token)
    note(job, f"{name} out")


@asynccontextmanager
async def asynchronous(job: aiqueue.Job[Any]) -> AsyncIterator[None]:
    with noted(job, "async"):
        await asyncio.sleep(0)
        yield


@contextmanager
def plain(job: aiqueue.Job[Any]) -> Iterator[None]:
    with noted(job, "plain"):
        TRAIL.set((*TRAIL.get(), str(where())))
        yield


@asynccontextmanager
async def suppressing_async(job: aiqueue.Job[Any]) -> AsyncIterator[None]:
    try:
        yield
    except BaseException:  # noqa: BLE001
        note(job, "suppressed")


@contextmanager
def suppressing_plain(job: aiqueue.Job[Any]) -> Iterator[None]:
    try:
        yield
    except BaseException:  # noqa: BLE001
        note(job, "suppressed")


async def do_async(job: aiqueue.Job[Do]) -> Any:
    match job.message.what:
        case "raise":
            raise ValueError("broken")
        case "hang":
            note(job, "hangs")
            await asyncio.sleep(60)
    return [TRAIL.get(), str(where())]


def do_plain(job: aiqueue.Job[Do]) -> Any:
    match job.message.what:
        case "raise":
            raise ValueError("broken")
        case "hang":
            note(job, "hangs")
            while not job.cancelled:
                time.sleep(0.005)
    return [TRAIL.get(), str(where())]


def make_closure() -> Any:
    @contextmanager
    def closure(job: aiqueue.Job[Any]) -> Iterator[None]:
        with noted(job, "closure"):
            yield

    return closure


worker = aiqueue.Worker(processes=1)
worker.around(make_closure())
worker.handle(Do, process=True)(do_plain)
