"""The worker of the scenarios. It serves the tenant `done` only: the jobs of `kept` stay in the stream, to be judged.

With ``SCHEDULES_VERSION`` it declares a schedule. With ``SCHEDULES_AIM`` it kills itself amid a tick that it holds,
when a file in that directory names the point.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiqueue
from aiqueue.schedules.jobs import TickJobs
from aiqueue.schedules.store import ScheduleStore
from aiqueue.schedules.ticks import Ticks

KEPT, DONE = "kept", "done"
AIM = "SCHEDULES_AIM"
VERSION = "SCHEDULES_VERSION"  # the interval in seconds of a schedule that the worker declares
VERSIONS = 1, 2  # an old and a new one
POINTS: dict[str, tuple[Any, str]] = {
    "read": (ScheduleStore, "get"),
    "made": (TickJobs, "make"),
    "stored": (TickJobs, "store"),
    "noted": (ScheduleStore, "put"),
    "parked": (Ticks, "park"),
}


class Tick(aiqueue.Message, kind="bench.tick"):
    number: int = 0


def _aim(kind: Any, name: str, file: Path) -> None:
    call: Callable[..., Any] = getattr(kind, name)

    async def call_and_die(*args: Any, **more: Any) -> Any:
        result = await call(*args, **more)
        if file.exists():
            try:
                file.unlink()
            except FileNotFoundError:
                return result
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(kind, name, call_and_die)


if directory := os.environ.get(AIM):
    for point, (kind, name) in POINTS.items():
        _aim(kind, name, Path(directory) / point)

version = os.environ.get(VERSION)
worker = aiqueue.Worker(tenants=[DONE], owner="bench" if version else None)


@worker.handle(Tick)
async def tick(job: aiqueue.Job[Tick]) -> float:
    return job.scheduled_for or 0.0


if version:
    worker.schedule(int(version), Tick(number=int(version)), tenant=KEPT, id="declared", misfire="all")
