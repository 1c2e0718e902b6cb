"""What tracing costs a job: CPU of a worker that drains no-op jobs, traced and not, in turn within each round.

- off: the client has no provider of tracers.
- 0 %: it has the SDK's, with the batch processor and an exporter that drops spans; no job begins a trace.
- 1 %: the same, and one job in a hundred begins a trace.
- off, headers; 1 %, headers: each job has a `traceparent`, one in a hundred of them sampled.
- 100 %: each job begins a trace.

CPU of the whole process, from the first handler to the last. What tracing adds is the median over pairs of neighbouring
drains: whatever else the machine does adds to both. An enqueue is measured the same way, one after the other.
"""

from __future__ import annotations

import asyncio
import importlib
import secrets
import statistics
import time
from typing import Any

import aiqueue

from .common import Noop, empty, message, raw_client, raw_job

WITHIN_S = 600.0  # of one drain: whatever else the machine does may hold it up
LIMIT_US = 2.0  # of 1 % above off
SIDES: dict[str, tuple[float | None, bool]] = {  # the ratio (None: no provider), and whether jobs have headers
    "off": (None, False),
    "0 %": (0.0, False),
    "1 %": (0.01, False),
    "off, headers": (None, True),
    "1 %, headers": (0.0, True),
    "100 %": (1.0, False),
}
ENQUEUES = 1_000
PARTS = 5  # of a round: many short ones, because a busy machine changes from one minute to the next


class Dropping:
    """An exporter that drops spans."""

    def export(self, spans: Any) -> Any:
        return importlib.import_module("opentelemetry.sdk.trace.export").SpanExportResult.SUCCESS

    def shutdown(self) -> None: ...


def provider() -> Any:
    """The SDK's provider, whose spans are made and dropped. Only this question needs the SDK."""
    sdk = importlib.import_module("opentelemetry.sdk.trace")
    made = sdk.TracerProvider(shutdown_on_exit=False)
    made.add_span_processor(importlib.import_module("opentelemetry.sdk.trace.export").BatchSpanProcessor(Dropping()))
    return made


async def fill(client: aiqueue.Client, jobs: int, *, with_headers: bool) -> None:
    """Store a backlog of jobs as aiqueue writes them; `with_headers`: of traces, one in a hundred sampled."""
    await empty(client)
    raw = await raw_client(client)
    js = raw.jetstream(publish_async_max_pending=1_000)
    for i in range(jobs):
        subject, data, told = raw_job(i)
        if with_headers:
            told["traceparent"] = f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-0{int(i % 100 == 0)}"
        await js.publish_async(subject, data, headers=told)
    await js.publish_async_completed()
    await raw.close()


async def drain_us(client: aiqueue.Client, jobs: int) -> float:
    """CPU of this process, in µs a job, from the first handler to the last."""
    begun = ended = 0.0
    done = 0
    finished = asyncio.Event()
    worker = aiqueue.Worker(concurrency=100)

    @worker.handle(Noop, result=False)
    async def noop(job: aiqueue.Job[Noop]) -> None:
        nonlocal begun, ended, done
        done += 1
        if done == 1:
            begun = time.process_time()
        elif done == jobs:
            ended = time.process_time()
            finished.set()

    async with worker.running(client), asyncio.timeout(WITHIN_S):
        await finished.wait()
    return (ended - begun) / (jobs - 1) * 1e6


async def enqueue_us(client: aiqueue.Client) -> float:
    """CPU of this process, in µs an awaited enqueue."""
    begun = time.process_time()
    for i in range(ENQUEUES):
        await client.enqueue(message(i), tenant="bench")
    took = time.process_time() - begun
    await empty(client)
    return took / ENQUEUES * 1e6


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> str:
    """The figures of all sides."""
    settings, made = client.connection.settings, provider()
    drains: dict[str, list[float]] = {name: [] for name in SIDES}
    enqueues: dict[str, list[float]] = {name: [] for name in ("off", "1 %", "100 %")}
    for number in range(PARTS * rounds):
        sides = list(SIDES)
        for name in sides[number % len(sides) :] + sides[: number % len(sides)]:
            ratio, with_headers = SIDES[name]
            traces: Any = "off" if ratio is None else "auto"
            options = settings.with_arguments(traces=traces, trace_ratio=ratio or 0.0)
            await fill(client, jobs // PARTS, with_headers=with_headers)
            async with aiqueue.connect(settings=options, tracer_provider=made) as traced:
                drains[name].append(await drain_us(traced, jobs // PARTS))
                if name in enqueues and number % PARTS == 0:
                    enqueues[name].append(await enqueue_us(traced))
    lines = [f"{name}: {_shown(found)} a job drained" for name, found in drains.items()]
    lines += [f"{name}: {_shown(found)} an enqueue" for name, found in enqueues.items()]
    for off, on in (("off", "0 %"), ("off", "1 %"), ("off, headers", "1 %, headers"), ("off", "100 %")):
        added = [more - less for more, less in zip(drains[on], drains[off], strict=True)]
        lines.append(f"{on} adds {statistics.median(added):.2f} µs a job to {off} (median of {len(added)} pairs)")
    return "\n".join([*lines, f"(1 % may add {LIMIT_US} at most)"])


def _shown(found: list[float]) -> str:
    return f"{min(found):.2f} µs of CPU at least, {statistics.median(found):.2f} in the median"
