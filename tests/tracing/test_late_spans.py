"""Spans that are made a moment after their start: as any other to the handler, and to whoever gets them."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from opentelemetry import trace

import aiqueue
from aiqueue.tracing import late_span

from ..support import Account, eventually
from .recording import Recorder

pytestmark = pytest.mark.families("agent.tasks")


class Page(aiqueue.Message, kind="page"):
    number: int = 0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    monkeypatch.setattr(late_span, "WITHIN_S", 60.0)
    return Recorder()


async def test_the_spans_of_a_handler_that_never_looks_have_the_times_of_its_run(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    ran: list[tuple[int, int, list[str]]] = []

    async def page(job: aiqueue.Job[Page]) -> None:
        begun = time.time_ns()
        await asyncio.sleep(0.05)
        ran.append((begun, time.time_ns(), recorder.names))

    worker = aiqueue.Worker()
    worker.handle(Page, result=False)(page)
    async with recorder.connect(account) as traced, worker.running(traced):
        await traced.enqueue(Page(), tenant="acme")
        await eventually(lambda: len(ran) == 1)
    assert ran[0][2] == ["send ai.agent.tasks"]
    handler, process = recorder.one("agent.task.execute"), recorder.one("process ai.agent.tasks")
    assert recorder.tree() == [
        "send ai.agent.tasks PRODUCER", "  process ai.agent.tasks CONSUMER", "    agent.task.execute INTERNAL",
    ]  # fmt: skip
    for each in (handler, process):
        assert each.start_time is not None
        assert each.end_time is not None
        assert each.start_time <= ran[0][0] < ran[0][1] <= each.end_time


@pytest.mark.parametrize("is_async", [True, False])
async def test_a_handler_can_use_its_span_as_any_other(
    client: aiqueue.Client, account: Account, recorder: Recorder, *, is_async: bool
) -> None:
    def use() -> None:
        current = trace.get_current_span()
        assert isinstance(current, trace.Span)
        assert current.is_recording()
        assert current.get_span_context().is_valid
        current.set_attribute("mine", 7)
        current.add_event("seen")
        with recorder.tracer.start_as_current_span("below"):
            pass

    async def page(job: aiqueue.Job[Page]) -> None:
        use()

    worker = aiqueue.Worker()
    worker.handle(Page)(page if is_async else lambda job: use())
    async with recorder.connect(account) as traced, worker.running(traced):
        await (await traced.enqueue(Page(), tenant="acme")).result(timeout=20)
    assert recorder.tree(("mine",)) == [
        "send ai.agent.tasks PRODUCER",
        "  process ai.agent.tasks CONSUMER",
        "    agent.task.execute INTERNAL mine=7",
        "      below INTERNAL",
    ]
    assert [each.name for each in recorder.one("agent.task.execute").events] == ["seen"]


async def test_a_span_that_is_used_after_its_end_has_ended_when_the_handler_did(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    kept: list[trace.Span] = []

    async def page(job: aiqueue.Job[Page]) -> None:
        kept.append(trace.get_current_span())

    worker = aiqueue.Worker()
    worker.handle(Page)(page)
    async with recorder.connect(account) as traced, worker.running(traced):
        await (await traced.enqueue(Page(), tenant="acme")).result(timeout=20)
        ended_by = time.time_ns()
        assert "agent.task.execute" not in recorder.names
        assert kept[0].get_span_context().is_valid
        assert not kept[0].is_recording()
        assert (recorder.one("agent.task.execute").end_time or 0) <= ended_by


async def test_a_span_that_goes_on_is_made_soon_all_the_same(
    client: aiqueue.Client, account: Account, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(late_span, "WITHIN_S", 0.01)
    begun: list[str] = []
    monkeypatch.setattr(late_span.LateSpan, "made", _noting(begun))
    go_on = asyncio.Event()

    async def page(job: aiqueue.Job[Page]) -> None:
        await go_on.wait()

    worker = aiqueue.Worker()
    worker.handle(Page)(page)
    async with recorder.connect(account) as traced, worker.running(traced):
        handle = await traced.enqueue(Page(), tenant="acme")
        await eventually(lambda: len(set(begun)) == 2)
        go_on.set()
        await handle.result(timeout=20)


def _noting(begun: list[str]) -> Any:
    made = late_span.LateSpan.made

    def noting(span: late_span.LateSpan) -> Any:
        found = made(span)
        begun.append(found.name)
        return found

    return noting


async def test_so_many_spans_are_made_at_once(client: aiqueue.Client, account: Account, recorder: Recorder) -> None:
    worker = aiqueue.Worker(concurrency=1)

    @worker.handle(Page, result=False)
    async def page(job: aiqueue.Job[Page]) -> None: ...

    async with recorder.connect(account) as traced, worker.running(traced):
        for number in range(late_span.BATCH):
            await traced.enqueue(Page(number=number), tenant="acme")
        await eventually(lambda: recorder.names.count("process ai.agent.tasks") >= late_span.BATCH - 2)


async def test_a_span_may_be_asked_for_while_it_is_made() -> None:
    """By a sampler, a processor, or a log record of theirs that names the current span."""
    seen = []

    def make(span: late_span.LateSpan) -> trace.Span:
        seen.append(span.get_span_context().is_valid)
        return trace.NonRecordingSpan(trace.SpanContext(1, 2, is_remote=False))

    made = late_span.LateSpan(make, {})
    assert made.get_span_context().is_valid
    assert seen == [False]


def test_spans_are_made_although_a_former_event_loop_has_ended_before_it_could(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_span, "WITHIN_S", 0.01)
    made: list[int] = []
    spans = late_span.LateSpans(lambda function: function())

    def add(number: int) -> None:
        spans.add(late_span.LateSpan(lambda _: made.append(number), {}))

    async def add_and_wait(number: int) -> None:
        add(number)
        await eventually(lambda: number in made)

    async def add_only() -> None:
        add(1)

    asyncio.run(add_only())
    assert made == []
    asyncio.run(add_and_wait(2))
    assert made == [1, 2]
    add(3)  # without a loop
    assert made == [1, 2, 3]
