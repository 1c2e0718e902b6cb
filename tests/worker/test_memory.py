"""What a job leaves behind: its memory is free when it has ended, not at the next garbage collection."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest

import aiqueue

from ..support import eventually

application_job: ContextVar[Any] = ContextVar("what an application keeps of the running job")


class Made(aiqueue.Message, kind="made"):
    n: int


@pytest.fixture
async def without_collector() -> AsyncIterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@asynccontextmanager
async def around_with_variable(job: Any) -> AsyncIterator[None]:
    application_job.set(job)
    yield


@pytest.mark.parametrize("way", ["result", "no result", "around", "thread", "failed"])
@pytest.mark.usefixtures("without_collector")
async def test_a_job_that_has_ended_is_in_no_reference_cycle(client: aiqueue.Client, way: str) -> None:
    worker = aiqueue.Worker()
    if way == "around":
        worker.around(around_with_variable)
    messages: list[weakref.ref[Made]] = []

    async def run(job: aiqueue.Job[Made]) -> int:
        messages.append(weakref.ref(job.message))
        await asyncio.sleep(0)
        if way == "failed":
            raise ValueError("no")
        return job.message.n

    def run_in_thread(job: aiqueue.Job[Made]) -> int:
        messages.append(weakref.ref(job.message))
        return job.message.n

    retry = aiqueue.Backoff(attempts=1)
    worker.handle(Made, retry=retry, result=way != "no result")(run_in_thread if way == "thread" else run)
    async with worker.running(client):
        for n in range(20):
            await client.enqueue(Made(n=n), tenant="acme")
        await eventually(lambda: len(messages) == 20)
        await eventually(lambda: sum(each() is not None for each in messages) == 0)
