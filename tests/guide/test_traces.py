"""A trace that a plain publisher has begun, in Python or Node.js, continues in the worker, and over its retry."""

from __future__ import annotations

import json

import aiqueue

from ..support import Account
from ..tracing.recording import PARENT_ID, SAMPLED, TRACE_ID, Recorder, trace_ids
from .clients import Plain
from .messages import Task


async def test_the_trace_of_a_plain_publisher_continues(client: aiqueue.Client, shared: Account, plain: Plain) -> None:
    recorder, worker = Recorder(), aiqueue.Worker(tenants=["traced"])

    @worker.handle(Task, retry=aiqueue.Backoff(first="10ms", attempts=2))
    async def handle(job: aiqueue.Job[Task]) -> str:
        if job.attempt == 1:
            raise ValueError("not yet")
        return job.headers["tracestate"]

    body = {"schema_version": "1.0", "message_type": "agent_task", "data": {"text": "hello"}}
    async with recorder.connect(shared, trace_ratio=0) as traced, worker.running(traced):
        given = {"traceparent": SAMPLED, "tracestate": "vendor=1", "task_id": "of-a-trace"}
        await plain.do("store", subject="ai.agent.tasks.traced", body=json.dumps(body), headers=given)
        handle_of = await client.job("of-a-trace", family="agent.tasks", tenant="traced")
        assert await handle_of.result(timeout=20) == "vendor=1"
        await recorder.ended(4)
    assert trace_ids(recorder) == {TRACE_ID}
    assert recorder.tree() == [
        "process ai.agent.tasks CONSUMER ERROR",
        "  agent.task.execute INTERNAL ERROR",
        "process ai.agent.tasks CONSUMER",
        "  agent.task.execute INTERNAL",
    ]
    parents = {each.parent.span_id for each in recorder.spans if each.parent and each.name.startswith("process")}
    assert parents == {PARENT_ID}
