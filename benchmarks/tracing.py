"""What tracing costs a job: CPU of a worker that drains no-op jobs, traced and not, in slices of a run (see `slices`).

- off: the client has no provider of tracers.
- 0 %: it has the SDK's, with the batch processor and an exporter that drops spans; no job begins a trace.
- 1 %: the same, and one job in a hundred begins a trace; with metrics: its jobs are counted, too.
- headers: each job has a `traceparent`, one in a hundred of them sampled.
- 100 %: each job begins a trace.

An enqueue is measured without slices, one after the other.
"""

from __future__ import annotations

import importlib
import secrets
import statistics
import time
from typing import Any

import aiqueue

from . import slices
from .common import empty, message
from .slices import OFF, OFF_AGAIN, Side

LIMIT_US = 2.0  # of 1 % above off
SIDES = (
    OFF, OFF_AGAIN, Side("0 %", ratio=0.0), Side("1 %", ratio=0.01), Side("1 % and metrics", metrics=True, ratio=0.01),
)  # fmt: skip
WITH_HEADERS = (Side("off, headers"), Side("1 %, headers", ratio=0.0))
ALL = (OFF, Side("100 %", ratio=1.0))
ENQUEUED = {"off": None, "1 %": 0.01, "100 %": 1.0}  # by the ratio
ENQUEUES = 1_000


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
    settings, made, size = client.connection.settings, provider(), jobs // 12
    enqueues: dict[str, list[float]] = {name: [] for name in ENQUEUED}
    for _ in range(rounds):
        for name, ratio in ENQUEUED.items():
            traces: Any = "off" if ratio is None else "auto"
            options = settings.with_arguments(traces=traces, trace_ratio=ratio or 0.0)
            async with aiqueue.connect(settings=options, tracer_provider=made) as traced:
                enqueues[name].append(await enqueue_us(traced))
    drained = [
        await slices.measure(client, SIDES, blocks=20 * rounds, jobs=size, provider=made),
        await slices.measure(
            client, WITH_HEADERS, blocks=10 * rounds, jobs=size, provider=made, more_headers=trace_header
        ),
        await slices.measure(client, ALL, blocks=2 * rounds, jobs=size, provider=made),
    ]
    lines = [line for each in drained for line in each.lines()]
    lines += [f"{name}: {_shown(found)} an enqueue" for name, found in enqueues.items()]
    return "\n".join([*lines, f"(1 % may add {LIMIT_US} at most)"])


def trace_header(i: int) -> dict[str, str]:
    """That of a job, by its number."""
    return {"traceparent": f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-0{int(i % 100 == 0)}"}


def _shown(found: list[float]) -> str:
    return f"{min(found):.2f} µs of CPU at least, {statistics.median(found):.2f} in the median"
