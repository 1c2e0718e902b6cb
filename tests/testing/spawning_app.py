"""A worker that `spawn` starts in another process. It notes each run in a file."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiqueue


class Pay(aiqueue.Message, kind="spawn.pay"):
    log: str


class Unkept(aiqueue.Message, kind="spawn.unkept"):
    log: str


class Refused(aiqueue.Message, kind="spawn.refused"):
    log: str


class Told(aiqueue.Message, kind="spawn.told"):
    pass


class Child(aiqueue.Message, kind="spawn.child"):
    pass


def trace(message: aiqueue.Message) -> dict[str, str]:
    return {"X-Kind": message.aiq_kind}


@asynccontextmanager
async def lifespan(client: aiqueue.Client) -> AsyncIterator[aiqueue.Settings]:
    yield client.settings


worker = aiqueue.Worker(lifespan=lifespan)


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


@worker.handle(Told)
async def told(job: aiqueue.Job[Told, aiqueue.Settings]) -> list[object]:
    """Return the settings of the worker, and what the function of its client has made for a child."""
    (header,) = await job.gather([("child", Child())])
    settings = job.state
    return [settings.creds, settings.profile, settings.claim_check, header]


@worker.handle(Child)
async def child(job: aiqueue.Job[Child]) -> str | None:
    return job.headers.get("X-Kind")
