"""Spans of jobs: from enqueue over retries, parking, children and steps, in one trace; none where none is wanted."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest

import aiqueue
from aiqueue.job import JobSpec

from ..support import Account, eventually
from .recording import PARENT_ID, SAMPLED, TRACE_ID, UNSAMPLED, Recorder, trace_ids

pytestmark = pytest.mark.families("agent.tasks")


class Page(aiqueue.Message, kind="page"):
    number: int = 0


class Part(aiqueue.Message, kind="part"):
    number: int = 0


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def make_worker(handler: Any, model: Any = Page, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker()
    worker.handle(model, **options)(handler)
    return worker


async def test_retries_parking_steps_and_children_are_of_the_trace_of_the_enqueue(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    async def page(job: aiqueue.Job[Page]) -> int:
        await job.step("read-7", asyncio.sleep, 0)
        if job.attempt == 1:
            raise ValueError("not yet")
        (found,) = await job.gather([("part", Part(number=1))])
        return int(found)

    async def part(job: aiqueue.Job[Part]) -> int:
        return job.message.number

    worker = make_worker(page, retry=aiqueue.Backoff(first="10ms", attempts=3))
    worker.handle(Part)(part)
    async with recorder.connect(account) as traced, worker.running(traced):
        handle = await traced.enqueue(Page(), tenant="acme", delay="1ms")
        assert await handle.result(timeout=20) == 1
        await recorder.ended(11)
    assert len(trace_ids(recorder)) == 1
    assert recorder.tree(("aiqueue.attempt", "aiqueue.outcome", "aiqueue.step", "aiqueue.child")) == [
        "send ai.agent.tasks PRODUCER",
        "  process ai.agent.tasks CONSUMER aiqueue.attempt=1 aiqueue.outcome=retry ERROR",
        "    agent.task.execute INTERNAL ERROR",
        "      step read INTERNAL aiqueue.step=read-7",
        "  process ai.agent.tasks CONSUMER aiqueue.attempt=2 aiqueue.outcome=waiting",
        "    agent.task.execute INTERNAL",
        "      send ai.agent.tasks PRODUCER aiqueue.child=part",
        "        process ai.agent.tasks CONSUMER aiqueue.attempt=1 aiqueue.outcome=done",
        "          agent.task.execute INTERNAL",
        "  process ai.agent.tasks CONSUMER aiqueue.attempt=2 aiqueue.outcome=done",
        "    agent.task.execute INTERNAL",
    ]


async def test_the_attributes_of_a_job_are_those_of_the_conventions(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    async def page(job: aiqueue.Job[Page]) -> None:
        raise aiqueue.Reject("of no use")

    async with recorder.connect(account) as traced, make_worker(page).running(traced):
        handle = await traced.enqueue(Page(), tenant="acme", priority="high", unique="p-1")
        with pytest.raises(aiqueue.JobFailed):
            await handle.result(timeout=20)
        await recorder.ended(3)
    common = {
        "messaging.system": "nats", "messaging.destination.name": "ai.agent.tasks", "messaging.message.id": "p-1",
        "aiqueue.tenant": "acme",
    }  # fmt: skip
    assert recorder.attributes("send ai.agent.tasks") == {
        **common, "messaging.operation.name": "send", "messaging.operation.type": "send",
    }  # fmt: skip
    processed = recorder.attributes("process ai.agent.tasks")
    assert 0 <= processed.pop("aiqueue.queued_s") < 60
    assert processed == {
        **common, "messaging.operation.name": "process", "messaging.operation.type": "process",
        "aiqueue.priority": "high", "aiqueue.kind": "page", "aiqueue.attempt": 1, "aiqueue.outcome": "failed",
        "aiqueue.reason": "rejected", "error.type": "Reject",
    }  # fmt: skip
    scope = recorder.spans[0].instrumentation_scope
    assert scope is not None
    assert (scope.name, scope.version) == ("aiqueue", aiqueue.__version__)
    assert recorder.attributes("agent.task.execute") == {"error.type": "Reject"}
    assert not any(each.events for each in recorder.spans)  # which would hold texts of exceptions


async def test_a_failed_attempt_has_the_class_of_its_error_or_timeout_as_error_type(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    async def page(job: aiqueue.Job[Page]) -> None:
        match job.message.number:
            case 0:
                await asyncio.sleep(60)
            case 1:
                raise aiqueue.Retry("busy", after="1h")
            case 2:
                raise aiqueue.Reject("of no use")
            case 3:
                raise KeyError("k")
        raise ExceptionGroup("many", [ValueError("one"), KeyError("two")])

    worker = make_worker(page, timeout="50ms", retry=aiqueue.Backoff(attempts=1))
    worker.handle(Part, process=True, timeout="1s", retry=aiqueue.Backoff(attempts=1))(_fail_in_a_child)
    async with recorder.connect(account) as traced, worker.running(traced):
        for number in range(5):
            await traced.enqueue(Page(number=number), tenant="acme", unique=f"p-{number}")
        for number in range(2):
            await traced.enqueue(Part(number=number), tenant="acme", unique=f"c-{number}")
        await eventually(lambda: recorder.names.count("process ai.agent.tasks") == 7)
    attributes = [dict(each.attributes or {}) for each in recorder.spans if each.name == "process ai.agent.tasks"]
    found = {each["messaging.message.id"]: (each["error.type"], each.get("aiqueue.reason")) for each in attributes}
    assert found == {
        "p-0": ("timeout", "attempts"), "p-1": ("Retry", "attempts"), "p-2": ("Reject", "rejected"),
        "p-3": ("KeyError", "attempts"), "p-4": ("ExceptionGroup", "attempts"),
        "c-0": ("ValueError", "attempts"), "c-1": ("timeout", "attempts"),
    }  # fmt: skip


def _fail_in_a_child(job: aiqueue.Job[Part]) -> None:
    if job.message.number:
        time.sleep(60)
    raise ValueError("no")


async def test_an_active_span_is_the_parent_and_one_that_is_not_sampled_samples_nothing(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    from opentelemetry import trace  # noqa: PLC0415
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags  # noqa: PLC0415

    seen: list[Any] = []

    async def page(job: aiqueue.Job[Page]) -> None:
        seen.append(job.headers.get("traceparent"))
        if job.message.number == 0:
            await traced.enqueue(Page(number=1), tenant="acme")  # in a handler whose trace is not sampled

    async with recorder.connect(account) as traced, make_worker(page).running(traced):
        with recorder.tracer.start_as_current_span("request"):
            await traced.enqueue(Page(number=2), tenant="acme")
        await recorder.ended(4)
        assert recorder.tree() == [
            "request INTERNAL",
            "  send ai.agent.tasks PRODUCER",
            "    process ai.agent.tasks CONSUMER",
            "      agent.task.execute INTERNAL",
        ]
        outer = SpanContext(TRACE_ID, PARENT_ID, is_remote=False, trace_flags=TraceFlags(0))
        with trace.use_span(NonRecordingSpan(outer)):
            await traced.enqueue(Page(number=0), tenant="acme")
        await eventually(lambda: len(seen) == 3)
        await asyncio.sleep(0)
    assert seen[1:] == [UNSAMPLED, UNSAMPLED]
    assert len(recorder.spans) == 4


@pytest.mark.parametrize("name", ["traceparent", "Traceparent"])
async def test_a_plain_publisher_s_trace_continues_with_its_state(
    client: aiqueue.Client, account: Account, plain: Any, recorder: Recorder, name: str
) -> None:
    found: list[Any] = []

    async def page(job: aiqueue.Job[Page]) -> None:
        if job.message.number == 0:
            await traced.enqueue(Page(number=1), tenant="acme")
        else:
            found.append((job.headers["traceparent"], job.headers["tracestate"]))

    async with recorder.connect(account, trace_ratio=0) as traced, make_worker(page).running(traced):
        body = b'{"message_type": "page", "data": {"number": 0}, "schema_version": "1.0"}'
        for sent in ({name: SAMPLED, "tracestate": "theirs=7"}, {name: UNSAMPLED}, {name: "00-1-2-01"}, {}):
            await plain.jetstream().publish("ai.agent.tasks.acme", body, headers=sent or None)
        await eventually(lambda: traced is not None and len(recorder.spans) >= 5)
        await recorder.ended(5)
    first = recorder.spans[0]
    assert first.parent is not None
    assert (first.parent.trace_id, first.parent.span_id, first.parent.is_remote) == (TRACE_ID, PARENT_ID, True)
    assert trace_ids(recorder) == {TRACE_ID}
    assert [state for parent, state in found if parent.startswith(SAMPLED[:35])] == ["theirs=7"]


async def test_a_job_without_a_trace_begins_one_by_its_id_and_all_its_attempts_are_of_it(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    async def page(job: aiqueue.Job[Page]) -> None:
        if job.attempt == 1:
            raise ValueError("not yet")

    worker = make_worker(page, retry=aiqueue.Backoff(first="10ms", attempts=3))
    await client.enqueue(Page(), tenant="acme")  # by a client that is not traced
    async with recorder.connect(account, trace_ratio=1) as traced, worker.running(traced):
        await recorder.ended(4)
    assert recorder.names == ["process ai.agent.tasks", "agent.task.execute"] * 2
    assert len(trace_ids(recorder)) == 1
    assert recorder.spans[0].parent is recorder.spans[2].parent is None


async def test_client_and_worker_choose_the_same_jobs(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    done: list[str] = []

    async def page(job: aiqueue.Job[Page]) -> None:
        done.append(job.id)

    async with recorder.connect(account, trace_ratio=0.2) as traced, make_worker(page).running(traced):
        ids = [f"job-{number}" for number in range(60)]
        for job_id in ids[:30]:
            await traced.enqueue(Page(), tenant="acme", unique=job_id)
        async for outcome in traced.enqueue_many([JobSpec(Page(), unique=each) for each in ids[30:]], tenant="acme"):
            assert isinstance(outcome, aiqueue.Handle)
        await eventually(lambda: len(done) == 60)
        chosen = {each for each in ids if traced.tracing is not None and traced.tracing.begins_trace(each)}
        await recorder.ended(3 * len(chosen))
    assert 2 < len(chosen) < 30
    roots = [each for each in recorder.spans if each.parent is None]
    assert {each.name for each in roots} == {"send ai.agent.tasks", "create ai.agent.tasks"}
    assert {(each.attributes or {})["messaging.message.id"] for each in roots} == chosen


async def test_many_jobs_that_continue_a_trace_have_one_span_of_their_call(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    async def page(job: aiqueue.Job[Page]) -> None: ...

    async with recorder.connect(account) as traced:
        with recorder.tracer.start_as_current_span("request"):
            async for _ in traced.enqueue_many([Page(number=each) for each in range(5)], tenant="acme"):
                pass
        async with make_worker(page).running(traced):
            await recorder.ended(12)
    sent = recorder.attributes("send ai.agent.tasks")
    assert (sent["messaging.batch.message_count"], sent["aiqueue.tenant"]) == (5, "acme")
    assert recorder.tree()[:2] == ["request INTERNAL", "  send ai.agent.tasks PRODUCER"]
    assert recorder.tree().count("    process ai.agent.tasks CONSUMER") == 5


async def test_the_caller_s_own_header_stays(client: aiqueue.Client, account: Account, recorder: Recorder) -> None:
    async def page(job: aiqueue.Job[Page]) -> str:
        return job.headers["traceparent"]

    async with recorder.connect(account) as traced, make_worker(page).running(traced):
        handle = await traced.enqueue(Page(), tenant="acme", headers={"traceparent": SAMPLED})
        assert await handle.result(timeout=20) == SAMPLED
        await recorder.ended(2)
    assert recorder.names == ["process ai.agent.tasks", "agent.task.execute"]
    assert trace_ids(recorder) == {TRACE_ID}


async def test_a_replay_of_a_dead_letter_continues_the_trace(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    tries: list[int] = []

    async def page(job: aiqueue.Job[Page]) -> None:
        tries.append(job.attempt)
        if len(tries) == 1:
            raise aiqueue.Reject("of no use")

    async with recorder.connect(account) as traced, make_worker(page).running(traced):
        await traced.enqueue(Page(), tenant="acme")
        await recorder.ended(3)
        async for letter in traced.dead.find():
            await traced.dead.replay(letter)
        await recorder.ended(5)
    assert len(trace_ids(recorder)) == 1


async def test_a_provider_that_fails_fails_no_job(
    client: aiqueue.Client, account: Account, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    from opentelemetry.sdk.trace import SpanProcessor  # noqa: PLC0415

    class Broken(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            if span.name != "send ai.agent.tasks":
                raise RuntimeError("a broken processor")

        def on_end(self, span: Any) -> None:
            raise RuntimeError("a broken exporter")

    async def page(job: aiqueue.Job[Page]) -> str:
        await job.step("one", asyncio.sleep, 0)
        return "done"

    recorder.provider.add_span_processor(Broken())
    async with recorder.connect(account) as traced, make_worker(page).running(traced):
        handle = await traced.enqueue(Page(), tenant="acme")
        assert await handle.result(timeout=20) == "done"
    assert sum("provider of tracers" in each.getMessage() for each in caplog.records) == 1


async def test_nothing_is_traced_without_a_provider_and_no_import_of_opentelemetry_is_needed() -> None:
    program = "import sys, aiqueue, aiqueue.gateway, aiqueue.agent; print([m for m in sys.modules if 'opentel' in m])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


async def test_a_client_is_not_traced_unless_the_program_has_a_provider(account: Account, recorder: Recorder) -> None:
    options = {"user": account.user, "password": account.password}
    async with aiqueue.connect(account.url, **options) as client:  # type: ignore[arg-type]
        assert client.tracing is None
    async with recorder.connect(account, traces="off") as client:
        assert client.tracing is None
    async with recorder.connect(account) as client:
        assert client.tracing is not None


async def test_a_retry_that_keeps_no_result_names_its_job_and_its_attempt(
    client: aiqueue.Client, account: Account, recorder: Recorder
) -> None:
    async def page(job: aiqueue.Job[Page]) -> None:
        if job.attempt == 1:
            raise ValueError("not yet")

    worker = make_worker(page, result=False, retry=aiqueue.Backoff(first="10ms", attempts=3))
    async with recorder.connect(account) as traced, worker.running(traced):
        await traced.enqueue(Page(), tenant="acme", unique="p-1")
        await recorder.ended(5)
    processed = [dict(each.attributes or {}) for each in recorder.spans if each.name.startswith("process")]
    assert [(each["messaging.message.id"], each["aiqueue.attempt"], each["aiqueue.outcome"]) for each in processed] == [
        ("p-1", 1, "retry"),
        ("p-1", 2, "done"),
    ]
