"""Handlers that leave something behind, cancel themselves or fork: child processes of the tests import them by name."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import multiprocessing
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import aiqueue

SEEN: contextvars.ContextVar[str] = contextvars.ContextVar("SEEN", default="nothing")
LEFT: list[asyncio.Task[None]] = []


class Do(aiqueue.Message, kind="do"):
    what: str = ""


@contextlib.asynccontextmanager
async def lifespan() -> AsyncIterator[None]:
    SEEN.set("the lifespan's")
    yield


async def do_async(job: aiqueue.Job[Do]) -> dict[str, Any]:
    task = asyncio.current_task()
    assert task is not None
    seen = SEEN.get()
    SEEN.set(f"that of job {job.id}")
    match job.message.what:
        case "leave a task that cancels":
            LEFT.append(asyncio.create_task(_cancel_later(task)))
        case "wait for what is left":
            await LEFT.pop()
            await asyncio.sleep(0)  # the place at which a cancellation would come
        case "leave two chunks on their way":
            LEFT.extend(asyncio.create_task(job.chunk({"of": job.id})) for _ in range(2))
            await asyncio.sleep(0)  # the first is asked for, and the second waits behind it
        case "chunk":
            await job.chunk({"of": job.id})
        case "cancel itself and return":
            task.cancel()
        case "cancel itself and wait":
            task.cancel()
            await asyncio.sleep(60)
        case "cancel itself and raise":
            task.cancel()
            raise ValueError("broken")
        case "have a group fail":
            async with asyncio.TaskGroup() as group:
                group.create_task(_raise())
                await asyncio.sleep(60)
        case "have a group fail, and cancel itself":
            async with asyncio.TaskGroup() as group:
                group.create_task(_raise())
                task.cancel()
                await asyncio.sleep(60)
    return {"pid": os.getpid(), "seen": seen}


async def _cancel_later(task: asyncio.Task[Any]) -> None:
    await asyncio.sleep(0.2)
    task.cancel()


async def _raise() -> None:
    raise ValueError("broken")


def do_sync(job: aiqueue.Job[Do]) -> dict[str, Any]:
    seen = SEEN.get()
    SEEN.set(f"that of job {job.id}")
    return {"pid": os.getpid(), "seen": seen}


async def fork_async(job: aiqueue.Job[Do]) -> int | None:
    return fork_sync(job)


def fork_sync(job: aiqueue.Job[Do]) -> int | None:
    """Start a forked process, terminate it, and return its exit code."""
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    process.start()
    process.terminate()
    process.join(10)
    code = process.exitcode
    process.kill()
    return code
