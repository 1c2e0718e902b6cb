"""Makes headers, and a handler whose children have them: a child process of the tests imports both by name."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import aiqueue

TRACE = contextvars.ContextVar("TRACE", default="none")


class Parent(aiqueue.Message, kind="parent"):
    n: int = 0


class Seen(aiqueue.Message, kind="seen"):
    n: int = 0


def trace(message: aiqueue.Message) -> dict[str, str]:
    return {"X-Trace": TRACE.get(), "X-Kind": message.aiq_kind}


@contextmanager
def resume_trace(job: aiqueue.Job[Any]) -> Iterator[None]:
    TRACE.set(f"{job.headers['X-Trace']}/{job.kind}")
    yield


async def parent(job: aiqueue.Job[Parent]) -> list[Any]:
    await job.enqueue(Seen(n=1), "one", headers={"x-kind": "the parent's own"})
    return await job.gather([("two", Seen(n=2))])


def parent_in_thread(job: aiqueue.Job[Parent]) -> list[Any]:
    job.enqueue_sync(Seen(n=1), "one", headers={"x-kind": "the parent's own"})
    return job.gather_sync([("two", Seen(n=2))])
