"""Handlers with steps, which the tests run on the event loop, in threads, and in child processes that import them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pydantic

import aiqueue

from ..support import whole_lines

FAST = aiqueue.Backoff(attempts=4, first=0.02, cap=0.05)


class Walk(aiqueue.Message, kind="walk"):
    """`log`: where each call of a step is written. The handler fails until attempt `ends_at`."""

    log: str
    steps: int = 3
    ends_at: int = 2


class Point(pydantic.BaseModel):
    x: int


def note(log: str, text: str) -> None:
    with Path(log).open("a") as file:
        file.write(f"{text}\n")


def noted(log: str | Path) -> list[str]:
    return whole_lines(Path(log))


def plain_step(log: str, n: int) -> dict[str, int]:
    note(log, f"step {n}")
    return {"n": n}


async def async_step(log: str, n: int) -> dict[str, int]:
    return plain_step(log, n)


async def walk(job: aiqueue.Job[Walk]) -> Any:
    got = [await job.step(f"s-{n}", async_step, job.message.log, n) for n in range(job.message.steps)]
    return _end(job, got, await job.calls())


async def walk_by_plain_steps(job: aiqueue.Job[Walk]) -> Any:
    got = [await job.step(f"s-{n}", plain_step, job.message.log, n) for n in range(job.message.steps)]
    return _end(job, got, await job.calls())


def walk_sync(job: aiqueue.Job[Walk]) -> Any:
    got = [job.step_sync(f"s-{n}", plain_step, job.message.log, n) for n in range(job.message.steps)]
    return _end(job, got, job.calls_sync())


async def walk_and_die(job: aiqueue.Job[Walk]) -> Any:
    """In its first two processes, end the process in the middle of the second step."""
    await job.step("s-0", async_step, job.message.log, 0)

    async def second() -> int:
        note(job.message.log, "step 1")
        if noted(job.message.log).count("step 1") < 3:
            os._exit(9)
        return 1

    return [await job.step("s-1", second), await job.calls()]


def _end(job: aiqueue.Job[Walk], got: list[Any], calls: list[Any]) -> Any:
    if job.attempt < job.message.ends_at:
        raise ValueError("not yet")
    return [got, calls]
