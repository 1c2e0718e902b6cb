"""The worker under test: a call of the stand-in provider for each job. Started by `launch.py`; imports only aiqueue, so
that a worker of a former version can be one of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Self

import aiqueue

FAMILY, PLAIN = "provider.calls", "plain.calls"
PORT, DRAIN_LOG, HAS_COST = "PROVIDER_PORT", "PROVIDER_DRAIN_LOG", "PROVIDER_COST"
RECORD = struct.Struct("<dq")


class Call(aiqueue.Message, kind="provider.call", family=FAMILY):
    """`cost`: the reservation; `used`: what the call will have cost. `sent`: monotonic seconds."""

    number: int
    model: str
    cost: float = 1.0
    used: float = 1.0
    takes_s: float = 0.0
    sent: float = 0.0


class Noop(aiqueue.Message, kind="provider.noop", family=FAMILY):
    """For drains: the handler appends 16 bytes to a file."""

    number: int
    model: str


class CostlyNoop(aiqueue.Message, kind="provider.costly", family=FAMILY):
    """The same with a function of its cost."""

    number: int
    model: str
    cost: float = 1.0


class PlainNoop(aiqueue.Message, kind="plain.noop", family=PLAIN):
    """The same in a family without a limit_key."""

    number: int
    model: str


class Provider:
    """One connection to the provider, for all calls of this process."""

    def __init__(self) -> None:
        self._open: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._count = 0

    async def __aenter__(self) -> Self:
        reader, self._writer = await asyncio.open_connection("127.0.0.1", int(os.environ[PORT]))
        self._send({"hello": os.getpid()})
        self._reader = asyncio.create_task(self._read(reader))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        with suppress(asyncio.CancelledError):
            await self._reader
        self._writer.close()

    async def call(self, **told: Any) -> dict[str, Any]:
        self._count += 1
        answered: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[self._count] = answered
        self._send({"id": self._count, **told})
        return await answered

    def _send(self, told: dict[str, Any]) -> None:
        self._writer.write(json.dumps(told).encode() + b"\n")

    async def _read(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            answer = json.loads(line)
            answered = self._open.pop(answer["id"])
            if not answered.done():
                answered.set_result(answer)


_provider: list[Provider] = []
_file: list[int] = []


@asynccontextmanager
async def _connected() -> AsyncIterator[None]:
    async with Provider() as provider:
        _provider.append(provider)
        yield


def _note(number: int) -> None:
    if not _file:
        _file.append(os.open(os.environ[DRAIN_LOG], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    os.write(_file[0], RECORD.pack(time.monotonic(), number))


worker = aiqueue.Worker(lifespan=_connected)


def _cost_of(message: Call | CostlyNoop) -> float:
    return message.cost


_cost = _cost_of if os.environ.get(HAS_COST) else None


@worker.handle(Call, result=False, cost=_cost)
async def call(job: aiqueue.Job[Call]) -> None:
    told = job.message
    answer = await _provider[0].call(
        tenant=job.tenant, key=told.model, used=told.used, takes_s=told.takes_s, number=told.number, sent=told.sent,
        attempt=job.attempt,
    )  # fmt: skip
    if answer["status"] == 429:
        raise aiqueue.Retry("429", after=answer["after"], pause="key")
    if _cost:
        job.settle(answer["used"])


@worker.handle(Noop, result=False)
async def noop(job: aiqueue.Job[Noop]) -> None:
    _note(job.message.number)


@worker.handle(CostlyNoop, result=False, cost=_cost)
async def costly(job: aiqueue.Job[CostlyNoop]) -> None:
    _note(job.message.number)


@worker.handle(PlainNoop, result=False)
async def plain(job: aiqueue.Job[PlainNoop]) -> None:
    _note(job.message.number)
