"""`perform`: what it tells a test, and what it says of wrong use. That it agrees with a worker: test_perform_agrees."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue import Backoff, Retry, testing
from aiqueue.errors import BadInput, ChildFailed, EncodeError, Stale, UnknownFamily


class Summary(aiqueue.Message, kind="summary"):
    words: int


class Summarise(aiqueue.Message[Summary], kind="summarise"):
    text: str = "x"
    document: aiqueue.Document | None = None


class Plain(aiqueue.Message, kind="plain"):
    pass


class Other(aiqueue.Message, kind="other", family="gateway.requests"):
    pass


worker = aiqueue.Worker()


@worker.handle(Summarise, retry=Backoff(attempts=3, first=9, jitter=0.5))
async def summarise(job: aiqueue.Job[Summarise]) -> Any:
    match job.message.text:
        case "busy":
            raise Retry("busy", after=9)
        case "bad":
            await job.chunk("a")
            raise ValueError("bad")
        case "state":
            return {"words": job.state}
        case "wrong":
            return {"words": "many"}
        case "sleep":
            await asyncio.sleep(60)
        case "read":
            assert job.message.document is not None
            return {"words": len(await job.open(job.message.document).read())}
        case "leave behind":
            left.append(job)
            return {"words": 0}
        case "gather":
            return {"words": len(await job.gather([("a", Plain()), ("b", Plain())]))}
    return Summary(words=1)


@worker.handle(Plain, timeout=None)
def plain(job: aiqueue.Job[Plain]) -> str:
    until = time.monotonic() + 10
    while not job.cancelled and time.monotonic() < until:
        time.sleep(0.005)
    stopped.append(job.cancelled)
    return "stopped"


left: list[Any] = []
stopped: list[bool] = []


async def test_a_retry_says_when_and_why_and_a_result_is_of_its_type() -> None:
    done = await testing.perform(worker, Summarise(text="busy"), attempt=2)
    assert (done.outcome, done.attempt, done.after_s, done.error) == ("retry", 2, 9, "busy")
    done = await testing.perform(worker, Summarise(text="bad"), attempt=2)
    assert (done.after_min_s, done.after_s) == (9, 18)
    assert done.chunks == ("a",)
    assert isinstance(done.exception, ValueError)
    assert repr(done) == "<Performed summarise: retry in 18 s on attempt 2: ValueError: bad>"
    assert (await testing.perform(worker, Summarise())).result == Summary(words=1)
    assert (await testing.perform(worker, Summarise(text="state"), state=7)).result.words == 7


async def test_the_result_of_a_job_that_is_not_done_is_an_error_with_the_handlers_own() -> None:
    done = await testing.perform(worker, Summarise(text="bad"), attempt=3)
    with pytest.raises(
        AssertionError, match=r"has no result: failed \(attempts\) on attempt 3: ValueError: bad"
    ) as told:
        _ = done.result
    assert told.value.__cause__ is done.exception
    done = await testing.perform(worker, Summarise(text="wrong"))
    assert done.outcome == "done"
    with pytest.raises(aiqueue.errors.ResultInvalid, match="words: Input should be a valid integer"):
        _ = done.result


async def test_a_timeout_and_a_cancellation_end_the_handler() -> None:
    done = await testing.perform(worker, Summarise(text="sleep"), timeout="20ms")
    assert (done.outcome, done.error) == ("retry", "timed out after 0.02 s")
    done = await testing.perform(worker, Summarise(text="sleep"), cancel_after=0.02)
    assert done.outcome == "cancelled"
    done = await testing.perform(worker, Plain(), cancel_after=0.02)
    assert done.outcome == "cancelled"
    for _ in range(200):
        if stopped:
            break
        await asyncio.sleep(0.01)
    assert stopped == [True]


async def test_a_test_that_is_cancelled_meanwhile_ends_and_so_does_the_handler() -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await testing.perform(worker, Summarise(text="sleep"))
    assert len(asyncio.all_tasks()) == 1


async def test_documents_are_read_and_a_missing_one_says_how_to_pass_it() -> None:
    document = testing.document(b"bytes")
    message = Summarise(text="read", document=document)
    assert (await testing.perform(worker, message, documents={document: b"bytes"})).result.words == 5
    done = await testing.perform(worker, message)
    assert done.error.startswith("NotFound: document test/")
    assert "documents={document: data}" in done.error
    done = await testing.perform(worker, message, documents={document: b"others"}, tenant="test")
    assert done.error.startswith("Corrupt: ")


async def test_a_job_waits_for_children_without_an_outcome_and_goes_on_with_theirs() -> None:
    message = Summarise(text="gather")
    done = await testing.perform(worker, message, children={"a": 1})
    assert done.outcome == "waiting"
    assert [(each.name, each.message(Plain)) for each in done.children] == [("a", Plain()), ("b", Plain())]
    assert (await testing.perform(worker, message, children={"a": 1, "b": None})).result.words == 2
    failed = ChildFailed("id", name="b", reason="rejected", error="no", attempt=1)
    done = await testing.perform(worker, message, children={"a": 1, "b": failed})
    assert "ChildFailed: child 'b'" in done.error


async def test_what_the_handler_leaves_behind_can_write_nothing_more() -> None:
    await testing.perform(worker, Summarise(text="leave behind"))
    with pytest.raises(Stale):
        await left[0].chunk("late")
    assert left[0].cancelled


async def test_families_are_those_of_the_directory_or_of_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: Path
) -> None:
    class Small(aiqueue.Message, kind="small", family="small.jobs"):
        pass

    small = aiqueue.Worker()
    small.handle(Small)(lambda job: job.family)
    with pytest.raises(UnknownFamily, match=r"small\.jobs"):
        await testing.perform(small, Small())
    settings = aiqueue.Settings(streams=streams)
    assert (await testing.perform(small, Small(), settings=settings)).result == "small.jobs"
    (tmp_path / "aiqueue.toml").write_text('streams = "streams"\n')
    monkeypatch.chdir(tmp_path)
    assert (await testing.perform(small, Small())).result == "small.jobs"
    monkeypatch.setenv("AIQUEUE_OVERLAY", '"small.jobs".family.priorities = ["normal", "low"]')
    with pytest.raises(BadInput, match="has no priority 'high': use one of normal, low"):
        await testing.perform(small, Small(), priority="high")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown argument": ({"attemp": 2}, "has no argument 'attemp' for a worker: it has attempt, state, documents"),
    "no worker": ({"worker": 3}, "testing.perform needs a Worker, not int"),
    "no message": ({"message": "text"}, "a message is an instance of your own subclass"),
    "a class": ({"message": Plain}, "pass an instance, such as Plain"),
    "another family": ({"message": Other()}, "this worker takes no jobs of gateway.requests, the family of Other"),
    "an attempt": ({"attempt": 0}, "attempt must be a whole number from 1"),
    "a priority": ({"priority": "urgent"}, "has no priority 'urgent'"),
    "a tenant": ({"tenant": "a b"}, "tenant 'a b'"),
    "a header": ({"headers": {"Nats-Msg-Id": "1"}}, "header 'Nats-Msg-Id' is reserved"),
    "a value of a header": ({"headers": {"x": "ü"}}, "invalid value of header 'x'"),
    "a timeout": ({"timeout": "soon"}, "timeout"),
    "no timeout": ({"timeout": 0}, "timeout must be above 0"),
    "documents": ({"documents": {"a": b""}}, "documents must map documents to their bytes"),
    "steps": ({"steps": ["a"]}, "steps must be a mapping"),
    "a step": ({"steps": {"a": object()}}, "cannot be encoded"),
    "settings": ({"settings": {}}, "settings must be aiqueue.Settings, not dict"),
    "a deadline": ({"deadline": "never"}, "deadline"),
    "a unique key": ({"unique": ""}, "unique key '' must be a text"),
}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_use_says_in_one_line_what_to_do(name: str) -> None:
    options, problem = WRONG[name]
    given = {"worker": worker, "message": Summarise()} | options
    with pytest.raises(BadInput) as told:
        await testing.perform(given.pop("worker"), given.pop("message"), **given)
    assert problem in str(told.value)
    assert "\n" not in str(told.value)


async def test_a_message_that_cannot_be_enqueued_is_refused_as_there() -> None:
    class Odd(aiqueue.Message, kind="odd"):
        value: Any

    odd = aiqueue.Worker()
    odd.handle(Odd)(lambda job: None)
    with pytest.raises(EncodeError):
        await testing.perform(odd, Odd(value=object()))
    with pytest.raises(BadInput, match="this worker has no handlers"):
        await testing.perform(aiqueue.Worker(), Plain())
    with pytest.raises(BadInput, match=r"testing\.document needs bytes, not str"):
        testing.document("text")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="takes no jobs of tenant 'x': it takes those of acme"):
        await testing.perform(_of_tenant(), Plain(), tenant="x")


def _of_tenant() -> aiqueue.Worker:
    narrow = aiqueue.Worker(tenants=["acme"])
    narrow.handle(Plain)(lambda job: job.tenant)
    return narrow


async def test_a_worker_of_some_tenants_gets_the_first_of_them() -> None:
    assert (await testing.perform(_of_tenant(), Plain())).result == "acme"


async def test_what_is_around_a_handler_is_entered_as_in_a_worker_and_what_it_suppresses_is_an_error() -> None:
    seen: list[str] = []
    around = aiqueue.Worker()

    @around.around
    @contextlib.asynccontextmanager
    async def asynchronous(job: aiqueue.Job) -> AsyncIterator[None]:
        seen.append("async")
        yield

    @around.around
    @contextlib.contextmanager
    def plain(job: aiqueue.Job) -> Iterator[None]:
        seen.append("plain")
        with contextlib.suppress(ValueError):
            yield

    @around.handle(Summarise)
    def summarise_in_thread(job: aiqueue.Job[Summarise]) -> Summary:
        if job.message.text == "bad":
            raise ValueError("bad")
        return Summary(words=1)

    done = await testing.perform(around, Summarise())
    failed = await testing.perform(around, Summarise(text="bad"))
    assert (done.outcome, failed.outcome) == ("done", "retry")
    assert "plain suppressed the handler's ValueError: bad" in str(failed.error)
    assert seen == ["async", "plain"] * 2
