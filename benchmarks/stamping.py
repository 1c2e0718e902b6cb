"""The worker of `stamped`, for ``aiqueue work benchmarks.stamping:worker``: each handler writes down when it began."""

from __future__ import annotations

import os
import struct
import time

import aiqueue

from .common import Noop

STAMPS = "BENCH_STAMPS"
STAMP = struct.Struct("<dq")  # monotonic seconds, the job's number

worker = aiqueue.Worker(concurrency=100)
_file = os.open(os.environ.get(STAMPS, os.devnull), os.O_WRONLY | os.O_APPEND)


@worker.handle(Noop, result=False)
async def noop(job: aiqueue.Job[Noop]) -> None:
    os.write(_file, STAMP.pack(time.monotonic(), job.message.i))
