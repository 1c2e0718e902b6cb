"""What counting costs a job: CPU of a worker that drains no-op jobs, with the setting `metrics` on and off in slices of
one run (see `slices`). Beside it the call alone, and a flush, which a worker makes every few seconds.
"""

from __future__ import annotations

import statistics
import time

import aiqueue
from aiqueue.lanes.delivery import Delivery, LanePull
from aiqueue.metrics import EVERY_S, Counts, Flusher
from aiqueue.subjects import Lane
from aiqueue.worker.counting import Tally
from aiqueue.worker.opening import OpenedJob

from . import slices
from .common import FAMILY
from .slices import METRICS, OFF, OFF_AGAIN

CALLS = 50_000
FLUSHES = 30
PROMISED_US = 1.0


def call_us(client: aiqueue.Client) -> float:
    """µs of one call, as settlement makes it."""
    tally = Tally(client.connection.clock, [(FAMILY, "noop")])
    delivery = Delivery.__new__(Delivery)
    delivery.lane = LanePull(key=Lane(FAMILY, "bench", "normal"), stream="", consumer="", ack_wait_s=30.0)
    delivery.tenant, delivery.delivery_count, delivery.stored_at = "bench", 1, time.time() - 0.5
    delivery.run_started_at, delivery.run_ended_at = time.monotonic(), 0.0
    opened = OpenedJob.__new__(OpenedJob)
    opened.kind = "noop"
    begun = time.process_time()
    for _ in range(CALLS):
        tally.count_done(delivery, opened)
    return (time.process_time() - begun) / CALLS * 1e6


async def flush_ms(client: aiqueue.Client) -> float:
    """CPU of a flush of one kind, in ms."""

    def take() -> dict[tuple[str, str, str], Counts]:
        counts = Counts()
        for exponent in range(-12, -2):
            counts.done += 1
            counts.add_run(2.0**exponent)
            counts.add_wait(2.0**exponent)
        return {(FAMILY, "bench", "noop"): counts}

    flusher = Flusher(client.connection, client.topology, [FAMILY], take)
    found: list[float] = []
    for _ in range(FLUSHES):
        begun = time.process_time()
        await flusher.flush()
        found.append(time.process_time() - begun)
    return statistics.median(found) * 1e3


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> str:
    """The figures of both sides."""
    calls = [call_us(client) for _ in range(5)]
    flush = await flush_ms(client)
    found = await slices.measure(client, [OFF, OFF_AGAIN, METRICS], blocks=40 * rounds, jobs=jobs // 12)
    return "\n".join([
        f"call alone: {min(calls):.2f} µs",
        *found.lines(),
        f"a flush of one kind: {flush:.2f} ms of CPU, every {EVERY_S:g} s",
        f"(at most {PROMISED_US} µs a job is promised)",
    ])  # fmt: skip
