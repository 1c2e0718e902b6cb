"""The jobs of plain clients: their messages, and a worker that records what its handlers get."""

from __future__ import annotations

import asyncio
from typing import Any

import aiqueue

ONCE = aiqueue.Backoff(attempts=1)


class Task(aiqueue.Message, kind="agent.task"):
    task_id: Any = None
    goal: str = ""


class Named(aiqueue.Message, kind="named"):
    goal: str = ""


def recording(seen: asyncio.Queue[aiqueue.Job[Any]]) -> aiqueue.Worker:
    worker = aiqueue.Worker()

    @worker.handle(Task, retry=ONCE)
    async def task(job: aiqueue.Job[Task]) -> None:
        seen.put_nowait(job)

    @worker.handle(Named, retry=ONCE)
    async def named(job: aiqueue.Job[Named]) -> None:
        seen.put_nowait(job)

    return worker


async def letters(client: aiqueue.Client) -> list[Any]:
    return [each async for each in client.dead.find()]
