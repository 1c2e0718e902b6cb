"""The worker under test: a handler that writes down when it began, and sleeps. Started by `launch.py`; imports only
aiqueue, so that a worker of a former version can be one of them.
"""

from __future__ import annotations

import asyncio
import os
import struct
import time

import aiqueue

FAMILY = "tenancy.jobs"
LOG, HANDLER_S, ENDS = "TENANCY_LOG", "TENANCY_HANDLER_S", "TENANCY_ENDS"
PID = "TENANCY_PID"  # of the worker: a job whose worker has died may be run in a child of another one
RECORD = struct.Struct("<IIqdd")  # what, the worker's process id, the job's number, when it was enqueued, when this was
START, END = 0, 1
TEXT = "x" * 160


class Task(aiqueue.Message, kind="tenancy.task", family=FAMILY):
    """`sent`: monotonic seconds. `takes_s`: how long the handler sleeps; 0: as long as all."""

    number: int
    sent: float = 0.0
    takes_s: float = 0.0
    text: str = TEXT


worker = aiqueue.Worker()
_pid = int(os.environ.get(PID, os.getpid()))
_handler_s = float(os.environ.get(HANDLER_S, "0"))
_ends = bool(os.environ.get(ENDS))
_file: list[int] = []


def _note(what: int, task: Task) -> None:
    """One append that other processes' appends do not cut, and that survives kill -9."""
    if not _file:
        _file.append(os.open(os.environ[LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    os.write(_file[0], RECORD.pack(what, _pid, task.number, task.sent, time.monotonic()))


@worker.handle(Task, result=False)
async def run(job: aiqueue.Job[Task]) -> None:
    task = job.message
    _note(START, task)
    if takes_s := task.takes_s or _handler_s:
        await asyncio.sleep(takes_s)
    if _ends:
        _note(END, task)
