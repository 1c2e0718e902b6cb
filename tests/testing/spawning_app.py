"""A worker that `spawn` starts in another process. It notes each run in a file."""

from __future__ import annotations

import os

import aiqueue


class Pay(aiqueue.Message, kind="spawn.pay"):
    log: str


class Unkept(aiqueue.Message, kind="spawn.unkept"):
    log: str


class Refused(aiqueue.Message, kind="spawn.refused"):
    log: str


worker = aiqueue.Worker()


def note(log: str) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, b"ran\n")
    os.close(file)


@worker.handle(Pay)
async def pay(job: aiqueue.Job[Pay]) -> int:
    note(job.message.log)
    return job.attempt


@worker.handle(Unkept, result=False)
def unkept(job: aiqueue.Job[Unkept]) -> None:
    note(job.message.log)
    print("said by the handler")


@worker.handle(Refused)
async def refused(job: aiqueue.Job[Refused]) -> None:
    note(job.message.log)
    raise aiqueue.Reject("never")
