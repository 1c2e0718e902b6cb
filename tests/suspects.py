"""Messages and handlers that child processes of the tests import by name."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue import attempt
from aiqueue.errors import Stale

LEFT: list[asyncio.Task[str]] = []  # what handlers began and did not wait for


class Act(aiqueue.Message, kind="act"):
    """What the handler shall do, and with what."""

    do: str
    value: float = 0
    task_id: str = ""


@contextlib.asynccontextmanager
async def lifespan() -> AsyncIterator[dict[str, int]]:
    yield {"entered_in": os.getpid()}


@contextlib.asynccontextmanager
async def deadly_to_read() -> AsyncIterator[None]:
    """Where every body ends the process that reads it."""
    attempt.decode_body = lambda _: os._exit(7)  # type: ignore[assignment, return-value]
    yield


async def act(job: aiqueue.Job[Act]) -> Any:
    """An async handler."""
    if job.message.do == "progress":
        await job.progress(0.5, "half")
        await job.progress(1, "whole")
    if job.message.do == "sleep":
        await asyncio.sleep(job.message.value)
    if job.message.do == "leave behind":
        LEFT.append(asyncio.create_task(_late(job)))
    if job.message.do == "left behind":
        return await LEFT.pop()
    done = _act(job)
    if job.message.do == "wait":
        await asyncio.sleep(job.message.value)
    return done


async def _late(job: aiqueue.Job[Act]) -> str:
    await asyncio.sleep(0.2)
    try:
        await job.progress(0.5, "late")
    except Stale as stale:
        return type(stale).__name__
    return "said"


def act_sync(job: aiqueue.Job[Act]) -> Any:
    """A plain one."""
    if job.message.do == "progress":
        job.progress_sync(0.5, "half")
        job.progress_sync(1, "whole")
    for n in range(int(job.message.value) if job.message.do.startswith("stream") else 0):
        job.chunk_sync([job.attempt, n])
        if "STREAMED" in os.environ:
            with Path(os.environ["STREAMED"]).open("a") as given:
                given.write(".")
        if n == 50 and job.attempt == 1 and job.message.do == "stream, die once":
            os.kill(os.getpid(), signal.SIGKILL)
    done = _act(job)
    while job.message.do == "heed" and not job.cancelled:
        time.sleep(0.01)
    while job.message.do == "meet" and Path(os.environ["SUSPECTS_LOG"]).read_text().count("meet ") < 2:
        time.sleep(0.01)
    return done


async def act_on_any(job: aiqueue.Job[aiqueue.RawMessage]) -> Any:
    """An async handler of every kind."""
    return _act_on_any(job)


def act_on_any_sync(job: aiqueue.Job[aiqueue.RawMessage]) -> Any:
    """A plain one."""
    return _act_on_any(job)


def _act_on_any(job: aiqueue.Job[aiqueue.RawMessage]) -> Any:
    message = job.message
    if message.body == b"exit":
        os._exit(9)
    if message.body.startswith(b"secret: "):
        raise ValueError(f"cannot read {message.body.decode()}")
    return [os.getpid(), job.kind, message.kind, message.body, message.content_type, message.schema_version]


def _act(job: aiqueue.Job[Act]) -> Any:
    message = job.message
    if os.environ.get("SUSPECTS_LOG"):
        with Path(os.environ["SUSPECTS_LOG"]).open("a") as log:
            log.write(f"{message.do} {job.id} {job.attempt} {os.getpid()}\n")
    match message.do:
        case "exit":
            os._exit(9)
        case "segv":
            ctypes.string_at(0)
        case "die once" if job.attempt == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "block":
            time.sleep(message.value)
        case "spin":
            while True:
                pass
        case "retry" if job.attempt < 3:
            raise aiqueue.Retry("not yet", after=0.05)
        case "reject":
            raise aiqueue.Reject("never")
        case "raise":
            raise ValueError("broken")
        case "system exit":
            raise SystemExit(3)
        case "odd":
            return object()
        case "types":
            return {"when": datetime(2026, 1, 2, tzinfo=UTC), "much": Decimal("1.50"), "raw": b"\x00", "none": None}
    print("to nobody", flush=True)  # must not end in the pipe
    return {"pid": os.getpid(), "attempt": job.attempt, "id": job.id, "state": job.state, "tenant": job.tenant}
