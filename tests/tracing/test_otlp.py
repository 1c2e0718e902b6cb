"""``traces = "otlp"``: spans arrive at a collector, and one that is gone fails no job."""

from __future__ import annotations

import os
import sys
from asyncio import subprocess
from pathlib import Path

import pytest
from aiohttp import web

from ..support import Account
from .recording import Recorder

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the exporter of OTLP is not installed")
assert Recorder  # the SDK is there, or the file is skipped

pytestmark = pytest.mark.families("agent.tasks")

PROGRAM = """
import asyncio
import aiqueue


class Page(aiqueue.Message, kind="page"):
    pass


worker = aiqueue.Worker()


@worker.handle(Page)
async def page(job: aiqueue.Job[Page]) -> str:
    from opentelemetry import trace

    with trace.get_tracer("the user's").start_as_current_span("of the user"):
        return "done"


async def main() -> None:
    async with aiqueue.connect(name="pages") as client, worker.running(client):
        print(await (await client.enqueue(Page(), tenant="acme")).result(timeout=20))


asyncio.run(main())
"""


async def run_program(account: Account, directory: Path, endpoint: str) -> str:
    (directory / "app.py").write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    environment |= {
        "AIQUEUE_URL": account.url, "AIQUEUE_USER": account.user, "AIQUEUE_PASSWORD": account.password,
        "AIQUEUE_TRACES": "otlp", "AIQUEUE_TRACE_RATIO": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "1",
    }  # fmt: skip
    process = await subprocess.create_subprocess_exec(
        sys.executable, str(directory / "app.py"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return out.decode().strip()


async def test_spans_arrive_at_a_collector_with_those_of_the_user(
    client: object, account: Account, tmp_path: Path
) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest  # noqa: PLC0415

    got = ExportTraceServiceRequest()

    async def collect(request: web.Request) -> web.Response:
        got.MergeFromString(await request.read())
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    try:
        assert await run_program(account, tmp_path, f"http://{host}:{port}") == "done"
    finally:
        await runner.cleanup()
    spans = {
        span.name: span for resource in got.resource_spans for scope in resource.scope_spans for span in scope.spans
    }
    assert sorted(spans) == ["agent.task.execute", "of the user", "process ai.agent.tasks", "send ai.agent.tasks"]
    assert len({each.trace_id for each in spans.values()}) == 1
    assert spans["of the user"].parent_span_id == spans["agent.task.execute"].span_id
    services = {
        each.value.string_value
        for resource in got.resource_spans
        for each in resource.resource.attributes
        if each.key == "service.name"
    }
    assert services == {"pages"}


async def test_a_collector_that_is_gone_fails_no_job(client: object, account: Account, tmp_path: Path) -> None:
    assert await run_program(account, tmp_path, "http://127.0.0.1:9") == "done"
