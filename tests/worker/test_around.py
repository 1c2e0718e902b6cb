"""Context managers around the runs of handlers: on the event loop, in threads, and in child processes."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import aiqueue
from aiqueue.errors import BadInput, JobCancelled, JobFailed

from ..support import eventually
from . import arounding
from .arounding import Do
from .plain_jobs import ONCE, letters

pytestmark = pytest.mark.families("agent.tasks")
SOON = aiqueue.Backoff(attempts=2, first=0.02, jitter=0)
WAYS = pytest.mark.parametrize(
    ("handler", "process"),
    [(arounding.do_async, False), (arounding.do_plain, False), (arounding.do_async, True), (arounding.do_plain, True)],
    ids=["async", "thread", "async in a process", "plain in a process"],
)
HERE = pytest.mark.parametrize("handler", [arounding.do_async, arounding.do_plain], ids=["async", "thread"])
Handler = Callable[[aiqueue.Job[Any]], Any]


def worker_with(*arounds: Any, handler: Handler, process: bool = False, **options: Any) -> aiqueue.Worker:
    worker = aiqueue.Worker(processes=1)
    for each in arounds[:1]:
        worker.around(each)
    worker.handle(Do, process=process, **{"retry": ONCE, **options})(handler)
    for each in arounds[1:]:  # also those that are declared behind a handler are around it
        worker.around(each)
    return worker


async def enqueue(client: aiqueue.Client, log: Path, what: str = "") -> aiqueue.Handle:
    return await client.enqueue(Do(what=what, log=log), tenant="acme")


async def error_of(handle: aiqueue.Handle) -> str:
    with pytest.raises(JobFailed) as failed:
        await handle.result(25)
    return failed.value.error


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").touch()
    return tmp_path / "log"


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines()


# -- where they run, and in which order


@WAYS
async def test_context_variables_reach_the_handler_and_plain_ones_are_entered_where_it_runs(
    client: aiqueue.Client, log: Path, handler: Handler, process: bool
) -> None:
    worker = worker_with(arounding.asynchronous, arounding.plain, handler=handler, process=process)
    async with worker.running(client):
        trail, where = await (await enqueue(client, log)).result(25)
    assert trail == ["async", "plain", where]
    assert (where == str(arounding.where())) == (handler is arounding.do_async and not process)
    assert lines(log) == ["async in", "plain in", "plain out", "async out"]


async def test_around_a_thread_the_async_ones_are_outside_of_the_plain_ones(client: aiqueue.Client, log: Path) -> None:
    in_this_order = arounding.plain, arounding.asynchronous
    async with worker_with(*in_this_order, handler=arounding.do_plain).running(client):
        await (await enqueue(client, log)).result(25)
    assert lines(log) == ["async in", "plain in", "plain out", "async out"]


async def test_what_one_job_sets_does_not_reach_the_next_one(client: aiqueue.Client, log: Path) -> None:
    seen = []

    @contextmanager
    def leaky(job: aiqueue.Job[Any]) -> Iterator[None]:
        seen.append(arounding.TRAIL.get())
        arounding.TRAIL.set((job.id,))
        yield

    worker = worker_with(leaky, handler=arounding.do_async)
    worker.concurrency = 1
    async with worker.running(client):
        for handle in [await enqueue(client, log) for _ in range(3)]:
            await handle.result(25)
    assert seen == [(), (), ()]


async def test_one_may_be_a_class_a_method_or_a_partial(client: aiqueue.Client, log: Path) -> None:
    seen = []

    class Timed:
        def __init__(self, job: aiqueue.Job[Any]) -> None:
            self.job = job

        def __enter__(self) -> None:
            seen.append("class")

        def __exit__(self, *_: object) -> None: ...

    class Owner:
        @contextmanager
        def method(self, job: aiqueue.Job[Any]) -> Iterator[None]:
            seen.append("method")
            yield

    @asynccontextmanager
    async def named(job: aiqueue.Job[Any], *, name: str) -> AsyncIterator[None]:
        seen.append(name)
        yield

    arounds = Timed, Owner().method, functools.partial(named, name="partial")
    async with worker_with(*arounds, handler=arounding.do_async).running(client):
        await (await enqueue(client, log)).result(25)
    assert seen == ["class", "method", "partial"]


# -- errors


@WAYS
async def test_an_exception_of_the_handler_comes_out_at_each_yield(
    client: aiqueue.Client, log: Path, handler: Handler, process: bool
) -> None:
    worker = worker_with(arounding.asynchronous, arounding.plain, handler=handler, process=process)
    async with worker.running(client):
        assert await error_of(await enqueue(client, log, "raise")) == "ValueError: broken"
    assert lines(log) == ["async in", "plain in", "plain saw ValueError", "async saw ValueError"]
    (letter,) = await letters(client)
    assert 'raise ValueError("broken")' in letter.history[-1]["traceback"]


@WAYS
@pytest.mark.parametrize("around", [arounding.suppressing_async, arounding.suppressing_plain], ids=["async", "plain"])
async def test_one_that_suppresses_an_exception_fails_the_job_and_the_error_says_so(
    client: aiqueue.Client, log: Path, handler: Handler, process: bool, around: Any
) -> None:
    async with worker_with(around, handler=handler, process=process).running(client):
        error = await error_of(await enqueue(client, log, "raise"))
    assert error == (
        f"RuntimeError: around {around.__name__} suppressed the handler's ValueError: broken (it must re-raise it, or "
        "raise another)"
    )
    assert lines(log) == ["suppressed"]
    (letter,) = await letters(client)
    assert letter.reason == "attempts"
    assert "ValueError: broken" in letter.history[-1]["traceback"]


@HERE
async def test_one_that_raises_before_its_yield_has_the_job_retried_as_for_the_handlers_own_error(
    client: aiqueue.Client, log: Path, handler: Handler
) -> None:
    calls = []

    @contextmanager
    def failing_once(job: aiqueue.Job[Any]) -> Iterator[None]:
        calls.append(job.attempt)
        if job.attempt == 1:
            raise OSError("no database")
        yield

    async with worker_with(arounding.asynchronous, failing_once, handler=handler, retry=SOON).running(client):
        await (await enqueue(client, log)).result(25)
    assert calls == [1, 2]
    assert lines(log) == ["async in", "async saw OSError", "async in", "async out"]


@HERE
async def test_what_one_raises_behind_its_yield_fails_the_attempt_of_a_handler_that_returned(
    client: aiqueue.Client, log: Path, handler: Handler
) -> None:
    @contextmanager
    def commit(job: aiqueue.Job[Any]) -> Iterator[None]:
        yield
        raise OSError("the commit failed")

    async with worker_with(commit, handler=handler, on={OSError: aiqueue.Reject}).running(client):
        assert await error_of(await enqueue(client, log)) == "OSError: the commit failed"
    (letter,) = await letters(client)
    assert letter.reason == "rejected"


@HERE
async def test_one_may_raise_another_exception_in_place_of_the_handlers(
    client: aiqueue.Client, log: Path, handler: Handler
) -> None:
    @asynccontextmanager
    async def translating(job: aiqueue.Job[Any]) -> AsyncIterator[None]:
        try:
            yield
        except ValueError as error:
            raise aiqueue.Reject("it will never do") from error

    async with worker_with(translating, handler=handler).running(client):
        assert await error_of(await enqueue(client, log, "raise")) == "it will never do (ValueError: broken)"
    (letter,) = await letters(client)
    assert letter.reason == "rejected"


@asynccontextmanager
async def never_async(job: aiqueue.Job[Any]) -> AsyncIterator[None]:
    if job.attempt > 100:
        yield


@contextmanager
def never_plain(job: aiqueue.Job[Any]) -> Iterator[None]:
    if job.attempt > 100:
        yield


@asynccontextmanager
async def twice_async(job: aiqueue.Job[Any]) -> AsyncIterator[None]:
    yield
    yield


@contextmanager
def twice_plain(job: aiqueue.Job[Any]) -> Iterator[None]:
    yield
    yield


@HERE
@pytest.mark.parametrize(
    ("around", "problem"),
    [
        (never_async, "generator didn't yield"),
        (never_plain, "generator didn't yield"),
        (twice_async, "generator didn't stop"),
        (twice_plain, "generator didn't stop"),
    ],
)
async def test_one_that_does_not_yield_once_fails_the_job_by_its_name(
    client: aiqueue.Client, log: Path, handler: Handler, around: Any, problem: str
) -> None:
    async with worker_with(around, handler=handler).running(client):
        error = await error_of(await enqueue(client, log))
    assert error == f"RuntimeError: around {around.__name__} must yield once: {problem}"


async def test_a_coroutine_that_a_plain_function_returns_is_awaited_within_async_ones_and_refused_within_plain_ones(
    client: aiqueue.Client, log: Path
) -> None:
    def decorated(job: aiqueue.Job[Do]) -> Any:  # as by a decorator that knows nothing of async functions
        return arounding.do_async(job)

    async with worker_with(arounding.asynchronous, handler=decorated).running(client):
        trail, _ = await (await enqueue(client, log)).result(25)
    assert trail == ["async"]
    async with worker_with(arounding.plain, handler=decorated).running(client):
        error = await error_of(await enqueue(client, log))
    assert error == (
        "TypeError: the handler returned a coroutine, which no plain `around` can be around: make it async"
    )
    assert lines(log)[2:] == ["plain in", "plain saw TypeError"]


# -- attempts that are stopped


async def test_a_timeout_comes_out_at_the_yield_of_an_async_handler(client: aiqueue.Client, log: Path) -> None:
    arounds = arounding.asynchronous, arounding.plain
    async with worker_with(*arounds, handler=arounding.do_async, timeout="50ms").running(client):
        assert await error_of(await enqueue(client, log, "hang")) == "timed out after 0.05 s"
    assert lines(log)[3:] == ["plain saw CancelledError", "async saw CancelledError"]


async def test_a_function_that_returns_in_its_thread_after_its_timeout_is_seen_as_failed(
    client: aiqueue.Client, log: Path
) -> None:
    """A session would commit otherwise what the next attempt does again."""
    arounds = arounding.asynchronous, arounding.plain
    async with worker_with(*arounds, handler=arounding.do_plain, timeout="50ms").running(client):
        assert await error_of(await enqueue(client, log, "hang")) == "timed out after 0.05 s"
        await eventually(lambda: len(lines(log)) == 5)
    assert set(lines(log)[3:]) == {"plain saw Stale", "async saw CancelledError"}


@pytest.mark.parametrize("arounds", [(), (arounding.suppressing_async,)], ids=["", "suppressed"])
async def test_a_cancelled_job_is_cancelled_whatever_one_makes_of_its_exception(
    client: aiqueue.Client, log: Path, arounds: tuple[Any, ...]
) -> None:
    async with worker_with(*arounds, arounding.asynchronous, handler=arounding.do_async).running(client):
        handle = await enqueue(client, log, "hang")
        await eventually(lambda: "hangs" in lines(log))
        assert await handle.cancel()
        with pytest.raises(JobCancelled):
            await handle.result(25)
        await eventually(lambda: "async saw CancelledError" in lines(log))
    assert await letters(client) == []


async def test_a_job_whose_worker_leaves_returns_to_the_queue_also_if_one_suppresses_that(
    client: aiqueue.Client, log: Path
) -> None:
    worker = worker_with(arounding.suppressing_async, handler=arounding.do_async)
    worker.drain_timeout_s = 0.0
    async with worker.running(client):
        handle = await enqueue(client, log, "hang")
        await eventually(lambda: "hangs" in lines(log))
    assert lines(log) == ["hangs", "suppressed"]

    async def attempt(job: aiqueue.Job[Any]) -> int:
        return job.attempt

    async with worker_with(handler=attempt).running(client):
        assert await handle.result(25) == 1


async def test_a_job_that_waits_for_its_children_leaves_by_an_exception_and_runs_again(
    client: aiqueue.Client, log: Path
) -> None:
    class Parent(aiqueue.Message, kind="parent"):
        log: Path

    worker = worker_with(arounding.asynchronous, handler=arounding.do_async)

    @worker.handle(Parent)
    async def parent(job: aiqueue.Job[Parent]) -> list[Any]:
        return await job.gather([("child", Do(log=job.message.log))])

    async with worker.running(client):
        ((trail, _),) = await (await client.enqueue(Parent(log=log), tenant="acme")).result(25)
    assert trail == ["async"]
    assert lines(log).count("async saw WaitsForChildren") >= 1
    assert lines(log)[-1] == "async out"


# -- declarations


async def coroutine_function(job: aiqueue.Job[Any]) -> None: ...


def generator_function(job: aiqueue.Job[Any]) -> Iterator[None]:
    yield


async def async_generator_function(job: aiqueue.Job[Any]) -> AsyncIterator[None]:
    yield


@contextmanager
def without_argument() -> Iterator[None]:
    yield


class Both:
    def __init__(self, job: aiqueue.Job[Any]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    async def __aenter__(self) -> None: ...
    async def __aexit__(self, *_: object) -> None: ...


NEEDS = "around needs a function with @contextmanager or @asynccontextmanager above it"


@pytest.mark.parametrize("declared", [aiqueue.Worker(), aiqueue.Agent("ada", tenant="acme")], ids=["worker", "agent"])
@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (None, f"{NEEDS}, not None"),
        ("session", f"{NEEDS}, not 'session'"),
        (5, f"{NEEDS}, not 5"),
        (coroutine_function, f"{NEEDS}, and one `yield` in it, where the handler runs: coroutine_function has none"),
        (generator_function, "around: generator_function is no context manager yet: put @contextmanager above it"),
        (
            async_generator_function,
            "around: async_generator_function is no context manager yet: put @asynccontextmanager above it",
        ),
        (without_argument, "around: without_argument must take one argument, the "),
        (Both, f"around: Both is both a plain and an async context manager: {NEEDS}"),
        (dict, f"around: dict is no context manager: {NEEDS}"),
        (without_argument(), f"{NEEDS}, and one `yield` in it, where the handler runs: "),
    ],
    ids=[
        "nothing", "a text", "a number", "async", "a generator", "an async generator", "no argument", "both",
        "a class", "a context manager",
    ],
)  # fmt: skip
def test_what_cannot_be_around_a_handler_is_refused_in_one_line(declared: Any, wrong: Any, problem: str) -> None:
    with pytest.raises(BadInput) as refused:
        declared.around(wrong)
    assert str(refused.value).startswith(problem)
    assert "\n" not in str(refused.value)


async def test_one_that_a_child_process_cannot_find_is_refused_when_the_worker_starts(client: aiqueue.Client) -> None:
    @contextmanager
    def closure(job: aiqueue.Job[Any]) -> Iterator[None]:
        yield

    worker = worker_with(closure, handler=arounding.do_plain, process=True)
    with pytest.raises(BadInput, match=r"the around tests\.worker\.test_around\..*closure is not found under its name"):
        async with worker.running(client):
            pass


async def test_a_child_process_finds_one_without_a_name_through_a_worker_that_is_a_global(
    client: aiqueue.Client, log: Path
) -> None:
    async with arounding.worker.running(client):
        trail, _ = await (await enqueue(client, log)).result(25)
    assert trail == ["closure"]
