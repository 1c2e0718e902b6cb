"""A worker whose handlers run in a thread and in a child process until a file says that they may end."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import aiqueue


class InThread(aiqueue.Message, kind="in-thread"):
    place: str


class InChild(aiqueue.Message, kind="in-child"):
    place: str


worker = aiqueue.Worker(processes=1)


def wait(job: aiqueue.Job[Any]) -> int:
    place = Path(job.message.place)
    (place / f"{job.kind}-{os.getpid()}-{time.monotonic_ns()}").touch()
    end = time.monotonic() + 30
    while not (place / "go").exists() and not job.cancelled and time.monotonic() < end:
        time.sleep(0.02)
    return job.attempt


@worker.handle(InThread)
def in_thread(job: aiqueue.Job[InThread]) -> int:
    return wait(job)


@worker.handle(InChild, process=True)
def in_child(job: aiqueue.Job[InChild]) -> int:
    return wait(job)
