"""Handlers with steps, which the tests run on the event loop, in threads, and in child processes that import them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import pydantic

import aiqueue
from aiqueue.journal import Checkpoints
from aiqueue.subjects import ParentRun
from aiqueue.worker.step_documents import StepDocuments

from ..support import whole_lines

STREAM = "AI_CHECKPOINTS"
RUN = ParentRun("agent.tasks", "j", "1-1")
FAST = aiqueue.Backoff(attempts=4, first=0.02, cap=0.05)


class Walk(aiqueue.Message, kind="walk"):
    """`log`: where each call of a step is written. The handler fails until attempt `ends_at`."""

    log: str
    steps: int = 3
    ends_at: int = 2


class Large(aiqueue.Message, kind="large"):
    """`log`: where each call of the step is written. `size`: of its result, in bytes. It fails until `ends_at`."""

    log: str
    size: int = 200_000
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


def large_step(log: str, size: int) -> dict[str, Any]:
    note(log, "large")
    return {"bytes": bytes(range(256)) * (size // 256), "tuple": (1, 2)}


async def keep_large(job: aiqueue.Job[Large]) -> Any:
    return _sum_up(job, await job.step("large", large_step, job.message.log, job.message.size))


def keep_large_sync(job: aiqueue.Job[Large]) -> Any:
    return _sum_up(job, job.step_sync("large", large_step, job.message.log, job.message.size))


def _sum_up(job: aiqueue.Job[Large], got: Any) -> Any:
    with Path(job.message.log).open("a") as file:
        file.write(f"got {hashlib.sha256(got['bytes']).hexdigest()} {got['tuple']}\n")
    if job.attempt < job.message.ends_at:
        raise ValueError("not yet")
    return len(got["bytes"])


def checkpoints(client: aiqueue.Client, order: list[float], *, has_past: bool) -> Checkpoints:
    """What the delivery at this place keeps for one run."""

    async def find_order() -> list[float]:
        return order

    return Checkpoints(
        client.connection, STREAM, RUN.checkpoints("acme"), run=1, attempt=1, find_order=find_order,
        has_past=has_past, large=StepDocuments(client.documents, "acme", RUN),
    )  # fmt: skip


def _end(job: aiqueue.Job[Walk], got: list[Any], calls: list[Any]) -> Any:
    if job.attempt < job.message.ends_at:
        raise ValueError("not yet")
    return [got, calls]
