"""Traces of whoever may publish, and of providers that answer anything; and that each span which begins ends once."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import Unavailable
from aiqueue.tracing import find_tracing, names

from ..support import Account, eventually
from .recording import SAMPLED, Recorder

pytestmark = pytest.mark.families("agent.tasks")

BODY = b'{"message_type": "page", "data": {"number": 0}, "schema_version": "1.0"}'


class Page(aiqueue.Message, kind="page"):
    number: int = 0


class Ended:
    """A span processor that knows which spans have begun, and how often each has ended."""

    def __init__(self) -> None:
        self.open: dict[int, str] = {}
        self.ended: Counter[int] = Counter()

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.open[span.context.span_id] = span.name

    def on_end(self, span: Any) -> None:
        self.ended[span.context.span_id] += 1
        self.open.pop(span.context.span_id, None)

    def _on_ending(self, span: Any) -> None: ...
    def shutdown(self) -> None: ...
    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def ended(recorder: Recorder) -> Ended:
    found = Ended()
    recorder.provider.add_span_processor(found)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    "state", ["a=" + "x" * 30_000, "a=\x1b[31m", "a=1,a=1", ",".join(f"k{n}=v" for n in range(99))]
)
async def test_a_hostile_tracestate_is_not_in_the_log_and_the_trace_continues_without_it(
    client: aiqueue.Client,
    account: Account,
    plain: Any,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    state: str,
) -> None:
    worker = aiqueue.Worker()
    worker.handle(Page)(lambda job: None)
    async with recorder.connect(account, trace_ratio=0) as traced, worker.running(traced):
        given = {"traceparent": SAMPLED, "tracestate": state, "baggage": state}
        await plain.jetstream().publish("ai.agent.tasks.acme", BODY, headers=given)
        await recorder.ended(2)
    assert all(not each.context.trace_state for each in recorder.spans if each.context)
    assert not [each for each in caplog.messages if state[:4] in each]


async def test_a_plain_job_whose_trace_has_no_id_is_sampled_as_one_without_a_trace(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    worker = aiqueue.Worker()
    worker.handle(Page)(lambda job: 1)
    async with recorder.connect(account, trace_ratio=0) as traced, worker.running(traced):
        for nobody in (f"00-{0:032x}-00f067aa0ba902b7-01", f"00-{7:032x}-{0:016x}-01"):
            await (await client.enqueue(Page(), tenant="acme", headers={"traceparent": nobody})).result(timeout=20)
    assert recorder.names == []


async def test_an_attribute_is_cut_and_any_exporter_can_encode_it(recorder: Recorder) -> None:
    common = pytest.importorskip("opentelemetry.exporter.otlp.proto.common.trace_encoder")
    tracing = find_tracing("auto", 1.0, "s", recorder.provider)
    assert tracing is not None
    long = "\ud800" + "x" * 100_000
    attributes = {names.STEP: long}
    process = tracing.start_process("ai.f", "acme", parent=None, run="1", attributes={})
    step = tracing.start("step x", attributes)
    assert process is not None
    assert step is not None
    with process, step:
        process.set(names.REASON, long)
        step.set(names.RESPONSE_ID, long)
        step.set(names.FINISH_REASONS, [long] * 1_000)
    for each in recorder.spans:
        for value in (each.attributes or {}).values():
            assert len(value) <= 1_024 if isinstance(value, str) else len(value) <= 32  # type: ignore[arg-type]
    assert len(common.encode_spans(recorder.spans).SerializeToString()) < 100_000


async def test_many_jobs_that_cannot_be_sent_leave_no_span_open(
    client: aiqueue.Client, account: Account, recorder: Recorder, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with recorder.connect(account) as traced:

        async def unavailable(*_: Any) -> None:
            raise Unavailable("no clock")

        monkeypatch.setattr(type(traced.connection.clock), "ensure", unavailable)
        with recorder.tracer.start_as_current_span("request"), pytest.raises(Unavailable):
            [each async for each in traced.enqueue_many([(Page(), {"tenant": "acme"})])]  # type: ignore[list-item]
    assert ended.open == {}


async def test_each_span_ends_once_whatever_becomes_of_its_job(
    client: aiqueue.Client, account: Account, recorder: Recorder, ended: Ended
) -> None:
    running = asyncio.Event()

    async def page(job: aiqueue.Job[Page]) -> object:
        match job.message.number:
            case 1:
                raise aiqueue.Reject("no")
            case 2 if job.attempt == 1:
                raise aiqueue.Retry(after="10ms")
            case 3:
                await job.gather([("page", Page(number=0))])
            case 4:
                running.set()
                await asyncio.sleep(60)
            case 5:
                await asyncio.sleep(60)
            case 6:
                await job.step("fails", _fail)
            case 7:
                return "x" * 200_000
            case 8:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await asyncio.sleep(1)
            case 9:
                await job.chunk("a part")
            case _:
                pass
        return 1

    worker = aiqueue.Worker(concurrency=20)
    worker.handle(Page, timeout="1s", retry=aiqueue.Backoff(attempts=2, first="10ms"))(page)

    @worker.handle(Sync, retry=aiqueue.Backoff(attempts=1))
    def sync(job: aiqueue.Job[Sync]) -> None:
        time.sleep(0.05)
        raise SystemExit(1)

    async with recorder.connect(account) as traced, worker.running(traced):
        handles = [await traced.enqueue(Page(number=n), tenant="acme") for n in range(10)]
        handles.append(await traced.enqueue(Sync(), tenant="acme"))
        await running.wait()
        await handles[4].cancel()
        await asyncio.gather(*(each.result(timeout=20) for each in handles), return_exceptions=True)
        await traced.enqueue(Page(number=5), tenant="acme")  # the worker stops amid this one
        await eventually(lambda: "process ai.agent.tasks" in ended.open.values())
    assert ended.open == {}
    assert set(ended.ended.values()) == {1}
    inner = Counter(
        (each.status.status_code.name, (each.attributes or {}).get("error.type"))
        for each in recorder.spans
        if each.name == "agent.task.execute"
    )
    assert inner["ERROR", "SystemExit"] == 1
    assert inner["ERROR", "Reject"] == 1


async def _fail() -> None:
    raise ValueError("no")


class Sync(aiqueue.Message, kind="sync"):
    pass
