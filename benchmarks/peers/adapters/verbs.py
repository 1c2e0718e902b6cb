"""What all adapters share: the job's arguments, the record of each run, and the verbs of a producer.

An adapter runs in its peer's own Python, with this directory on its path, so this file needs the standard library only.
Its verbs: ``prepare`` (what the server must have before), ``one N FIRST`` (so many jobs from that number on, each call
awaited), ``many N FIRST`` (the best bulk API), ``pace RATE SECONDS FIRST`` (an open loop). A producer prints one line
of JSON: how many, in how many seconds, and the CPU seconds of its process meanwhile; its start is in neither.

The environment: ADDRESS_ENV is the server, RECORD_ENV the file that handlers append to.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

ADDRESS_ENV = "BENCH_ADDRESS"
RECORD_ENV = "BENCH_RECORD"
RECORD = struct.Struct("<ddq")  # enqueued, begun (CLOCK_MONOTONIC), the job's number
TEXT = "x" * 160
AT_ONCE = 100  # calls under way where a peer has no bulk API
LATE_S = 0.005  # a producer that is later than this counts from the schedule
OVERRUN = 1.5  # a producer that cannot hold its pace ends after this many times its seconds

Step = Callable[[], Coroutine[Any, Any, None]]

_record: list[int] = []


def ran(i: int, t: float) -> None:
    """The handler's whole work: one record, by one write. Every process opens the file for itself."""
    if not _record:
        _record.append(os.open(os.environ[RECORD_ENV], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600))
    os.write(_record[0], RECORD.pack(t, time.monotonic(), i))


def address() -> str:
    return os.environ[ADDRESS_ENV]


class Producer(Protocol):
    """An open connection of an async peer."""

    async def one(self, i: int, t: float) -> object: ...

    async def many(self, numbers: range) -> object: ...


class SyncProducer(Protocol):
    """A connection of a sync peer; `open` has it stand, so that no job's call does."""

    def open(self) -> object: ...

    def one(self, i: int, t: float) -> object: ...

    def many(self, numbers: range) -> object: ...


async def gathered(numbers: range, one: Callable[[int, float], Awaitable[object]]) -> None:
    """AT_ONCE calls at a time, for a peer without a bulk API."""
    for first in range(numbers.start, numbers.stop, AT_ONCE):
        chunk = range(first, min(first + AT_ONCE, numbers.stop))
        await asyncio.gather(*(one(i, time.monotonic()) for i in chunk))


class Clock:
    """Wall and CPU seconds since it was made."""

    def __init__(self) -> None:
        self._begun, self._cpu = time.monotonic(), _cpu_s()

    def tell(self, count: int) -> None:
        seconds, cpu_s = time.monotonic() - self._begun, _cpu_s() - self._cpu
        print(json.dumps({"count": count, "seconds": seconds, "cpu_s": cpu_s}), flush=True)


class Pace:
    """The schedule of an open loop."""

    def __init__(self, rate: float, seconds: float) -> None:
        self.count = int(rate * seconds)
        self._rate = rate
        self._begun = time.monotonic() + 0.1
        self._end = self._begun + seconds * OVERRUN

    @property
    def over(self) -> bool:
        return time.monotonic() > self._end

    def wait_s(self, place: int) -> float:
        return max(0.0, self._begun + place / self._rate - time.monotonic())

    def mark(self, place: int) -> float:
        """The time from which the job at this place counts."""
        due, now = self._begun + place / self._rate, time.monotonic()
        return due if now - due > LATE_S else now


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


async def run(connect: Callable[[], AbstractAsyncContextManager[Producer]], arguments: list[str]) -> None:
    """A verb of an async peer."""
    verb, *numbers = arguments
    async with connect() as producer:
        clock = Clock()
        if verb == "pace":
            clock.tell(await _paced(producer, Pace(float(numbers[0]), float(numbers[1])), int(numbers[2])))
            return
        count, first = int(numbers[0]), int(numbers[1])
        if verb == "one":
            for i in range(first, first + count):
                await producer.one(i, time.monotonic())
        else:
            await producer.many(range(first, first + count))
        clock.tell(count)


async def _paced(producer: Producer, pace: Pace, first: int) -> int:
    for place in range(pace.count):
        if pace.over:
            return place
        await asyncio.sleep(pace.wait_s(place))
        await producer.one(first + place, pace.mark(place))
    return pace.count


def run_sync(producer: SyncProducer, arguments: list[str]) -> None:
    """A verb of a sync peer."""
    verb, *numbers = arguments
    producer.open()
    clock = Clock()
    if verb == "pace":
        clock.tell(_paced_sync(producer, Pace(float(numbers[0]), float(numbers[1])), int(numbers[2])))
        return
    count, first = int(numbers[0]), int(numbers[1])
    if verb == "one":
        for i in range(first, first + count):
            producer.one(i, time.monotonic())
    else:
        producer.many(range(first, first + count))
    clock.tell(count)


def _paced_sync(producer: SyncProducer, pace: Pace, first: int) -> int:
    for place in range(pace.count):
        if pace.over:
            return place
        time.sleep(pace.wait_s(place))
        producer.one(first + place, pace.mark(place))
    return pace.count


def main(
    connect: Callable[[], AbstractAsyncContextManager[Producer]],
    *,
    prepare: Step | None = None,
    work: Step | None = None,
) -> None:
    """The program of an async peer, on uvloop. `work`: the worker, where the peer has no program of its own for it."""
    import uvloop  # noqa: PLC0415 - sync peers have none

    match sys.argv[1:]:
        case ["prepare"]:
            if prepare is not None:
                uvloop.run(prepare())
        case ["work"] if work is not None:
            uvloop.run(work())
        case arguments:
            uvloop.run(run(connect, arguments))


def main_sync(producer: SyncProducer) -> None:
    """The program of a sync peer. It has nothing to prepare."""
    if sys.argv[1:] != ["prepare"]:
        run_sync(producer, sys.argv[1:])
