"""What a step of a handler costs, beside one awaited publish of the same body to the same stream."""

from __future__ import annotations

import time

import aiqueue
from aiqueue import codec

from .common import raw_client
from .report import OURS, RAW, Row

HOW = {
    OURS: "await job.step(...) in a loop in one handler, 1,900 steps a job",
    RAW: "await js.publish, the same body and headers",
}
EACH = 1_900
RESULT = {"text": "x" * 160}


class Steps(aiqueue.Message, kind="steps"):
    jobs: int


async def step() -> dict[str, str]:
    return RESULT


async def ours(client: aiqueue.Client) -> float:
    """Steps a second in one handler."""
    took: list[float] = []
    worker = aiqueue.Worker()

    @worker.handle(Steps, timeout="120s")
    async def steps(job: aiqueue.Job[Steps]) -> None:
        began = time.perf_counter()
        for number in range(EACH):
            await job.step(f"s-{number}", step)
        took.append(time.perf_counter() - began)

    async with worker.running(client):
        handle = await client.enqueue(Steps(jobs=1), tenant="bench")
        await handle.result(timeout=120)
    return EACH / took[0]


async def theirs(client: aiqueue.Client) -> float:
    """Publishes a second, one awaited after another."""
    raw = await raw_client(client)
    js = raw.jetstream()
    subject = f"ai.checkpoint.agent.tasks.bench.{time.time_ns()}.1-1"
    body = codec.encode({"name": "s-1", "result": RESULT})
    began = time.perf_counter()
    for number in range(EACH):
        told = {"Content-Type": codec.CBOR, "Aiq-Event": "step", "Nats-Msg-Id": f"{subject}/{number}"}
        await js.publish(subject, body, headers=told)
    took = time.perf_counter() - began
    await raw.close()
    return EACH / took


async def run(client: aiqueue.Client, *, rounds: int, jobs: int) -> list[Row]:
    row = Row("steps", "steps of a handler, one after another", "/s", x=EACH, how=HOW)
    for _ in range(rounds):
        row.add(OURS, await ours(client))
        row.add(RAW, await theirs(client))
    return [row]
