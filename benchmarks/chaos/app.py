"""The worker under test, for ``aiqueue work benchmarks.chaos.app:worker``. Its environment says where it writes."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import aiqueue

from .records import EFFECT, END, START, Pen

FAMILY = "chaos.jobs"
STREAM = "CHAOS_JOBS"
JOURNAL = "ai.chaos.results"
LOG, HANDLER_MS = "CHAOS_LOG", "CHAOS_HANDLER_MS"

DECLARED = """
[family]
name = "{family}"
default_kind = "task"
journal = "{journal}"

[stream]
name = "{stream}"
max_bytes = "{max_bytes}"

[consumer]
ack_wait = "{ack_wait_s:g}s"

[profile.cluster]
stream.num_replicas = 3
"""


class Task(aiqueue.Message, kind="task", family=FAMILY):
    number: int


worker = aiqueue.Worker(concurrency=50)


def declared(ack_wait_s: float, max_bytes: str) -> str:
    """The stream file of the jobs."""
    return DECLARED.format(family=FAMILY, journal=JOURNAL, stream=STREAM, ack_wait_s=ack_wait_s, max_bytes=max_bytes)


async def work(pen: Pen, number: int, handler_s: float) -> str:
    """What a handler does here: it writes down its start, an effect in its middle, and its end."""
    mark = pen.mark()
    pen.write(START, number, mark)
    await asyncio.sleep(handler_s / 2)
    pen.write(EFFECT, number, mark)
    await asyncio.sleep(handler_s / 2)
    pen.write(END, number, mark)
    return mark


_pens: list[Pen] = []


@worker.handle(Task, timeout="30s")
async def run(job: aiqueue.Job[Task]) -> dict[str, Any]:
    if not _pens:
        _pens.append(Pen(os.environ[LOG]))
    handler_s = float(os.environ[HANDLER_MS]) / 1000
    return {"number": job.message.number, "mark": await work(_pens[0], job.message.number, handler_s)}
