"""A producer process: so many jobs at such a rate, and what became of each enqueue.

``python -m benchmarks.chaos.producer LOG FIRST COUNT RATE TENANTS TIMEOUT_S``, the server by the environment. It ends
when each job is acknowledged, refused, or unknown: no PubAck came, and it may be stored all the same.
"""

from __future__ import annotations

import asyncio
import sys
import time

import aiqueue
from aiqueue.errors import AIQueueError, Unavailable

from . import records
from .app import Task
from .records import Pen

UNDERWAY_MAX = 2_000


async def produce(pen: Pen, *, first: int, count: int, rate: float, tenants: int, timeout_s: float) -> None:
    underway = asyncio.Semaphore(UNDERWAY_MAX)

    async def one(client: aiqueue.Client, number: int) -> None:
        begun = time.monotonic()
        what = records.REFUSED
        try:
            handle = await client.enqueue(
                Task(number=number),
                tenant=f"t{number % tenants}",
                unique=str(number),
                on_full="wait",
                timeout=timeout_s,
            )
            what = records.DUPLICATE if handle.duplicate else records.ACKED
        except Unavailable as error:
            what = records.UNKNOWN if error.maybe_stored else records.REFUSED
        except AIQueueError as error:
            print(f"{number}: {error!r}", file=sys.stderr, flush=True)
        finally:
            pen.write(what, number, f"{time.monotonic() - begun:.6f}")
            underway.release()

    async with aiqueue.connect(connect_timeout=30) as client:
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for place in range(count):
                await asyncio.sleep(max(0.0, begun + place / rate - time.monotonic()))
                await underway.acquire()
                group.create_task(one(client, first + place))


def main() -> None:
    path, first, count, rate, tenants, timeout_s = sys.argv[1:]
    pen = Pen(path)
    asyncio.run(
        produce(
            pen,
            first=int(first),
            count=int(count),
            rate=float(rate),
            tenants=int(tenants),
            timeout_s=float(timeout_s),
        )
    )
    pen.close()


if __name__ == "__main__":
    main()
