"""What a plain client does, beside `stamping`: fetch(100), each body decoded, a stamp and an ack.

Of fewer than a thousand messages it fetches a tenth at a time: what is counted must be several batches.

``python -m benchmarks.stamping_raw STREAM CONSUMER COUNT``, the server by the environment. It takes so many, and ends
when it is told to or has had nothing for half a minute. It imports nothing of aiqueue: its start and its memory are
those of nats-py and cbor2. It uses uvloop where that is installed, as `aiqueue work` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
import time

import nats
import nats.errors

from .raw import collect_less_often, loop_factory, opened

STAMP = struct.Struct("<dq")
IDLE_S = 30.0


async def drain(stream: str, consumer: str, count: int) -> None:
    told: list[int] = []  # to end: not before the acks of what was fetched are on their way
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told.append, signal.SIGTERM)
    file = os.open(os.environ["BENCH_STAMPS"], os.O_WRONLY | os.O_APPEND)
    servers = os.environ["AIQUEUE_URL"].split(",")
    raw = await nats.connect(servers, user=os.environ["AIQUEUE_USER"], password=os.environ["AIQUEUE_PASSWORD"])
    subscription = await raw.jetstream().pull_subscribe_bind(consumer, stream)
    batch = min(100, max(1, count // 10))
    done, heard = 0, time.monotonic()
    while done < count and not told and time.monotonic() - heard < IDLE_S:
        with contextlib.suppress(nats.errors.TimeoutError, asyncio.TimeoutError):
            for each in await subscription.fetch(min(batch, count - done), timeout=5):
                number = opened(each)["i"]
                heard = time.monotonic()
                os.write(file, STAMP.pack(heard, number))
                await each.ack()
                done += 1
    await raw.flush()
    while not told and time.monotonic() - heard < IDLE_S:  # its memory may still be asked for
        await asyncio.sleep(0.01)
    await raw.close()


if __name__ == "__main__":
    collect_less_often()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(drain(sys.argv[1], sys.argv[2], int(sys.argv[3])))
