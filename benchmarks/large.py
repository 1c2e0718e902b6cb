"""Results and steps that are stored as documents, beside the same bytes in a NATS object store by stock nats-py."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from nats.js.object_store import ObjectStore

import aiqueue
from aiqueue import codec

from .common import raw_client
from .report import OURS, RAW, Row

MB = 1_000_000
SIZES = {1 * MB: 20, 20 * MB: 3}  # and how many of each, one after another, make a round
BUCKET = "AI_DOCUMENTS"  # of both sides, so that both write to one stream
WAIT_S = 60.0
RESULT = {
    OURS: "enqueue, a handler that returns the bytes, await handle.result()",
    RAW: "store.put of the encoded bytes, then store.get(writeinto=BytesIO), decoded: no job, no journal",
}
STEP = {OURS: "await job.step(...) in a loop in one handler", RAW: "store.put of the encoded bytes, each awaited"}

_numbers = itertools.count()


class Large(aiqueue.Message, kind="large"):
    n: int
    size: int
    steps: int = 0


def make(n: int, size: int) -> bytes:
    """Bytes that no other result has: equal ones are stored once."""
    return n.to_bytes(8, "big") + bytes(size - 8)


worker = aiqueue.Worker()


@worker.handle(Large, timeout="120s")
async def large(job: aiqueue.Job[Large]) -> Any:
    message = job.message
    if not message.steps:
        return make(message.n, message.size)
    begun = time.perf_counter()
    for number in range(message.steps):
        await job.step(f"s-{number}", make, message.n + number, message.size)
    return time.perf_counter() - begun


@asynccontextmanager
async def raw_store(client: aiqueue.Client) -> AsyncIterator[ObjectStore]:
    raw = await raw_client(client)
    try:
        yield await raw.jetstream().object_store(BUCKET)
    finally:
        await raw.close()


async def result(client: aiqueue.Client, size: int) -> float:
    """Milliseconds from enqueue to result."""
    n = next(_numbers)
    begun = time.perf_counter()
    handle = await client.enqueue(Large(n=n, size=size), tenant="bench")
    got = await handle.result(timeout=WAIT_S)
    took = time.perf_counter() - begun
    if got != make(n, size):
        raise RuntimeError(f"result {n} is not the one that the handler has returned")
    return took * 1000


async def raw_result(store: ObjectStore, size: int) -> float:
    """Milliseconds of a put and a get."""
    n = next(_numbers)
    name = f"raw/{n}"
    begun = time.perf_counter()
    await store.put(name, codec.encode(make(n, size)))
    buffer = io.BytesIO()
    await store.get(name, writeinto=buffer)
    got = codec.decode(buffer.getvalue(), codec.CBOR)
    took = time.perf_counter() - begun
    if got != make(n, size):
        raise RuntimeError(f"object {n} is not the one that was put")
    await store.delete(name)
    return took * 1000


async def steps(client: aiqueue.Client, size: int, count: int) -> float:
    """Milliseconds of a step."""
    first, *_ = [next(_numbers) for _ in range(count)]
    handle = await client.enqueue(Large(n=first, size=size, steps=count), tenant="bench")
    return float(await handle.result(timeout=WAIT_S)) * 1000 / count


async def raw_steps(store: ObjectStore, size: int, count: int) -> float:
    """Milliseconds of a put."""
    numbers = [next(_numbers) for _ in range(count)]
    begun = time.perf_counter()
    for n in numbers:
        await store.put(f"raw/{n}", codec.encode({"name": "s", "result": make(n, size)}))
    took = time.perf_counter() - begun
    for n in numbers:
        await store.delete(f"raw/{n}")
    return took * 1000 / count


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    rows = []
    async with raw_store(client) as store, worker.running(client):
        for size, count in SIZES.items():
            await result(client, size)
            await raw_result(store, size)
            results = Row("large", f"a result of {size // MB} MB, from enqueue to result()", "ms", x=size, how=RESULT)
            kept = Row("large", f"a step whose result has {size // MB} MB", "ms", x=size, how=STEP)
            for _ in range(rounds):
                for _ in range(count):
                    results.add(OURS, await result(client, size))
                    results.add(RAW, await raw_result(store, size))
                kept.add(OURS, await steps(client, size, count))
                kept.add(RAW, await raw_steps(store, size, count))
            rows += [results, kept]
    return rows
